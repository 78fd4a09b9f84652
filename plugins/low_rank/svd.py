"""Matrices of low rank: a linear layer or a convolution and a pointwise one behind it.

W (O, I·k) ≈ U Uᵀ W        reduce: Uᵀ W (r, I, *k)        expand: U (O, r, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor

from .chain import Chain, Stage
from .kernel import Kernel
from .method import Method, Ranks, Shape


@dataclass(frozen=True)
class ConvSvd(Method):
    """Zhang et al. 2015 (arXiv:1505.06798), section 3.1."""

    def limits(self, shape: Shape) -> Ranks:
        return (min(shape[0], prod(shape[1:])),)

    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        return [(ranks[0], *shape[1:]), (shape[0], ranks[0], *(1 for _ in shape[2:]))]

    def decompose(self, kernel: Kernel, ranks: Ranks) -> Chain:
        basis = kernel.basis[0][:, : ranks[0]]
        reduce = (basis.T @ kernel.matrix).view(ranks[0], *kernel.weight.shape[1:])
        expand = basis.view(*basis.shape, *(1 for _ in kernel.weight.shape[2:]))
        return Chain((Stage("reduce", reduce), Stage("expand", expand)))

    def spectra(self, kernel: Kernel) -> list[Tensor]:
        return [kernel.basis[1]]

    def unfoldings(self, weight: Tensor) -> list[list[Tensor]]:
        return [[weight.flatten(1)]]


@dataclass(frozen=True)
class LinearSvd(ConvSvd):
    """The same for linear layers (Sainath et al. 2013)."""

    types: ClassVar[str] = "Linear"
