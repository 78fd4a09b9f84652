"""Operators that Python writes with brackets: slices, selections, sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from ..state.write import ranks
from ..torch_private import OpOverload
from .literals import literal, tight

Operand = Callable[[Any], str]


def is_tensor(value: Any) -> bool:
    """Whether `value` is a node that holds no Python number."""
    return isinstance(value, fx.Node) and not is_scalar(value)


def is_scalar(node: fx.Node) -> bool:
    """Whether the node's value is a Python number: a size, or arithmetic on sizes."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, OpOverload):
        return str(node.target).startswith(("aten.sym_size", "aten.sym_numel", "aten.sym_stride"))
    return True


def rank(node: Any) -> int | None:
    """Number of dimensions of the node's tensor at the example, where it is known."""
    found = ranks(node) if isinstance(node, fx.Node) else None
    return found if isinstance(found, int) else None


def _subscript(node: fx.Node, dim: int, index: str, operand: Operand) -> str | None:
    """`x[:, :, index]` with `index` at dimension `dim`."""
    dims = rank(node.args[0])
    if not is_tensor(node.args[0]) or (dim < 0 and dims is None):
        return None
    position = dim if dim >= 0 else dim + int(dims or 0)
    return f"{tight(literal(node.args[0], operand), True)}[{':, ' * position}{index}]"


def _slice(node: fx.Node, operand: Operand) -> str | None:
    given: tuple[Any, ...] = node.args[1:]
    dim, start, end, step = given + (0, None, None, 1)[len(given) :]
    first = "" if start is None or start == 0 else literal(start, operand)
    last = "" if end is None or end == 2**63 - 1 else literal(end, operand)
    by = "" if step == 1 else f":{literal(step, operand)}"
    if node.kwargs or not isinstance(dim, int):
        return None
    return _subscript(node, dim, f"{first}:{last}{by}", operand)


def _select(node: fx.Node, operand: Operand) -> str | None:
    if len(node.args) != 3 or not isinstance(node.args[1], int):
        return None
    return _subscript(node, node.args[1], literal(node.args[2], operand), operand)


def _index(node: fx.Node, operand: Operand) -> str | None:
    indices = node.args[1]
    if not isinstance(indices, list | tuple) or not indices or not is_tensor(node.args[0]):
        return None
    if any(not rank(index) for index in indices if index is not None):
        return None  # Python takes a tensor without dimensions for a number
    inside = ", ".join(":" if index is None else literal(index, operand) for index in indices)
    return f"{tight(literal(node.args[0], operand), True)}[{inside}]"


def _size(node: fx.Node, operand: Operand) -> str | None:
    tensor, dim = node.args
    return f"{tight(literal(tensor, operand), True)}.shape[{literal(dim, operand)}]"


def _einsum(node: fx.Node, operand: Operand) -> str | None:
    equation, tensors = node.args[:2]
    if len(node.args) > 2 or node.kwargs or not isinstance(tensors, list | tuple) or len(tensors) > 2:
        return None  # with more operands Python chooses an order of its own
    texts = [literal(value, operand) for value in (equation, *tensors)]
    return f"torch.einsum({', '.join(texts)})"


SUBSCRIPTS: dict[str, Callable[[fx.Node, Operand], str | None]] = {
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.index.Tensor": _index,
    "aten.sym_size.int": _size,
    "aten.einsum.default": _einsum,
}
