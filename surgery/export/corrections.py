"""Operators that torch.onnx writes wrongly, in a form that it writes rightly; those without one are refused by name.

avg_pool(x; divisor d, kernel k)   →   avg_pool(pad(x)) · |k| / d
lstm(x; projections)                   refused: the LSTM of ONNX has none
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from ..errors import ExportError
from ..torch_private import schema_of

aten = torch.ops.aten


def correct(program: ExportedProgram, way_out: str) -> None:
    """Rewrites in place, or refuses, what torch.onnx is known to write wrongly.

    Raises:
        ExportError: an operator has no right form in ONNX. `way_out` is the remedy beside that of the operator.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        name = operator_name(node.target)
        if why := name in REFUSED and REFUSED[name](node):
            raise ExportError(why, at=_place(node), fix=f"{REMEDIES[name]}; or {way_out}")
        if name in CORRECTED:
            CORRECTED[name](graph, node)


def operator_name(target: Any) -> str:
    """`avg_pool2d` of aten.avg_pool2d.default."""
    return str(target).removeprefix("aten.").partition(".")[0]


def _place(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {"": ("", None)}
    module = list(stack.values())[-1][0].removeprefix("model").removeprefix(".")
    return f"{node.name} in module {module}" if module else node.name


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments by name, defaults included."""
    schema = schema_of(node.target).arguments
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | node.kwargs
    return {a.name: given.get(a.name, a.default_value) for a in schema}


def _divisor(graph: fx.Graph, node: fx.Node) -> None:
    """Padded by hand, all windows are whole: each is divided by |k|, and then by d / |k|."""
    found, sizes = _arguments(node), node.args[0].meta["val"].shape  # type: ignore[union-attr]
    rank = 3 if "3d" in str(node.target) else 2
    if found["divisor_override"] is None or not all(isinstance(size, int) for size in sizes[-rank:]):
        return
    kernel, stride, padding = (_of_each(found[name], rank) for name in ("kernel_size", "stride", "padding"))
    stride = stride or kernel
    ends = [(out - 1) * s for out, s in zip(node.meta["val"].shape[-rank:], stride, strict=True)]
    last = [max(0, end + k - n - p) for end, k, n, p in zip(ends, kernel, sizes[-rank:], padding, strict=True)]
    pads = [pad for both in zip(reversed(padding), reversed(last), strict=True) for pad in both]
    with graph.inserting_before(node):
        padded = _call(graph, node, aten.constant_pad_nd.default, node.args[0], pads, 0.0)
        means = _call(graph, node, node.target, padded, kernel, stride)
        product = _call(graph, node, aten.mul.Tensor, means, prod(kernel) / found["divisor_override"])
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _ceiling(node: fx.Node) -> None:
    """No ceil_mode where there are no more windows with it: ONNX would count one that PyTorch drops."""
    found, rank = _arguments(node), int(operator_name(node.target).partition("pool")[2][0])
    values = node.meta["val"] if isinstance(node.meta["val"], tuple | list) else [node.meta["val"]]
    sizes, out = node.args[0].meta["val"].shape[-rank:], values[0].shape[-rank:]  # type: ignore[union-attr]
    if not found["ceil_mode"] or not all(isinstance(size, int) for size in sizes):
        return
    names = ("kernel_size", "stride", "padding", "dilation")
    kernel, stride, padding, dilation = (_of_each(found.get(name, [1]), rank) for name in names)
    steps = zip(sizes, kernel, stride or kernel, padding, dilation, strict=True)
    if tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in steps) == tuple(out):
        node.args, node.kwargs = tuple((found | {"ceil_mode": False}).values()), {}


def _pool(graph: fx.Graph, node: fx.Node) -> None:
    _ceiling(node)
    if "divisor_override" in _arguments(node):
        _divisor(graph, node)


def _log_sigmoid(graph: fx.Graph, node: fx.Node) -> None:
    with graph.inserting_before(node):
        negative = _call(graph, node, aten.neg.default, node.args[0])
        product = _call(graph, node, aten.neg.default, _call(graph, node, aten.softplus.default, negative))
    node.replace_all_uses_with(product)
    graph.erase_node(node)


def _cross(graph: fx.Graph, node: fx.Node) -> None:
    """Along the first dimension of size 3, where none is given."""
    first, other = node.args[:2]
    if _arguments(node)["dim"] is None:
        node.args, node.kwargs = (first, other, list(node.meta["val"].shape).index(3)), {}


def _of_each(value: list[int], rank: int) -> list[int]:
    return list(value) * rank if len(value) == 1 else list(value)


def _call(graph: fx.Graph, like: fx.Node, target: Any, *args: Any) -> fx.Node:
    """A node in the place of `like`, with the value that export expects in it."""
    node = graph.call_function(target, args)
    values = [argument.meta["val"] if isinstance(argument, fx.Node) else argument for argument in args]
    node.meta = {**like.meta, "val": target(*values)}
    return node


def _projections(node: fx.Node) -> str:
    """With projections, an LSTM has one weight more for each layer and direction."""
    found = _arguments(node)
    if "params" not in found:  # of packed sequences, which have no ONNX form at all
        return ""
    without = found["num_layers"] * (2 if found["bidirectional"] else 1) * (4 if found["has_biases"] else 2)
    return "" if len(found["params"]) == without else "nn.LSTM(proj_size=…): the LSTM of ONNX has no projections"


_RANKS = ("1d", "2d", "3d")
_POOLS = [
    f"{kind}_pool{rank}{end}" for kind, end in (("avg", ""), ("max", ""), ("max", "_with_indices")) for rank in _RANKS
]
CORRECTED: dict[str, Callable[[fx.Graph, fx.Node], None]] = {
    **dict.fromkeys(_POOLS, _pool),
    "log_sigmoid": _log_sigmoid,
    "cross": _cross,
}
REFUSED: dict[str, Callable[[fx.Node], str]] = {"lstm": _projections}
REMEDIES = {
    "lstm": "use an LSTM without proj_size",
    "_upsample_bicubic2d_aa": "resize with `recompute_scale_factor=True`, to a `size`, or without antialias",
    "_upsample_bilinear2d_aa": "resize with `recompute_scale_factor=True`, to a `size`, or without antialias",
}
"""For what is refused, and for operators that the file computes rightly with some arguments only."""
