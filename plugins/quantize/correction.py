"""Biases that take the mean error of rounding off the outputs.

    E[ŷ] - E[y] = (Ŵ - W) E[x]      b' = b - (Ŵ - W) E[x]

Nagel et al. 2019 (arXiv:1906.04721, section 4.2), with the means that the calibration data shows.
"""

from __future__ import annotations

from torch import Tensor

from surgery import Regression


def correction(matrix: Tensor, rounded: Tensor, mean: Tensor) -> Tensor:
    """b' - b (channels,), float64, of W and Ŵ (groups, outputs, features) on inputs of this mean (groups, features)."""
    change = matrix.detach().double() - rounded.detach().double()
    return (change @ mean.double().unsqueeze(2)).flatten()


def corrected_bias(regression: Regression, rounded: Tensor) -> Tensor:
    """b' (channels,), float64: what Ŵ (groups, outputs, features) gives on the layer's present inputs has the mean of
    what it should give, so that errors of the layers before it are taken off too."""
    return regression.bias(rounded).flatten()
