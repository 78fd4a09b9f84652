"""Values on a line as sorted points with weights, a row per group: what clustering in one dimension works on.

Of many values the points are the bins of a histogram whose width follows the distance from the mean: their keys are the
leading bits of the floating point number, so that neither outliers nor scale matter. With prefix sums over the points

    w = Σ wᵢ,  s = Σ wᵢ xᵢ,  q = Σ wᵢ xᵢ²:   the distortion of a cell about its centroid s/w is  q - s²/w

and any cell costs three differences. What values scatter within a bin is the same for every choice of cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

SHIFT = 13
"""Bits of a float32 that a histogram leaves out: its bins are a 1024th of their value wide."""
ANCHOR = 1e6
"""Weight of a centre that must not move, in parts of all others."""
MANY = 2**17
"""Values of a group from which on a histogram stands for them."""
CHUNK = 2**22


@dataclass(frozen=True)
class Points:
    """`position` (groups, points) ascending, less `centre` (groups, 1); `weight` (groups, points) ≥ 0, not all zero.

    `anchored`: a point at zero is so heavy that the centroid of its cell is zero.
    """

    position: Tensor
    weight: Tensor
    centre: Tensor
    anchored: bool = False

    @property
    def count(self) -> int:
        """Points per group."""
        return self.position.shape[1]

    @cached_property
    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Prefix sums w, s and q, (groups, points + 1) each."""
        weight, moment = self.weight, self.weight * self.position
        if self.anchored:
            zero = self.position == 0
            weight = weight + zero * (ANCHOR * weight.sum(1, keepdim=True) / zero.sum(1, keepdim=True))
        return _prefix(weight), _prefix(moment), _prefix(moment * self.position)

    def centroids(self, cuts: Tensor, otherwise: Tensor) -> Tensor:
        """Centroids (groups, k) of the cells between `cuts` (groups, k + 1); `otherwise` where a cell is empty."""
        weight, moment = (total.gather(1, cuts).diff(dim=1) for total in self.sums[:2])
        return torch.where(weight > 0, moment / weight.clamp_min(1e-300), otherwise)

    def distortion(self, cuts: Tensor) -> Tensor:
        """Σ w (x - centroid)² of the cells between `cuts` (groups, k + 1), per group."""
        weight, moment, square = (total.gather(1, cuts).diff(dim=1) for total in self.sums)
        return (square - moment.square() / weight.clamp_min(1e-300)).clamp_min(0).sum(1)

    def merged(self, edges: Tensor) -> Points:
        """One point, their mean, for those between every two of `edges` (groups, bins + 1)."""
        weight, moment = (_prefix(v).gather(1, edges).diff(dim=1) for v in (self.weight, self.weight * self.position))
        if self.anchored:
            moment = torch.where(self._holds_zero(edges), 0.0, moment)
        first = self.position.gather(1, edges[:, :-1].clamp_max(self.count - 1))
        position = torch.where(weight > 0, moment / weight.clamp_min(1e-300), first)
        return Points(position.cummax(1).values, weight, self.centre, self.anchored)

    def _holds_zero(self, edges: Tensor) -> Tensor:
        zeros = _prefix((self.position == 0).double()).gather(1, edges)
        return zeros.diff(dim=1) > 0

    def edges(self, bins: int) -> Tensor:
        """Edges (groups, bins + 1) of bins as fine as the density to the power ⅓ asks for (Panter and Dite 1951): those
        of nearly the best quantiser of as many values."""
        gap = self.position.diff(dim=1)
        width = torch.cat([gap[:, :1], (gap[:, 1:] + gap[:, :-1]) / 2, gap[:, -1:]], 1)
        share = (self.weight * width.square()).pow(1 / 3)
        for _ in range(4):  # a point far off needs no more than a bin of its own
            share = share.minimum(share.sum(1, keepdim=True) / bins)
        share = share.cumsum(1)
        wanted = share[:, -1:] * torch.linspace(0, 1, bins + 1, dtype=torch.float64)[1:-1]
        inner = torch.searchsorted(share, wanted.contiguous())
        ends = inner.new_zeros(len(inner), 1)
        return torch.cat([ends, inner, ends + self.count], 1)


def _prefix(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values.cumsum(1), (1, 0))


def points(values: Tensor, weights: Tensor | None, *, anchored: bool = False, exact: bool = False) -> Points:
    """Of `values` (groups, …) with `weights` ≥ 0 of that shape, None = 1. `exact`: every value is a point."""
    if weights is not None and not bool(weights.any()):
        weights = None
    if exact or values[0].numel() < MANY:
        return _sorted(values, weights, anchored)
    rows = [_histogram(values[i], None if weights is None else weights[i], anchored) for i in range(len(values))]
    longest = max(row.count for row in rows)
    padded = [_padded(row, longest) for row in rows]
    position, weight = torch.cat([row.position for row in padded]), torch.cat([row.weight for row in padded])
    return Points(position, weight, torch.cat([row.centre for row in padded]), anchored)


def _sorted(values: Tensor, weights: Tensor | None, anchored: bool) -> Points:
    flat = values.reshape(len(values), -1).double()
    weight = torch.ones_like(flat) if weights is None else weights.reshape(flat.shape).double()
    weight = torch.where(weight.sum(1, keepdim=True) > 0, weight, 1.0)
    centre = flat.mean(1, keepdim=True) * (not anchored)
    if anchored:
        flat, weight = (torch.nn.functional.pad(v, (1, 0)) for v in (flat, weight))
    position, order = (flat - centre).sort(1)
    return Points(position, weight.gather(1, order), centre, anchored)


def _histogram(values: Tensor, weights: Tensor | None, anchored: bool) -> Points:
    """One group's."""
    centre = 0.0 if anchored else float(values.mean(dtype=torch.float64))
    bins = 2 ** (32 - SHIFT)
    weight, moment = torch.zeros(bins, dtype=torch.float64), torch.zeros(bins, dtype=torch.float64)
    values, weights = _lines(values), None if weights is None else _lines(weights)
    step = max(1, CHUNK // values[0].numel())
    for start in range(0, len(values), step):
        part = (values[start : start + step] - centre).float().reshape(-1)
        heavy = None if weights is None else weights[start : start + step].reshape(-1).double()
        key = _keys(part)
        weight += torch.bincount(key, heavy, bins)
        moment += torch.bincount(key, part.double() if heavy is None else part * heavy, bins)
    if anchored:
        weight[bins // 2] += 1e-300  # the bin of zero
    used = weight > 0
    position = torch.where(weight[used] > 1e-290, moment[used] / weight[used], 0.0)
    return Points(position[None], weight[used][None], torch.full((1, 1), centre, dtype=torch.float64), anchored)


def _lines(values: Tensor) -> Tensor:
    """As something whose rows are no longer than a chunk."""
    return values if values[0].numel() <= CHUNK else values.reshape(-1)


def _keys(values: Tensor) -> Tensor:
    """Keys of float32 `values`, in the order of the values."""
    bits = values.view(torch.int32)
    ordered = (bits >> 31).bitwise_and_(0x7FFFFFFF).bitwise_xor_(bits)
    return ordered.bitwise_right_shift_(SHIFT).add_(2 ** (31 - SHIFT))


def _padded(row: Points, count: int) -> Points:
    """With points of no weight at the end."""
    missing = count - row.count
    position = torch.cat([row.position, row.position[:, -1:].expand(-1, missing)], 1)
    return Points(position, torch.nn.functional.pad(row.weight, (0, missing)), row.centre, row.anchored)
