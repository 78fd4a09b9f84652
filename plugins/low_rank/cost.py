"""What layers and their factors cost, and the ranks that are worth considering."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import surgery
from surgery import CapturedModel, Layer

from .chain import owned_axes
from .kernel import Kernel
from .method import Method, Ranks, Shape


@dataclass(frozen=True)
class Place:
    """One call: sizes of one sample along the kernel's axes at the layer's input and output, and how many such samples
    there are per sample of the model. A linear layer has one axis, its rows."""

    before: tuple[int, ...]
    after: tuple[int, ...]
    times: float


@dataclass(frozen=True)
class Geometry:
    """What the cost of a layer depends on: its weight's shape (O, I, *k) and its calls."""

    shape: Shape
    places: tuple[Place, ...]

    @classmethod
    def of(cls, model: CapturedModel, layer: Layer) -> Geometry:
        weight = layer.module.weight
        shape = tuple(weight.shape)  # type: ignore[arg-type]
        axes, batch = len(shape) - 2, model.inputs.batch_size
        places = []
        for node in layer.nodes:
            given, made = surgery.shape(node.args[0]), surgery.shape(node)  # type: ignore[arg-type]
            if axes:
                times = prod(given[: -1 - axes]) / batch
                places.append(Place(tuple(given[-axes:]), tuple(made[-axes:]), times))
            else:
                rows = prod(given[:-1])
                places.append(Place((rows,), (rows,), 1 / batch))
        return cls(shape, tuple(places))

    @property
    def macs(self) -> int:
        return self.macs_of([self.shape])

    @property
    def weights(self) -> int:
        return prod(self.shape)

    def cost(self, measure: str) -> int:
        """MACs, or weights for parameters and bytes."""
        return self.macs if measure == "macs" else self.weights

    @property
    def rows(self) -> float:
        """Of a linear layer: how many it is given per sample of the model."""
        return sum(prod(place.before) * place.times for place in self.places)

    def macs_of(self, shapes: Sequence[Shape]) -> int:
        """MACs of stages with weights of these shapes, for one sample of the model."""
        owned = owned_axes([shape[2:] for shape in shapes])
        total = 0.0
        for place in self.places:
            sizes = list(place.before)
            for shape, axes in zip(shapes, owned, strict=True):
                for axis in axes:
                    sizes[axis] = place.after[axis]
                total += prod(shape) * prod(sizes) * place.times
        return round(total)


@dataclass(frozen=True)
class Rung:
    """One choice of ranks: its cost, and an estimate of f / f(0), 0 ... 1."""

    ranks: Ranks
    macs: int
    weights: int
    error: float

    def cost(self, measure: str) -> int:
        return self.macs if measure == "macs" else self.weights

    def fits(self, geometry: Geometry) -> bool:
        """Whether it needs neither more MACs nor more weights than the layer."""
        return self.macs <= geometry.macs and self.weights <= geometry.weights


def rung(method: Method, geometry: Geometry, ranks: Ranks, error: float) -> Rung:
    shapes = method.shapes(geometry.shape, ranks)
    return Rung(ranks, method.macs(geometry, ranks), sum(map(prod, shapes)), error)


def ladder(
    method: Method, kernel: Kernel, geometry: Geometry, step: int, measure: str = "macs", most: int = 32
) -> list[Rung]:
    """The choices that cost less than the layer, in the other measure no more, and less than all that lose no more;
    cheapest first."""
    costs = (rung(method, geometry, ranks, 0.0) for ranks in method.choices(geometry.shape, step, most))
    cheaper = [own for own in costs if own.cost(measure) < geometry.cost(measure) and own.fits(geometry)]
    errors = method.estimates(kernel, [own.ranks for own in cheaper])
    rungs = [replace(own, error=error) for own, error in zip(cheaper, errors, strict=True)]
    rungs.sort(key=lambda r: (r.cost(measure), r.error))
    best: list[Rung] = []
    for candidate in rungs:
        if not best or candidate.error < best[-1].error:
            best.append(candidate)
    return best


def default_step(shape: Shape) -> int:
    """8, which kernels like, for wide layers; a sixteenth of the narrower side, as a power of two, for others."""
    narrow = min(shape[:2])
    step = 8
    while step > 1 and step * 16 > narrow:
        step //= 2
    return step
