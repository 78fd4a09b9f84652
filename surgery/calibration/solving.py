"""Linear systems whose matrix is only known by what it does to a vector."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor],
    goal: Tensor,
    start: Tensor | None,
    precondition: Callable[[Tensor], Tensor],
    steps: int,
    tolerance: float = 0.0,
) -> Tensor:
    """Approximate solution x, of any shape, of `apply(x) = goal` for a linear `apply`, symmetric positive semidefinite,
    and a goal in its range.

    Every step lowers ½ x·apply(x) - x·goal and applies `apply` and `precondition`, which nearly undoes it, once. Ends
    after `steps`, when the residual, as `precondition` sees it, has fallen to the part `tolerance` of the first, or
    where `apply` gives nothing. `start` None = 0.
    """
    x, residual = (goal.new_zeros(goal.shape), goal) if start is None else (start, goal - apply(start))
    direction = scaled = precondition(residual)
    size = first = float((residual * scaled).sum())
    for _ in range(steps):
        if not size > tolerance**2 * first:
            break
        image = apply(direction)
        curvature = float((direction * image).sum())
        if not curvature > 0:
            break
        step = size / curvature
        x, residual = x + step * direction, residual - step * image
        scaled = precondition(residual)
        size, before = float((residual * scaled).sum()), size
        direction = scaled + size / before * direction
    return x
