"""Operators that have no channel rule: they are tried on random numbers, or make unprunable what they see."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_networks import Do
from removal import assert_removed_is_masked, deviation, found, net_between, reasons, sizes
from torch import nn

from surgery import ChannelRule, capture, find_channels
from surgery.channels.layers import convolution
from surgery.testing import randomise

SIDE = 4


def unpooled(m, x):
    """Down and up again, each maximum to its old place."""
    small, where = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(small * 2, where, 2)


def as_windows(m, x):
    """(b, 8, 4, 4) → (b, 8 · 4 places of a window, 4 windows)"""
    return F.unfold(x, 2, stride=2).unsqueeze(-1)


TRIED = {
    "adaptive maximum": (lambda m, x: F.adaptive_max_pool2d(x, 2), 8, 8, 8),
    "maxima and their places": (lambda m, x: torch.cat(F.max_pool2d(x, 2, return_indices=True), 1), 8, 16, 8),
    "maxima put back": (unpooled, 8, 8, 8),
    "least and largest": (lambda m, x: torch.cat([*torch.aminmax(x, dim=2, keepdim=True)], 1), 8, 16, 8),
    "gated linear unit": (lambda m, x: F.glu(x, 1), 8, 4, 4),
    "gated along pixels": (lambda m, x: F.glu(x, 3), 8, 8, 8),
    "windows of pixels": (as_windows, 8, 32, 8),
    "windows put back": (lambda m, x: F.fold(as_windows(m, x)[..., 0], (4, 4), 2, stride=2), 8, 8, 8),
    "pixel shuffle to two channels": (lambda m, x: F.pixel_shuffle(x, 2), 8, 2, 2),
    "pixel unshuffle": (lambda m, x: F.pixel_unshuffle(x, 2), 6, 24, 6),
    "sum along pixels so far": (lambda m, x: x.cumsum(2), 8, 8, 8),
    "sorted pixels": (lambda m, x: x.sort(3).values, 8, 8, 8),
    "middle of pixels": (lambda m, x: x.median(3, keepdim=True).values, 8, 8, 8),
    "reflected": (lambda m, x: F.pad(x, (1, 1, 2, 0), mode="reflect"), 8, 8, 8),
    "wrapped around": (lambda m, x: F.pad(x, (1, 1, 2, 0), mode="circular"), 8, 8, 8),
    "cosine similarity along pixels": (lambda m, x: F.normalize(x, dim=3), 8, 8, 8),
    "upper triangles": (lambda m, x: x.triu(), 8, 8, 8),
    "resized": (lambda m, x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), 8, 8, 8),
}
"""Function, channels before it and after it, and the units that can go."""


@pytest.mark.parametrize("name", TRIED)
def test_an_operator_without_a_rule_lets_through_what_trials_show(name):
    function, before, after, units = TRIED[name]
    channels = net_between(function, before, after)
    assert sizes(channels) == {"a": units}
    assert_removed_is_masked(channels)


def test_a_logarithm_of_channels_that_go_is_no_obstacle():
    channels = net_between(lambda m, x: x.abs().log().exp() + x.abs().rsqrt(), 8, 8)
    assert sizes(channels) == {"a": 8}
    assert_removed_is_masked(channels)


@pytest.mark.parametrize("channels", [4, 8, 12])
def test_a_unit_before_a_pixel_shuffle_is_all_channels_of_one_output_channel(channels):
    """Behind it every pixel is a feature: sub-pixel rows and columns must stay where they are."""
    image = torch.randn(2, 3, SIDE, SIDE)
    layers = nn.Sequential(nn.Conv2d(3, channels, 1), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(channels * 16, 6))
    known = found(nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 2)), image)
    assert sizes(known) == ({"0": channels // 4} if channels > 4 else {}) | {"3": 6}
    assert_removed_is_masked(known)


MIXED = {
    "over them": lambda m, x: x * x.cumsum(1),
    "neighbours": lambda m, x: F.local_response_norm(x, 3),
    "in rows": lambda m, x: x.renorm(2, 0, 1.0),
    "one after the other": lambda m, x: torch.cummax(x, 1).values,
}


@pytest.mark.parametrize("name", MIXED)
def test_an_operator_that_mixes_channels_keeps_them_and_is_the_reason(name):
    channels = net_between(MIXED[name], 8, 8)
    assert sizes(channels) == {}
    assert "a" in reasons(channels)


def raising(call):
    raise ZeroDivisionError("no luck")


def too_short(call):
    return [call.result, call.result]


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (raising, "the channel rule for aten.relu.default fails: ZeroDivisionError: no luck"),
        (too_short, "the channel rule for aten.relu.default fails: ValueError: it gives"),
        (lambda call: None, "the channel rule for aten.relu.default fails: ValueError: it gives"),
    ],
)
def test_a_rule_that_fails_ends_nothing_and_is_the_reason(read, why):
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1))
    model = capture(randomise(layers), torch.randn(2, 3, SIDE, SIDE))
    channels = find_channels(model, {torch.ops.aten.relu.default: ChannelRule(read)})
    assert sizes(channels) == {"2": 6}
    assert reasons(channels)["0"].startswith(f"relu: {why}")
    assert_removed_is_masked(channels)


def test_a_module_whose_rule_fails_at_one_call_keeps_its_channels_at_the_other():
    parts = {"a": nn.Conv2d(3, 8, 1), "c": nn.Conv2d(8, 8, 1), "b": nn.Conv2d(8, 2, 1)}
    model = Do(lambda m, x: m.b(m.c(m.c(m.a(x)).relu()).tanh()), **parts)
    captured = capture(randomise(model), torch.randn(2, 3, SIDE, SIDE))
    calls = []

    def once(call):
        calls.append(call.layer)
        return raising(call) if calls.count("c") == 2 and call.layer == "c" else convolution(call)

    channels = find_channels(captured, {nn.Conv2d: ChannelRule(once)})
    assert sizes(channels) == {}
    assert reasons(channels)["a"] == "c: the channel rule for Conv2d fails: ZeroDivisionError: no luck"


def test_what_the_analysis_stumbles_over_keeps_its_channels_and_ends_nothing(monkeypatch):
    def only_at_relu(model, node, values):
        if node.name == "relu":
            raise KeyError(node.name)

    monkeypatch.setattr("surgery.channels.walk.find_shuffle", only_at_relu)
    layers = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Tanh(), nn.Conv2d(6, 2, 1))
    channels = found(layers, torch.randn(2, 3, SIDE, SIDE))
    assert sizes(channels) == {"2": 6}
    assert reasons(channels)["0"] == "relu: aten.relu.default cannot be followed: KeyError: 'relu'"


@pytest.mark.parametrize("batch", [2, 3])
def test_a_single_channel_that_is_left_is_not_squeezed_away(batch):
    model = Do(lambda m, x: m.b(m.a(x).mean((2, 3), keepdim=True).squeeze()), a=nn.Conv2d(3, 8, 1), b=nn.Linear(8, 2))
    channels = found(model, torch.randn(batch, 3, SIDE, SIDE))
    marks = [torch.arange(8) != 5]
    assert deviation(channels, marks, channels.model.inputs) <= 1e-6
    assert deviation(channels, marks, channels.model.inputs.with_batch(4)) <= 1e-6
