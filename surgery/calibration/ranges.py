"""Smallest and largest values, and histograms, of streamed tensors.

Values that are not finite, such as those of attention masks, do not count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BINS = 4096
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Range:
    """Extremes over the whole tensor and per channel, (channels,) float64."""

    low: float
    high: float
    channel_low: Tensor
    channel_high: Tensor


@dataclass(frozen=True)
class Histogram:
    """Exact counts (`BINS`,) int64 of equal bins over [-`bound`, `bound`); bin i begins at (2 i / BINS - 1) · bound."""

    counts: Tensor
    bound: float
    """A power of two above every absolute value."""

    @property
    def edges(self) -> Tensor:
        """(BINS + 1,) float64."""
        return torch.linspace(-1, 1, BINS + 1, dtype=torch.float64) * self.bound


class RunningRange:
    """Adds up a `Range` over values (rows, channels)."""

    def __init__(self) -> None:
        self._low = self._high = torch.empty(0)

    def add(self, values: Tensor) -> None:
        low, high = values.amin(0), values.amax(0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            finite = values.isfinite()
            low = values.where(finite, math.inf).amin(0)
            high = values.where(finite, -math.inf).amax(0)
        first = not self._low.numel()
        self._low = low if first else torch.minimum(self._low, low)
        self._high = high if first else torch.maximum(self._high, high)

    def finish(self) -> Range:
        low, high = self._low.double().cpu(), self._high.double().cpu()
        return Range(float(low.min()), float(high.max()), low, high)


class RunningHistogram:
    """Adds up a `Histogram`. The bound doubles when a value passes it; that merges bins in pairs and loses nothing."""

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._bound = _SMALLEST

    def add(self, values: Tensor) -> None:
        finite = values.isfinite()
        if not bool(finite.all()):
            values = values[finite]
        values = values.flatten().double()  # so that scaling by a power of two is exact
        if not values.numel():
            return
        self._grow(float(values.abs().max()))
        index = (values * (BINS / 2 / self._bound)).floor_().long() + BINS // 2
        self._counts += torch.bincount(index, minlength=BINS).cpu()

    def _grow(self, largest: float) -> None:
        needed = math.ldexp(1.0, math.frexp(largest)[1])
        while self._bound < needed:
            quarter = torch.zeros(BINS // 4, dtype=torch.int64)
            self._counts = torch.cat([quarter, self._counts.view(-1, 2).sum(1), quarter])
            self._bound *= 2

    def finish(self) -> Histogram:
        return Histogram(self._counts, self._bound)
