"""Weights rounded up or down as is best for the layer's output, found by gradient descent.

    least  d G dᵀ + λ Σ (1 - |2 h - 1|^β),   q = clamp(⌊w⌋ + h),   h = clamp(σ(v)(ζ - γ) + γ, 0, 1),   d = w - q

Nagel et al. 2020 (AdaRound, arXiv:2004.10568, equations 21 to 24), w in steps of the grid. β falls from 20 to 2, which
lets h move freely first and pushes it to 0 or 1 in the end. The error of the output over any amount of data is a
quadratic form of d, so that no step needs data: its gradient is 2 d G, exact where they draw samples. G is divided by
the mean of its diagonal, so that λ means the same for every layer. What comes out goes on by coordinate descent, in
which a weight may also move further than to its two neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .rounding import better, descended, in_steps, nearest
from .scheme import Grid, Scheme

ZETA, GAMMA = 1.1, -0.1
WARM = 0.2
"""Share of the steps without the regulariser."""
START, END = 20.0, 2.0
"""β"""


def adaround(
    matrix: Tensor,
    gram: Tensor,
    scheme: Scheme,
    *,
    zeros: Tensor | None = None,
    iterations: int = 500,
    rate: float = 0.1,
    strength: float = 1.0,
) -> Tensor:
    """Integers (groups, outputs, features), float64, for W of that shape: an output channel never costs more than
    rounded to the nearest.

    `gram`: E[x xᵀ] (groups, features, features), or the covariance where the bias is corrected after. `scheme`:
    symmetric, one scale or one for each output. `zeros`: places that stay zero. `rate`: of Adam; `strength`: λ.
    """
    steps = in_steps(matrix, scheme)
    chosen = torch.stack(
        [_chosen(w, g, scheme.grid, iterations, rate, strength) for w, g in zip(steps, gram, strict=True)]
    )
    if zeros is not None:
        chosen.masked_fill_(zeros, 0)
    return better(steps, gram, nearest(steps, scheme, zeros), descended(steps, chosen, gram, scheme, zeros))


def _chosen(steps: Tensor, gram: Tensor, grid: Grid, iterations: int, rate: float, strength: float) -> Tensor:
    w = steps.float()
    down = w.floor().clamp_(grid.low, grid.high - 1)
    metric = (gram / gram.diagonal().mean().clamp_min(1e-100)).to(w)
    v = _inverse((w - down).clamp_(0, 1))
    adam = _Adam(v, rate)
    for number in range(iterations):
        s = torch.sigmoid(v)
        h = (s * (ZETA - GAMMA) + GAMMA).clamp_(0, 1)
        slope = 2 * (down + h - w) @ metric
        if number >= WARM * iterations:
            slope += strength * _push(h, _beta(number, iterations))
        slope *= (ZETA - GAMMA) * s * (1 - s) * ((h > 0) & (h < 1))
        adam.step(slope)
    return (down + (v >= 0)).double()


def _inverse(h: Tensor) -> Tensor:
    """v with h(v) = h."""
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def _push(h: Tensor, beta: float) -> Tensor:
    """Derivative of 1 - |2 h - 1|^β."""
    t = 2 * h - 1
    return -2 * beta * t.abs().pow(beta - 1) * t.sign()


def _beta(number: int, iterations: int) -> float:
    """From `START` to `END` along a cosine."""
    done = (number / iterations - WARM) / (1 - WARM)
    return END + (START - END) * (1 + math.cos(math.pi * done)) / 2


class _Adam:
    """Kingma and Ba 2015 (arXiv:1412.6980, algorithm 1) on one tensor, in place."""

    def __init__(self, value: Tensor, rate: float) -> None:
        self.value, self.rate, self.number = value, rate, 0
        self.mean, self.square = torch.zeros_like(value), torch.zeros_like(value)

    def step(self, slope: Tensor) -> None:
        self.number += 1
        self.mean.lerp_(slope, 0.1)
        self.square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        scale = math.sqrt(1 - 0.999**self.number)
        self.value.addcdiv_(self.mean, self.square.sqrt().add_(1e-8), value=-self.rate * scale / (1 - 0.9**self.number))
