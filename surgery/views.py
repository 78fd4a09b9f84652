"""Which nodes of an exported graph share memory with another, and how a value written through a view gets back.

v = select(x, 1, 0),  v' written   →   x' = select_scatter(x, v', 1, 0)
v = x.transpose(1, 2), v' written  →   x' = v'.transpose(1, 2)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from .torch_private import OpOverload, schema_of, storage_of

aten = torch.ops.aten

Inverse = Callable[[fx.Graph, fx.Node, fx.Node, fx.Node], fx.Node]
"""From graph, base, the view's new value and the view to the base's new value."""


def may_alias(node: fx.Node) -> bool:
    """Whether the result, or a tensor of a result list, shares memory with the first argument."""
    if not (node.args and isinstance(node.args[0], fx.Node)) or node.meta.get("fresh"):
        return False
    if node.target is operator.getitem:
        return may_alias(node.args[0])
    if not isinstance(node.target, OpOverload) or schema_of(node.target).is_mutable:
        return False
    if node.target in _COPIES_IF_NEEDED:
        return _same_storage(node, node.args[0])
    return node.target in _ALIASES_IN_EVAL or any(r.alias_info is not None for r in schema_of(node.target).returns)


def chain_to_base(node: fx.Node) -> Iterator[fx.Node]:
    """`node`, what it is a view of, and so on to the tensor that owns the memory; lists of views are passed over."""
    yield node
    while may_alias(node):
        source = node.args[0]
        assert isinstance(source, fx.Node)
        base = source.args[0] if node.target is operator.getitem else source
        assert isinstance(base, fx.Node)
        node = base
        yield node


def aliases(base: fx.Node) -> list[fx.Node]:
    """`base` and every view of it, views of views included, each after what it is a view of."""
    found = {base: None}
    queue = [base]
    for node in queue:
        fresh = [user for user in node.users if may_alias(user) and user.args[0] is node and user not in found]
        found |= dict.fromkeys(fresh)
        queue += fresh
    return list(found)


def put_back(graph: fx.Graph, view: fx.Node, base: fx.Node, new: fx.Node) -> fx.Node | None:
    """The value of `base` once its view `view` holds `new`; None where the view has no known inverse."""
    source = view.args[0] if view.target is operator.getitem else view
    assert isinstance(source, fx.Node)
    inverse = _INVERSES.get(source.target)
    return inverse(graph, base, new, view) if inverse else None


def _same_storage(a: fx.Node, b: fx.Node) -> bool:
    """Of the example tensors that export recorded; True where it recorded none."""
    first, second = a.meta.get("val"), b.meta.get("val")
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        return True
    return storage_of(first) == storage_of(second)


def _same_call(target: Any) -> Inverse:
    """The scatter operator with the view's own arguments, or an operator that is its own inverse."""
    scatters = len(schema_of(target).arguments) > 1 and schema_of(target).arguments[1].name == "src"
    return lambda graph, base, new, view: graph.call_function(
        target, (*((base, new) if scatters else (new,)), *view.args[1:]), view.kwargs
    )


def _same_order(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    """For views that keep the elements and their order."""
    return graph.call_function(aten.reshape_as.default, (new, base))


def _identity(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    return new


def _permute(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    order = view.args[1]
    assert isinstance(order, list | tuple)
    positive = [int(d) % len(order) for d in order]  # type: ignore[arg-type]
    return graph.call_function(aten.permute.default, (new, [positive.index(d) for d in range(len(order))]))


def _move(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    source, destination = view.args[1:]
    return graph.create_node("call_function", view.target, (new, destination, source))


def _narrow(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    dim, start, length = view.args[1:]
    ends = isinstance(start, int) and isinstance(length, int)
    end = start + length if ends else graph.call_function(operator.add, (start, length))  # type: ignore[operator]
    return graph.call_function(aten.slice_scatter.default, (base, new, dim, start, end))


def _unbind(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    source, index = view.args
    assert isinstance(source, fx.Node)
    dim = source.args[1] if len(source.args) > 1 else 0
    return graph.call_function(aten.select_scatter.default, (base, new, dim, index))


def _split(graph: fx.Graph, base: fx.Node, new: fx.Node, view: fx.Node) -> fx.Node:
    source, index = view.args
    assert isinstance(source, fx.Node)
    pieces = [graph.call_function(operator.getitem, (source, i)) for i in range(len(source.meta["val"]))]
    assert isinstance(index, int)
    unused, pieces[index] = pieces[index], new
    graph.erase_node(unused)
    return graph.call_function(aten.cat.default, (pieces, source.args[2] if len(source.args) > 2 else 0))


_ALIASES_IN_EVAL = {
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}

_COPIES_IF_NEEDED = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.contiguous.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten.flatten.using_ints,
}

_INVERSES: dict[Any, Inverse] = {
    aten.select.int: _same_call(aten.select_scatter.default),
    aten.slice.Tensor: _same_call(aten.slice_scatter.default),
    aten.diagonal.default: _same_call(aten.diagonal_scatter.default),
    **{op: _same_call(op) for op in (aten.transpose.int, aten.t.default, aten.numpy_T.default, aten.mT.default)},
    **{op: _same_call(op) for op in (aten.swapaxes.default, aten.swapdims.default)},
    aten.permute.default: _permute,
    aten.movedim.int: _move,
    aten.movedim.intlist: _move,
    aten.narrow.default: _narrow,
    aten.unbind.int: _unbind,
    **dict.fromkeys((aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default), _split),
    **dict.fromkeys((aten.view.default, aten.view_as.default, aten.unflatten.int, aten.expand.default), _same_order),
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default), _same_order),
    **dict.fromkeys((aten.reshape.default, aten.reshape_as.default, aten.flatten.using_ints), _same_order),
    **dict.fromkeys((aten.expand_as.default,), _same_order),
    **dict.fromkeys((aten.alias.default, aten.detach.default, *_ALIASES_IN_EVAL), _identity),
    **dict.fromkeys(
        _COPIES_IF_NEEDED - {aten.reshape.default, aten.reshape_as.default, aten.flatten.using_ints}, _identity
    ),
}
