"""Weights rounded one column after the other, each error made up for by the columns that are left.

Frantar et al. 2023 (GPTQ, arXiv:2210.17323, section 3), which rounds as Optimal Brain Compression does, in one order
for all outputs; `surgery.error_feedback` says how. Columns that meet the strongest inputs go first, while most are
left; in the end coordinate descent goes on from what was found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import surgery

from .rounding import better, descended, in_steps, nearest
from .scheme import Scheme

Choose = Callable[[Tensor, int], Tensor]


def gptq(matrix: Tensor, gram: Tensor, scheme: Scheme, *, zeros: Tensor | None = None, ridge: float = 1e-2) -> Tensor:
    """Integers (groups, outputs, features), float64, for W of that shape: an output channel never costs more than
    rounded to the nearest.

    `gram`: E[x xᵀ] (groups, features, features), or the covariance where the bias is corrected after. `scheme`:
    symmetric, one scale or one for each output. `zeros`: places (groups, outputs, features) that stay zero. `ridge`:
    λ in parts of the mean of the Gram matrix's diagonal.

    Raises:
        InputError: W or the Gram matrix holds NaN or infinity.
    """
    steps = in_steps(matrix, scheme)
    rounded = [
        _rounded(w, g, scheme, None if zeros is None else zeros[i], ridge)
        for i, (w, g) in enumerate(zip(steps, gram, strict=True))
    ]
    found = descended(steps, torch.stack(rounded), gram, scheme, zeros)
    return better(steps, gram, nearest(steps, scheme, zeros), found)


def _rounded(steps: Tensor, gram: Tensor, scheme: Scheme, zeros: Tensor | None, ridge: float) -> Tensor:
    """One group, its columns in order of their inputs' power."""
    order = gram.diagonal().argsort(descending=True, stable=True)
    kept = None if zeros is None else zeros[:, order]

    def begin(columns: Tensor, curvature: Tensor, start: int) -> Choose:
        return lambda column, j: nearest(column, scheme, None if kept is None else kept[:, start + j])

    found = surgery.error_feedback(steps[:, order], gram[order][:, order], begin, ridge=ridge)
    return torch.empty_like(found).index_copy_(1, order, found)
