"""Scales of weights: symmetric, one for each output channel or one for all.

    minmax  s = max |w| / high                      no weight is clipped
    mse     s = argmin Σ p (w - s q)²,  q = clamp(round(w / s), low, high)

The latter tries shares of minmax and alternates from the best between q and the best scale for it, Σ p w q / Σ p q².
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .scheme import SMALLEST, Grid, Scheme, affine

FACTORS = 48
ROUNDS = 8
CHUNK = 2**18
"""Weights at a time, so that they stay in the processor's cache."""

WeightObserver = Literal["minmax", "mse"]


def weight_scheme(
    weight: Tensor,
    grid: Grid,
    per_channel: bool = True,
    observer: WeightObserver = "minmax",
    *,
    axis: int = 0,
    importance: Tensor | None = None,
) -> Scheme:
    """The symmetric scheme of a weight (…, channels, …), its channels along `axis`; float64 scales.

    `importance`: p ≥ 0 of `mse`, broadcast to the weight: how strong the input is that meets it, E[x²].
    """
    rows = _rows(weight.detach(), axis, per_channel)
    scale = affine(rows.amin(1), rows.amax(1), grid, symmetric=True).scale
    if observer == "mse":
        strength = None if importance is None else _rows(importance.expand(weight.shape), axis, per_channel)
        size = max(1, CHUNK // rows.shape[1])
        parts = [slice(start, start + size) for start in range(0, len(rows), size)]
        scale = torch.cat([_least(rows[p], scale[p], grid, None if strength is None else strength[p]) for p in parts])
    if not per_channel:
        scale = scale[0]
    return Scheme(scale, torch.zeros_like(scale, dtype=torch.int64), grid, axis if per_channel else None)


def _rows(weight: Tensor, axis: int, per_channel: bool) -> Tensor:
    return weight.movedim(axis, 0).flatten(1) if per_channel else weight.reshape(1, -1)


def _least(rows: Tensor, start: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """The best scale (rows,) that is found from `start`, the one that clips nothing."""
    w = rows.double()
    p = torch.ones_like(w) if importance is None else importance.double()
    best, least = start, _error(w, start, p, grid)
    for tried in torch.linspace(1, 0.15, FACTORS).tolist()[1:]:
        best, least = _better(best, least, tried * start, _error(w, tried * start, p, grid))
    for _ in range(ROUNDS):
        q = _integers(w, best, grid)
        fitted = (p * w * q).sum(1) / (p * q * q).sum(1).clamp_min(SMALLEST)
        fitted = fitted.where(fitted > SMALLEST, best)
        best, least = _better(best, least, fitted, _error(w, fitted, p, grid))
    return best


def _error(w: Tensor, scale: Tensor, p: Tensor, grid: Grid) -> Tensor:
    return (p * (w - _integers(w, scale, grid) * scale.unsqueeze(1)).square()).sum(1)


def _better(best: Tensor, least: Tensor, tried: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    return tried.where(error < least, best), torch.minimum(error, least)


def _integers(w: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    return (w / scale.unsqueeze(1)).round_().clamp_(grid.low, grid.high)
