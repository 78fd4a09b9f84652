"""Matrices of low rank: a linear layer or a convolution and a pointwise one behind it.

W (O, I·k) ≈ U Uᵀ W        reduce: Uᵀ W (r, I, *k)        expand: U (O, r, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .chain import Chain, Stage
from .kernel import Kernel
from .method import Method, Ranks, Shape


@dataclass(frozen=True)
class ConvSvd(Method):
    """Zhang et al. 2015 (arXiv:1505.06798), section 3.1."""

    def limits(self, shape: Shape) -> Ranks:
        features = 1
        for size in shape[1:]:
            features *= size
        return (min(shape[0], features),)

    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        return [(ranks[0], *shape[1:]), (shape[0], ranks[0], *(1 for _ in shape[2:]))]

    def decompose(self, kernel: Kernel, ranks: Ranks) -> Chain:
        basis = kernel.basis[0][:, : ranks[0]]
        reduce = (basis.T @ kernel.matrix).view(ranks[0], *kernel.weight.shape[1:])
        expand = basis.view(*basis.shape, *(1 for _ in kernel.weight.shape[2:]))
        return Chain((Stage("reduce", reduce), Stage("expand", expand)))

    def spectra(self, kernel: Kernel) -> list[Tensor]:
        return [kernel.basis[1]]

    def unfoldings(self, kernel: Kernel) -> list[Tensor]:
        return [kernel.matrix]


@dataclass(frozen=True)
class LinearSvd(ConvSvd):
    """The same for linear layers (Sainath et al. 2013)."""

    types: ClassVar[str] = "Linear"
