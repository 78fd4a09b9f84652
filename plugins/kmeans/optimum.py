"""The best k cells of points on a line, by dynamic programming (Wang and Song 2011, Ckmeans.1d.dp).

    D₁(j) = c(0, j),   D_q(j) = min over i ≤ j of D_{q-1}(i) + c(i, j),   c = distortion of the points i … j-1

The best i grows with j (c is a Monge array), so that the j between two known ones only look between their i: level by
level, all j of a level and all groups at once, O(n log n) for a row. The cuts are found by going back through the rows'
choices; where these would not fit in memory, the cells are halved first: the cut between the halves is the i with the
least of D_{k/2}(i) from the left plus that from the right (Hirschberg 1975).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .points import Points

Array = NDArray[np.float64]
Places = NDArray[np.int64]

MEMORY = 2**28
"""Bytes that the choices of all rows may take."""
CHUNK = 2**18
"""Candidates that are looked at together."""


def best_cuts(points: Points, k: int) -> Tensor:
    """Cuts (groups, k + 1) between the k cells with the least distortion, from 0 to the number of points."""
    found = np.zeros((len(points.position), k + 1), np.int64)
    for group, own in _batches(points):
        found[group] = _Rows(*own).cuts(k)
    return torch.from_numpy(found)


def _batches(points: Points) -> list[tuple[slice, tuple[Array, Array, Array]]]:
    """Groups with their prefix sums, so many at a time as keep to the cache."""
    step = max(1, CHUNK // points.count)
    sums = [total.numpy() for total in points.sums]
    starts = range(0, len(points.position), step)
    return [(group := slice(a, a + step), (sums[0][group], sums[1][group], sums[2][group])) for a in starts]


class _Rows:
    """Prefix sums (groups, points + 1) of several groups, or of a part of their points."""

    def __init__(self, weight: Array, moment: Array, square: Array) -> None:
        self.weight, self.moment, self.square = weight, moment, square
        self.groups, self.size = weight.shape
        self.flat = tuple(np.ascontiguousarray(total).reshape(-1) for total in (weight, moment, square))

    def cuts(self, k: int) -> Places:
        """(groups, k + 1)"""
        if k > 2 and 4 * k * self.groups * self.size > MEMORY:
            assert self.groups == 1 or self.groups * self.size <= 2 * CHUNK
            return np.concatenate([self._part(g).halved(k) for g in range(self.groups)])
        choices, best = [], self._first()
        for _ in range(k - 1):
            best, choice = self._later(best)
            choices.append(choice.astype(np.int32))
        place: Places = np.full(self.groups, self.size - 1)
        found = [place]
        for own in reversed(choices):
            place = own[np.arange(self.groups), place].astype(np.int64)
            found.append(place)
        return np.stack([np.zeros_like(place), *reversed(found)], 1)

    def halved(self, k: int) -> Places:
        left, right = self, self._mirrored()
        ahead, behind = left._first(), right._first()
        for _ in range(k // 2 - 1):
            ahead, _ = left._later(ahead)
        for _ in range(k - k // 2 - 1):
            behind, _ = right._later(behind)
        middle = int((ahead + behind[:, ::-1]).argmin())
        low = self._part(0, 0, middle + 1).cuts(k // 2)
        high = self._part(0, middle, self.size).cuts(k - k // 2)
        return np.concatenate([low, high[:, 1:] + middle], 1)

    def _part(self, group: int, start: int = 0, stop: int | None = None) -> _Rows:
        return _Rows(*(total[group : group + 1, start:stop] for total in (self.weight, self.moment, self.square)))

    def _mirrored(self) -> _Rows:
        """The points from the other end."""
        return _Rows(*(total[:, -1:] - total[:, ::-1] for total in (self.weight, self.moment, self.square)))

    def _first(self) -> Array:
        totals = (total - total[:, :1] for total in (self.weight, self.moment, self.square))
        return _distortion(*totals)

    def _later(self, best: Array) -> tuple[Array, Places]:
        """D_q from D_{q-1}, with the choice of every place."""
        values, choice = np.zeros_like(best), np.zeros(best.shape, np.int64)
        offset = np.arange(self.groups)[:, None] * self.size
        stride = 1 << max(0, (self.size - 1).bit_length() - 1)
        while stride:
            places = np.arange(stride, self.size, 2 * stride)
            low = choice[:, places - stride]
            after = np.minimum(places + stride, self.size - 1)
            high = np.where(places + stride < self.size, np.minimum(choice[:, after], places), places)
            place, first, last = ((a + offset).reshape(-1) for a in (np.broadcast_to(places, low.shape), low, high))
            self._search(best.reshape(-1), place, first, last, values.reshape(-1), choice.reshape(-1))
            stride //= 2
        return values, choice

    def _search(self, best: Array, place: Places, low: Places, high: Places, values: Array, choice: Places) -> None:
        """The least for every `place` among the cuts from `low` to `high`, all as flat positions."""
        ends = np.cumsum(high - low + 1)
        start = 0
        while start < len(place):
            done = ends[start - 1] if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + CHUNK, "right")))
            own = slice(start, stop)
            if stop == start + 1:
                self._search_one(best, int(place[start]), int(low[start]), int(high[start]), values, choice)
            else:
                self._search_some(best, place[own], low[own], high[own] - low[own] + 1, values, choice)
            start = stop

    def _search_one(self, best: Array, place: int, low: int, high: int, values: Array, choice: Places) -> None:
        own = slice(low, high + 1)
        cost = best[own] + _distortion(*(total[place] - total[own] for total in self.flat))
        least = int(cost.argmin())
        values[place], choice[place] = cost[least], (low + least) % self.size

    def _search_some(
        self, best: Array, place: Places, low: Places, count: Places, values: Array, choice: Places
    ) -> None:
        first = np.cumsum(count) - count
        cut = np.arange(first[-1] + count[-1]) + np.repeat(low - first, count)
        cost = best[cut] + _distortion(*(np.repeat(total[place], count) - total[cut] for total in self.flat))
        least = np.minimum.reduceat(cost, first)
        hits = np.flatnonzero(cost == np.repeat(least, count))
        own = hits[np.searchsorted(hits, first)]  # the first of equal ones
        values[place], choice[place] = least, cut[own] % self.size


def _distortion(weight: Array, moment: Array, square: Array) -> Array:
    lost = square - moment * moment / np.maximum(weight, 1e-300)
    return np.maximum(lost, 0.0)
