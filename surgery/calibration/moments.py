"""Statistics of streamed values: what calibration gathers and how it adds up.

Second moments are taken about a shift, the mean of the first chunk, so that large means cost no precision:

    S = Σ (x - s)(x - s)ᵀ,  t = Σ (x - s):   mean = s + t/n,   covariance = S/n - (t/n)(t/n)ᵀ

Products are formed in the data's precision (at least float32) chunk by chunk and summed in float64. All results are
float64 on the CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


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
        return self.required_covariance + self.mean.unsqueeze(2) * self.mean.unsqueeze(1)

    @property
    def power(self) -> Tensor:
        """E[x²] (groups, features), the diagonal of `gram`."""
        return self.variance + self.mean.square()

    @property
    def required_covariance(self) -> Tensor:
        assert self.covariance is not None, "ask for 'gram'"
        return self.covariance

    def bias_correction(self, before: Tensor, after: Tensor) -> Tensor:
        """(groups, outputs): what to add to the bias so that replacing W `before` by `after` leaves the mean output."""
        return ((before - after).double() @ self.mean.unsqueeze(2)).squeeze(2)

    def output_error(self, before: Tensor, after: Tensor, bias_change: Tensor | None = None) -> float:
        """√(E‖y - y'‖² / E‖y - E y‖²) for y = W x, y' = W' x + `bias_change`; W (groups, outputs, features).

        0 = no error, 1 = no better than predicting the mean output.
        """
        difference = (before - after).double()
        shift = self.bias_correction(before, after)
        offset = shift if bias_change is None else shift - bias_change.double()
        return relative_root(self.spread(difference) + float(offset.square().sum()), self.spread(before.double()))

    def spread(self, weight: Tensor) -> float:
        """E‖W(x - E x)‖², summed over outputs."""
        return max(0.0, float(((weight @ self.required_covariance) * weight).sum()))


@dataclass(frozen=True)
class Cross:
    """Moments of a layer's unfolded input x and of the target y its output should meet, per group.

    Means (groups, features) and (groups, outputs); covariances xx (groups, features, features), yx (groups, outputs,
    features) and yy (groups, outputs, outputs).
    """

    count: int
    x_mean: Tensor
    y_mean: Tensor
    xx: Tensor
    yx: Tensor
    yy: Tensor

    @classmethod
    def of(cls, joint: Moments, features: int) -> Cross:
        """From the moments of rows [x, y]."""
        mean, c, f = joint.mean, joint.required_covariance, features
        return cls(joint.count, mean[:, :f], mean[:, f:], c[:, :f, :f], c[:, f:, :f], c[:, f:, f:])

    def solve(self, towards: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
        """Weight (groups, outputs, features) and bias (groups, outputs) with the least E‖y - W x - b‖² + λ‖W -
        `towards`‖².

        λ is `ridge` times the mean variance of the features (> 0), so that directions which the data does not show keep
        the weight they have.
        """
        start = towards.double()
        scale = self.xx.diagonal(dim1=1, dim2=2).mean(1).clamp_min(torch.finfo(torch.float64).tiny)
        damping = torch.diag_embed((ridge * scale).unsqueeze(1).expand(-1, self.xx.shape[1]))
        rest = self.yx - start @ self.xx
        weight = start + torch.linalg.solve(self.xx + damping, rest, left=False)
        return weight, self.y_mean - (weight @ self.x_mean.unsqueeze(2)).squeeze(2)

    def error(self, weight: Tensor, bias: Tensor) -> float:
        """√(E‖y - W x - b‖² / E‖y - E y‖²): 0 = none, 1 = no better than predicting the mean."""
        w = weight.double()
        total = float(self.yy.diagonal(dim1=1, dim2=2).sum())
        rest = total - 2 * float((w * self.yx).sum()) + float(((w @ self.xx) * w).sum())
        offset = self.y_mean - (w @ self.x_mean.unsqueeze(2)).squeeze(2) - bias.double()
        return relative_root(max(0.0, rest) + float(offset.square().sum()), total)


def relative_root(error: float, reference: float) -> float:
    """√(error / reference); infinite where only the reference is 0."""
    if reference <= 0:
        return 0.0 if error <= 0 else math.inf
    return math.sqrt(error / reference)


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
