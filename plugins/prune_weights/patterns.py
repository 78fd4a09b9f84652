"""What goes together, and which of it goes first. Scores (groups, outputs, features): what is higher stays, and what is
zero already has one below 0. Masks say what stays.

A pattern divides a weight into units that live or die as one: single weights, blocks, or, with windows, single weights
of which every window keeps as many.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


def lowest(scores: Tensor, count: int) -> Tensor:
    """Marks of the `count` lowest of `scores`, of any shape; of equal ones the first."""
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.reshape(-1)
    cut = flat.kthvalue(min(count, len(flat))).values
    gone = flat < cut
    equal = torch.nonzero(flat == cut).squeeze(1)
    gone[equal[: count - int(gone.sum())]] = True
    return gone.view(scores.shape)


@dataclass(frozen=True)
class Single:
    """Every weight by itself."""

    def units(self, shape: Shape) -> int:
        return prod(shape)

    def scores(self, scores: Tensor) -> Tensor:
        """One per unit."""
        return scores

    def mask(self, scores: Tensor, gone: int) -> Tensor:
        """Which weights stay when the `gone` lowest units go."""
        return ~lowest(scores, gone)


@dataclass(frozen=True)
class Blocks:
    """Blocks of `rows` outputs and `columns` features; those at the edges are what is left."""

    rows: int
    columns: int

    def units(self, shape: Shape) -> int:
        groups, outputs, features = shape
        return groups * -(-outputs // self.rows) * -(-features // self.columns)

    def scores(self, scores: Tensor) -> Tensor:
        """(groups, rows of blocks, columns of blocks) means; below 0 where nothing in the block is above."""
        size = (self.rows, self.columns)
        means = F.avg_pool2d(scores.clamp_min(0).unsqueeze(1), size, ceil_mode=True)
        peaks = F.max_pool2d(scores.unsqueeze(1), size, ceil_mode=True)
        return torch.where(peaks < 0, peaks, means).squeeze(1)

    def mask(self, scores: Tensor, gone: int) -> Tensor:
        return self._blown(~lowest(self.scores(scores), gone), scores.shape)

    def _blown(self, units: Tensor, shape: torch.Size) -> Tensor:
        blown = units.repeat_interleave(self.rows, 1).repeat_interleave(self.columns, 2)
        return blown[:, : shape[1], : shape[2]]


@dataclass(frozen=True)
class Windows:
    """At most `kept` of `size` consecutive inputs are not zero, at each of `places` places of the kernel (Mishra et al.
    2021, arXiv:2104.08378, section 3.1); features are inputs × places."""

    kept: int
    size: int
    places: int

    def units(self, shape: Shape) -> int:
        return prod(shape)

    def scores(self, scores: Tensor) -> Tensor:
        return scores

    def gone(self, shape: Shape) -> int:
        """How many weights go."""
        return prod(shape) // self.size * (self.size - self.kept)

    def mask(self, scores: Tensor, gone: int) -> Tensor:
        """Which weights stay when the `gone` lowest go of those that are not among the highest of their window."""
        windows = scores.unflatten(2, (-1, self.size, self.places))
        order = windows.argsort(dim=3, stable=True)
        ranks = order.argsort(dim=3)
        doomed = (ranks < self.size - self.kept).flatten(2)
        return ~lowest(scores.masked_fill(~doomed, torch.inf), min(gone, int(doomed.sum())))


Pattern = Single | Blocks | Windows


def counts_over(scores: list[Tensor], gone: int) -> list[int]:
    """How many of each layer's units go when the `gone` lowest of all go; at least one of each stays."""
    flat = [own.reshape(-1).clone() for own in scores]
    for own in flat:
        own[own.argmax()] = torch.inf
    marks = lowest(torch.cat(flat), min(gone, sum(map(len, flat)) - len(flat)))
    return [int(own.sum()) for own in marks.split([len(own) for own in flat])]
