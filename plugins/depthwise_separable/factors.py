"""A dense convolution as a depthwise and a pointwise one.

    W[o, c, κ] ≈ W'[o, c, κ] = Σ_j P[o, c, j] D[c, j, κ]          W (O, C, k), P (O, C, m), D (C, m, k), j < m

Input channel c is filtered by its own m kernels D[c]; P mixes the C·m results into O outputs. Without data the best P
and D are a truncated singular value decomposition of each W[:, c] (Eckart and Young 1936). With the covariance Σ
(C·k, C·k) of the unfolded input they minimise the variance of the output's error,

    f(P, D) = tr(Δ Σ Δᵀ),   Δ = W - W' (O, C·k),

which is quadratic in P for given D and in D for given P: the two are solved in turn, and f never rises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import conjugate_gradients

RIDGE = 1e-4
"""Added to the covariance, times its mean variance: directions that the data does not show keep a little weight."""
TOLERANCE = 3e-4
"""The alternation stops when one round lowers f by less than this part."""
STEPS, NEAR = 20, 1e-3
"""Conjugate-gradient steps of one solution for D, and the part of the residual at which they end."""


@dataclass(frozen=True)
class Factors:
    """P `pointwise` (O, C, m) and D `depthwise` (C, m, k), float64."""

    pointwise: Tensor
    depthwise: Tensor

    @property
    def product(self) -> Tensor:
        """W' (O, C, k)."""
        return torch.einsum("ocj,cjk->ock", self.pointwise, self.depthwise)


def nearest(weight: Tensor, multiplier: int) -> Factors:
    """The factors whose product is nearest to `weight` (O, C, k); `multiplier` is m ≤ min(O, k)."""
    left, values, right = torch.linalg.svd(weight.double().transpose(0, 1), full_matrices=False)
    root = values[:, :multiplier].sqrt()
    pointwise = (left[:, :, :multiplier] * root.unsqueeze(1)).transpose(0, 1)
    return Factors(pointwise, root.unsqueeze(2) * right[:, :multiplier])


def weight_error(weight: Tensor, product: Tensor) -> float:
    """‖W - W'‖ / ‖W‖: 0 = none, 1 = no better than predicting zero."""
    norm = float(weight.double().norm())
    return float((weight.double() - product.double()).norm()) / norm if norm else 0.0


def fit(weight: Tensor, covariance: Tensor, start: Factors, rounds: int) -> Factors:
    """Lower f from `start` by at most `rounds` rounds of solving for P and for D."""
    target = weight.double().flatten(1)
    metric = covariance + RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    moment = target @ metric
    total = float((moment * target).sum())
    if total <= 0:
        return start
    factors, gain = _solve_pointwise(moment, metric, start)
    for _ in range(rounds):
        factors = _solve_depthwise(moment, metric, factors)
        before = gain
        factors, gain = _solve_pointwise(moment, metric, factors)
        if gain - before <= TOLERANCE * (total - before) or total - gain <= 1e-14 * total:
            break
    return factors


def _solve_pointwise(moment: Tensor, metric: Tensor, factors: Factors) -> tuple[Factors, float]:
    """P = W Σ Bᵀ (B Σ Bᵀ)⁻¹ with B (C·m, C·k) the depthwise convolution as a matrix; and tr(W Σ Wᵀ) - f."""
    half = _apply_depthwise(metric, factors.depthwise)  # Σ Bᵀ
    inner = _apply_depthwise(half.T, factors.depthwise)
    right = _apply_depthwise(moment, factors.depthwise)
    old = factors.pointwise.flatten(1)
    damping = 1e-10 * inner.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped = inner + damping * torch.eye(len(inner), dtype=torch.float64)
    new = old + torch.linalg.solve(damped, right - old @ inner, left=False)
    gain = float((new * (2 * right - new @ inner)).sum())
    return Factors(new.view_as(factors.pointwise), factors.depthwise), gain


def _apply_depthwise(rows: Tensor, depthwise: Tensor) -> Tensor:
    """rows (n, C·k) times Bᵀ: (n, C·m)."""
    channels, _, kernel = depthwise.shape
    return torch.einsum("nck,cjk->ncj", rows.view(-1, channels, kernel), depthwise).flatten(1)


def _solve_depthwise(moment: Tensor, metric: Tensor, factors: Factors) -> Factors:
    """The normal equations H d = Pᵀ W Σ, H[cjκ, c'j'κ'] = (PᵀP)[cj, c'j'] Σ[cκ, c'κ'], by conjugate gradients."""
    p, d = factors.pointwise, factors.depthwise
    channels, multiplier, kernel = d.shape
    mixing = torch.einsum("ocj,odi->cjdi", p, p)
    by_channel = metric.view(channels, kernel, channels, kernel)
    columns = metric.view(channels * kernel, channels, kernel).transpose(0, 1).contiguous()

    def hessian(v: Tensor) -> Tensor:
        seen = torch.bmm(columns, v.transpose(1, 2)).view(channels, channels, kernel, multiplier)  # (d, c, k, i)
        return torch.einsum("dcki,cjdi->cjk", seen, mixing)

    own = torch.arange(channels)
    left = _inverse(mixing[own, :, own])
    right = _inverse(by_channel[own, :, own])
    goal = torch.einsum("ocj,ock->cjk", p, moment.view(-1, channels, kernel))
    return Factors(p, conjugate_gradients(hessian, goal, d, lambda r: left @ r @ right, STEPS, NEAR))


def _inverse(blocks: Tensor) -> Tensor:
    """Of positive semidefinite blocks (n, a, a), zero ones included, for preconditioning only."""
    scale = blocks.diagonal(dim1=1, dim2=2).mean(1)
    damping = 1e-8 * (scale + scale.mean()) + 1e-100
    inverse: Tensor = torch.linalg.inv(blocks + torch.diag_embed(damping.unsqueeze(1).expand(-1, blocks.shape[1])))
    return inverse
