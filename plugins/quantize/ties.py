"""Scales at which no sum of products falls near a tie of the rounding.

    y₈ = round(r a) + z,   a = Σ x₈ W₈ + b₃₂,   r = s_x s_w / s_y

A runtime computes r a in one product, PyTorch by summing floats: where r a is k + ½ but for their errors they round
apart. All sums that may be so are known, those next to (k + ½) / r; s_w grows by up to half a percent until none is.
"""

from __future__ import annotations

import torch
from torch import Tensor

TRIED = 128
GROWTH = 0.005
STEPS = 256
"""Of what is rounded to."""


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
