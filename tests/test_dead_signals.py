"""Layers whose outputs do not vary with the data, hardly do, or are none at all: every pass gives a result, and finite
numbers."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
from torch import nn

from surgery import Context, Data, Registry, capture
from surgery.calibration import Moments

PASSES = {
    "prune_filters": {"ratio": 0.3},
    "tucker": {"macs": 0.5},
    "svd": {},
    "depthwise_separable": {},
    "prune_weights": {},
    "hashed": {},
    "kmeans": {"bits": 2},
    "quantize": {},
}


class Net(nn.Module):
    """Three convolutions and two heads; `last` reads what the first one gives."""

    def __init__(self, outputs: int = 5):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU())
        self.after, self.head = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 8)
        self.last = nn.Linear(8, outputs)

    def forward(self, x):
        y = self.head(self.after(self.body(x)).relu().mean((2, 3)))
        return torch.cat([y, self.last(y)], 1)


def constant(net):
    """What comes out of the second convolution is below zero on any data."""
    net.body[2].bias.data.fill_(-100)


def nearly_constant(net):
    """… varies by less than float32 can tell beside its size."""
    net.body[2].weight.data.mul_(1e-9)
    net.body[2].bias.data.fill_(1)


def denormal(net):
    net.body[2].weight.data.fill_(1e-42)
    net.body[2].bias.data.zero_()


@cache
def captured(change, outputs=5):
    torch.manual_seed(0)
    net = Net(outputs).eval()
    change(net)
    return capture(net, torch.randn(2, 3, 6, 6))


def edited(name, model):
    step = Registry.load().passes[name](**PASSES[name])
    return step(model, Context(model, Data([torch.randn(8, 3, 6, 6) for _ in range(2)])))


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("change", [constant, nearly_constant, denormal])
def test_every_pass_gives_a_result_where_outputs_do_not_vary(name, change):
    model, report = edited(name, captured(change))
    assert report.edits
    assert all(math.isfinite(value) for edit in report.edits for value in edit.numbers.values())
    assert bool(model(torch.randn(2, 3, 6, 6)).isfinite().all())


@pytest.mark.parametrize("name", ["prune_filters", "svd", "prune_weights", "hashed", "kmeans", "quantize"])
def test_a_layer_without_outputs_is_left_with_a_reason_and_the_others_are_treated(name):
    model, report = edited(name, captured(lambda net: None, outputs=0))
    assert {skip.layer for skip in report.skips} >= {"last"}
    assert {edit.layer for edit in report.edits} & {"head", "body.0", "body.2"}
    assert model(torch.randn(2, 3, 6, 6)).shape == (2, 8)


def test_an_error_is_told_in_parts_of_rounding_where_the_target_does_not_vary():
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    moments = Moments(10, one, one, one.view(1, 1, 1))
    task = moments.regression(zero.view(1, 1, 1), one)  # y = 1, whatever x is
    assert task.error(zero.view(1, 1, 1), one) == 0
    assert task.error(zero.view(1, 1, 1), one + 1e-6) == pytest.approx(1, rel=0.1)
    assert math.isfinite(task.error(one.view(1, 1, 1), zero))
