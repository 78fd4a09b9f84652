"""Removed = masked: the model without some units computes what the whole model computes with these units at zero."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from random_networks import Do
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import surgery
from surgery import CapturedModel, Channels, Inputs, capture, find_channels
from surgery.captured import relative_error
from surgery.channels.masking import masked_outputs
from surgery.contract import snapshot
from surgery.testing import randomise

BOUND = 1e-5


def found(model: nn.Module, example: object, *, heads: bool = False, rules: dict | None = None) -> Channels:
    """Channels of `model` as captured, with weights at which no check is vacuous."""
    return find_channels(capture(randomise(model), example), rules, heads=heads)


def net_between(function: Callable[..., Tensor], outputs: int, inputs: int) -> Channels:
    """Of `a`, a convolution of images 2×3×4×4 to `outputs` channels, `function(parts, x)`, and `b`, a convolution of
    `inputs` channels."""
    parts = {"a": nn.Conv2d(3, outputs, 1), "b": nn.Conv2d(inputs, 2, 1)}
    return found(Do(lambda m, x: m.b(function(m, m.a(x))), **parts), torch.randn(2, 3, 4, 4))


def sizes(channels: Channels) -> dict[str, int]:
    """Number of units by the group's name."""
    return {group.name: group.size for group in channels.groups}


def outputs(channels: Channels) -> list[set[str]]:
    """Per group the layers whose output channels it is."""
    return [{member.layer for member in group.of("output")} for group in channels.groups]


def reasons(channels: Channels) -> dict[str, str]:
    """Why layers have channels that stay."""
    return {frozen.layer: frozen.why for frozen in channels.frozen}


def random_marks(channels: Channels, seed: int = 0, least: int = 0) -> list[Tensor]:
    """Of each group a random share of the units, never all of any dimension; at least `least` of each group stay."""
    generator = torch.Generator().manual_seed(seed)
    marks = []
    for group in channels.groups:
        share = torch.rand(1, generator=generator)
        marks.append((torch.rand(group.size, generator=generator) < share) & (torch.arange(group.size) >= least))
    return channels.spared(marks)


def halves(channels: Channels) -> list[Tensor]:
    """Every second unit of each group."""
    return [torch.arange(group.size) % 2 == 1 for group in channels.groups]


def removed(channels: Channels, marks: Sequence[Tensor]) -> CapturedModel:
    """A model without the marked units; the one that `channels` is about stays as it is."""
    model = snapshot(channels.model)
    find_channels(model, channels.walk.rules, heads=any(heads.whole for heads in channels.walk._heads.values())).remove(
        marks
    )
    return model


def deviation(channels: Channels, marks: Sequence[Tensor], inputs: Inputs) -> float:
    """Of the removed from the masked model, relative to the largest output."""
    smaller, alive = removed(channels, marks), channels.alive(marks)
    with torch.no_grad():
        actual = tree_leaves(smaller(*inputs.args, **inputs.kwargs))
    expected = masked_outputs(channels, alive, inputs)
    return max(relative_error(a, e) for a, e in zip(actual, tree_leaves(expected), strict=True))


def assert_removed_is_masked(
    channels: Channels, seeds: Iterable[int] = range(3), bound: float = BOUND
) -> CapturedModel:
    """For random marks, at the example and at another batch size. The model without every second unit comes back."""
    assert channels.groups
    example = channels.model.inputs
    batches = [example, example.with_batch(5)] if channels.model.dynamic_batch else [example]
    for marks in [*(random_marks(channels, seed) for seed in seeds), halves(channels)]:
        for inputs in batches:
            error = deviation(channels, marks, inputs)
            assert error <= bound, f"deviates by {error:.1e} without {marks}"
    return removed(channels, halves(channels))


def assert_costs_are_measured(channels: Channels, marks: Sequence[Tensor]) -> None:
    """What `cost` foresees is what the removed model measures. (Where one position is left that einsum sums over, it
    multiplies elementwise, which is not measured.)"""
    measured = surgery.measure(removed(channels, marks), channels.model.inputs)
    alive, cost = channels.alive(marks), channels.cost
    foreseen = cost.macs(alive), cost.parameters(alive), cost.bytes(alive)
    assert foreseen == (measured.macs, measured.parameters, measured.parameter_bytes)
