"""Separable filters: a convolution along the kernel's first axis and one along the others.

W (O, I, k₁, k₂) ≈ Σ_r H[o, r, k₂] V[r, i, k₁]        vertical: V (r, I, k₁, 1)        horizontal: H (O, r, 1, k₂)

The (I·k₁, O·k₂) matrix has rank r, and its singular value decomposition is the best such pair for the weight (Tai et
al. 2016, arXiv:1511.06067, theorem 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .chain import Chain, Norm, Stage
from .kernel import Kernel
from .method import Method, Ranks, Shape
from .projection import folded, kept, leading_values, project


@dataclass(frozen=True)
class SpatialSvd(Method):
    """Jaderberg et al. 2014 (arXiv:1405.3866), scheme 2. `batchnorm`: one between the two, an identity (Tai et al.,
    section 3.2)."""

    batchnorm: bool = False

    def obstacle(self, module: nn.Module) -> str | None:
        return super().obstacle(module) or _narrow(getattr(module, "kernel_size", ()))

    def limits(self, shape: Shape) -> Ranks:
        outputs, inputs, first, *others = shape
        return (min(inputs * first, outputs * prod(others)),)

    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        outputs, inputs, first, *others = shape
        return [(ranks[0], inputs, first, *(1 for _ in others)), (outputs, ranks[0], 1, *others)]

    def decompose(self, kernel: Kernel, ranks: Ranks) -> Chain:
        vertical, horizontal = self.shapes(tuple(kernel.weight.shape), ranks)
        found = project(folded(kernel, 2), len(kernel.weight), ranks[0])
        inner = torch.eye(ranks[0], dtype=found.core.dtype) if found.inner is None else found.inner
        norm = Norm.unknown(ranks[0]) if self.batchnorm else None
        first = Stage("vertical", inner.T.reshape(vertical), norm=norm)
        return Chain((first, Stage("horizontal", found.core.reshape(horizontal))))

    def estimates(self, kernel: Kernel, choices: Sequence[Ranks]) -> list[float]:
        """The error in the weight's metric; an upper bound in the output's."""
        parts = kept(folded(kernel, 2), max((rank for (rank,) in choices), default=1))[-1]
        return [float((1 - parts[rank - 1]).clamp(0, 1)) for (rank,) in choices]

    def spectra(self, kernel: Kernel) -> list[Tensor]:
        return [leading_values(folded(kernel, 2).whitened)]

    def unfoldings(self, weight: Tensor) -> list[list[Tensor]]:
        return [[folded(Kernel(weight), 2).weight.movedim(1, 0).flatten(1)]]


def _narrow(kernel: Sequence[int]) -> str | None:
    if len(kernel) > 1 and kernel[0] > 1 and prod(kernel[1:]) > 1:
        return None
    return f"a kernel of {'x'.join(map(str, kernel))} has nothing to separate"
