"""What a decomposition has to say about itself; everything else is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, ClassVar

from .steps import multiples, raised

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .chain import Factors
    from .cost import Geometry
    from .kernel import Kernel

Ranks = tuple[int, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Method(ABC):
    """A way to write a weight (O, I, *k) as factors of given ranks. Instances travel to other processes."""

    names: ClassVar[tuple[str, ...]] = ("rank",)
    """What its ranks are called, in order."""
    types: ClassVar[str] = "Conv"
    """Beginning of the layer types that it works on."""

    def obstacle(self, module: nn.Module) -> str | None:
        """Why a layer of the right type cannot be decomposed, or None."""
        groups = getattr(module, "groups", 1)
        if type(module).__name__.startswith("ConvTranspose"):
            return "transposed convolutions are not decomposed"
        return f"grouped ({groups} groups)" if groups > 1 else None

    @abstractmethod
    def limits(self, shape: Shape) -> Ranks:
        """The ranks at which the weight is reproduced."""

    @abstractmethod
    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        """Shapes of the stages' weights (out, in / groups, *k)."""

    def macs(self, geometry: Geometry, ranks: Ranks) -> int:
        """MACs of the stages in the layer's place, for one sample of the model."""
        return geometry.macs_of(self.shapes(geometry.shape, ranks))

    @abstractmethod
    def decompose(self, kernel: Kernel, ranks: Ranks) -> Factors:
        """The factors.

        Raises:
            PassError: the decomposition does not converge.
        """

    def random(self, shape: Shape, ranks: Ranks) -> Factors:
        """Factors of the right shapes with random weights, for timing."""
        from .chain import random_chain

        return random_chain(self.shapes(shape, ranks))

    @abstractmethod
    def spectra(self, kernel: Kernel) -> list[Tensor]:
        """Per rank: the part of f(0) that each further component keeps, falling."""

    def estimates(self, kernel: Kernel, choices: Sequence[Ranks]) -> list[float]:
        """Per choice f / f(0), 0 ... 1, about what `decompose` reaches: the sum of what each rank cuts off."""
        tails = []
        for spectrum in self.spectra(kernel):
            cut = spectrum.flip(0).cumsum(0).flip(0)
            tails.append([*(cut / cut[0].clamp_min(1e-300)).tolist(), 0.0])
        return [
            min(1.0, sum(tail[min(rank, len(tail) - 1)] for tail, rank in zip(tails, ranks, strict=True)))
            for ranks in choices
        ]

    def ranks_by_energy(self, kernel: Kernel, energy: float, step: int) -> Ranks:
        """The lowest ranks, in multiples of `step`, that keep this share of every spectrum."""
        found = []
        for spectrum, limit in zip(self.spectra(kernel), self.limits(tuple(kernel.weight.shape)), strict=True):
            kept = spectrum.cumsum(0) / spectrum.sum().clamp_min(1e-300)
            rank = int((kept < energy - 1e-12).sum()) + 1
            found.append(raised(rank, step, limit))
        return tuple(found)

    @abstractmethod
    def unfoldings(self, weight: Tensor) -> list[list[Tensor]]:
        """Per rank the matrices that have it, or a lower one, for variational Bayes to judge."""

    def ranks_by_vbmf(self, weight: Tensor, step: int) -> Ranks:
        """The ranks that variational Bayes finds above the noise of a weight (O, I, *k), in multiples of `step`."""
        from .vbmf import evbmf_rank

        limits = self.limits(tuple(weight.shape))
        found = [max(map(evbmf_rank, matrices)) for matrices in self.unfoldings(weight)]
        return tuple(raised(rank, step, limit) for rank, limit in zip(found, limits, strict=True))

    def choices(self, shape: Shape, step: int, most: int = 32) -> list[Ranks]:
        """Ranks worth considering: multiples of `step`, at most `most` each, and the limits."""
        return list(product(*(multiples(limit, step, most) for limit in self.limits(shape))))
