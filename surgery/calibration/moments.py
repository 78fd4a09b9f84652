"""Statistics of streamed values: what calibration gathers and how it adds up.

Second moments are taken about a shift, the mean of the first chunk, so that large means cost no precision:

    S = Σ (x - s)(x - s)ᵀ,  t = Σ (x - s):   mean = s + t/n,   covariance = S/n - (t/n)(t/n)ᵀ

Products are formed in the data's precision (at least float32) chunk by chunk and summed in float64. All results are
float64 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

RIDGE = 1e-4
"""λ of `Moments.damping`, in parts of the mean variance of the features."""
SCARCITY = 1e-2
"""Least such λ times rows per feature."""
NOISE = 1e-6
"""Least λ in parts of the features' mean power E[x²]: what varies by less than a thousandth of its size is hardly more
than rounding, and weights large enough to tell it apart would show the rounding in the output."""
ROUNDING = 1e-6
"""What products of float32 are off by, in parts of their size: a rest below it is no knowledge."""
TINY = torch.finfo(torch.float32).tiny
"""Products of float32 that are smaller are zero, or hold few digits."""


@dataclass(frozen=True)
class Moments:
    """First and second moments of rows (groups, rows, features). `covariance` only where it was asked for."""

    count: int
    """Number of rows per group."""
    mean: Tensor
    """(groups, features)"""
    variance: Tensor
    """(groups, features), population variance"""
    covariance: Tensor | None = None
    """(groups, features, features)"""

    @property
    def gram(self) -> Tensor:
        """E[x xᵀ] (groups, features, features)."""
        return self.full_covariance + self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    @property
    def power(self) -> Tensor:
        """E[x²] (groups, features), the diagonal of `gram`."""
        return self.variance + self.mean.square()

    @property
    def spread(self) -> float:
        """Variance of all features together, at least what rounding makes of their size: > 0 where nothing varies."""
        return max(float(self.variance.sum()), ROUNDING**2 * float(self.power.sum()), TINY)

    @property
    def full_covariance(self) -> Tensor:
        """`covariance`, which must have been asked for."""
        assert self.covariance is not None, "ask for 'gram'"
        return self.covariance

    def damping(self, ridge: float | None = None) -> Tensor:
        """λ (groups,) > 0: `ridge` times the mean variance of the features.

        None: `RIDGE`, more where there are few rows for the features, so that they are not fitted by heart. Either way
        at least `NOISE` times their mean power.
        """
        if ridge is None:
            ridge = max(RIDGE, SCARCITY * self.mean.shape[1] / self.count)
        return torch.maximum(ridge * self.variance.mean(1), NOISE * self.power.mean(1)).clamp_min(TINY)

    def regression(self, weight: Tensor, bias: Tensor | None) -> Regression:
        """The task of computing W x + b of these rows x; W (groups, outputs, features), b (groups, outputs)."""
        w = weight.detach().double().cpu()
        y_mean = _times(w, self.mean) + (0 if bias is None else bias.detach().double().cpu())
        yx = w @ self.full_covariance
        return Regression(self.count, self.mean, y_mean, self.full_covariance, yx, (yx * w).sum(2))


@dataclass(frozen=True)
class Regression:
    """The task of predicting targets y from rows x by W x + b, in moments, per group.

    Means (groups, features) and (groups, outputs); covariances xx (groups, features, features), yx (groups, outputs,
    features) and the variances y_variance (groups, outputs).
    """

    count: int
    x_mean: Tensor
    y_mean: Tensor
    xx: Tensor
    yx: Tensor
    y_variance: Tensor

    @classmethod
    def of(cls, joint: Moments, features: int) -> Regression:
        """From the moments of rows [x, y]."""
        mean, c, f = joint.mean, joint.full_covariance, features
        return cls(joint.count, mean[:, :f], mean[:, f:], c[:, :f, :f], c[:, f:, :f], joint.variance[:, f:])

    def through(self, matrix: Tensor) -> Regression:
        """The same targets from z = M x, M (features', features) and one group."""
        m = matrix.double().unsqueeze(0)
        return replace(self, x_mean=_times(m, self.x_mean), xx=m @ self.xx @ m.mT, yx=self.yx @ m.mT)

    def solve(self, towards: Tensor, ridge: float | None = None, image: Tensor | None = None) -> Tensor:
        """W (groups, outputs, features) with the least E‖y - W x - b‖² + λ‖W - `towards`‖² for the best b.

        λ is that of `damping`, so that directions which the data does not show keep the weight they have.
        `image`: `towards` · xx, where it is known.
        """
        start = towards.detach().double().cpu()
        rest = self.yx - (start @ self.xx if image is None else image)
        if float(rest.square().sum()) <= ROUNDING**2 * float(self.yx.square().sum()):
            return start
        damped = self.xx + torch.diag_embed(self.damping(ridge).unsqueeze(1).expand(-1, self.xx.shape[1]))
        change: Tensor = torch.linalg.solve(damped, rest, left=False)
        return start + change

    def damping(self, ridge: float | None = None) -> Tensor:
        """λ (groups,) > 0 of `Moments.damping` of the rows."""
        variance = self.xx.diagonal(dim1=1, dim2=2)
        return Moments(self.count, self.x_mean, variance).damping(ridge)

    def bias(self, weight: Tensor) -> Tensor:
        """The best b (groups, outputs) for W: the mean output is then the mean target."""
        return self.y_mean - _times(weight.detach().double().cpu(), self.x_mean)

    def error(self, weight: Tensor, bias: Tensor | None, image: Tensor | None = None) -> float:
        """√(E‖y - W x - b‖² / E‖y - E y‖²): 0 = no error, 1 = no better than predicting the mean target.

        In parts of what rounding makes of y where y varies by less than that, as behind layers that have died.
        `image`: `weight` · xx, where it is known.
        """
        w = weight.detach().double().cpu()
        offset = self.bias(w) - (0 if bias is None else bias.detach().double().cpu())
        total = float(self.y_variance.sum())
        rest = total - 2 * float((w * self.yx).sum()) + float(((w @ self.xx if image is None else image) * w).sum())
        error = max(0.0, rest) + float(offset.square().sum())
        return math.sqrt(error / Moments(self.count, self.y_mean, self.y_variance).spread)


def _times(weight: Tensor, vector: Tensor) -> Tensor:
    """W (groups, outputs, features) times (groups, features)."""
    return (weight @ vector.unsqueeze(2)).squeeze(2)


class Scatter:
    """Adds up `Moments` of rows; `full` keeps the covariance and not just its diagonal."""

    def __init__(self, full: bool) -> None:
        self.full, self.count = full, 0
        self._shift = self._total = self._products = torch.empty(0)

    def add(self, rows: Tensor) -> None:
        """`rows` (groups, rows, features)."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if not self.count:
            self._start(rows)
        centred = rows - self._shift.to(rows.dtype)
        self._products += centred.mT @ centred if self.full else centred.square().sum(1)
        self._total += centred.sum(1)
        self.count += rows.shape[1]

    def _start(self, rows: Tensor) -> None:
        groups, _, features = rows.shape
        self._shift = rows.mean(1, keepdim=True)
        self._total = rows.new_zeros(groups, features, dtype=torch.float64)
        self._products = rows.new_zeros(groups, features, *[features] * self.full, dtype=torch.float64)

    @property
    def finite(self) -> bool:
        return bool(self._total.isfinite().all())

    def finish(self) -> Moments:
        """The moments so far. Takes the sums over: call once."""
        offset = (self._total / self.count).cpu()
        mean = self._shift.squeeze(1).double().cpu() + offset
        second = self._products.cpu().div_(self.count)
        if not self.full:
            return Moments(self.count, mean, (second - offset.square()).clamp_min(0))
        second.baddbmm_(offset.unsqueeze(2), offset.unsqueeze(1), alpha=-1)
        return Moments(self.count, mean, second.diagonal(dim1=1, dim2=2).clamp_min(0), second)
