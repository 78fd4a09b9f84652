"""Which weights of a layer go, a few at a time, and what the others become.

    least tr V H Vᵀ - 2 tr V Gᵀ   over V with the zeros of a mask,   H = E[x xᵀ] + λ,  G = E[y xᵀ] + λ W

W (groups, outputs, features) is what the weight was: λ pulls to it where the data says nothing. A weight v costs about
h v² (h the diagonal of H) when it goes and the others have not made up for it. Hassibi and Stork 1993 divide by the
inverse Hessian's diagonal instead and let one weight go at a time; a share at a time (as many as Zhu and Gupta 2017,
arXiv:1710.01878, have go), followed by a solution for all that is left, ends as near for a hundredth of the work.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import conjugate_gradients

from .patterns import Pattern

ROUNDS = 32
STEPS = 5
LAST_STEPS = 40
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Quadratic:
    """H and G, float64, over the mean of H's diagonal: V is the same, and float32 holds any magnitude of x."""

    hessian: Tensor
    goal: Tensor

    @classmethod
    def of(cls, moments: Tensor, cross: Tensor, towards: Tensor, damping: Tensor) -> Quadratic:
        """From E[x xᵀ], E[y xᵀ] and λ (groups,) > 0."""
        hessian = moments + torch.diag_embed(damping.unsqueeze(1).expand(moments.shape[:2]))
        size = hessian.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1)
        return cls(hessian / size, (cross + damping.view(-1, 1, 1) * towards) / size)

    @property
    def diagonal(self) -> Tensor:
        """(groups, 1, features)"""
        return self.hessian.diagonal(dim1=1, dim2=2).unsqueeze(1)

    def solved(self) -> Tensor:
        """The best V of all."""
        found: Tensor = torch.linalg.solve(self.hessian, self.goal, left=False)
        return found

    def refined(self, start: Tensor, mask: Tensor, steps: int, exact: bool = False) -> Tensor:
        """V after `steps` of conjugate gradients from `start`, zero outside the mask; in float32 unless `exact`."""
        kind = torch.float64 if exact else torch.float32
        hessian, goal, diagonal, m = (t.to(kind) for t in (self.hessian, self.goal, self.diagonal, mask))
        found = conjugate_gradients(
            lambda v: (v @ hessian) * m,
            goal * m,
            start.to(kind) * m,
            lambda residual: residual / diagonal,
            steps,
            TOLERANCE,
        )
        return found.double() * mask


def pruned(task: Quadratic, pattern: Pattern, zeros: Tensor, gone: int) -> Tensor:
    """V with `gone` units fewer, those among them that hold only `zeros`, which stay zero."""
    mask, value = ~zeros, task.solved()
    before = int((pattern.scores(torch.where(zeros, -1.0, 1.0)) < 0).sum())
    if bool(zeros.any()):
        value = task.refined(value, mask, LAST_STEPS)
    for number in range(1, ROUNDS + 1):
        left = round(max(0, gone - before) * (1 - number / ROUNDS) ** 3)  # Zhu and Gupta 2017, equation 1
        scores = torch.where(mask, value.square() * task.diagonal, -1.0)
        mask = pattern.mask(scores, gone - left) & mask
        value = task.refined(value, mask, STEPS) if left else value
    return task.refined(value, mask, LAST_STEPS, exact=True)


def refitted(task: Quadratic, start: Tensor, mask: Tensor) -> Tensor:
    """The best V that is zero outside the mask."""
    return task.refined(start, mask, 2 * LAST_STEPS, exact=True)
