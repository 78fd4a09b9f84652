"""Channels between two layers rescaled so that both layers' weights have equal ranges.

    W₂ f(W₁ x + b₁)  =  (W₂ S) f(S⁻¹ W₁ x + S⁻¹ b₁),   f(s x) = s f(x) for s > 0      s = √(r₁ / r₂)

r₁, r₂ (channels,) are the largest |w| of an output channel of W₁ and of what reads it in W₂; both become √(r₁ r₂).
Nagel et al. 2019 (arXiv:1906.04721, section 4.1, equation 11). Exact up to rounding; ReLU6 has no such f and is left
alone. It pays where a weight has one scale for all its channels.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

import surgery
from surgery import CapturedModel, Edit, Layer

aten = torch.ops.aten
ROUNDS = 30
SETTLED = 1e-3
"""Greatest |log s| of a last round, where layers stand in chains."""

_PER_VALUE = {aten.relu.default, aten.leaky_relu.default, aten.dropout.default}
_PER_CHANNEL = {
    *_PER_VALUE,
    *(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default),
    *(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default),
    *(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default),
}
_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


@dataclass(frozen=True)
class Pair:
    """What `first` gives is read by `second` alone, through operators with f(s x) = s f(x)."""

    first: Layer
    second: Layer


def pairs(model: CapturedModel, chosen: Iterable[Layer] | None = None) -> list[Pair]:
    """Those among the layers `chosen` (default: all), two convolutions or two linear layers each, none shared or
    computed."""
    asked = surgery.layers(model) if chosen is None else chosen
    fitting = [layer for layer in asked if _fits(model, layer)]
    readers = {layer.nodes[0]: layer for layer in fitting}
    found = []
    for first in fitting:
        reader = _reader(model, first)
        second = readers.get(reader) if reader else None
        if second and (first.type == "Linear") == (second.type == "Linear"):
            found.append(Pair(first, second))
    return found


def _fits(model: CapturedModel, layer: Layer) -> bool:
    plain = isinstance(layer.module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return plain and surgery.sharing(model, layer) is None


def _reader(model: CapturedModel, layer: Layer) -> fx.Node | None:
    """The first node after the layer, each the only user of the one before, that is no such f."""
    passing = _PER_VALUE if layer.type == "Linear" else _PER_CHANNEL
    node = layer.nodes[0]
    while len(node.users) == 1:
        user = next(iter(node.users))
        module = model.get_submodule(str(user.target)) if user.op == "call_module" else None
        if user.args[:1] != (node,):
            return None
        if user.target not in passing and not isinstance(module, _MODULES):
            return user
        node = user
    return None


def equalise(model: CapturedModel, wanted: Iterable[Pair]) -> list[Edit]:
    """Rescale the channels between every pair, again and again where pairs share a layer; one edit for each pair, with
    the largest range of a channel over the smallest before and after."""
    wanted = list(wanted)
    layers = {layer.name: layer for pair in wanted for layer in (pair.first, pair.second)}
    weights = {name: surgery.weight_of(layer).double() for name, layer in layers.items()}
    biases = {name: bias.double() for name, layer in layers.items() if (bias := _bias(layer)) is not None}
    before = [_spread(_ranges_out(weights[pair.first.name])) for pair in wanted]
    for _ in range(ROUNDS):
        if max((_step(pair, weights, biases) for pair in wanted), default=0.0) < SETTLED:
            break
    for name, layer in layers.items():
        _put(model, layer, weights[name], biases.get(name))
    return [
        Edit(
            pair.first.name,
            f"channels scaled to meet {pair.second.name}",
            {"range_ratio_before": old, "range_ratio": _spread(_ranges_out(weights[pair.first.name]))},
            also=(pair.second.name,),
        )
        for pair, old in zip(wanted, before, strict=True)
    ]


def _step(pair: Pair, weights: dict[str, Tensor], biases: dict[str, Tensor]) -> float:
    """Scale the channels of one pair; the greatest |log s|."""
    first, second = pair.first.name, pair.second.name
    groups = int(getattr(pair.second.module, "groups", 1))
    r1, r2 = _ranges_out(weights[first]), _ranges_in(weights[second], groups)
    scale = torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
    weights[first] = weights[first] / scale.view(-1, *[1] * (weights[first].ndim - 1))
    weights[second] = _times_inputs(weights[second], scale, groups)
    if first in biases:
        biases[first] = biases[first] / scale
    return float(scale.log().abs().max())


def _ranges_out(weight: Tensor) -> Tensor:
    """max |w| (outputs,)"""
    return weight.flatten(1).abs().amax(1)


def _ranges_in(weight: Tensor, groups: int) -> Tensor:
    """max |w| (inputs,) of a weight (outputs, inputs per group, *kernel)."""
    return weight.reshape(groups, -1, weight.shape[1], weight[0, 0].numel()).abs().amax((1, 3)).flatten()


def _times_inputs(weight: Tensor, scale: Tensor, groups: int) -> Tensor:
    grouped = weight.reshape(groups, -1, *weight.shape[1:])
    return (grouped * scale.view(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)


def _bias(layer: Layer) -> Tensor | None:
    bias = layer.module.bias
    return bias.detach() if isinstance(bias, Tensor) else None


def _spread(ranges: Tensor) -> float:
    """Largest over smallest range, channels without weights aside."""
    own = ranges[ranges > 0]
    return float(own.max() / own.min()) if own.numel() else 1.0


def _put(model: CapturedModel, layer: Layer, weight: Tensor, bias: Tensor | None) -> None:
    module = layer.module
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            old = getattr(module, name)
            setattr(module, name, nn.Parameter(value.to(old), old.requires_grad))
    if layer.functional:
        surgery.replace_layer(model, layer, {"": module})
