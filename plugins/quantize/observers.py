"""Which part of what a tensor was seen to hold its grid should span.

minmax      all of it
percentile  all but a share of the values, half of it at each end
entropy     where the values on the grid are distributed most alike to the values themselves
mse         where the mean squared error of values on the grid is least

All but the first read the calibration's histogram. Its values are taken as evenly spread within a bin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from surgery import InputError

from .scheme import Grid, Scheme, affine
from .weights import weight_scheme as weight_scheme

PERCENTILE = 99.99
CANDIDATES = 128


class Range(Protocol):
    """Smallest and largest value."""

    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...


class Histogram(Protocol):
    """`counts` (bins,) of values between `edges` (bins + 1,), float64, equal bins."""

    @property
    def counts(self) -> Tensor: ...
    @property
    def edges(self) -> Tensor: ...


Observe = Callable[[Range, Histogram | None, Grid], tuple[float, float]]


def minmax(seen: Range, histogram: Histogram | None, grid: Grid) -> tuple[float, float]:
    """Smallest and largest value seen.

    Raises:
        InputError: no finite value was seen.
    """
    if not -torch.inf < seen.low <= seen.high < torch.inf:
        raise InputError(
            f"values range from {seen.low} to {seen.high}", fix="look for NaN and infinity in the calibration data"
        )
    return seen.low, seen.high


def percentile(seen: Range, histogram: Histogram | None, grid: Grid, share: float = PERCENTILE) -> tuple[float, float]:
    """Holds `share` percent of the values; half of the others lie below, half above."""
    low, high = minmax(seen, histogram, grid)
    counts, edges = _bins(histogram)
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    cut = (1 - share / 100) / 2 * below[-1]
    first, last = _quantile(below, edges, cut), -_quantile(below[-1] - below.flip(0), -edges.flip(0), cut)
    return min(max(first, low), high), max(min(last, high), low)


def _quantile(below: Tensor, edges: Tensor, count: Tensor) -> float:
    """Where so many values lie below."""
    bin = int(torch.searchsorted(below, count, right=True)) - 1
    bin = min(bin, len(edges) - 2)
    part = (count - below[bin]) / (below[bin + 1] - below[bin]).clamp_min(1)
    return float(edges[bin] + part * (edges[bin + 1] - edges[bin]))


def entropy(seen: Range, histogram: Histogram | None, grid: Grid) -> tuple[float, float]:
    """The [max(low, -T), min(high, T)] with the least KL divergence (Migacz 2017, "8-bit inference with TensorRT").

    The reference P holds the counts, with those outside added to the outermost bin that holds values inside; Q spreads
    what each integer stands for, counts outside left out, evenly over the bins that are not empty.
    """
    low, high = minmax(seen, histogram, grid)
    counts, edges = _filled(histogram)
    most = torch.linspace(1 / CANDIDATES, 1, CANDIDATES, dtype=torch.float64) * max(-low, high)
    lows, highs = (-most).clamp_min(min(low, 0)), most.clamp_max(max(high, 0))
    best = int(_divergence(counts, edges, lows, highs, grid).flip(0).argmin())
    return float(lows.flip(0)[best]), float(highs.flip(0)[best])


def _divergence(counts: Tensor, edges: Tensor, lows: Tensor, highs: Tensor, grid: Grid) -> Tensor:
    """KL(P ‖ Q) in nats for each pair of `lows` and `highs`, infinite where no value lies between. `counts` > 0
    (bins,), `edges` (bins, 2)."""
    inside = (edges[:, 1] > lows.unsqueeze(1)) & (edges[:, 0] <= highs.unsqueeze(1))
    scheme = affine(lows, highs, grid, axis=0)
    levels = (scheme.quantise(edges.mean(1).expand(len(lows), -1)) - grid.low).long()
    mass = counts * inside
    per_level = torch.zeros(len(lows), grid.steps + 1, dtype=torch.float64)
    share = per_level.scatter_add(1, levels, mass) / per_level.scatter_add(1, levels, inside.double()).clamp_min(1)
    given = _saturated(counts, inside)
    wanted = share.gather(1, levels) / mass.sum(1, keepdim=True)
    terms = given * (given / wanted).log()
    divergence = terms.where(inside, 0).sum(1)
    return divergence.where(inside.any(1), torch.inf)


def _saturated(counts: Tensor, inside: Tensor) -> Tensor:
    """P (candidates, bins): shares of all values, those outside in the first and last bin `inside`."""
    given = counts * inside
    total, up_to = counts.sum(), counts.cumsum(0)
    first = inside.long().argmax(1, keepdim=True)
    last = inside.shape[1] - 1 - inside.flip(1).long().argmax(1, keepdim=True)
    given.scatter_add_(1, first, (up_to - counts)[first])
    given.scatter_add_(1, last, total - up_to[last])
    return given / total


def mse(seen: Range, histogram: Histogram | None, grid: Grid) -> tuple[float, float]:
    """The range with the least mean squared error: found for both ends together by 1/64, then for one end after the
    other, in the end by 1/500."""
    low, high = minmax(seen, histogram, grid)
    counts, edges = _filled(histogram)
    most = torch.tensor([min(low, 0.0), max(high, 0.0)], dtype=torch.float64)
    ends, coarse, fine = most, torch.linspace(1, 1 / 64, 64), 1 + torch.linspace(-0.03, 0.03, 31)
    for factors, moved in ((coarse, [0, 1]), (1.5 * coarse, [1]), (1.5 * coarse, [0]), (fine, [1]), (fine, [0])):
        tried = ends.repeat(len(factors), 1)
        tried[:, moved] = (tried[:, moved] * factors.unsqueeze(1)).clamp(most[0], most[1])
        tried = torch.cat([ends.unsqueeze(0), tried])
        ends = tried[_squared_error(counts, edges, affine(tried[:, 0], tried[:, 1], grid, axis=0)).argmin()]
    return float(ends[0]), float(ends[1])


def _squared_error(counts: Tensor, edges: Tensor, scheme: Scheme) -> Tensor:
    """(candidates,) Σ (x - x̂)² where the values are spread evenly over their bins: F(e₁) - F(e₀) over the bin's width,

    F(e) = k s³/12 + (e - k s)³/3, an integral of (x - x̂)², k the integer for e less the zero point.
    """
    scale = scheme.scale.unsqueeze(1)
    sides = []
    for e in (edges[:, 0], edges[:, 1]):
        k = scheme.quantise(e.expand(len(scale), -1)) - scheme.zero_point.unsqueeze(1)
        sides.append(k * scale.pow(3) / 12 + (e - k * scale).pow(3) / 3)
    return (counts / (edges[:, 1] - edges[:, 0]) * (sides[1] - sides[0])).sum(1)


def _bins(histogram: Histogram | None) -> tuple[Tensor, Tensor]:
    assert histogram is not None, "ask for 'histograms'"
    return histogram.counts.double(), histogram.edges


def _filled(histogram: Histogram | None) -> tuple[Tensor, Tensor]:
    """Counts of the bins that hold values, and their edges (bins, 2)."""
    counts, edges = _bins(histogram)
    filled = counts > 0
    return counts[filled], torch.stack([edges[:-1], edges[1:]], 1)[filled]


OBSERVERS: dict[str, Observe] = {"minmax": minmax, "percentile": percentile, "entropy": entropy, "mse": mse}
