"""Large matrices as tensor trains: several small linear layers, each along one part of the features.

Features are numbered by several indices, of the inputs (i_1 … i_d) and of the outputs (o_d … o_1), the first one the
slowest:

    W[o_d … o_1, i_1 … i_d] ≈ G_1[o_1, i_1, :] G_2[:, o_2, i_2, :] … G_d[:, o_d, i_d]      G_n (r_{n-1}, o_n, i_n, r_n)

    split    (…, I)                                 →  (…, i_1, …, i_d)
    core_n   (…, i_1, …, i_{n-1}, i_n r_n)          →  (…, i_1, …, i_{n-1}, o_n r_{n-1}),   n = d … 1
             then o_n moves in front of i_1, and r_{n-1} joins i_{n-1}
    join     (…, o_d, …, o_1)                       →  (…, O),   + bias
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from surgery import Operator

from .chain import parameter
from .descent import Form, fitted
from .kernel import Kernel, squared_values
from .method import Method, Ranks, Shape

if TYPE_CHECKING:
    from .cost import Geometry

aten = torch.ops.aten
STEPS = 8
"""Of the descent in the metric of the outputs, for one core in one round."""


@dataclass(frozen=True)
class TensorTrain(Method):
    """Novikov et al. 2015 (arXiv:1509.06569), section 4."""

    types: ClassVar[str] = "Linear"
    cores: int = 2
    min_features: int = 512

    def obstacle(self, module: nn.Module) -> str | None:
        outputs, inputs = module.weight.shape  # type: ignore[misc]
        if min(outputs, inputs) < self.min_features:
            return f"{inputs} inputs and {outputs} outputs, of which min_features asks for {self.min_features}"
        for size, what in ((outputs, "outputs"), (inputs, "inputs")):
            if factorised(size, self.cores) is None:
                return f"its {size} {what} are no product of {self.cores} factors above 1"
        return None

    def limits(self, shape: Shape) -> Ranks:
        return (max(_most(*self._sizes(shape))),)

    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        return [(o * left, i * right) for left, o, i, right in reversed(self._cores(shape, ranks))]

    def macs(self, geometry: Geometry, ranks: Ranks) -> int:
        """A core is called once for every index of the outputs made before it and of the inputs that still wait."""
        cores = self._cores(geometry.shape, ranks)
        calls = [
            prod(o for _, o, _, _ in cores[n + 1 :]) * prod(i for _, _, i, _ in cores[:n]) for n in range(len(cores))
        ]
        return round(geometry.rows * sum(prod(core) * times for core, times in zip(cores, calls, strict=True)))

    def decompose(self, kernel: Kernel, ranks: Ranks) -> Train:
        outputs, inputs = self._sizes(tuple(kernel.weight.shape))

        def near(weight: Tensor) -> list[Tensor]:
            return _nearest(weight.flatten(1), outputs, inputs, ranks[0])

        if kernel.covariance is None or ranks >= self.limits(tuple(kernel.weight.shape)):
            return Train(tuple(near(kernel.weight)))
        split = Kernel(kernel.weight.reshape(-1, *inputs), kernel.covariance)
        return Train(tuple(fitted(split, Form(assembled, _undoing, _each, STEPS), near)))

    def random(self, shape: Shape, ranks: Ranks) -> Train:
        generator = torch.Generator().manual_seed(0)
        cores = self._cores(shape, ranks)
        return Train(tuple(torch.randn(core, generator=generator, dtype=torch.float64) for core in cores))

    def spectra(self, kernel: Kernel) -> list[Tensor]:
        """Squared singular values, added up over the places where the train couples."""
        found = torch.zeros(self.limits(tuple(kernel.weight.shape))[0], dtype=torch.float64)
        split = Kernel(kernel.weight.reshape(-1, *self._sizes(tuple(kernel.weight.shape))[1]), kernel.covariance)
        for matrix in self.unfoldings(split.whitened.flatten(1))[0]:
            values = squared_values(matrix)
            found[: len(values)] += values
        return [found]

    def estimates(self, kernel: Kernel, choices: Sequence[Ranks]) -> list[float]:
        """What the places where the train couples cut off one by one, added up: an upper bound in the separable part of
        the metric (Oseledets 2011, theorem 2.2), and with two cores the value."""
        return [min(1.0, (self.cores - 1) * lost) for lost in super().estimates(kernel, choices)]

    def unfoldings(self, weight: Tensor) -> list[list[Tensor]]:
        """One matrix for every place where the train couples: they share one rank."""
        paired = _paired(weight, *self._sizes(tuple(weight.shape)))
        return [[paired.flatten(2 * n).flatten(0, 2 * n - 1) for n in range(1, self.cores)]]

    def _sizes(self, shape: Shape) -> tuple[Shape, Shape]:
        """o_1 ≥ … ≥ o_d and i_1 ≤ … ≤ i_d: in this order the cores cost least."""
        outputs, inputs = factorised(shape[0], self.cores), factorised(shape[1], self.cores)
        assert outputs is not None
        assert inputs is not None
        return outputs, inputs[::-1]

    def _cores(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        outputs, inputs = self._sizes(shape)
        bonds = _bonds(outputs, inputs, ranks[0])
        return list(zip(bonds, outputs, inputs, bonds[1:], strict=False))


@dataclass(frozen=True)
class Train:
    """Cores G_1 … G_d (r_{n-1}, o_n, i_n, r_n)."""

    cores: tuple[Tensor, ...]

    @cached_property
    def product(self) -> Tensor:
        return assembled(self.cores)

    def parts(self, module: nn.Module, bias: Tensor | None) -> dict[str, nn.Module]:
        sizes = [core.shape[2] for core in self.cores]
        made: dict[str, nn.Module] = {"split": Operator(aten.unflatten.int, (-1, sizes))}
        for n in range(len(self.cores), 0, -1):
            core = self.cores[n - 1]
            left, o, i, right = core.shape
            made[f"core_{n}"] = _linear(module, core.transpose(0, 1).reshape(o * left, i * right))
            if n > 1:
                made[f"split_{n}"] = Operator(aten.unflatten.int, (-1, [o, left]))
                made[f"move_{n}"] = Operator(aten.movedim.int, (-2, -n - 1))
                made[f"join_{n}"] = Operator(aten.flatten.using_ints, (-2, -1))
        made["join"] = Operator(aten.flatten.using_ints, (-len(self.cores), -1))
        if bias is not None:
            made["bias"] = Operator(aten.add.Tensor, parameter=parameter(module, bias))
        return made


def factorised(size: int, count: int) -> Shape | None:
    """`count` factors above 1, as nearly equal as can be, falling; None where there are not as many."""
    if count == 1:
        return (size,) if size > 1 else None
    found = []
    for first in range(2, size):
        rest = factorised(size // first, count - 1) if size % first == 0 else None
        if rest is not None and rest[0] <= first:
            found.append((first, *rest))
    return min(found, key=lambda factors: (sum(factors), factors), default=None)


def assembled(cores: Sequence[Tensor]) -> Tensor:
    """W' (O, I) of its cores."""
    found = cores[0].movedim(0, -1).flatten(2)  # (o_1, i_1, r_1)
    for core in cores[1:]:
        joined = torch.tensordot(found, core, ([2], [0]))  # (outputs, inputs, o, i, r)
        found = joined.permute(2, 0, 1, 3, 4).flatten(2, 3).flatten(0, 1)
    return found.squeeze(2)


