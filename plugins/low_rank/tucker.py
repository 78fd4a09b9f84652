"""Fewer input and output channels around a convolution: Tucker-2.

W (O, I, *k) ≈ U C Aᵀ        reduce: Aᵀ (s, I, 1)        core: C (p, s, *k)        expand: U (O, p, 1)

A projection that would keep all of its channels is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import pad

from .chain import Chain, Stage
from .engine import Engine
from .kernel import Kernel
from .method import Method, Ranks, Shape
from .projection import folded, kept, leading_values, project


@dataclass(frozen=True)
class Tucker2(Method):
    """Kim et al. 2016 (arXiv:1511.06530), section 3.1."""

    names: ClassVar[tuple[str, ...]] = ("rank_out", "rank_in")
    engine: Engine = "own"

    def obstacle(self, module: nn.Module) -> str | None:
        pointwise = prod(getattr(module, "kernel_size", ())) == 1
        return super().obstacle(module) or ("pointwise: channel_svd is its form" if pointwise else None)

    def limits(self, shape: Shape) -> Ranks:
        outputs, inputs, *kernel = shape
        return min(outputs, inputs * prod(kernel)), min(inputs, outputs * prod(kernel))

    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        outputs, inputs, *kernel = shape
        ones = [1] * len(kernel)
        reduce = [(ranks[1], inputs, *ones)] if ranks[1] < inputs else []
        expand = [(outputs, ranks[0], *ones)] if ranks[0] < outputs else []
        return [*reduce, (*ranks, *kernel), *expand]

    def choices(self, shape: Shape, step: int, most: int = 32) -> list[Ranks]:
        return [ranks for ranks in super().choices(shape, step, most) if ranks == _useful(shape, ranks)]

    def decompose(self, kernel: Kernel, ranks: Ranks) -> Chain:
        shape = tuple(kernel.weight.shape)
        rank_out, rank_in = _useful(shape, ranks)
        found = project(folded(kernel, 1), rank_out, rank_in, self.engine)
        inner = None if found.inner is None else found.inner.T
        factors = [("reduce", inner), ("core", found.core), ("expand", found.outer)]
        named = [(name, factor) for name, factor in factors if factor is not None]
        shapes = self.shapes(shape, ranks)
        return Chain(tuple(Stage(name, _padded(f, made)) for (name, f), made in zip(named, shapes, strict=True)))

    def estimates(self, kernel: Kernel, choices: Sequence[Ranks]) -> list[float]:
        """What the leading components of both sides lose, with the best core for them: an upper bound."""
        shape = tuple(kernel.weight.shape)
        useful = [_useful(shape, ranks) for ranks in choices]
        lost = (1 - kept(folded(kernel, 1), max((inner for _, inner in useful), default=1))).clamp(0, 1)
        return [float(lost[min(out, lost.shape[0]) - 1, min(inner, lost.shape[1]) - 1]) for out, inner in useful]

    def spectra(self, kernel: Kernel) -> list[Tensor]:
        return [kernel.basis[1], leading_values(folded(kernel, 1).whitened)]

    def unfoldings(self, weight: Tensor) -> list[list[Tensor]]:
        return [[weight.flatten(1)], [weight.movedim(1, 0).flatten(1)]]


def _useful(shape: Shape, ranks: Ranks) -> Ranks:
    """No more of one side than the core can make of the other."""
    (outputs, inputs, *kernel), (out, inner) = shape, ranks
    taps = prod(kernel)
    inner = inner if inner == inputs else min(inner, out * taps)
    return out if out == outputs else min(out, inner * taps), inner


def _padded(factor: Tensor, shape: Shape) -> Tensor:
    """With zeros for ranks that are of no use."""
    rows, columns = shape[0] - factor.shape[0], shape[1] - factor.shape[1]
    return pad(factor, [0, 0] * (factor.ndim - 2) + [0, columns, 0, rows]).reshape(shape)
