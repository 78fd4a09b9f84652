"""The same functions in forms for which there are integer kernels.

linear(x (…, I))            →   reshape(linear(reshape(x, (-1, I))))     a Gemm and not a MatMul with an Add
silu(x)                     →   x sigmoid(x)
hardswish(x)                →   x hardsigmoid(x)
mean over all pixels        →   avg_pool2d with a window as large
dropout, clone, contiguous  →   nothing
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import fx

import surgery
from surgery import CapturedModel
from surgery.graph import tree_leaves

from .placement import kind

aten = torch.ops.aten
_DROPOUT = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
_COPIES = ("aten.clone.default", "aten.contiguous.default", "aten.alias.default", "aten.detach.default")


def rewrite(model: CapturedModel, chosen: Collection[str]) -> None:
    """Rewrite the eval-mode graph around the layers `chosen`, by name."""
    flat = [
        node
        for layer in surgery.layers(model)
        if layer.type == "Linear" and layer.name in chosen
        for node in layer.nodes
        if len(surgery.shape(node)) > 2
    ]
    open_dims = _open_dims(model, flat)
    for node in flat:
        _flatten(model.graph, node, open_dims[node])
    for node in list(model.graph.nodes):
        if kind(model, node) in (*_DROPOUT, *_COPIES):
            _drop(model, node)
        elif rule := _RULES.get(node.target):
            rule(model, node)


class _Shapes(fx.Interpreter):
    """Notes the shape of every tensor."""

    def __init__(self, model: CapturedModel) -> None:
        super().__init__(model)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            self.shapes[n] = tuple(value.shape)
        return value


def _leaves(inputs: surgery.Inputs) -> list[Any]:
    return tree_leaves((inputs.args, inputs.kwargs))


def _open_dims(model: CapturedModel, nodes: list[fx.Node]) -> dict[fx.Node, int]:
    """The dimension of each node's value that depends on the batch; the first where none does."""
    if not (nodes and model.dynamic_batch):
        return dict.fromkeys(nodes, 0)
    seen = _Shapes(model)
    with torch.no_grad():
        seen.run(*_leaves(model.inputs.with_batch(model.inputs.batch_size + 1)), enable_io_processing=False)
    found = {}
    for node in nodes:
        pairs = zip(surgery.shape(node), seen.shapes[node], strict=True)
        found[node] = next((i for i, (a, b) in enumerate(pairs) if a != b), 0)
    return found


def _flatten(graph: fx.Graph, node: fx.Node, open_dim: int) -> None:
    """Rows of a linear layer's input as one dimension."""
    source, sizes = _first(node), surgery.shape(node)
    with graph.inserting_before(node):
        rows = _call(graph, aten.reshape.default, source, [-1, surgery.shape(source)[-1]])
    with graph.inserting_after(node):
        back = _call(graph, aten.reshape.default, node, [-1 if i == open_dim else n for i, n in enumerate(sizes)])
    node.replace_all_uses_with(back, delete_user_cb=lambda user: user is not back)
    node.replace_input_with(source, rows)
    _note_shape(back, node, sizes)
    _note_shape(node, node, (surgery.shape(rows)[0], sizes[-1]))


def _drop(model: CapturedModel, node: fx.Node) -> None:
    """Remove an identity. What it made contiguous may not be any more, which `reshape` takes and `view` does not."""
    surgery.bypass(model, node)
    for other in model.graph.nodes:
        if other.target is aten.view.default:
            other.target = aten.reshape.default


def _split(gate: Any, model: CapturedModel, node: fx.Node) -> None:
    """`gate`(x) x"""
    with model.graph.inserting_before(node):
        product = _call(model.graph, aten.mul.Tensor, _first(node), _call(model.graph, gate, _first(node)))
    _put(model.graph, node, product)


def _pool_mean(model: CapturedModel, node: fx.Node) -> None:
    dims, sizes = node.args[1], surgery.shape(_first(node))
    if len(sizes) != 4 or not isinstance(dims, list | tuple) or sorted(int(d) % 4 for d in dims) != [2, 3]:  # type: ignore[arg-type]
        return
    if len(node.args) > 3 or node.kwargs.get("dtype") is not None:
        return
    with model.graph.inserting_before(node):
        pooled = _call(model.graph, aten.avg_pool2d.default, _first(node), [sizes[2], sizes[3]])
        keep = len(node.args) > 2 and node.args[2]
        result = pooled if keep else _call(model.graph, aten.flatten.using_ints, pooled, 1)
    _put(model.graph, node, result)


def _pool_evenly(model: CapturedModel, node: fx.Node) -> None:
    """Adaptive pooling whose windows are all alike."""
    before, after = surgery.shape(_first(node))[-2:], surgery.shape(node)[-2:]
    if before == after:
        surgery.bypass(model, node)
    elif len(surgery.shape(node)) == 4 and all(b % a == 0 for b, a in zip(before, after, strict=True)):
        window = [b // a for b, a in zip(before, after, strict=True)]
        with model.graph.inserting_before(node):
            pooled = _call(model.graph, aten.avg_pool2d.default, _first(node), window)
        _put(model.graph, node, pooled)


_RULES: dict[Any, Any] = {
    aten.silu.default: partial(_split, aten.sigmoid.default),
    aten.hardswish.default: partial(_split, aten.hardsigmoid.default),
    aten.mean.dim: _pool_mean,
    aten.adaptive_avg_pool2d.default: _pool_evenly,
}


def _call(graph: fx.Graph, target: Any, source: fx.Node, *args: Any) -> fx.Node:
    node = graph.call_function(target, (source, *args))
    tensors = [torch.empty(surgery.shape(a), device="meta") if isinstance(a, fx.Node) else a for a in node.args]
    _note_shape(node, source, tuple(target(*tensors).shape))
    return node


def _note_shape(node: fx.Node, like: fx.Node, sizes: tuple[int, ...]) -> None:
    node.meta["tensor_meta"] = like.meta["tensor_meta"]._replace(shape=torch.Size(sizes))


def _put(graph: fx.Graph, node: fx.Node, instead: fx.Node) -> None:
    node.replace_all_uses_with(instead)
    graph.erase_node(node)


def _first(node: fx.Node) -> Any:
    return node.args[0]
