"""Factors of a multilinear form brought nearer to a weight in its metric, one after the other, by conjugate gradients.

f is quadratic in every single factor, with a Hessian that is never formed: a step multiplies by Σ once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import conjugate_gradients

from .kernel import Kernel

SWEEPS = 2
"""Rounds over all factors in the metric itself."""


@dataclass(frozen=True)
class Form:
    """What factors amount to, and how they are made better."""

    product: Callable[[Sequence[Tensor]], Tensor]
    """W' (O, …) of the factors; linear in each of them."""
    undo: Callable[[Sequence[Tensor], int], Callable[[Tensor], Tensor]]
    """From the factors and the number of one to what nearly undoes its Hessian, exactly so in the weight's metric."""
    each: Callable[[Callable[[Tensor, int], Tensor], Sequence[Tensor]], list[Tensor]]
    """Applies a change to the factors along every dimension of W but the first; the change is given the dimension."""
    steps: int
    """Conjugate-gradient steps for one factor in one round."""


def fitted(kernel: Kernel, form: Form, near: Callable[[Tensor], Sequence[Tensor]]) -> list[Tensor]:
    """Factors for the outputs: the better of those `near` the weight and those near it in the separable part of the
    metric, brought down in the metric itself."""
    seen = kernel.separated
    starts = [form.each(kernel.uncoloured, near(kernel.weight)), near(seen.weight)]
    starts = [lowered(seen, start, form, 1) for start in starts]
    best = min(starts, key=lambda start: seen.error(form.product(start)))
    return form.each(kernel.coloured, lowered(seen, best, form, SWEEPS))


def lowered(kernel: Kernel, factors: Sequence[Tensor], form: Form, sweeps: int) -> list[Tensor]:
    """Factors whose f is lower, never higher."""
    found = list(factors)
    for _ in range(sweeps):
        for number in reversed(range(len(found))):
            found[number] = found[number] + _change(kernel, found, number, form)
    return found


def _change(kernel: Kernel, factors: Sequence[Tensor], number: int, form: Form) -> Tensor:
    """What to add to one factor."""
    free = factors[number].detach().requires_grad_()

    def formed(factor: Tensor) -> Tensor:
        return form.product([*factors[:number], factor, *factors[number + 1 :]]).flatten(1)

    with torch.enable_grad():
        product = formed(free)

    def pulled(moment: Tensor) -> Tensor:
        return torch.autograd.grad(product, free, moment.view_as(product), retain_graph=True)[0]

    def hessian(change: Tensor) -> Tensor:
        return pulled(kernel.seen(formed(change)))

    goal = pulled(kernel.seen(kernel.matrix - product.detach()))
    return conjugate_gradients(hessian, goal, None, form.undo(factors, number), form.steps)
