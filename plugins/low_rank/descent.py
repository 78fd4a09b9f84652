"""Factors of a multilinear form brought nearer to a weight in its metric, one after the other, by conjugate gradients.

f is quadratic in every single factor, with a Hessian that is never formed: a step multiplies by Σ once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .kernel import Kernel

Form = Callable[[Sequence[Tensor]], Tensor]
"""From the factors to what they amount to, of the weight's shape; linear in each of them."""
Preconditioner = Callable[[Sequence[Tensor], int], Callable[[Tensor], Tensor]]
"""From the factors and the number of one to what nearly undoes its Hessian, exactly so in the weight's metric."""


def lowered(
    kernel: Kernel, factors: Sequence[Tensor], form: Form, undo: Preconditioner, sweeps: int, steps: int
) -> list[Tensor]:
    """Factors whose f is lower, never higher: `sweeps` times `steps` steps for each of them."""
    found = list(factors)
    for _ in range(sweeps):
        for number in reversed(range(len(found))):
            found[number] = _improved(kernel, found, number, form, undo(found, number), steps)
    return found


def _improved(
    kernel: Kernel, factors: Sequence[Tensor], number: int, form: Form, undo: Callable[[Tensor], Tensor], steps: int
) -> Tensor:
    free = factors[number].detach().requires_grad_()

    def formed(factor: Tensor) -> Tensor:
        return form([*factors[:number], factor, *factors[number + 1 :]]).flatten(1)

    with torch.enable_grad():
        product = formed(free)

    def pulled(moment: Tensor) -> Tensor:
        return torch.autograd.grad(product, free, moment.view_as(product), retain_graph=True)[0]

    found = factors[number]
    rest = pulled(kernel.seen(kernel.matrix - product.detach()))
    direction, size = torch.zeros_like(found), 1.0
    for _ in range(steps):
        step = undo(rest)
        last, size = size, float((rest * step).sum())
        if not size > 0:
            break
        direction = step + (size / last if bool(direction.any()) else 0.0) * direction
        change = formed(direction)
        moment = kernel.seen(change)
        curvature = float((change * moment).sum())
        if not curvature > 0:
            break
        found = found + size / curvature * direction
        rest = rest - size / curvature * pulled(moment)
    return found
