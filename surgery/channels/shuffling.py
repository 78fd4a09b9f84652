"""Channels that change places: shuffles, written as reshape, transpose, reshape, or as an operator of their own.

    (b, g i, …) → (b, g, i, …) → (b, i, g, …) → (b, i g, …)      one permutation of the channels

Kept as a reshape, a shuffle would tie channel i of every group together; as a permutation it ties nothing. When
channels have gone, `index_select` with what is left of the permutation takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..captured import CapturedModel
from ..names import get_attribute
from ..replacement import add_buffer
from ..vocabulary import arguments
from .values import Axis, Value

aten = torch.ops.aten


@dataclass(frozen=True)
class Shuffle:
    """`nodes`, run on `source`, give its channels along `dim` in another order: place i has those of `order[i]`."""

    source: fx.Node
    dim: int
    order: Tensor
    nodes: tuple[fx.Node, ...]

    def axis(self, axis: Axis) -> Axis:
        return Axis(axis.ids[self.order], axis.zero)


def find_shuffle(model: CapturedModel, node: fx.Node, values: Mapping[fx.Node, Any]) -> Shuffle | None:
    """The shuffle that begins at `node`, if one does and the channels may shrink."""
    source = node.args[0] if node.args else None
    value = values.get(source) if isinstance(source, fx.Node) else None
    if not isinstance(value, Value) or not isinstance(source, fx.Node):
        return None
    labelled = [d for d, axis in enumerate(value.axes) if axis is not None]
    if len(labelled) != 1:
        return None
    dim = labelled[0]
    if node.target is aten.index_select.default:
        index = node.args[2]
        if node.args[1] != dim or not isinstance(index, fx.Node) or index.op != "get_attr":
            return None
        return Shuffle(source, dim, get_attribute(model, str(index.target)).cpu(), (node,))
    return _by_moves(node, source, value, dim, values)


def _by_moves(node: fx.Node, source: fx.Node, value: Value, dim: int, values: Mapping[fx.Node, Any]) -> Shuffle | None:
    places = Value(value.shape, tuple(None if d != dim else Axis(torch.arange(n)) for d, n in enumerate(value.shape)))
    numbers = places.index(dim)
    nodes: list[fx.Node] = []
    here: fx.Node | None = node
    while here is not None and getattr(here.target, "overloadpacket", None) in _MOVES:
        numbers = _moved(here, numbers, values)
        nodes.append(here)
        varying = _varying(numbers)
        if varying == [dim] and tuple(numbers.shape) == value.shape:
            return (
                None
                if len(nodes) == 1 and here.target is not aten.channel_shuffle.default
                else Shuffle(source, dim, _along(numbers, dim), tuple(nodes))
            )
        if len(varying) < 2:
            return None
        here = next(iter(here.users)) if len(here.users) == 1 else None
    return None


_MOVES: frozenset[Any] = frozenset(
    {aten.view, aten.reshape, aten.unflatten, aten.flatten, aten.transpose, aten.permute, aten.swapaxes}
    | {aten.contiguous, aten.clone, aten.channel_shuffle}
)


def _moved(node: fx.Node, numbers: Tensor, values: Mapping[fx.Node, Any]) -> Tensor:
    given = {name: _plain(value, values) for name, value in list(arguments(node).items())[1:]}
    if node.target in (aten.contiguous.default, aten.clone.default):
        return numbers
    if node.target is aten.view.default:
        return numbers.reshape(given["size"])
    target: Any = node.target
    moved: Tensor = target(numbers, **given)
    return moved


def _plain(tree: Any, values: Mapping[fx.Node, Any]) -> Any:
    """Sizes that the graph computes, as numbers at the example batch."""

    def number(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        if node.target is aten.sym_size.int:
            source, dim = node.args
            assert isinstance(source, fx.Node)
            return int(source.meta["tensor_meta"].shape[dim])
        assert callable(node.target)
        return node.target(*(_plain(arg, values) for arg in node.args))

    return torch.fx.node.map_arg(tree, number)


def _varying(numbers: Tensor) -> list[int]:
    core = numbers[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in numbers.stride())]
    return [d for d, size in enumerate(core.shape) if size > 1 and bool((core != core.narrow(d, 0, 1)).any())]


def _along(numbers: Tensor, dim: int) -> Tensor:
    return numbers.movedim(dim, -1).reshape(-1, numbers.shape[dim])[0].clone()


def replace_shuffle(
    model: CapturedModel, shuffle: Shuffle, source: fx.Node, alive_before: Tensor, alive_after: Tensor
) -> fx.Node:
    """Put `index_select` over the channels of `source` that are left in the place of the shuffle, or `source` itself
    where they stay in order; gives what stands there now.

    `alive_before`, `alive_after`: (size,) which places of the source and of the result are left.
    """
    rank = torch.cumsum(alive_before, 0) - 1
    order = rank[shuffle.order[alive_after]]
    last = shuffle.nodes[-1]
    new = source
    if not torch.equal(order, torch.arange(int(alive_before.sum()))):
        with model.graph.inserting_before(last):
            new = _selected(model, shuffle, source, order)
    last.replace_all_uses_with(new)
    for node in reversed(shuffle.nodes):
        model.graph.erase_node(node)
    return new


def _selected(model: CapturedModel, shuffle: Shuffle, source: fx.Node, order: Tensor) -> fx.Node:
    last = shuffle.nodes[-1]
    index = add_buffer(model, f"{last.name}_order", order)
    new = model.graph.call_function(aten.index_select.default, (source, shuffle.dim, index))
    new.meta.update({k: v for k, v in last.meta.items() if k in ("tensor_meta", "module_path")})
    return new
