"""What the tests of prune_filters have in common."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from surgery_plugins.prune_filters import PruneFilters
from surgery_plugins.prune_filters.choosing import Choice, Start
from torch import nn

import surgery
from surgery import (
    Context,
    Criterion,
    Data,
    Registry,
    capture,
    find_channels,
    hookimpl,
)
from surgery.testing import NETWORKS, randomise
from surgery.testing.trial import description, first_difference, state_of

SOME = ("plain_cnn", "residual", "grouped_depthwise", "squeeze_excite", "zero_padded_shortcut", "conv_1d", "attention")
BUDGETS = {"macs": "macs", "parameters": "parameters", "bytes": "parameter_bytes"}


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return (self.shortcut(x) + self.body(x)).relu()


@cache
def captured(name):
    if name == "deep":
        blocks = [Block(a, b) for a, b in ((3, 32), (32, 32), (32, 48), (48, 48), (48, 64))]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
        return capture(randomise(model), torch.randn(2, 3, 8, 8))
    return NETWORKS[name].captured()


def context(name, *, data=False, **options):
    batches = NETWORKS["plain_cnn" if name == "deep" else name].calibration() if data else None
    return Context(captured(name), Data(batches), **options)


def pruned(name, *, data=False, registry=None, seed=0, **options):
    """The pruned network and the report."""
    step = PruneFilters(**options)
    return step(captured(name), context(name, data=data, registry=registry, seed=seed))


def sizes(model, **options):
    return [group.size for group in find_channels(model, **options).groups]


def widths(model):
    """Output channels by layer."""
    return {side.layer: len(side.ids) for side in find_channels(model).outputs}


def share(name, result, kind):
    before, after = (surgery.measure(m, captured(name).inputs) for m in (captured(name), result))
    return getattr(after, BUDGETS[kind]) / getattr(before, BUDGETS[kind])


def chosen(name, *, part=1.0, seed=0, criterion="l2", **options):
    """Marks per group."""
    found, own = find_channels(captured(name)), context(name, seed=seed)
    return Choice(PruneFilters(**options), found, own.criterion(criterion), own, Start.of(found), part).marks()


def registry_of(function, comparable=False):
    """A registry whose criterion `given` has the scores `function(found)`."""
    scores = {"scores": lambda self, found, context: function(found), "comparable": comparable, "__doc__": "Given."}
    cls = type("Given", (Criterion,), scores)

    class Plugin:
        @hookimpl
        def surgery_criteria(self):
            return [cls]

    return Registry([Plugin()])


def same(a, b):
    return first_difference(state_of(a), state_of(b)) is None and description(a) == description(b)


def assert_refused(error, message, name="residual", *, given=None, data=None, **options):
    """A clear error with a remedy; the model stays as it was, bit for bit."""
    model = captured(name)
    state, text = state_of(model), description(model)
    with pytest.raises(error, match=message) as caught:
        PruneFilters(**options)(model, Context(model, Data(data), registry=given))
    assert caught.value.fix
    assert caught.value.at or "prune_filters" in caught.value.problem or "criteri" in caught.value.problem
    assert first_difference(state_of(model), state) is None
    assert description(model) == text
