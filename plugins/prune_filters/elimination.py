"""Which units a layer can do without, by least squares: group optimal brain surgeon.

A unit's features in a layer are the columns of W that read its channels; W itself is the best weight for what the
layer gives today. With A = Σ + λ I (features, features), Σ the covariance of the unfolded input, leaving out the
features J of one unit, all others re-solved, raises the error by

    ΔE_J = tr(W_J (P_JJ)⁻¹ W_Jᵀ),   P = A⁻¹          then  W ← W - W_J (P_JJ)⁻¹ P_J·,  P ← P - P_·J (P_JJ)⁻¹ P_J·

Hassibi & Stork 1993, Second Order Derivatives for Network Pruning, eq. 5; by blocks as in Kurtic et al. 2022
(arXiv:2203.07259), eq. 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Reader:
    """A layer that reads the units: its least squares task, as far as units have been left out.

    `columns` (units · k, outputs) Wᵀ and `inverse` (units · k, units · k) P, k rows for each of the units `left`; of
    the `gone` among them the rows mean nothing. `scale`: errors are divided by it, the variance of what the layer's
    output goes into. `size`: units there were.
    """

    size: int
    left: Tensor
    gone: Tensor
    columns: Tensor
    inverse: Tensor
    scale: float

    @classmethod
    def of(cls, features: Tensor, weight: Tensor, inverse: Tensor, scale: float) -> Reader:
        """`features` (units, k): columns of W that belong to each unit. What other features cost is never asked, and
        what they do for those left stands in P: they need no rows."""
        rows = features.reshape(-1)
        units = torch.arange(len(features))
        return cls(len(features), units, units < 0, weight.mT[rows], inverse[rows][:, rows], scale)

    def costs(self) -> Tensor:
        """(size,) rise of the error if each alone goes next; 0 of those that are gone."""
        own = self.columns.unflatten(0, (len(self.left), -1))  # (left, k, outputs)
        blocks = self.inverse.view(*own.shape[:2], *own.shape[:2]).diagonal(dim1=0, dim2=2).movedim(-1, 0)
        blocks = torch.where(self.gone[:, None, None], torch.eye(own.shape[1], dtype=own.dtype), blocks)
        rises = torch.linalg.solve(blocks, own @ own.mT).diagonal(dim1=1, dim2=2).sum(1)
        costs = torch.zeros(self.size, dtype=torch.float64)
        costs[self.left] = rises.clamp_min(0).masked_fill(self.gone, 0) / self.scale
        return costs

    def leave_out(self, units: Tensor) -> None:
        marked = torch.isin(self.left, units)
        gone = self._rows(marked)
        rows = self.inverse[gone]
        step = torch.linalg.solve(rows[:, gone], rows).mT
        self.columns.addmm_(step, self.columns[gone], alpha=-1)
        self.inverse.addmm_(step, rows, alpha=-1)
        self.gone = self.gone | marked
        if 8 * int(self.gone.sum()) > len(self.gone):  # not each time: copying takes as long as computing
            self._compact()

    def _compact(self) -> None:
        rows = self._rows(~self.gone)
        self.columns, self.inverse = self.columns[rows], self.inverse[rows][:, rows]
        self.left = self.left[~self.gone]
        self.gone = self.gone[~self.gone]

    def _rows(self, marked: Tensor) -> Tensor:
        """Of the marked units among those `left`."""
        return torch.nonzero(marked.repeat_interleave(len(self.columns) // len(marked))).reshape(-1)


def inverted(xx: Tensor, damping: Tensor) -> Tensor:
    """P = (Σ + λ I)⁻¹ from Σ and λ."""
    damped = xx.diagonal_scatter(xx.diagonal() + damping)
    return torch.cholesky_inverse(torch.linalg.cholesky(damped))


def eliminate(size: int, readers: Sequence[Reader], fixed: Tensor) -> Tensor:
    """(size,) how much each unit raises the error of all `readers` when it goes in its turn, the cheapest first.

    `fixed` (size,) is added: what units cost where no reader judges them. Below 128 units go one at a time, of more
    1/64 of those that are left. Scores never fall in the order of removal, as on the lower convex hull of the error
    curve: units that only pay together go together.
    """
    alive = torch.ones(size, dtype=torch.bool)
    order: list[int] = []
    rises: list[float] = []
    while len(order) < size:
        costs = fixed.double() + sum((r.costs() for r in readers), torch.zeros(size, dtype=torch.float64))
        costs = costs.masked_fill(~alive, torch.inf)
        left = size - len(order)
        units = costs.argsort(stable=True)[: max(1, left // 64)]
        order += units.tolist()
        rises += costs[units].tolist()
        alive[units] = False
        for reader in readers:
            reader.leave_out(units)
    scores = torch.empty(size, dtype=torch.float64)
    scores[torch.tensor(order, dtype=torch.long)] = never_falling(torch.tensor(rises, dtype=torch.float64))
    return scores


def never_falling(steps: Tensor) -> Tensor:
    """Slopes of the lower convex hull of the curve with these steps, each a hair above the last, to keep the order."""
    blocks: list[tuple[float, int]] = []  # mean, length
    for step in steps.tolist():
        mean, length = float(step), 1
        while blocks and blocks[-1][0] >= mean:
            before, count = blocks.pop()
            mean, length = (before * count + mean * length) / (count + length), count + length
        blocks.append((mean, length))
    slopes = torch.cat(
        [torch.empty(0, dtype=torch.float64), *(torch.full((n,), m, dtype=torch.float64) for m, n in blocks)]
    )
    hair = 1e-12 * slopes.abs().max() if len(slopes) else 0.0
    return slopes + hair * torch.arange(len(slopes))
