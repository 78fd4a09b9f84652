"""Quantise and dequantise nodes in a captured graph, and layers with integer weights and biases.

    x → conv(·, W, b) → relu → y
    x → Q → DQ → conv(·, DQ(W₈), DQ(b₃₂)) → relu → Q → DQ → y         b₃₂ at the scale s_x s_w

    hardsigmoid(DQ(x₈, s)) → DQ(x₈, s/6) + DQ(1, ½)         what is below 0 or above 1 is cut off by the grid behind it

The operators are those of `torch.ops.quantized_decomposed`, which export as QuantizeLinear and DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, fx

import surgery
from surgery import CapturedModel, Layer
from surgery.graph import parameters_of, register_decomposed

from .placement import HARDSIGMOID, Placement
from .scheme import Scheme, hardsigmoid_terms
from .shared import Rounded

register_decomposed()
operators = torch.ops.quantized_decomposed
BIAS_STEPS = 2**30
"""An int32 bias keeps to this, which leaves room for the sum it is added to."""


UINT8 = 255


def insert_pairs(placement: Placement, schemes: Mapping[fx.Node, Scheme]) -> None:
    """Round every value of `placement` by its scheme in `schemes` (by the value that decides the scale). Activations
    that are taken in go."""
    graph = placement.model.graph
    rounded = {value: placement.is_rounded(value) for value in placement.values}
    integer = {node for node in graph.nodes if placement.is_integer(node)}
    gates = [node for node in graph.nodes if node in placement.joins and placement.kind(node) == HARDSIGMOID]
    sums = {node: schemes[placement.values[source]] for node in gates for source in placement.reads(node)}
    for value, root in placement.values.items():
        users = [user for user in value.users if rounded[value] or user in integer]
        pair = _pair(graph, value, schemes[root])
        for user in users:
            user.replace_input_with(value, pair)
        if rounded[value] and placement.producer(value) is not value:  # the ends of the grid do what it does
            surgery.bypass(placement.model, value)
    for node, scheme in sums.items():
        _write_as_sum(placement.model, node, hardsigmoid_terms(scheme))


def is_quantised(model: CapturedModel) -> bool:
    return any(_is_dequantise(node) for node in model.graph.nodes)


def input_scale(node: fx.Node) -> float:
    """The scale of what a layer's call reads."""
    return float(_first(node).args[1])


def output_scale(node: fx.Node) -> float | None:
    """The scale of what a layer's call gives; None where that stays float."""
    scales = [user.args[1] for user in node.users if user.target is operators.quantize_per_tensor.default]
    return float(scales[0]) if scales else None  # type: ignore[arg-type]


class Integers(Protocol):
    """What a layer computes with: `integers` in the shape of its weight, by `scheme` per output, looked up in those of
    `shared` where it is given, and a float `bias` (outputs,)."""

    @property
    def integers(self) -> Tensor: ...
    @property
    def scheme(self) -> Scheme: ...
    @property
    def bias(self) -> Tensor | None: ...
    @property
    def shared(self) -> Rounded | None: ...


def integer_layer(model: CapturedModel, layer: Layer, given: Integers) -> None:
    """Give `layer` integer weights, and int32 biases (one per call, as the scales of its inputs may differ)."""
    scale, bias = given.scheme.scale.expand(len(given.integers)).contiguous(), given.bias
    read = _integer_weight(model, layer, given, scale)
    if bias is None:
        return
    place = str(read.args[1].target).rpartition(".")[0]  # type: ignore[union-attr]
    for number, node in enumerate(sorted(read.users)):
        integers = (bias.detach().double() / (scale * input_scale(node))).round().to(torch.int32)
        _set_bias(model, node, f"{place}.bias_{number + 1}" if number else f"{place}.bias", integers, read.args[1])


def _integer_weight(model: CapturedModel, layer: Layer, given: Integers, scale: Tensor) -> fx.Node:
    """The node that gives the weight to all calls of the layer."""
    low, high, shared = given.scheme.grid.low, given.scheme.grid.high, given.shared
    tensors = shared.tensors if shared else {"weight": given.integers.to(torch.int8)}
    tensors["weight_scale"] = scale.float()
    if layer.type == "Linear":  # ONNX Runtime makes no QGemm of a Gemm without
        tensors["weight_zero"] = torch.zeros_like(scale, dtype=torch.int8)

    def function(weight_scale: Tensor, weight_zero: Tensor | None = None, **rest: Tensor) -> Tensor:
        weight = shared.looked_up(rest) if shared else rest["weight"]
        result: Tensor = operators.dequantize_per_channel(weight, weight_scale, weight_zero, 0, low, high, torch.int8)
        return result

    before = set(model.graph.nodes)
    surgery.replace_weight(model, layer, function, tensors)
    made: fx.Node = next(node for node in model.graph.nodes if node not in before and _is_dequantise(node))
    return made


def _set_bias(model: CapturedModel, node: fx.Node, name: str, integers: Tensor, weight_scale: Any) -> None:
    graph = model.graph
    path, _, leaf = name.rpartition(".")
    home = model.get_submodule(path)
    parameters_of(home).pop(leaf, None)
    home.register_buffer(leaf, integers)
    with graph.inserting_before(node):
        scales = graph.call_function(torch.ops.aten.mul.Tensor, (weight_scale, input_scale(node)))
        limits = torch.iinfo(torch.int32)
        bias = graph.call_function(
            operators.dequantize_per_channel.default,
            (graph.get_attr(name), scales, None, 0, limits.min, limits.max, torch.int32),
        )
    if "bias" in node.kwargs:
        node.update_kwarg("bias", bias)
    else:
        node.update_arg(2, bias)


def _pair(graph: fx.Graph, value: fx.Node, scheme: Scheme) -> fx.Node:
    """The rounded `value`."""
    grid = scheme.grid
    last = [node for node in graph.nodes if node.op == "placeholder"][-1] if value.op == "placeholder" else value
    if grid.high < UINT8:  # ONNX rounds to all of uint8: the ends of fewer bits are cut off before
        ends = [float(scheme.dequantise(torch.tensor(float(end)))) for end in (grid.low, grid.high)]
        with graph.inserting_after(last):
            value = last = graph.call_function(torch.ops.aten.clamp.default, (value, *ends))
    with graph.inserting_after(last):
        integers = graph.call_function(operators.quantize_per_tensor.default, (value, *_options(scheme)))
    with graph.inserting_after(integers):
        return _dequantise(graph, integers, scheme)


def _dequantise(graph: fx.Graph, integers: fx.Node, scheme: Scheme) -> fx.Node:
    return graph.call_function(operators.dequantize_per_tensor.default, (integers, *_options(scheme)))


def _options(scheme: Scheme) -> tuple[float, int, int, int, torch.dtype]:
    return float(scheme.scale), int(scheme.zero_point), scheme.grid.low, scheme.grid.high, torch.uint8


def _write_as_sum(model: CapturedModel, node: fx.Node, terms: Sequence[Scheme]) -> None:
    """Two integers added up in the place of `node`, which reads the first of them."""
    graph, integers = model.graph, _first(_first(node))
    with graph.inserting_before(node):
        one = surgery.add_buffer(model, f"{node.name}_one", torch.tensor(1, dtype=torch.uint8))
        added = [_dequantise(graph, value, term) for value, term in zip((integers, one), terms, strict=True)]
        result = graph.call_function(torch.ops.aten.add.Tensor, tuple(added))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _is_dequantise(node: fx.Node) -> bool:
    return node.target in (operators.dequantize_per_tensor.default, operators.dequantize_per_channel.default)


def _first(node: fx.Node) -> Any:
    return node.args[0]
