"""One node of the graph as a channel rule sees it, and what a rule may say about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, fx, nn

from .positions import Positions
from .values import Axes, Axis, Value


@dataclass(frozen=True)
class Work:
    """MACs of one node over the whole example batch: `fixed` times the sizes of `dims`, which shrink."""

    node: str
    fixed: int
    dims: tuple[Tensor, ...]


@dataclass(frozen=True)
class Side:
    """Channels that a layer gives or takes: the numbers of the positions along that dimension of its weight."""

    layer: str
    node: fx.Node
    ids: Tensor


@dataclass(frozen=True)
class Heads:
    """Dimensions of a value that become the heads of an attention product, and whether these go as a whole or lose
    features, each the same."""

    dims: frozenset[int]
    whole: bool


@dataclass
class Facts:
    """What the rules have said so far."""

    positions: Positions
    outputs: dict[int, Side] = field(default_factory=dict)
    """By the first of their numbers."""
    inputs: dict[int, Side] = field(default_factory=dict)
    work: list[Work] = field(default_factory=list)


@dataclass
class Call:
    """A node with the values it is called on. `arguments` go by the names of the operator's schema, or of the module's
    forward; nodes in them are replaced by `Value`s and by plain numbers. `result` has the shape of what it returns."""

    node: fx.Node
    arguments: dict[str, Any]
    result: Any
    module: nn.Module | None
    layer: str
    facts: Facts
    heads: Heads | None = None
    """Those of the attention that it is or feeds, if any."""
    computed: frozenset[str] = frozenset()
    """Arguments in which a number stands that the graph computes, such as the batch's size: `arguments` has the number
    at the example, which is another one at another size."""

    @property
    def input(self) -> Value:
        """The first tensor."""
        value = next(iter(self.arguments.values()))
        assert isinstance(value, Value)
        return value

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def parameter(self, name: str, *dims: int) -> Value | None:
        """The module's tensor of this name with axes along `dims`; None where it has none."""
        tensor = getattr(self.module, name, None)
        if not isinstance(tensor, Tensor):
            return None
        return self.tensor(tensor, dims)

    def tensor(self, tensor: Tensor, dims: Iterable[int]) -> Value:
        return parameter_value(self.facts.positions, tensor, dims)

    def gives(self, axes: Sequence[Axis | None]) -> Value:
        """The (single) result with these axes."""
        assert isinstance(self.result, Value)
        return Value(self.result.shape, tuple(axes), self.result.dtype)

    def unite(self, first: Axis | None, second: Axis | None, why: str = "meets a tensor whose size is fixed") -> None:
        """Both dimensions lose the same places. Where one of them is fixed, both are, because of `why`."""
        if first is not None and second is not None:
            self.facts.positions.unite(first.ids, second.ids)
        else:
            self.freeze(first or second, why)

    def unite_all(self, axes: Sequence[Axis | None], why: str = "meets a tensor whose size is fixed") -> Axis | None:
        """`unite` for any number; the first is given back, fixed where one of them is."""
        if any(axis is None for axis in axes):
            for axis in axes:
                self.freeze(axis, why)
            return None
        for axis in axes[1:]:
            self.unite(axes[0], axis)
        return axes[0] if axes else None

    def freeze(self, axis: Axis | None, why: str) -> None:
        """The dimension keeps all of its positions, because of `why`."""
        if axis is not None:
            self.facts.positions.freeze(axis.ids, f"{self.layer}: {why}")

    def freeze_all(self, axes: Iterable[Axis | None], why: str) -> None:
        for axis in axes:
            self.freeze(axis, why)

    def rows_alike(self, table: Tensor) -> Tensor:
        """(rows, positions): every row loses the same places. Gives the first row."""
        if len(table) > 1:
            self.facts.positions.unite(table[1:], table[:1].expand(len(table) - 1, -1))
        return table[0]

    def produces(self, axis: Axis | None) -> None:
        """`axis` is the output channels of this layer, which may be removed."""
        if axis is not None:
            self.facts.outputs.setdefault(int(axis.ids[0]), Side(self.layer, self.node, axis.ids))

    def takes(self, axis: Axis | None) -> None:
        """`axis` is the input dimension of this layer's weight."""
        if axis is not None:
            self.facts.inputs.setdefault(int(axis.ids[0]), Side(self.layer, self.node, axis.ids))

    def costs(self, dims: Iterable[tuple[int, Axis | None]], fixed: int = 1) -> None:
        """This node takes `fixed` · ∏ size MACs, over the example batch."""
        dims = list(dims)
        rest = prod(size for size, axis in dims if axis is None)
        self.facts.work.append(Work(self.node.name, fixed * rest, tuple(axis.ids for _, axis in dims if axis)))


def parameter_value(positions: Positions, tensor: Tensor, dims: Iterable[int]) -> Value:
    """A parameter or buffer as a value. A dimension of size 1 cannot shrink."""
    wanted = set(dims)
    axes: Axes = tuple(
        Axis(positions.of(tensor, d)) if d in wanted and size > 1 else None for d, size in enumerate(tensor.shape)
    )
    return Value(tuple(tensor.shape), axes, tensor.dtype)


Rule = Callable[[Call], Any]
"""From a call to its result: a `Value`, or a list of them where the operator returns several."""
