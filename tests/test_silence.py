"""What a recipe names is told of, and what it names in vain is told before the first pass."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import surgery
from surgery import Context, Data, Pass, PassReport, RecipeError, Registry
from surgery.captured import capture


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(20, 16), nn.LayerNorm(16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, tokens):
        return self.second(torch.relu(self.first(self.norm(self.embed(tokens)))).mean(1))


TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(scope="module")
def text():
    return capture(Text(), TOKENS)


def told(step, model):
    _, report = step(model, Context(model, Data(calibration=[TOKENS, TOKENS + 5])))
    return {entry.layer for entry in (*report.edits, *report.skips)}, report


PASSES = sorted(set(Registry.load().passes) - {"prune_filters"})


@pytest.mark.parametrize("name", PASSES)
def test_every_layer_that_select_names_has_an_edit_or_a_skip(text, name):
    step = Registry.load().find_pass(name)(select=("Embedding", "norm", "first"))
    layers, _ = told(step, text)
    assert layers == {"embed", "norm", "first"}


def test_the_skip_says_which_pass_and_which_kind_of_layer(text):
    _, report = told(Registry.load().find_pass("kmeans")(select=("Embedding",)), text)
    assert [(skip.layer, skip.why) for skip in report.skips] == [
        ("embed", "kmeans finds nothing to change in it (Embedding)")
    ]


def test_a_pass_that_says_nothing_is_spoken_for(text):
    @dataclass(frozen=True, kw_only=True)
    class Idle(Pass):
        """Does nothing."""

        def apply(self, model, context):
            return PassReport()

    assert told(Idle(select=("Linear",)), text)[0] == {"first", "second"}
    assert told(Idle(select=("Linear",), exclude=("second",)), text)[0] == {"first"}
    assert told(Idle(), text)[0] == set()


@pytest.mark.parametrize(
    ("late", "problem"),
    [
        ({"kmeans": {"exclude": ["frist"]}}, r"exclude: 'frist' matches no layer \(did you mean first"),
        ({"prune_filters": {"overrides": {"frist": 0.5}}}, "overrides: 'frist' matches no layer"),
        ({"finetune": {"select": ["embedding.*"]}}, r"select: 'embedding\.\*' matches no layer"),
    ],
)
def test_a_pattern_that_can_match_nothing_is_told_before_the_first_pass(late, problem):
    seen = []
    recipe = {"name": "late", "passes": ["fold_batchnorm", late]}
    with pytest.raises(RecipeError, match=problem) as caught:
        surgery.operate(Text(), TOKENS, recipe, data=[TOKENS], progress=lambda what, *_: seen.append(what))
    assert "step 2 of 2" in caught.value.at
    assert seen == ["capture"]


def test_a_pattern_on_what_an_earlier_pass_makes_is_left_to_its_step():
    passes = [{"svd": {"select": ["first"], "rank": 4}}, {"kmeans": {"select": ["first.*"], "bits": 2}}]
    operation = surgery.operate(Text(), TOKENS, {"name": "both", "passes": passes}, data=[TOKENS], latency_rounds=0)
    assert {edit.layer.partition(".")[0] for edit in operation.reports[1].edits} == {"first"}
