"""Who does the alternating steps of a decomposition: this library, or TensorLy from the same start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Engine = Literal["own", "tensorly"]
DESCRIPTION = "who does the alternating steps: own, or TensorLy, slower to the same result"


def tensorly_tucker(tensor: Tensor, inner: Tensor, rank_out: int, sweeps: int, tolerance: float) -> Tensor:
    """P (F, s) orthonormal of a partial Tucker decomposition of (O, F, B), by `partial_tucker` from P `inner`."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    outer = tensor.new_zeros(len(tensor), rank_out)  # is made anew from `inner` before it is used
    start = (tensor, [outer, inner])
    ranks = (rank_out, inner.shape[1])
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        (_, factors), _ = partial_tucker(tensor, ranks, modes=[0, 1], n_iter_max=sweeps, init=start, tol=tolerance)
    found: Tensor = factors[1]
    return found


def tensorly_round(tensor: Tensor, factors: Sequence[Tensor], damping: float) -> list[Tensor]:
    """One round of least squares for every factor, by `parafac` with `damping` for `l2_reg`.

    Raises:
        PassError: the least squares have no single solution.
    """
    import tensorly
    from tensorly.cp_tensor import CPTensor
    from tensorly.decomposition import parafac

    from surgery import PassError

    rank = factors[0].shape[1]
    try:
        with tensorly.backend_context("pytorch", local_threadsafe=True):
            start = CPTensor((None, list(factors)))
            return list(parafac(tensor, rank, n_iter_max=1, init=start, tol=0, l2_reg=damping).factors)
    except RuntimeError as error:
        why = "; ".join(str(error).splitlines()[:1])
        raise PassError(f"TensorLy: {why}", fix="give regularisation, or engine: own") from error
