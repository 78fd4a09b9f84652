"""Operators of PyTorch without a rule of their own are tried: what becomes of their result when positions go?

    f(x without the units K)  =  f(x) without the units K        for random x, a random K and its complement

A unit is a position along a dimension of x, or n positions: neighbours, or every n-th. In the result it has one place
or several, in the same order or the reverse. So pooling, padding, normalisation over other dimensions, gated linear
units, windows and pixel shuffles are known without a line for each. What mixes positions, or names how many there
are, is found out as well: then no guess holds, and nothing may go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from ..torch_private import OpOverload, schema_of, tree_leaves, tree_map_only
from .call import Call
from .values import Axis, Value, values_in

LIMIT = 2**25
"""Elements of an operator's tensors above which it is not tried: a trial takes some twenty calls."""

COMBINATIONS = 16
"""Of dimensions of several operands that are tried as one."""

Sample = dict[int, Tensor]
"""Random tensors for the operands, by the operand's `id`."""


@dataclass(frozen=True)
class Place:
    """A dimension of a result, and which unit stands at each of its positions."""

    dim: int
    units: Tensor


@dataclass(frozen=True)
class Cut:
    """Dimensions of operands (by the operand's `id`) that lose positions together, and the unit of each position."""

    dims: dict[int, int]
    units: Tensor

    @property
    def count(self) -> int:
        return int(self.units.max()) + 1

    def keeps(self) -> list[Tensor]:
        """(units,) which of them stay: a random half, and the others."""
        first = torch.randperm(self.count, generator=torch.Generator().manual_seed(self.count)) < (self.count + 1) // 2
        return [first, ~first]


@dataclass(frozen=True)
class Found:
    """A cut that no trial speaks against, and where its units stand in the results; None = in none of them."""

    cut: Cut
    places: tuple[Place | None, ...]


def can_be_tried(call: Call) -> bool:
    """Whether it is an operator of PyTorch's own that gives the same on the same tensors, which are not too large."""
    target = call.node.target
    if call.module is not None or not isinstance(target, OpOverload) or target.namespace != "aten":
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or schema_of(target).is_mutable or call.computed:
        return False
    name = schema_of(target).name.removeprefix("aten::")
    if any(_is_whole(value) for value in values_in(call.arguments)) and not name.startswith(_CHECKS_INDICES):
        return False  # it may read or write anywhere in memory
    return sum(torch.Size(value.shape).numel() for value in values_in([call.arguments, call.result])) <= LIMIT


def tried(call: Call) -> Any:
    """The result with the axes that trials show; all else that the operator sees stays whole."""
    trial = _Trial(call)
    found = trial.found()
    needs = "needs all positions along it" if trial.whole else "has no channel rule, and takes no random numbers"
    why = f"{call.node.target} {needs}"
    for value in trial.operands:
        known = {each.cut.dims.get(id(value)) for each in found}
        call.freeze_all((axis for dim, axis in enumerate(value.axes) if dim not in known), why)
    axes: list[list[Axis | None]] = [[None] * result.ndim for result in trial.results]
    for each in found:
        ids, zero = trial.united(each.cut), trial.vanishes(each)
        for own, place in zip(axes, each.places, strict=True):
            if place is not None:
                own[place.dim] = Axis(ids[place.units], zero)
    made = iter([Value(r.shape, tuple(own), r.dtype) for r, own in zip(trial.results, axes, strict=True)])
    return tree_map_only(Value, lambda _: next(made), call.result)


