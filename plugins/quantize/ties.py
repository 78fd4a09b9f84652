"""Scales at which no sum of products, and few sums of two values, fall near a tie of the rounding.

    y₈ = round(r a) + z,   a = Σ x₈ W₈ + b₃₂,   r = s_x s_w / s_y

A runtime computes r a in one product, PyTorch by summing floats: where r a is k + ½ but for their errors they round
apart. All sums that may be so are known, those next to (k + ½) / r; s_w grows by up to half a percent until none is.

    y₈ = round(r_a a + r_b b) + z,   a, b = x₈ - z_x,   r = s_x / s_y

All pairs of two values that are added are known too: s_y grows likewise, to where fewest of them come near a tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .scheme import Scheme

TRIED = 128
GROWTH = 0.005
STEPS = 256
"""Of what is rounded to."""
NEAR = 2.0**-12
"""A tie, in steps of the output; floats of 32 bits err by less in a sum of that size."""


def untied(scale: Tensor, ratio: float) -> Tensor:
    """Scales (outputs,) no smaller than `scale` and at most half a percent larger, float64 that float32 holds.
    `ratio`: s_x / s_y."""
    factors = 1 + GROWTH * torch.arange(TRIED, dtype=torch.float64) / TRIED
    tried = (scale.double().unsqueeze(1) * factors).float().double()
    best = torch.stack([distance(column, ratio) for column in tried.T]).argmax(0, keepdim=True)
    return tried.gather(1, best.T).squeeze(1)


def distance(scale: Tensor, ratio: float) -> Tensor:
    """How near (outputs,) the sum next to any tie comes to it, in steps of the output: |r a - (k + ½)|."""
    r = (scale * ratio).unsqueeze(1)
    sums = (torch.arange(STEPS, dtype=torch.float64) + 0.5) / r
    return ((sums.round() - sums).abs() * r).amin(1)


def untied_sum(result: Scheme, terms: Sequence[Scheme]) -> Scheme:
    """`result`, of a sum of two values on the grids `terms`, with a scale up to half a percent larger."""
    integers = [torch.arange(t.grid.low, t.grid.high + 1, dtype=torch.float64) - t.zero_point for t in terms]
    first, second = (i * t.scale for i, t in zip(integers, terms, strict=True))
    sums = (first.unsqueeze(1) + second).flatten()
    tried = (result.scale * (1 + GROWTH * torch.arange(TRIED, dtype=torch.float64) / TRIED)).float().double()
    near = torch.tensor([near_ties(sums / scale) for scale in tried])
    return replace(result, scale=tried[near.argmin()])


def near_ties(x: Tensor) -> int:
    """How many come near a k + ½."""
    shifted = x - 0.5
    return int(((shifted - shifted.round()).abs() < NEAR).sum())
