"""Weights put on a grid or to zero, column by column, while the columns that are left make up for it.

    least tr (Q - W) H (Q - W)ᵀ,   H = R Rᵀ,  R upper triangular
    column j of (Q - W) R is R_jj (q_j - v_j),   v_j = w_j - Σ_{i<j} (q_i - w_i) R_ij / R_jj

v_j is what the weight has become once the columns before j are chosen and all from j on are free to follow; choosing
q_j costs R_jj² ‖q_j - v_j‖² and nothing else. R_jj⁻² is the first of the inverse Hessian of the columns from j on: so
it is Optimal Brain Surgeon (Hassibi and Stork 1993, equation 5) in a fixed order for all outputs at a time: Frantar
and Alistarh 2022 (Optimal Brain Compression, arXiv:2208.11580), Frantar et al. 2023 (GPTQ, arXiv:2210.17323), Frantar
and Alistarh 2023 (SparseGPT, arXiv:2301.00774, section 3); they go by the inverse of H, this by H itself.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import InputError

Choose = Callable[[Tensor, int], Tensor]
Begin = Callable[[Tensor, Tensor, int], Choose]


def error_feedback(matrix: Tensor, gram: Tensor, begin: Begin, *, block: int = 128, ridge: float = 1e-4) -> Tensor:
    """Q (outputs, features), float64: `matrix` W as the choices make it, each made up for by the columns after it.

    `gram`: H (features, features), second moments of the features; their covariance where the bias is free.
    `begin(columns, curvature, start)` is called at the first column of each block, with what the weights (outputs,
    width) have become by then and R_jj² (width,): choosing q for v in column j raises the squared output error by
    curvature[j] (q - v)². It returns `choose(column, j)`, called in order for j = 0 … width - 1, counted from `start`,
    with what that column (outputs,) has become: it gives the values that are kept.
    `block`: columns per block. `ridge`: λ in parts of the mean diagonal of H, added to it; more where H with it is not
    positive definite in floating point.

    Later columns follow as if they were free. Where much is yet to go from them too, as with a mask that is known
    beforehand, solving for what is left is better: no choice is guaranteed less error than without compensation.

    Raises:
        InputError: H or W holds NaN or infinity.
    """
    weights = matrix.detach().double().cpu()
    if not bool(weights.isfinite().all()):
        raise InputError("the weights hold NaN or infinity", fix="repair the model, or exclude the layer")
    root = _root(gram.detach().double().cpu(), ridge)
    result, change = torch.empty_like(weights), torch.empty_like(weights)
    for start in range(0, weights.shape[1], block):
        stop = min(start + block, weights.shape[1])
        own = torch.linalg.inv(root[start:stop, start:stop]).triu_()
        current = weights[:, start:stop] - change[:, :start] @ root[:start, start:stop] @ own
        result[:, start:stop] = _block(current, own, begin, start)
        change[:, start:stop] = result[:, start:stop] - weights[:, start:stop]
    return result


def _block(columns: Tensor, inverse: Tensor, begin: Begin, start: int) -> Tensor:
    """The values chosen for one block; `inverse` is that of its part of R."""
    current = columns.T.contiguous()  # (width, outputs): a column is contiguous
    scales = inverse.diagonal()
    choose = begin(columns, scales.pow(-2), start)
    for j in range(len(current)):
        kept = choose(current[j], j).to(current)
        error = (kept - current[j]) / scales[j]
        current[j + 1 :].addr_(inverse[j, j + 1 :], error)
        current[j] = kept
    return current.T


def _root(gram: Tensor, ridge: float) -> Tensor:
    """Upper triangular R with R Rᵀ = H + λ."""
    if not bool(gram.isfinite().all()):
        raise InputError("the second moments hold NaN or infinity", fix="look for them in the calibration data")
    mean = float(gram.diagonal().mean())
    damping = ridge * mean if mean > 0 else 1.0
    backwards = gram.flip(0, 1)
    while True:
        damped = backwards.clone()
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            root: Tensor = lower.flip(0, 1)
            return root
        damping = max(10 * damping, 1e-12 * mean)