class _Trial:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.operands = list({id(value): value for value in values_in(call.arguments)}.values())
        self.results = values_in([call.result])
        samples = [{id(v): _random(v, kind, i) for i, v in enumerate(self.operands)} for kind in range(len(_KINDS))]
        outputs = [(sample, self._outputs(sample)) for sample in samples]
        self.whole = [(sample, whole) for sample, whole in outputs if whole is not None and _tells(whole)]

    def found(self) -> list[Found]:
        """One for every dimension that may shrink; none where they cannot do so at the same time."""
        found: list[Found] = []
        for value in sorted(self.operands, key=lambda value: -value.ndim):
            for dim, axis in enumerate(value.axes):
                if axis is not None and all(each.cut.dims.get(id(value)) != dim for each in found):
                    found += self._first_found(value, dim, found)
        return found if len(found) < 2 or self._agree(found) else []

    def _first_found(self, value: Value, dim: int, known: Sequence[Found]) -> list[Found]:
        taken = {(index, place.dim) for each in known for index, place in enumerate(each.places) if place}
        for cut in self._cuts(value, dim) if self.whole else ():
            places = self._places(cut, (dim, dim - value.ndim), taken)
            if places is not None:
                return [Found(cut, places)]
        return []

    def _cuts(self, value: Value, dim: int) -> Iterator[Cut]:
        """Units of one position; then of ever more, where the result has as many places as there are such units."""
        size = value.shape[dim]
        places = torch.arange(size)
        counts = sorted({n for r in self.results for n in r.shape if 1 < n < size and size % n == 0}, reverse=True)
        for dims in self._together(value, dim):
            for units in (places, *(u for n in counts for u in (places // (size // n), places % n))):
                yield Cut(dims, units)

    def _together(self, value: Value, dim: int) -> Iterator[dict[int, int]]:
        """This dimension with those of other operands that have as many positions: first with those at the same place,
        in the end alone."""
        choices: list[list[int | None]] = []
        others = [other for other in self.operands if other is not value]
        for other in others:
            alike = [d for d, axis in enumerate(other.axes) if axis and other.shape[d] == value.shape[dim]]
            place = dim if other.ndim == value.ndim else dim - value.ndim + other.ndim
            choices.append([*sorted(alike, key=lambda d: d != place), None])
        for chosen in islice(product(*choices), COMBINATIONS):
            yield {id(value): dim} | {id(o): d for o, d in zip(others, chosen, strict=True) if d is not None}

    def _places(self, cut: Cut, likely: Sequence[int], taken: set[tuple[int, int]]) -> tuple[Place | None, ...] | None:
        """Where the units stand in each result; None where this does not hold for the operator."""
        trials = []
        for sample, whole in self.whole:
            for keep in cut.keeps():
                part = self._outputs(_without(sample, [(cut, keep)]))
                if part is None:
                    return None
                trials.append((keep, whole, part))
        places: list[Place | None] = []
        for index, result in enumerate(self.results):
            options = [place for place in _options(result, cut.count, likely) if (index, place.dim) not in taken]
            for place in (*options, None):
                if all(_equal(part[index], _left(whole[index], [(place, keep)])) for keep, whole, part in trials):
                    places.append(place)
                    break
            else:
                return None
        return tuple(places)

    def _agree(self, found: Sequence[Found]) -> bool:
        """Whether all of them can lose units at once."""
        for sample, whole in self.whole:
            for side in (0, 1):
                keeps = [each.cut.keeps()[side] for each in found]
                part = self._outputs(_without(sample, [(f.cut, k) for f, k in zip(found, keeps, strict=True)]))
                for index, result in enumerate(whole):
                    places = [(each.places[index], keep) for each, keep in zip(found, keeps, strict=True)]
                    if part is None or not _equal(part[index], _left(result, places)):
                        return False
        return True

    def vanishes(self, found: Found) -> bool:
        """Whether the results are zero at units whose values in the operands are, wherever those are said to be."""
        zeros = {id(v): a.zero for v in self.operands if (a := v.axis(found.cut.dims.get(id(v), v.ndim)))}
        for sample, _ in self.whole:
            for keep in found.cut.keeps():
                gone = torch.nonzero(~keep[found.cut.units]).reshape(-1)
                masked = {
                    key: tensor.index_fill(found.cut.dims[key], gone, 0) if zeros.get(key) else tensor
                    for key, tensor in sample.items()
                }
                results = self._outputs(masked) or self.whole[0][1]
                pairs = zip(results, found.places, strict=True)
                if any(bool((_left(result, [(place, ~keep)]) != 0).any()) for result, place in pairs if place):
                    return False
        return True

    def united(self, cut: Cut) -> Tensor:
        """(units,) a number for each unit, all of whose positions live or die together."""
        axes = [axis for v in self.operands if (axis := v.axis(cut.dims.get(id(v), v.ndim)))]
        self.call.unite_all(axes)
        order = torch.argsort(cut.units, stable=True)
        return self.call.rows_alike(axes[0].ids[order].view(cut.count, -1).T)

    def _outputs(self, sample: Sample) -> list[Tensor] | None:
        """What the operator gives; None where it refuses the tensors."""
        target: Any = self.call.node.target
        try:
            given = tree_map_only(Value, lambda value: sample[id(value)], self.call.arguments)
            return [leaf for leaf in tree_leaves(target(**given)) if isinstance(leaf, Tensor)]
        except Exception:
            return None


def _is_whole(value: Value) -> bool:
    return not (value.dtype.is_floating_point or value.dtype.is_complex or value.dtype == torch.bool)


_CHECKS_INDICES = ("gather", "take_along_dim", "index_", "scatter", "max_unpool", "embedding", "where", "one_hot")
"""Operators that refuse whole numbers out of range, and so can be tried with any."""

_KINDS: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: 0.1 + 0.8 * x.sigmoid(), lambda x: 9 * x)
"""Numbers of either sign, between 0 and 1 where inverse functions are defined, and large ones."""


def _random(value: Value, kind: int, number: int) -> Tensor:
    """A tensor like `value`; whole numbers are 0 or 1, which most operators take for an index."""
    generator = torch.Generator().manual_seed(7 * number + kind)
    if not (_is_whole(value) or value.dtype == torch.bool):
        return _KINDS[kind](torch.randn(value.shape, generator=generator)).to(value.dtype)
    return torch.randint(0, 2, value.shape, generator=generator).to(value.dtype)


def _tells(outputs: Sequence[Tensor]) -> bool:
    """Whether most numbers are finite, so that equal outputs mean something."""
    return all(bool(output.isfinite().sum() * 2 >= output.numel()) for output in outputs)


def _options(result: Value, count: int, likely: Sequence[int]) -> Iterator[Place]:
    """Places that `count` units might have in `result`, first in the dimension where they were in the operand."""
    dims = [dim % result.ndim for dim in likely if -result.ndim <= dim < result.ndim]
    for dim in dict.fromkeys([*dims, *range(result.ndim)]):
        places = torch.arange(size := result.shape[dim])
        if size > 1 and size % count == 0:
            yield Place(dim, places // (size // count))
            yield Place(dim, places % count if size > count else places.flip(0))


def _without(sample: Sample, cuts: Sequence[tuple[Cut, Tensor]]) -> Sample:
    left = dict(sample)
    for cut, keep in cuts:
        index = torch.nonzero(keep[cut.units]).reshape(-1)
        left |= {key: left[key].index_select(dim, index) for key, dim in cut.dims.items()}
    return left


def _left(result: Tensor, places: Sequence[tuple[Place | None, Tensor]]) -> Tensor:
    """`result` at the units that are kept."""
    for place, keep in places:
        if place is not None:
            result = result.index_select(place.dim, torch.nonzero(keep[place.units]).reshape(-1))
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to rounding, which differs where fewer numbers are vectorised otherwise."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    bound = 32 * torch.finfo(a.dtype).eps
    largest = float(b.nan_to_num(0, 0, 0).abs().max()) if b.numel() else 0.0
    return torch.allclose(a, b, rtol=bound, atol=bound * largest, equal_nan=True)
