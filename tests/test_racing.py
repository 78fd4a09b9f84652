"""Modules exported together and timed apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import InputError
from surgery.captured import capture
from surgery.export.runtime import runtime_session
from surgery.inputs import Inputs
from surgery.racing import _Together, export_each


class Two(nn.Module):
    """Two results, and it writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor]:
        x += shift
        return {"y": self.layer(x), "x": x}


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * shift.mean()
        return y


@pytest.mark.parametrize("order", [(Two, One), (One, Two), (One, One)])
def test_every_file_holds_its_contestant_alone(order: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    contestants = [kind().eval() for kind in order]
    x, shift = torch.randn(3, 4), torch.randn(3, 1)
    together = capture(_Together(contestants), Inputs((x, shift)))
    for number, (file, module) in enumerate(zip(export_each(together, tmp_path), contestants, strict=True)):
        found = runtime_session(file)(together.inputs)
        result = module(x.clone(), shift)
        expected = list(result.values()) if isinstance(result, dict) else [result]
        assert len(found) == len(expected)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)
        weights = {tensor.name for tensor in onnx.load(file).graph.initializer if "layer" in tensor.name}
        assert weights == {f"contestants.{number}.layer.weight", f"contestants.{number}.layer.bias"}


def test_named_arguments_are_those_of_the_contestants() -> None:
    found = surgery.onnx_latency(
        {"a": One(), "b": Two()}, {"shift": torch.ones(2, 1), "x": torch.randn(2, 4)}, rounds=2
    )
    assert found["a"].ratio == 1
    assert found["b"].seconds > 0


def test_no_contestants_are_refused() -> None:
    with pytest.raises(InputError):
        surgery.onnx_latency({}, torch.randn(1, 3))
