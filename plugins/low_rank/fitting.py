"""A layer's factors, near to its weight or to what its output should be. Runs in any process."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from surgery import Regression

from .chain import Chain, Factors
from .kernel import DAMPING, Kernel
from .method import Method, Ranks


@dataclass(frozen=True)
class Fit:
    """Factors with the bias (O,) that goes with them, None = the layer's own, and their errors.

    `weight_error`: ‖W - W'‖ / ‖W‖. `output_error`: √(E‖y - y'‖² / E‖y - E y‖²), None without data.
    """

    factors: Factors
    bias: Tensor | None
    weight_error: float
    output_error: float | None

    @property
    def matrix(self) -> Tensor:
        """W' (1, O, I·k)"""
        return self.factors.product.flatten(1).unsqueeze(0)


def fit(method: Method, weight: Tensor, ranks: Ranks, regression: Regression | None) -> Fit:
    """Factors near `weight` (O, I, *k), or whose outputs are near the targets of `regression` (the metric)."""
    weight = weight.double()
    if regression is None:
        factors = method.decompose(Kernel(weight), ranks)
        return Fit(factors, None, Kernel(weight).error(factors.product), None)
    goal = regression.solve(weight.flatten(1).unsqueeze(0))
    factors = method.decompose(Kernel(goal[0].view(weight.shape), regression.xx[0]), ranks)
    return judged(refitted(factors, regression), weight, regression)


def refitted(factors: Factors, regression: Regression) -> Factors:
    """A chain with the last stage that is best for the others: least squares on what it is given."""
    if not isinstance(factors, Chain):
        return factors
    solved = regression.through(factors.features).solve(factors.last.unsqueeze(0), DAMPING)
    return factors.with_last(solved[0])


def judged(factors: Factors, weight: Tensor, regression: Regression, bias: Tensor | None = None) -> Fit:
    """Factors with their errors and `bias` (O,), None = the best for `regression`."""
    matrix = factors.product.flatten(1).unsqueeze(0)
    bias = regression.bias(matrix)[0] if bias is None else bias
    error = regression.error(matrix, bias.unsqueeze(0))
    return Fit(observed(factors, regression), bias, Kernel(weight.double()).error(factors.product), error)


def measured(found: Fit, regression: Regression, bias: Tensor | None) -> Fit:
    """A fit to the weight with the error of its output, for the report."""
    error = regression.error(found.matrix, None if bias is None else bias.unsqueeze(0))
    return Fit(observed(found.factors, regression), found.bias, found.weight_error, error)


def observed(factors: Factors, regression: Regression) -> Factors:
    """With BatchNorms between them that know the data."""
    return factors.observed(regression.x_mean[0], regression.xx[0]) if isinstance(factors, Chain) else factors
