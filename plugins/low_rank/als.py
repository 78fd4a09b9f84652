"""Sums of rank-one tensors (components) near a tensor: starts, and alternating least squares from them.

    T ≈ Σ_r a_r ∘ b_r ∘ c_r ∘ …        factors A (size, rank), B, C₁, C₂ …, one for every dimension

The best sum of a given length need not exist: components grow without bound and cancel (de Silva and Lim 2008).
Least is therefore made

    ‖T - T'‖² + λ (‖A‖² + ‖B‖² + …)

whose second part, least where a component has equal norms in all its factors, keeps the components small: the aim of
Phan et al. 2020 (arXiv:2008.05441).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .engine import Engine, tensorly_round


def assembled(factors: Sequence[Tensor]) -> Tensor:
    """T' of its factors."""
    sizes = [len(factor) for factor in factors]
    found: Tensor = (factors[0] @ khatri_rao(factors[1:]).T).view(sizes)
    return found


def khatri_rao(factors: Sequence[Tensor]) -> Tensor:
    """(product of the sizes, rank); the last factor's index runs fastest."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found.unsqueeze(1) * factor).flatten(0, 1)
    return found


def strengths(factors: Sequence[Tensor]) -> Tensor:
    """Norms of the components (rank,)."""
    return torch.stack([factor.norm(dim=0) for factor in factors]).prod(0)


def balanced(factors: Sequence[Tensor]) -> list[Tensor]:
    """The same components with equal norms in all factors, and the largest entry positive in all but the first."""
    size = strengths(factors) ** (1 / len(factors))
    found, sign = [], torch.ones_like(size)
    for factor in factors[1:]:
        largest = factor.gather(0, factor.abs().argmax(0, keepdim=True))[0]
        own = torch.where(largest < 0, -1.0, 1.0).to(factor.dtype)
        found.append(factor * (own * size / factor.norm(dim=0).clamp_min(1e-300)))
        sign = sign * own
    return [factors[0] * (sign * size / factors[0].norm(dim=0).clamp_min(1e-300)), *found]


def sliced(tensor: Tensor) -> tuple[list[Tensor], Tensor]:
    """Orthogonal components that add up to the tensor, largest first, and their squared norms.

    The two largest dimensions of the tensor make matrices, one for every index of the others, which are turned to their
    principal axes before; the components are those of the matrices' singular value decompositions.
    """
    rows, columns, *rest = sorted(range(tensor.ndim), key=lambda d: (-tensor.shape[d], d))
    turned, bases = tensor.permute(rows, columns, *rest), []
    for dim in range(2, tensor.ndim):
        unfolded = turned.movedim(dim, 0).flatten(1)
        bases.append(torch.linalg.eigh(unfolded @ unfolded.T)[1])
        turned = torch.tensordot(turned, bases[-1], ([dim], [0])).movedim(-1, dim)
    left, values, right = torch.linalg.svd(turned.flatten(2).movedim(-1, 0), full_matrices=False)
    energies, order = values.square().flatten().sort(descending=True, stable=True)
    number, place = order // values.shape[1], order % values.shape[1]
    found = {rows: left[number, :, place].T * values[number, place], columns: right[number, place].T}
    for dim, basis in reversed(list(zip(rest, bases, strict=True))):
        found[dim] = basis[:, number % len(basis)]
        number = number // len(basis)
    return [found[dim] for dim in range(tensor.ndim)], energies


def random_start(tensor: Tensor, rank: int, seed: int) -> list[Tensor]:
    """Random directions, together as large as the tensor."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(size, rank, generator=generator, dtype=tensor.dtype) for size in tensor.shape]
    size = (float(tensor.norm()) / math.sqrt(rank)) ** (1 / len(drawn))
    return [factor * (size / factor.norm(dim=0)) for factor in drawn]


def penalty(tensor: Tensor, rank: int, regularisation: float) -> float:
    """λ, with which equally large components, together as large as T, add `regularisation` N ‖T‖²."""
    return regularisation * math.pow(float(tensor.square().sum()) / rank, 1 - 1 / tensor.ndim)


def als(
    tensor: Tensor,
    start: Sequence[Tensor],
    damping: float,
    iterations: int,
    tolerance: float = 0.0,
    engine: Engine = "own",
) -> list[Tensor]:
    """Least squares for one factor after the other, until a round gains less than `tolerance` of what is lost.

    A round is one of TensorLy's `parafac` with λ `damping` for `l2_reg`, whoever does it.
    """
    slices = tensor.flatten(2).movedim(-1, 0).contiguous()  # (k, O, I)
    total, last = float(tensor.square().sum()), math.inf
    found = balanced(start) if damping else list(start)
    for _ in range(iterations):
        if engine == "tensorly":
            found = tensorly_round(tensor, found, damping)
            inner = float((tensor * assembled(found)).sum())
        else:
            found, inner = _round(slices, found, damping)
        lost = total - 2 * inner + float(_gram(found).sum()) + damping * sum(float(f.square().sum()) for f in found)
        if damping:
            found = balanced(found)
        if not last - lost > tolerance * lost:
            break
        last = lost
    return found


def _round(slices: Tensor, factors: Sequence[Tensor], damping: float) -> tuple[list[Tensor], float]:
    """New factors, and the inner product of T and T'.

    The whole tensor is multiplied twice instead of once for every dimension: with B, and with A, from which B and the
    smaller factors follow.
    """
    found = list(factors)
    seen = (slices @ found[1]) * khatri_rao(found[2:]).unsqueeze(1)
    found[0] = solved(seen.sum(0), found, 0, damping)
    seen = slices.mT @ found[0]
    found[1] = solved((seen * khatri_rao(found[2:]).unsqueeze(1)).sum(0), found, 1, damping)
    core = (seen * found[1]).sum(1).view(*map(len, found[2:]), -1)
    for dim in range(2, len(found)):
        found[dim] = solved(_contracted(core, found, dim), found, dim, damping)
    return found, float((core.flatten(0, -2) * khatri_rao(found[2:])).sum())


def _contracted(core: Tensor, factors: Sequence[Tensor], dim: int) -> Tensor:
    """(size, rank): `core` (*k, rank) summed over all of k but `dim`, by its factors."""
    found = core.movedim(dim - 2, 0)
    for other in range(2, len(factors)):
        if other != dim:
            found = (found * factors[other].view(-1, *(1,) * (found.ndim - 3), found.shape[-1])).sum(1)
    return found


def _gram(factors: Sequence[Tensor], but: int | None = None) -> Tensor:
    """(rank, rank): inner products of the components, without those of dimension `but`."""
    return torch.stack([f.T @ f for dim, f in enumerate(factors) if dim != but]).prod(0)


def solved(moment: Tensor, factors: Sequence[Tensor], dim: int, damping: float) -> Tensor:
    """The factor X (size, rank) of `dim` with X (G + λ) = `moment`, G the inner products of the other factors."""
    gram = _gram(factors, dim)
    scale = float(gram.diagonal().mean())
    gram.diagonal().add_(max(damping, 1e-12 * scale, 1e-100))
    half, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        found: Tensor = torch.linalg.lstsq(gram, moment.T, driver="gelsd").solution.T
        return found
    return torch.cholesky_solve(moment.T, half).T
