"""Fewer inputs and fewer outputs: a kernel (O, F, B) behind a projection of its F input dimensions, before one onto O.

W ≈ W' = U C Aᵀ      A (F, s), C (p, s, B), U (O, p) orthonormal; F: input channels, or channels and kernel's first axis

Without data the three are a partial Tucker decomposition, found by orthogonal iteration (De Lathauwer et al. 2000,
algorithm 4.2), which for p = O is one singular value decomposition. With the covariance Σ (F·B, F·B) of the unfolded
input they minimise f = tr(Δ Σ Δᵀ), Δ = W - W'. Given A the inputs of C are z = (Aᵀ ⊗ 1) x, and the best U C is the
reduced-rank regression of the outputs on z (Izenman 1975); given U and C, f is quadratic in A. The two are solved in
turn, and f never rises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from .kernel import Kernel, root

SWEEPS = 50
"""Most rounds of orthogonal iteration."""
SETTLED = 1e-4
"""Orthogonal iteration ends when a round lowers the relative error by less, as in TensorLy."""
ROUNDS = 3
"""Most improvements of A in the output's metric."""
STEPS = 8
"""Conjugate-gradient steps of one improvement."""
WORTH = 0.01
"""Part of f that an improvement has to take away for another to follow."""


@dataclass(frozen=True)
class Projected:
    """A (F, s) orthonormal, None = all of F, with what is left behind it: a kernel (O, s, B) in the metric of z."""

    inner: Tensor | None
    kernel: Kernel
    rank_out: int

    @cached_property
    def outer(self) -> Tensor | None:
        """U (O, p), None where p = O."""
        outputs = len(self.kernel.weight)
        return self.kernel.basis[0][:, : self.rank_out] if self.rank_out < outputs else None

    @cached_property
    def core(self) -> Tensor:
        """C (p, s, B)"""
        weight = self.kernel.weight
        return weight if self.outer is None else (self.outer.T @ weight.flatten(1)).view(-1, *weight.shape[1:])


def folded(kernel: Kernel, dims: int) -> Kernel:
    """(O, F, B): the first `dims` dimensions behind O as one, and the others."""
    weight, covariance = kernel.weight, kernel.covariance
    shape = (len(weight), prod(weight.shape[1 : 1 + dims]), prod(weight.shape[1 + dims :]))
    return Kernel(weight.reshape(shape), None if covariance is None else covariance.contiguous())


def project(kernel: Kernel, rank_out: int, rank_in: int) -> Projected:
    """The best that is found of a kernel (O, F, B); ranks p ≤ s·B and s ≤ p·B, or s = F."""
    if rank_in == kernel.weight.shape[1]:
        return Projected(None, kernel, rank_out)
    plain = _iterated(kernel.weight, rank_out, rank_in)
    if kernel.covariance is None or rank_in == kernel.weight[:, 0].numel():  # of all of it
        return Projected(plain, Kernel(_seen(kernel, plain)), rank_out)
    separable = kernel.whitened
    likely = (_leading(separable, rank_in), _iterated(separable, rank_out, rank_in))
    starts = [plain, *(torch.linalg.qr(kernel.coloured(p, 1)).Q for p in likely)]
    return _improved(kernel, min((_solved(kernel, a, rank_out) for a in starts), key=lambda found: found[1]))


def kept(kernel: Kernel, most: int) -> Tensor:
    """(p, s), s ≤ `most`: the part of f(0) that the first p output and s input components keep, not improved."""
    inner = kernel.coloured(_leading(kernel.whitened, most), 1)
    if kernel.covariance is None:
        seen = _seen(kernel, inner)
    else:
        half = _through(kernel.covariance, inner)
        factor = root(_metric(half, inner))
        moment = kernel.matrix @ half.flatten(2).flatten(0, 1).T
        seen = torch.linalg.solve_triangular(factor.T, moment, upper=True, left=False)
        seen = seen.view(len(moment), inner.shape[1], -1)
    energies = torch.einsum("ofb,op->pfb", seen, kernel.basis[0]).square().sum(2)
    shares: Tensor = energies.cumsum(0).cumsum(1) / max(kernel.energy, 1e-300)
    return shares


# --- the weight's metric ---


def leading_values(tensor: Tensor) -> Tensor:
    """Squared singular values of (O, F, B) as a matrix (F, O·B), falling."""
    matrix = tensor.movedim(1, 0).flatten(1)
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0)


def _leading(tensor: Tensor, rank: int) -> Tensor:
    """The first left singular vectors (F, rank) of (O, F, B) as a matrix (F, O·B)."""
    return Kernel(tensor.movedim(1, 0)).basis[0][:, :rank]