def _nearest(matrix: Tensor, outputs: Shape, inputs: Shape, rank: int) -> list[Tensor]:
    """Cores near a matrix (O, I) by successive singular value decompositions (Oseledets 2011, algorithm 1)."""
    import tensorly
    from tensorly.decomposition import tensor_train

    paired = _paired(matrix, outputs, inputs)
    merged = paired.reshape([o * i for o, i in zip(outputs, inputs, strict=True)])
    with tensorly.backend_context("pytorch", local_threadsafe=True):
        cores = tensor_train(merged, _bonds(outputs, inputs, rank))
    return [core.reshape(len(core), o, i, -1) for core, o, i in zip(cores, outputs, inputs, strict=True)]


def _paired(matrix: Tensor, outputs: Shape, inputs: Shape) -> Tensor:
    """(o_1, i_1, o_2, i_2, …)"""
    count = len(outputs)
    order = [dim for n in range(count) for dim in (count - 1 - n, count + n)]
    return matrix.reshape(*outputs[::-1], *inputs).permute(order)


def _most(outputs: Shape, inputs: Shape) -> list[int]:
    """Highest ranks between the cores."""
    pairs = [o * i for o, i in zip(outputs, inputs, strict=True)]
    return [min(prod(pairs[:n]), prod(pairs[n:])) for n in range(1, len(pairs))]


def _bonds(outputs: Shape, inputs: Shape, rank: int) -> list[int]:
    """r_0 … r_d"""
    return [1, *(min(rank, most) for most in _most(outputs, inputs)), 1]


def _each(change: Callable[[Tensor, int], Tensor], cores: Sequence[Tensor]) -> list[Tensor]:
    """All cores changed along their inputs, core n along dimension n of the weight (O, i_1, i_2, …)."""
    found = []
    for n, core in enumerate(cores, start=1):
        first = core.movedim(2, 0)
        found.append(change(first.flatten(1), n).view(first.shape).movedim(0, 2))
    return found


def _undoing(cores: Sequence[Tensor], number: int) -> Callable[[Tensor], Tensor]:
    """Of least squares for a core in the weight's metric."""
    left, right = cores[0].new_ones(1, 1), cores[0].new_ones(1, 1)
    for core in cores[:number]:
        left = torch.einsum("ab,aoir,bois->rs", left, core, core)
    for core in reversed(cores[number + 1 :]):
        right = torch.einsum("roia,soib,ab->rs", core, core, right)
    inverses = [torch.linalg.pinv(gram, hermitian=True) for gram in (left, right)]
    return lambda moment: torch.einsum("ar,rois,sb->aoib", inverses[0], moment, inverses[1])


def _linear(like: Any, weight: Tensor) -> nn.Module:
    outputs, inputs = weight.shape
    made = nn.Linear(inputs, outputs, bias=False, device="meta")
    made.weight = parameter(like, weight)
    return made
