"""Which units a layer can do without, by least squares: group optimal brain surgeon.

A unit's features in a layer are the columns of W that read its channels. With A = Σ + λ I (features, features), Σ the
covariance of the unfolded input, B = Y + λ W₀ (outputs, features), Y the covariance of the target with it, the best
weight is W = B A⁻¹. Leaving out the features J of one unit, all others re-solved, raises the error by

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

    `features` (units, k): columns that belong to each unit; `weight` (outputs, all features) W; `inverse` P.
    `scale`: errors are divided by it, the variance of what the layer's output goes into.
    """

    features: Tensor
    weight: Tensor
    inverse: Tensor
    scale: float

    @classmethod
    def of(cls, features: Tensor, xx: Tensor, yx: Tensor, towards: Tensor, scale: float, damping: Tensor) -> Reader:
        """From moments: `xx` Σ, `yx` Y, `towards` W₀, `damping` λ."""
        damped = xx + torch.diag_embed(damping.expand(len(xx)))
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return cls(features, (yx + damping * towards) @ inverse, inverse, max(scale, 1e-100))

    def costs(self) -> Tensor:
        """(units,) rise of the error if each alone goes next."""
        blocks = self.inverse[self.features.unsqueeze(2), self.features.unsqueeze(1)]  # (units, k, k)
        columns = self.weight[:, self.features].transpose(0, 1)  # (units, outputs, k)
        solved = torch.linalg.solve(_regular(blocks), columns.mT)
        costs: Tensor = (columns.mT * solved).sum((1, 2)).clamp_min(0) / self.scale
        return costs

    def leave_out(self, units: Tensor) -> None:
        gone = self.features[units].reshape(-1)
        block = self.inverse[gone.unsqueeze(1), gone]
        step = torch.linalg.solve(_regular(block), self.inverse[gone])  # (gone, features)
        self.weight = self.weight - self.weight[:, gone] @ step
        self.inverse = self.inverse - self.inverse[:, gone] @ step
        self.weight[:, gone] = 0
        self.inverse[gone], self.inverse[:, gone] = 0, 0


def _regular(blocks: Tensor) -> Tensor:
    """Blocks of units that are gone are zero: the identity in their place."""
    empty = (blocks.diagonal(dim1=-2, dim2=-1) == 0).all(-1)
    return blocks + empty[..., None, None] * torch.eye(blocks.shape[-1], dtype=blocks.dtype)


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
