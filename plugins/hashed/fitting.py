"""Shared values nearest to a layer: to its weight, or to what its output should be.

    f(w) = Σ_o E (y_o - g_o V_o x - b_o)² + λ ‖W - g V‖²,   V = H w,   H places every value with its signs (`looked_up`)
    Hᵀ[g² (H w) (Σ + λ)] = Hᵀ[g (yx + λ W)]                 W, V (groups, outputs, features)

Σ is the covariance of the unfolded input, yx that of the target with it, g the gain of a BatchNorm behind the layer,
otherwise 1. Conjugate gradients solve for w: a step takes one product with Σ. Then each g_o is the best for its V_o.
Without Σ the optimum is the mean of ξ W over each bucket. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import surgery
from surgery import Regression, Task

from .hashing import looked_up, sizes, summed

STEPS = 30
TOLERANCE = 1e-4
"""Of conjugate gradients, at a time."""
ROUNDS = 2
"""Of values and gains in turn."""
LEAST = 1e-3
"""Least gain to begin with, in parts of the largest."""
FLOOR = 1e-4
"""Least importance of a feature, in parts of the mean: weights that the data does not show count a little."""


@dataclass(frozen=True)
class Layout:
    """H: `places` (n,) in the order of W (groups, outputs, features), `count` K."""

    places: Tensor
    shape: tuple[int, int, int]
    count: int

    def spread(self, values: Tensor) -> Tensor:
        """H w (groups, outputs, features)"""
        return looked_up(values, self.places, self.shape)

    def gathered(self, matrix: Tensor) -> Tensor:
        """Hᵀ V (K,)"""
        return summed(matrix.reshape(-1), self.places, self.count)

    def totals(self, weights: Tensor) -> Tensor:
        """Sums of weights, which carry no sign, over every bucket (K,)."""
        spread = weights.expand(self.shape).reshape(-1)
        return spread.new_zeros(self.count).index_add_(0, self.places % self.count, spread)

    def mean(self, matrix: Tensor) -> Tensor:
        """The values nearest to W: the mean of ξ W over every bucket (equation 12 set to zero), 0 for an empty one."""
        return self.gathered(matrix) / sizes(self.places, self.count).clamp_min(1)

    def weighted_mean(self, matrix: Tensor, importance: Tensor) -> Tensor:
        """The values with the least Σ p_f (W_of - V_of)², `importance` p (groups, 1, features)."""
        floor = importance.mean().clamp_min(1e-100) * FLOOR
        return self.gathered(matrix * (importance + floor)) / self.totals(importance + floor).clamp_min(1e-300)


@dataclass(frozen=True)
class Fit:
    """Values w (K,), V, the gain g (groups, outputs) where there is one, and the bias that goes with g V."""

    values: Tensor
    matrix: Tensor
    gain: Tensor | None
    bias: Tensor

    @property
    def map(self) -> Tensor:
        """g V (groups, outputs, features)"""
        return self.matrix if self.gain is None else self.gain.unsqueeze(2) * self.matrix


@dataclass(frozen=True)
class Problem:
    """f for one layer. `present`: W with the BatchNorm's factors (groups, outputs, features)."""

    layout: Layout
    regression: Regression
    present: Tensor

    @cached_property
    def damped(self) -> Tensor:
        """Σ + λ (groups, features, features)"""
        return self.regression.xx + torch.diag_embed(self._ridge.expand(-1, self.present.shape[2]))

    @cached_property
    def wanted(self) -> Tensor:
        """yx + λ W (groups, outputs, features)"""
        return self.regression.yx + self._ridge.unsqueeze(2) * self.present

    @cached_property
    def _ridge(self) -> Tensor:
        """λ (groups, 1): weights that the data does not show are drawn to what they were."""
        return self.regression.damping().unsqueeze(1)

    @property
    def spread(self) -> Tensor:
        """√(f(0)) per output (groups, outputs): gains with which values serve all outputs alike.

        At least `LEAST` of the largest: an output that never varies has no say in shared values, but its own have to be
        numbers that a weight can hold. 1 where none varies.
        """
        size = (self.regression.y_variance + self._ridge * self.present.square().sum(2)).sqrt()
        largest = size.max()
        return size.clamp_min(LEAST * float(largest)) if float(largest) > 1e-30 else torch.ones_like(size)

    def values(self, gain: Tensor, start: Tensor | None) -> Tensor:
        """w (K,) for the gain g (groups, outputs)."""
        squared, layout = gain.square().unsqueeze(2), self.layout
        diagonal = layout.totals(squared * self.damped.diagonal(dim1=1, dim2=2).unsqueeze(1)).clamp_min(1e-300)

        def apply(values: Tensor) -> Tensor:
            return layout.gathered(squared * (layout.spread(values) @ self.damped))

        goal = layout.gathered(gain.unsqueeze(2) * self.wanted)
        return surgery.conjugate_gradients(apply, goal, start, lambda r: r / diagonal, STEPS, TOLERANCE)

    def gain(self, values: Tensor, known: Tensor) -> Tensor:
        """g (groups, outputs) for w; as it is `known` where V_o is zero."""
        matrix = self.layout.spread(values)
        size = ((matrix @ self.damped) * matrix).sum(2)
        found = (matrix * self.wanted).sum(2) / size.clamp_min(1e-300)
        return torch.where((size > 0) & (found != 0), found, known)

    def fit(self, values: Tensor, gain: Tensor | None) -> Fit:
        """With the best bias for the values and the gain."""
        found = Fit(values, self.layout.spread(values), gain, self.regression.y_mean)
        return replace(found, bias=self.regression.bias(found.map))


def fit_outputs(problem: Problem, gain: Tensor | None, dtype: torch.dtype, task: Task | None) -> Fit:
    """Values, rounded to `dtype`, with the least error of the target; with a `task`, through a ReLU where one follows.

    `gain` (groups, outputs): what a BatchNorm behind the layer multiplies by, to begin with; None = there is none.
    """
    values, gain = _alternated(problem, gain, None)
    for _ in range(task.rounds if task else 0):
        assert task is not None
        found = problem.fit(values, gain)
        problem = replace(problem, regression=task.rectified(found.map, found.bias))
        values, gain = _alternated(problem, gain, values)
    return problem.fit(values.to(dtype).double(), gain)


def _alternated(problem: Problem, gain: Tensor | None, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if gain is None:
        return problem.values(torch.ones_like(problem.regression.y_mean), values), None
    for _ in range(ROUNDS):
        values = problem.values(gain, values)
        gain = problem.gain(values, gain)
    assert values is not None
    return values, gain
