"""What rounding costs: the mean squared error of a layer's outputs, as the Gram matrix of its inputs tells it.

    E‖(W - s Q) x‖² = Σ over outputs of s_i² d G dᵀ,   d = w_i / s_i - q_i,   G = E[x xᵀ]

Every output channel is a task of its own, and s_i² a factor of it: all here is in steps of the grid, W / s.
Matrices are (groups, outputs, features), Gram matrices (groups, features, features), as layers are unfolded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Scheme

BLOCK = 128
"""Columns."""
ROUNDS = 8


def in_steps(matrix: Tensor, scheme: Scheme) -> Tensor:
    """W / s (groups, outputs, features), float64. The scheme is symmetric: one scale, or one for each output."""
    scale = scheme.scale.double()
    return matrix.detach().double() / (scale.view(*matrix.shape[:2], 1) if scale.ndim else scale)


def nearest(steps: Tensor, scheme: Scheme, zeros: Tensor | None = None) -> Tensor:
    """The nearest integer of each; 0 where `zeros`."""
    found = steps.round().clamp_(scheme.grid.low, scheme.grid.high)
    return found if zeros is None else found.masked_fill_(zeros, 0)


def cost(steps: Tensor, integers: Tensor, gram: Tensor) -> Tensor:
    """d G dᵀ (groups, outputs) in squared steps of each output."""
    d = steps - integers
    return ((d @ gram.to(d)) * d).sum(2)


def better(steps: Tensor, gram: Tensor, *choices: Tensor) -> Tensor:
    """For every output channel the choice that costs least, the first of equals."""
    costs = torch.stack([cost(steps, choice, gram) for choice in choices])
    return torch.stack(choices).gather(0, costs.argmin(0)[None, ..., None].expand(1, *steps.shape))[0]


def descended(
    steps: Tensor,
    integers: Tensor,
    gram: Tensor,
    scheme: Scheme,
    zeros: Tensor | None = None,
    tolerance: float = 0.005,
) -> Tensor:
    """From `integers` on, every weight in turn takes the value that is best with all others as they are, round by round
    until one gains no more than `tolerance` of the cost, `ROUNDS` at most: no output channel costs more than before.

    Dimensions as above; blocks of columns at a time, so that most of the work is in matrix products.
    """
    found = integers.clone()
    for i, (now, wanted, g) in enumerate(zip(found, steps, gram.to(found), strict=True)):
        slope = (now - wanted) @ g
        before = ((now - wanted) * slope).sum()
        for _ in range(ROUNDS):
            for start in range(0, now.shape[1], BLOCK):
                part = slice(start, start + BLOCK)
                own = None if zeros is None else zeros[i, :, part]
                slope.addmm_(_turn(now[:, part], slope[:, part], g[part, part], scheme, own), g[part])
            after = ((now - wanted) * slope).sum()
            if not before - after > tolerance * before:
                break
            before = after
    return found


def _turn(integers: Tensor, slope: Tensor, gram: Tensor, scheme: Scheme, zeros: Tensor | None) -> Tensor:
    """Once through the columns of a block, `integers` in place; by how much they moved."""
    moved, current = torch.zeros_like(integers), slope.T.contiguous()
    for j, curvature in enumerate(gram.diagonal().tolist()):
        if curvature > 0:
            old = integers[:, j].clone()
            change = (current[j] / -curvature).round_()
            new = nearest(old + change, scheme, None if zeros is None else zeros[:, j])
            moved[:, j] = new - old
            integers[:, j] = new
            current.addr_(gram[j], moved[:, j])
    return moved
