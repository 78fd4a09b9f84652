"""Fewer inputs and fewer outputs: a kernel (O, F, B) behind a projection of its F input dimensions, before one onto O.

W ≈ W' = U C Aᵀ      A (F, s), C (p, s, B), U (O, p) orthonormal; F: input channels, or channels and kernel's first axis

Without data the three are a partial Tucker decomposition, found by orthogonal iteration (De Lathauwer et al. 2000,
algorithm 4.2), which for p = O is one singular value decomposition. With the covariance Σ (F·B, F·B) of the unfolded
input they minimise f = tr(Δ Σ Δᵀ), Δ = W - W'. Given A the inputs of C are z = (Aᵀ ⊗ 1) x, and the best U C is the
reduced-rank regression of the outputs on z (Izenman 1975); given U and C, f is quadratic in A. The two are solved in
turn, and f never rises.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from surgery import conjugate_gradients

from .engine import Engine, tensorly_tucker
from .kernel import Kernel, root, squared_values

SWEEPS = 50
"""Most rounds of orthogonal iteration."""
SETTLED = 1e-4
"""Orthogonal iteration ends when a round lowers the relative error by less, as in TensorLy."""
ROUNDS = 3
"""Most improvements of A in the output's metric."""
STEPS, NEAR = 8, 1e-2
"""Conjugate-gradient steps of one improvement, and the part of the residual at which they end."""
WORTH = 0.01
"""Part of f that an improvement has to take away for another to follow."""
LARGE = 2**20
"""Entries of a covariance from which on A is looked for in float32; C, U and f are always in float64."""


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


def project(kernel: Kernel, rank_out: int, rank_in: int, engine: Engine = "own") -> Projected:
    """The best that is found of a kernel (O, F, B); ranks p ≤ s·B and s ≤ p·B, or s = F."""
    if rank_in == kernel.weight.shape[1]:
        return Projected(None, kernel, rank_out)
    if kernel.covariance is None or rank_in == kernel.weight[:, 0].numel():  # of all of it
        plain = _iterated(kernel.weight, rank_out, rank_in, engine)
        return Projected(plain, Kernel(_seen(kernel, plain)), rank_out)
    plain, likely = (
        _iterated(tensor.to(_kind(kernel)), rank_out, rank_in, engine).double()
        for tensor in (kernel.weight, kernel.whitened)
    )
    starts = [torch.linalg.qr(a).Q for a in (plain, kernel.coloured(likely, 1))]
    return _improved(kernel, min((_solved(kernel, a, rank_out) for a in starts), key=lambda found: found[1]))


def kept(kernel: Kernel, most: int) -> Tensor:
    """(p, s), s ≤ `most`: the part of f(0) that the first p output and s input components keep, not improved."""
    inner = kernel.coloured(_leading(kernel.whitened, most), 1)
    if kernel.covariance is None:
        seen = _seen(kernel, inner)
    else:
        factor = root(_metric(kernel.covariance, inner))
        seen = torch.linalg.solve_triangular(factor.T, _moment(kernel, inner), upper=True, left=False)
        seen = seen.view(len(seen), inner.shape[1], -1)
    energies = torch.einsum("ofb,op->pfb", seen, kernel.basis[0]).square().sum(2)
    shares: Tensor = energies.cumsum(0).cumsum(1) / max(kernel.energy, 1e-300)
    return shares


# --- the weight's metric ---


def leading_values(tensor: Tensor) -> Tensor:
    """Squared singular values of (O, F, B) as a matrix (F, O·B), falling."""
    return squared_values(tensor.movedim(1, 0).flatten(1))


def _leading(tensor: Tensor, rank: int) -> Tensor:
    """The first left singular vectors (F, rank) of (O, F, B) as a matrix (F, O·B)."""
    return Kernel(tensor.movedim(1, 0)).basis[0][:, :rank]


def _iterated(tensor: Tensor, rank_out: int, rank_in: int, engine: Engine) -> Tensor:
    """P (F, s) orthonormal of a partial Tucker decomposition, by orthogonal iteration from the leading vectors."""
    inner = _leading(tensor, rank_in)
    if rank_out >= min(len(tensor), tensor[0].numel()):
        return inner
    if engine == "tensorly":
        return tensorly_tucker(tensor, inner, rank_out, SWEEPS, SETTLED)
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
    metric, moment = _metric(kernel.covariance, inner), _moment(kernel, inner)
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


def _metric(covariance: Tensor, inner: Tensor) -> Tensor:
    """(s·B, s·B): cov(z)."""
    half = _through(covariance, inner).transpose(2, 3)  # (s, B, B, F)
    rank, taps, _, size = half.shape
    metric = (half.reshape(-1, size) @ inner).view(rank, taps, taps, rank).transpose(2, 3).reshape(rank * taps, -1)
    return (metric + metric.T) / 2


def _moment(kernel: Kernel, inner: Tensor) -> Tensor:
    """(O, s·B): cov(y, z)."""
    return torch.einsum("ofb,fs->osb", kernel.moment.view(kernel.weight.shape), inner).flatten(1)


def _improved(kernel: Kernel, start: tuple[Projected, float]) -> Projected:
    """Better A, C and U by turns."""
    best, lost = start
    columns = _columns(kernel)
    for _ in range(ROUNDS):
        if lost <= 1e-14 * kernel.energy:
            break
        found, now = _solved(kernel, torch.linalg.qr(_better(kernel, columns, best)).Q, best.rank_out)
        if now >= lost:
            break
        gain, best, lost = 1 - now / lost, found, now
        if gain < WORTH:
            break
    return best


def _kind(kernel: Kernel) -> torch.dtype:
    """In which A is looked for."""
    large = kernel.covariance is not None and kernel.covariance.numel() >= LARGE
    return torch.float32 if large else torch.float64


def _columns(kernel: Kernel) -> Tensor:
    """Σ (F·B·B', F') in the order in which a product with A (F', s) needs no other."""
    assert kernel.covariance is not None
    size, taps = kernel.weight.shape[1:]
    return kernel.covariance.view(size, taps, size, taps).transpose(2, 3).to(_kind(kernel)).reshape(-1, size)


def _better(kernel: Kernel, columns: Tensor, best: Projected) -> Tensor:
    """A (F, s) nearer to the solution of H(A) = Cᵀ Uᵀ W Σ, by conjugate gradients from the one that `best` has.

    H(A)[f, s] = Σ (Cᵀ C)[s b, s' b'] Σ[f b, f' b'] A[f', s'], preconditioned by Σ and C Cᵀ without their B.
    """
    core = best.core.to(columns.dtype)
    assert best.inner is not None
    size, taps = kernel.weight.shape[1:]
    mixing = torch.einsum("psb,ptc->bcts", core, core).reshape(-1, core.shape[1])
    moment = kernel.moment if best.outer is None else best.outer.T @ kernel.moment
    goal = torch.einsum("pfb,psb->fs", moment.view(-1, size, taps).to(core.dtype), core)

    def hessian(a: Tensor) -> Tensor:
        return (columns @ a).view(size, -1) @ mixing  # (F, B·B'·s')

    spread = torch.einsum("fbbg->fg", columns.view(size, taps, taps, size))
    left, right = root(spread), root(torch.einsum("psb,ptb->st", core, core))

    def precondition(residual: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(residual, left).T, right).T

    found = conjugate_gradients(hessian, goal, best.inner.to(core.dtype), precondition, STEPS, NEAR)
    return found.to(best.inner.dtype)
