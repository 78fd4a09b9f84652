"""Operators that no one here chose: drawn from PyTorch's own database, each between two layers (`make operators`)."""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

import pytest
from operator_sweep import database, examined, name_of

pytest.importorskip("expecttest", reason="PyTorch's database of operators needs it")
PAGE = Path(__file__).parent.parent / "docs" / "operators.md"
KINDS = (
    "sin",
    "amax",
    "nn.functional.glu",
    "nn.functional.unfold",
    "cumsum",
    "roll",
    "max.binary",
    "nn.functional.mish",
)


@cache
def drawn(number: int) -> list:
    return random.Random(21).sample(database(), number)


@pytest.mark.parametrize("number", range(18))
def test_an_operator_that_chance_chose_is_pruned_right_or_left_alone_or_refused(number):
    row = examined(drawn(18)[number], onnx=number % 6 == 0)
    assert row.outcome in ("pruned", "unprunable", "refused", "out of scope"), row
    assert row.outcome == "pruned" or row.why


@pytest.mark.parametrize("name", KINDS)
def test_an_operator_of_every_kind_is_pruned(name):
    row = examined(next(op for op in database() if name_of(op) == name), onnx=False)
    assert row.outcome == "pruned", row


def test_the_page_counts_no_wrong_result_and_no_crash():
    counts = dict(re.findall(r"^\| (\w[\w ]*) \| (\d+) \|$", PAGE.read_text(), re.MULTILINE))
    assert (counts["wrong"], counts["crash"]) == ("0", "0")
    assert int(counts["pruned"]) >= 150