def _iterated(tensor: Tensor, rank_out: int, rank_in: int) -> Tensor:
    """P (F, s) orthonormal of a partial Tucker decomposition."""
    inner = _leading(tensor, rank_in)
    if rank_out >= min(len(tensor), tensor[0].numel()):
        return inner
    total, before = float(tensor.square().sum()), torch.inf
    for sweep in range(SWEEPS):
        outer = Kernel(torch.einsum("ofb,fs->osb", tensor, inner)).basis[0][:, :rank_out]
        seen = Kernel(torch.einsum("ofb,op->fpb", tensor, outer))
        vectors, values = seen.basis
        inner = vectors[:, :rank_in]
        error = (max(0.0, total - float(values[:rank_in].sum())) / max(total, 1e-300)) ** 0.5
        if sweep > 1 and before - error < SETTLED:
            break
        before = error
    return inner


# --- the output's metric ---


def _solved(kernel: Kernel, inner: Tensor, rank_out: int) -> tuple[Projected, float]:
    """The best C and U for A orthonormal, and their f."""
    assert kernel.covariance is not None
    half = _through(kernel.covariance, inner)
    metric = _metric(half, inner)
    moment = kernel.matrix @ half.flatten(2).flatten(0, 1).T
    old = _seen(kernel, inner)
    rest = moment - old.flatten(1) @ metric
    change = torch.cholesky_solve(rest.T, root(metric)).T
    found = Projected(inner, Kernel(old + change.view_as(old), metric), rank_out)
    made = found.core.flatten(1) if found.outer is None else found.outer @ found.core.flatten(1)
    lost = kernel.energy - float((made * (2 * moment - made @ metric)).sum())
    return found, max(0.0, lost)


def _seen(kernel: Kernel, inner: Tensor) -> Tensor:
    """(O, s, B): the weight in the coordinates of A orthonormal."""
    return torch.einsum("ofb,fs->osb", kernel.weight, inner)


def _through(covariance: Tensor, inner: Tensor) -> Tensor:
    """(s, B, F, B): cov(z, x)."""
    size, rank = inner.shape
    taps = len(covariance) // size
    return (inner.T @ covariance.view(size, -1)).view(rank, taps, size, taps)


def _metric(half: Tensor, inner: Tensor) -> Tensor:
    """(s·B, s·B): cov(z)."""
    rank, taps, size, _ = half.shape
    metric = (inner.T @ half.view(rank * taps, size, taps)).view(rank * taps, rank * taps)
    return (metric + metric.T) / 2


def _improved(kernel: Kernel, start: tuple[Projected, float]) -> Projected:
    """Better A, C and U by turns."""
    best, lost = start
    for _ in range(ROUNDS):
        if lost <= 1e-14 * kernel.energy:
            break
        found, now = _solved(kernel, torch.linalg.qr(_better(kernel, best)).Q, best.rank_out)
        if now >= lost:
            break
        gain, best, lost = 1 - now / lost, found, now
        if gain < WORTH:
            break
    return best


def _better(kernel: Kernel, best: Projected) -> Tensor:
    """A (F, s) nearer to the solution of H(A) = Cᵀ Uᵀ W Σ, by conjugate gradients from the one that `best` has.

    H(A)[f, s] = Σ (Cᵀ C)[s b, s' b'] Σ[f b, f' b'] A[f', s'], preconditioned by Σ and C Cᵀ without their B.
    """
    covariance, core = kernel.covariance, best.core
    assert covariance is not None
    assert best.inner is not None
    size, rank = best.inner.shape
    taps = len(covariance) // size
    mixing = torch.einsum("psb,ptc->stcb", core, core).reshape(rank, -1)
    weight = kernel.matrix if best.outer is None else best.outer.T @ kernel.matrix
    goal = torch.einsum("pfb,psb->fs", (weight @ covariance).view(-1, size, taps), core)

    def hessian(a: Tensor) -> Tensor:
        seen = _through(covariance, a).permute(2, 0, 1, 3).reshape(size, -1)  # (F, s'·B'·B)
        return seen @ mixing.T

    spread = torch.einsum("fbgb->fg", covariance.view(size, taps, size, taps))
    left, right = root(spread), root(torch.einsum("psb,ptb->st", core, core))

    def precondition(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).T, right).T

    return _descended(hessian, goal, best.inner, precondition)


def _descended(
    apply: Callable[[Tensor], Tensor], goal: Tensor, start: Tensor, precondition: Callable[[Tensor], Tensor]
) -> Tensor:
    """Nearer to `apply(x) = goal`, `apply` symmetric positive semidefinite, by conjugate gradients: every step lowers
    ½ x·apply(x) - x·goal."""
    x, residual = start, goal - apply(start)
    direction = scaled = precondition(residual)
    size = first = float((residual * scaled).sum())
    for _ in range(STEPS):
        image = apply(direction)
        curvature = float((direction * image).sum())
        if curvature <= 0 or size <= 1e-4 * first:
            break
        step = size / curvature
        x, residual = x + step * direction, residual - step * image
        scaled = precondition(residual)
        before, size = size, float((residual * scaled).sum())
        direction = scaled + size / before * direction
    return x
