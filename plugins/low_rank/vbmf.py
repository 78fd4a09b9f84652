"""The rank of a matrix of signal and noise, by empirical variational Bayesian matrix factorisation.

V (L, M), L ≤ M, is taken for B Aᵀ + noise of variance σ², with Gaussian priors on the columns of A and B whose
variances are learned. Nakajima et al. 2013 (JMLR 14, pages 1-37) solve this in closed form: a component with singular
value γ stays if γ² > M σ² x̲, and σ² is the minimum of a function of one variable. In the form of Nakajima et al. 2015
(JMLR 16, pages 3757-3811), with α = L / M and x_h = γ_h² / (M σ²):

    x̲ = (1 + τ̲) (1 + α / τ̲),   Φ(τ̲) + Φ(τ̲ / α) = 0,   Φ(z) = log(1 + z) / z - 1/2
    Ω(σ²) = Σ_h x_h - log x_h + [x_h > x̲] (log(1 + τ_h) + α log(1 + τ_h / α) - τ_h),   x = (1 + τ) (1 + α / τ)
"""

from __future__ import annotations

from math import ceil, log, log1p

import torch
from torch import Tensor

GRID = 256
"""Noise levels that are tried at a time; the function may have several minima."""
ROUNDS = 4
"""Finer grids around the best noise level."""
LEAST = 1e-12
"""Share of the mean square below which there is no noise."""


def evbmf_rank(matrix: Tensor) -> int:
    """How many components of a matrix, 0 ... its smaller side, stand out from its noise."""
    short, long = sorted(matrix.shape)
    squared = torch.linalg.svdvals(matrix.double()).square() / long  # x σ², falling
    if not float(squared.sum()) > 0:
        return 0
    ratio = short / long
    least = threshold(ratio)
    noise = noise_level(squared / squared.sum(), ratio, least) * squared.sum()
    return int((squared > noise * least).sum())


def threshold(ratio: float) -> float:
    """x̲ of α."""
    low, high = 0.0, 3.0  # Φ falls; at α = 1 its zero is 2.5129, and lower below
    for _ in range(60):
        middle = (low + high) / 2
        if _phi(middle) + _phi(middle / ratio) > 0:
            low = middle
        else:
            high = middle
    return (1 + high) * (1 + ratio / high)


def _phi(z: float) -> float:
    return log1p(z) / z - 0.5


def noise_level(squared: Tensor, ratio: float, least: float) -> float:
    """σ² of `squared` (L,), γ² / M: the lowest Ω between its bounds, on a logarithmic grid that is refined."""
    short = len(squared)
    most = min(ceil(short / (1 + ratio)) - 1, short - 1)  # components there can be at most
    upper = float(squared.mean())
    lower = max(float(squared[most]) / least, float(squared[most:].mean()), upper * LEAST)
    low, high = log(lower), log(max(lower, upper))
    best = high
    for _ in range(ROUNDS):
        tried = torch.linspace(low, high, GRID, dtype=torch.float64)
        best = float(tried[_energies(squared, tried.exp(), ratio, least).argmin()])
        width = (high - low) / (GRID - 1)
        low, high = best - width, best + width
    return float(torch.tensor(best, dtype=torch.float64).exp())


def _energies(squared: Tensor, noise: Tensor, ratio: float, least: float) -> Tensor:
    """Ω (n,) of noise levels (n,), up to a constant."""
    x = squared / noise.unsqueeze(1)
    spread = x.clamp_min(least) - (1 + ratio)
    tau = (spread + (spread.square() - 4 * ratio).clamp_min(0).sqrt()) / 2
    gain = torch.where(x > least, tau.log1p() + ratio * (tau / ratio).log1p() - tau, 0.0)
    return (x + gain).sum(1) + len(squared) * noise.log()
