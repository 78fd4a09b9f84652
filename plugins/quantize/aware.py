"""Training in which weights, biases and activations are rounded as the integers will round them.

    x → Q → DQ → conv(·, W, b) → Q → DQ → y               activations round, weights are still to be rounded
    x → fake → conv(·, fake(W), fake(b)) → fake → y       the twin that is trained: the same values, with gradients

The gradient of a rounded value is that of the value, 0 where its integer is clamped (Jacob et al. 2018,
arXiv:1712.05877, section 3). Training begins at the integers that would be written without it and keeps their scales;
zeros of a weight stay zero.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

import surgery
from surgery import CapturedModel, Context, Layer, PassReport
from surgery.graph import TO_COPY

from .fitting import Fitted
from .insertion import input_scale, operators
from .scheme import Scheme
from .training import fake_quantised

if TYPE_CHECKING:
    from . import Quantize

aten = torch.ops.aten
CELL = 0.499
"""Of a step to each side of an integer: weights begin within."""


@dataclass(frozen=True)
class Rounded:
    """A layer of the twin: the names of its weight and bias, and the scheme of the weight, in scales of float32."""

    weight: str
    bias: str | None
    scheme: Scheme


def trained(
    step: Quantize, model: CapturedModel, layers: list[Layer], fitted: Mapping[str, Fitted], context: Context
) -> tuple[dict[str, Fitted], PassReport]:
    """Integers of `layers` after training, by name, and the report of the training. `fitted`: where it begins. `model`
    has its activations rounded already; what else it has gets its trained values."""
    twin, rounded = rounding_twin(model, layers, fitted)
    report = context.find_pass("finetune")(**(step.training or {})).apply(twin, context)
    values = surgery.tensors(twin)
    found = {}
    for layer in layers:
        own = rounded[layer.name]
        bias = None if own.bias is None else values[own.bias].detach()
        found[layer.name] = _fitted(surgery.weight_of(layer), values[own.weight].detach(), own.scheme, bias)
    _take(model, values, {name for own in rounded.values() for name in (own.weight, own.bias) if name})
    return found, report


def rounding_twin(
    model: CapturedModel, layers: list[Layer], fitted: Mapping[str, Fitted]
) -> tuple[CapturedModel, dict[str, Rounded]]:
    """The model to train, and what in it became of `layers`, by name. In eval mode it computes what the integers of
    `fitted` compute."""
    twin = surgery.snapshot(model)
    names = {layer.name for layer in layers}
    rounded = {}
    for layer in [layer for layer in surgery.layers(twin) if layer.name in names]:
        rounded[layer.name] = _round_layer(twin, layer, fitted[layer.name])
    for node in list(twin.graph.nodes):
        if node.target is operators.dequantize_per_tensor.default:
            _round_value(twin.graph, node)
    twin.graph.eliminate_dead_code()
    twin.recompile()
    return twin, rounded


def _round_layer(twin: CapturedModel, layer: Layer, fitted: Fitted) -> Rounded:
    """Have the weight of `layer`, and its bias at each call, rounded."""
    module: Any = layer.module
    scheme = replace(fitted.scheme, scale=fitted.scheme.scale.float().double())
    learns = module.weight.requires_grad
    if fitted.bias is not None and not layer.functional:
        module.bias = nn.Parameter(fitted.bias.to(module.weight), learns)
    bias = module.bias

    def function(weight: Tensor, weight_scale: Tensor) -> Tensor:
        kept = replace(scheme, scale=weight_scale, zero_point=torch.zeros_like(weight_scale))
        return fake_quantised(weight * (weight != 0), kept)

    weight = nn.Parameter(_within(module.weight.detach(), fitted.integers, scheme), learns)
    scale = scheme.scale.float()
    surgery.replace_weight(twin, layer, function, {"weight": weight, "weight_scale": scale})
    names = {id(tensor): name for name, tensor in surgery.tensors(twin).items()}
    if bias is not None:
        _round_bias(twin.graph, names[id(bias)], names[id(scale)])
    return Rounded(names[id(weight)], None if bias is None else names[id(bias)], scheme)


def _within(weight: Tensor, integers: Tensor, scheme: Scheme) -> Tensor:
    """`weight` moved to where it rounds to `integers`, however these were found."""
    q, scale = integers.double(), scheme.along(scheme.scale, integers.double())
    return torch.maximum(torch.minimum(weight.double(), (q + CELL) * scale), (q - CELL) * scale).to(weight)


def _round_bias(graph: fx.Graph, bias: str, weight_scale: str) -> None:
    [scale] = _readers(graph, weight_scale)
    for reader in _readers(graph, bias):
        for call in list(reader.users):
            with graph.inserting_before(call):
                rounded = _multiples(graph, reader, scale, input_scale(call))
            call.replace_input_with(reader, rounded)


def _multiples(graph: fx.Graph, bias: fx.Node, scale: fx.Node, factor: float) -> fx.Node:
    """`bias` as the nearest multiples of `scale` · `factor`, found in float64 as the integers are; the gradient passes
    unchanged."""

    def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return graph.call_function(target, args, kwargs)

    exact, step = (call(TO_COPY.default, node, dtype=torch.float64) for node in (bias, scale))
    integers = call(aten.round.default, call(aten.div.Tensor, exact, call(aten.mul.Tensor, step, factor)))
    short = call(TO_COPY.default, integers, dtype=torch.float32)
    value = call(aten.detach.default, call(aten.mul.Tensor, short, call(aten.mul.Tensor, scale, factor)))
    return _with_gradient(graph, value, bias)


def _round_value(graph: fx.Graph, node: fx.Node) -> None:
    """A pair that ends in `node` as one operator with a gradient; it rounds alike."""
    pair: Any = node.args[0]
    if pair.target is not operators.quantize_per_tensor.default:  # a constant
        return
    value, own = pair.args[0], pair.args[1:5]
    scale, *_ = own
    with graph.inserting_before(node):
        fake = graph.call_function(aten.fake_quantize_per_tensor_affine.default, (value, *own))
        if node.args[1] != scale:
            fake = _scaled(graph, fake, scale, node.args[1])
    node.replace_all_uses_with(fake)
    graph.erase_node(node)


def _scaled(graph: fx.Graph, fake: fx.Node, scale: Any, other: Any) -> fx.Node:
    """Multiples of `scale` as those of `other`, as a runtime has them that reads the integers so."""
    integers = graph.call_function(aten.round.default, (graph.call_function(aten.div.Tensor, (fake, scale)),))
    exact = graph.call_function(aten.detach.default, (graph.call_function(aten.mul.Tensor, (integers, other)),))
    return _with_gradient(graph, exact, graph.call_function(aten.mul.Tensor, (fake, other / scale)))


def _with_gradient(graph: fx.Graph, value: fx.Node, other: fx.Node) -> fx.Node:
    """`value`, with the gradient of `other`."""
    zero = graph.call_function(aten.sub.Tensor, (other, graph.call_function(aten.detach.default, (other,))))
    return graph.call_function(aten.add.Tensor, (value, zero))


def _readers(graph: fx.Graph, name: str) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "get_attr" and node.target == name]


def _fitted(before: Tensor, weight: Tensor, scheme: Scheme, bias: Tensor | None) -> Fitted:
    integers = scheme.quantise(weight)
    error = (scheme.dequantise(integers) - before).norm() / before.norm().clamp_min(1e-30)
    return Fitted(integers.double(), scheme, bias, float(error))


def _take(model: CapturedModel, values: Mapping[str, Tensor], taken: Collection[str]) -> None:
    """Give `model` what it has under the same names as `values`, but for those `taken` already."""
    for name in surgery.tensors(model).keys() & values.keys() - set(taken):
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, values[name])
