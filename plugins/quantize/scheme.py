"""Integers that stand for real numbers on an even grid, zero exactly among them.

    q = clamp(round(x / s) + z, low, high)      x ≈ s (q - z)

Halves round to even, as QuantizeLinear of ONNX has it (Jacob et al. 2018, arXiv:1712.05877, section 2.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

SMALLEST = 2.0**-100
"""Scale where there is nothing to represent but zero; far from underflow when multiplied with another."""


@dataclass(frozen=True)
class Grid:
    """Integers `low` … `high`, such as 0 … 255, -127 … 127 or -64 … 63."""

    low: int
    high: int

    @property
    def steps(self) -> int:
        """Between the smallest and the largest."""
        return self.high - self.low

    @classmethod
    def unsigned(cls, bits: int) -> Grid:
        """0 … 2^bits - 1"""
        return cls(0, 2**bits - 1)

    @classmethod
    def signed(cls, bits: int) -> Grid:
        """As many below zero as above: -(2^(bits - 1) - 1) … 2^(bits - 1) - 1"""
        return cls(1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1)


@dataclass(frozen=True)
class Scheme:
    """`scale` > 0 and `zero_point` on the grid (integers), both 0-d or (channels,) along the dimension `axis`."""

    scale: Tensor
    zero_point: Tensor
    grid: Grid
    axis: int | None = None

    def quantise(self, x: Tensor) -> Tensor:
        """The integers for `x`, in the type of `x`."""
        return ((x / self.along(self.scale, x)).round() + self.along(self.zero_point, x)).clamp(
            self.grid.low, self.grid.high
        )

    def dequantise(self, q: Tensor) -> Tensor:
        """What the integers stand for; in the type of `q` where that is a floating-point one, else in the scale's."""
        q = q if q.is_floating_point() else q.to(self.scale.dtype)
        return (q - self.along(self.zero_point, q)) * self.along(self.scale, q)

    def round(self, x: Tensor) -> Tensor:
        """The nearest numbers to `x` that the grid has."""
        return self.dequantise(self.quantise(x))

    def along(self, values: Tensor, x: Tensor) -> Tensor:
        """`values`, 0-d or (channels,), in the type of `x` and broadcast to it."""
        values = values.to(x)
        if self.axis is None:
            return values
        shape = [1] * x.ndim
        shape[self.axis] = -1
        return values.view(shape)


def affine(
    low: float | Tensor, high: float | Tensor, grid: Grid, symmetric: bool = False, axis: int | None = None
) -> Scheme:
    """The scheme whose grid spans `low` … `high`, widened to hold zero; float64 scales, int64 zero points.

    `symmetric`: zero is the integer 0, as is usual for weights; the larger of both sides decides. Otherwise -15 … 25
    on 0 … 255 takes -15 to 0, 5 to 128 (127.5 rounds to even) and 25 to 255.
    """
    low = torch.as_tensor(low, dtype=torch.float64).clamp_max(0)
    high = torch.as_tensor(high, dtype=torch.float64).clamp_min(0)
    if symmetric:
        below = -low / -grid.low if grid.low < 0 else torch.zeros_like(low)
        scale = torch.maximum(high / grid.high, below).clamp_min(SMALLEST)
        return Scheme(scale, torch.zeros_like(scale, dtype=torch.int64), grid, axis)
    scale = ((high - low) / grid.steps).clamp_min(SMALLEST)
    zero = (grid.low - low / scale).round().clamp(grid.low, grid.high)
    return Scheme(scale, zero.long(), grid, axis)


def hardsigmoid_terms(x: Scheme) -> tuple[Scheme, Scheme]:
    """Of the sum x/6 + ½, which hardsigmoid(x) is between 0 and 1: `x` read with a sixth of its scale, and 1 with ½."""
    half = Scheme(torch.tensor(0.5, dtype=torch.float64), torch.tensor(0), Grid(1, 1))
    return replace(x, scale=(x.scale / 6).float().double()), half
