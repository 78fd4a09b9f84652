"""Codebooks: k values that stand for many (Lloyd 1957; Han et al. 2016, section 3).

    x (groups, …) → codebook (groups, k) ascending,   index of x = number of midpoints between its values below x

A codebook starts from values at equal distances, at equal shares of the values, at random (Han et al., section 3.2) or
from the best cells of a coarse histogram or of all values, and goes on by Lloyd's rounds, each value to the centroid of
its cell, none of which raises the distortion.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .optimum import best_cuts
from .points import Points, points

Start = Literal["optimal", "exact", "linear", "density", "random"]

ROUNDS = 300
"""Most rounds of Lloyd."""
BINS = 16
"""Bins per value of the histogram whose best cells are found."""
BATCH = 2**22
"""Values of groups that are clustered at a time."""


def codebooks(
    values: Tensor,
    k: int,
    weights: Tensor | None = None,
    *,
    start: Start = "optimal",
    zero: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """k values for each group of `values` (groups, …): (groups, k) float64, ascending, with the least
    Σ weights · (x - value)²; nearly the least there is from the start "optimal", the very least from "exact".

    `zero`: one of them is zero. Groups with fewer points than k repeat their last value.
    """
    step = max(1, BATCH // values[0].numel())
    found = []
    for first in range(0, len(values), step):
        own = slice(first, first + step)
        line = points(values[own], None if weights is None else weights[own], anchored=zero, exact=start == "exact")
        found.append(_codebook(line, min(k, line.count), start, generator))
    return _filled(torch.cat(found), k)


def _codebook(line: Points, k: int, start: Start, generator: torch.Generator | None) -> Tensor:
    if start in ("optimal", "exact"):
        cuts = best_cuts(line, k) if start == "exact" or line.count <= BINS * k else _best_of_bins(line, k)
        values = line.centroids(cuts, _at(line, cuts[:, :-1]))
    else:
        values = _started(line, k, start, generator)
    values = lloyd(line, values)
    if line.anchored:
        values.scatter_(1, values.abs().argmin(1, keepdim=True), 0.0)
    return values + line.centre


def _best_of_bins(line: Points, k: int) -> Tensor:
    edges = line.edges(BINS * k)
    return edges.gather(1, best_cuts(line.merged(edges), k))


def _at(line: Points, places: Tensor) -> Tensor:
    return line.position.gather(1, places.clamp_max(line.count - 1))


def _started(line: Points, k: int, start: Start, generator: torch.Generator | None) -> Tensor:
    """k values (groups, k) of which, where zero is one, the one next to zero is."""
    if start == "linear":
        low, high = line.position[:, :1], line.position[:, -1:]
        values = low + (high - low) * torch.linspace(0, 1, k, dtype=torch.float64)
    elif start == "density":
        share = line.weight.cumsum(1)
        wanted = share[:, -1:] * (torch.arange(k, dtype=torch.float64) + 0.5) / k
        values = _at(line, torch.searchsorted(share, wanted))
    else:
        # the k largest of u^(1/weight) are a sample without replacement (Efraimidis and Spirakis 2006)
        noise = torch.rand(line.weight.shape, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        chosen = (noise.log() / line.weight).topk(k, dim=1).indices
        values = line.position.gather(1, chosen).sort(1).values
    if line.anchored:
        values = values.scatter(1, values.abs().argmin(1, keepdim=True), 0.0)
    return values


def lloyd(line: Points, values: Tensor, rounds: int = ROUNDS) -> Tensor:
    """`values` (groups, k) ascending after so many rounds, or when no point changes its cell any more."""
    before: Tensor | None = None
    for _ in range(rounds):
        cuts = cells(line, values)
        if before is not None and torch.equal(cuts, before):
            break
        values, before = line.centroids(cuts, values), cuts
    return values


def cells(line: Points, values: Tensor) -> Tensor:
    """Cuts (groups, k + 1) between the points that are nearest to each of `values` (groups, k)."""
    inner = torch.searchsorted(line.position, (values[:, 1:] + values[:, :-1]) / 2)
    ends = inner.new_zeros(len(inner), 1)
    return torch.cat([ends, inner, ends + line.count], 1)


def _filled(values: Tensor, k: int) -> Tensor:
    return torch.cat([values, values[:, -1:].expand(-1, k - values.shape[1])], 1)


def assign(values: Tensor, codebook: Tensor) -> Tensor:
    """Index (groups, n) uint8 of the nearest of `codebook` (groups, k), ascending, for `values` (groups, n)."""
    middle = ((codebook[:, 1:].double() + codebook[:, :-1].double()) / 2).to(values.dtype)
    if len(values) == 1:
        return torch.bucketize(values, middle[0], out_int32=True).to(torch.uint8)
    return torch.searchsorted(middle.contiguous(), values.contiguous(), out_int32=True).to(torch.uint8)
