"""What is to be approximated: a layer's weight, and the metric in which it should be near.

    f(W') = tr(Δ Σ Δᵀ),   Δ = W - W' (O, I·k),   Σ (I·k, I·k) the covariance of the unfolded input

is the variance of the output's error; without data Σ = 1 and f is the squared error of the weight. The best W' of rank
r is U Uᵀ W, with U the first r eigenvectors of W Σ Wᵀ: the principal components of the output (Eckart and Young 1936;
Zhang et al. 2015, arXiv:1505.06798, section 3.1). Decompositions that treat input channels and kernel axes apart see Σ
through its separable part, Σ_I ⊗ Σ_1 ⊗ Σ_2 …, one matrix per dimension of W behind the first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

DAMPING = 1e-6
"""Added to a covariance, in parts of its mean variance, where it is inverted."""


@dataclass(frozen=True)
class Kernel:
    """`weight` (O, I, *k), no kernel axes for a linear layer, and `covariance` (I·k, I·k), None = the weight's metric.
    Both of one type: float64 but for starts."""

    weight: Tensor
    covariance: Tensor | None = None

    @property
    def matrix(self) -> Tensor:
        """(O, I·k)"""
        return self.weight.flatten(1)

    @cached_property
    def moment(self) -> Tensor:
        """W Σ (O, I·k): the covariance of the output with the unfolded input."""
        return self.seen(self.matrix)

    @cached_property
    def energy(self) -> float:
        """f(0): the squared weight, or the variance of the output."""
        return float((self.moment * self.matrix).sum())

    def error(self, product: Tensor) -> float:
        """√(f(W') / f(0)) of W' `product` (O, I, *k): 0 = none, 1 = no better than nothing, also where f(0) is 0."""
        rest = self.matrix - product.flatten(1)
        lost = float((self.seen(rest) * rest).sum())
        return math.sqrt(lost) / math.sqrt(self.energy if self.energy > 0 else lost) if lost > 0 else 0.0

    def seen(self, matrix: Tensor) -> Tensor:
        """M Σ of a matrix M (·, I·k)."""
        return matrix if self.covariance is None else matrix @ self.covariance

    @cached_property
    def basis(self) -> tuple[Tensor, Tensor]:
        """U (O, m) orthonormal and the part of f(0) that each column keeps (m,), falling; m = min(O, I·k)."""
        outputs, features = self.matrix.shape
        if outputs <= features:
            values, vectors = torch.linalg.eigh(self.moment @ self.matrix.T)
            return vectors.flip(1), values.flip(0).clamp_min(0)
        seen = self.matrix if self.covariance is None else self.matrix @ root(self.covariance)
        values, vectors = torch.linalg.eigh(seen.T @ seen)
        return torch.linalg.qr(seen @ vectors.flip(1)).Q, values.flip(0).clamp_min(0)

    @cached_property
    def roots(self) -> tuple[Tensor | None, ...]:
        """Per dimension of W behind the first a square root R of Σ's separable part, Σ_d = R Rᵀ; None = 1."""
        sizes = self.weight.shape[1:]
        if self.covariance is None:
            return (None,) * len(sizes)
        shaped = self.covariance.view(*sizes, *sizes)
        parts = [_partial_trace(shaped, dim) for dim in range(len(sizes))]
        scale = float(self.covariance.diagonal().sum()) ** (1 / len(parts))
        return tuple(root(part * (scale / float(part.trace()))) if float(part.trace()) > 0 else None for part in parts)

    @cached_property
    def whitened(self) -> Tensor:
        """W with the square roots multiplied on: its squared error is the separable part's f."""
        seen = self.weight
        for dim, r in enumerate(self.roots, start=1):
            seen = seen if r is None else torch.tensordot(seen, r, ([dim], [0])).movedim(-1, dim)
        return seen

    @cached_property
    def separated(self) -> Kernel:
        """`whitened` with what the metric then is: f is the same, and Σ nearer to 1."""
        if self.covariance is None:
            return self
        shaped = self.covariance.view(*self.weight.shape[1:], -1)
        shaped = _undone(shaped, self.roots).flatten(0, -2).T.view(*self.weight.shape[1:], -1)
        return Kernel(self.whitened, _undone(shaped, self.roots).flatten(0, -2))

    def coloured(self, factor: Tensor, dim: int) -> Tensor:
        """A factor (size, rank) of `whitened` along dimension `dim` of W as the factor of W that it stands for."""
        r = self.roots[dim - 1]
        if r is None:
            return factor
        found: Tensor = torch.linalg.solve_triangular(r.T, factor, upper=True)
        return found

    def uncoloured(self, factor: Tensor, dim: int) -> Tensor:
        """The reverse of `coloured`."""
        r = self.roots[dim - 1]
        return factor if r is None else r.T @ factor


def root(covariance: Tensor) -> Tensor:
    """Lower triangular R with R Rᵀ = covariance, damped as far as it takes to be positive definite."""
    size = max(float(covariance.diagonal().mean()), 1e-38)  # rounding may leave a dead layer less than nothing
    damping = DAMPING
    found: Tensor
    while True:
        damped = covariance.clone()
        damped.diagonal().add_(size * damping)
        found, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return found
        damping *= 10


def squared_values(matrix: Tensor) -> Tensor:
    """Squared singular values, falling."""
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values: Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0)


def _undone(shaped: Tensor, roots: tuple[Tensor | None, ...]) -> Tensor:
    """R⁻¹ of every root along the dimensions (*sizes, rest)."""
    for dim, r in enumerate(roots):
        if r is not None:
            moved = shaped.movedim(dim, 0)
            solved = torch.linalg.solve_triangular(r, moved.flatten(1), upper=False)
            shaped = solved.view(moved.shape).movedim(0, dim)
    return shaped


def _partial_trace(shaped: Tensor, dim: int) -> Tensor:
    """(size, size) of a covariance (*sizes, *sizes): the diagonal of every dimension but `dim` is summed."""
    rank = shaped.ndim // 2
    first, second = list(range(rank)), list(range(rank))
    second[dim] = rank
    return torch.einsum(shaped, [*first, *second], [dim, rank])
