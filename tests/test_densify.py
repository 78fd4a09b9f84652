"""Weights that were computed in the graph, as ordinary ones again."""

from __future__ import annotations

import pytest
import torch
from surgery_plugins.densify import Densify
from surgery_plugins.prune_weights import PruneWeights
from torch import Tensor, nn

from surgery import Context, capture, layers
from surgery.captured import CapturedModel


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.twice, self.head = nn.Conv2d(3, 4, 3, bias=False), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.conv(x).mean((2, 3)))))


@pytest.fixture
def pruned() -> CapturedModel:
    model = capture(Twice(), torch.randn(2, 3, 6, 6))
    return PruneWeights(sparsity=0.6)(model, Context(model))[0]


def test_values_and_names_stay_and_zeros_can_be_trained_again(pruned):
    model, report = Densify()(pruned, Context(pruned))
    assert [edit.layer for edit in report.edits] == ["conv", "twice", "head"]
    assert report.edits[0].what == "its weight is no longer computed from conv.weight"
    before = pruned.state_dict()
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {layer.type for layer in layers(model)} == {"Conv2d", "Linear"}
    assert not any(layer.computed or layer.functional for layer in layers(model))
    zero = model.get_parameter("head.weight") == 0
    model(torch.randn(8, 3, 6, 6)).square().sum().backward()
    assert bool((model.get_parameter("head.weight").grad[zero] != 0).all())


def test_ordinary_weights_and_those_not_selected_stay_as_they_are(pruned):
    model, report = Densify(select=("conv",))(pruned, Context(pruned))
    assert [edit.layer for edit in report.edits] == ["conv"]
    assert [layer.name for layer in layers(model) if layer.computed] == ["twice", "head"]
    plain = capture(Twice(), torch.randn(2, 3, 6, 6))
    assert not Densify()(plain, Context(plain))[1].edits
