"""Layers with weights: they take channels in, mix them, and give channels of their own.

A module and a functional call on parameters are the same to a rule: it reads the axes of the weight's dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import nn

from ..torch_private import ConvNd, ConvTransposeNd
from .arithmetic import elementwise
from .call import Call
from .values import Axis, Value


def convolution(call: Call) -> Any:
    """nn.Conv1d … nn.ConvTranspose3d, and the operators on a weight that is a value."""
    module = call.module
    if isinstance(module, ConvNd):
        transposed = isinstance(module, ConvTransposeNd)
        weight, bias, groups = call.parameter("weight", 0, 1), call.parameter("bias", 0), module.groups
    else:
        transposed = "transpose" in str(call.node.target)
        weight, bias, groups = call["weight"], call["bias"], call["groups"]
    assert weight is not None
    x, rank = call.input, weight.ndim - 2
    call.freeze_all(x.axes[-rank:], "convolved over")
    call.freeze_all(weight.axes[2:], "the kernel's own size")
    place = x.ndim - rank - 1
    channels = _grouped if groups > 1 else _dense
    made = channels(call, x.axes[place], x.shape[place], weight, groups, transposed)
    if bias is not None:
        call.unite(made, bias.axes[0])
    call.produces(weight.axes[1 if transposed else 0])
    call.takes(weight.axes[0 if transposed else 1])
    positions = x.shape[-rank:] if transposed else call.result.shape[-rank:]
    fixed = prod(positions) * prod(x.shape[:place]) * prod(weight.shape[2:])
    call.costs(zip(weight.shape[:2], weight.axes[:2], strict=True), fixed)
    batch = [axis and Axis(axis.ids, axis.zero and bias is None) for axis in x.axes[:place]]
    return call.gives([*batch, made, *[None] * rank])


def _dense(call: Call, taken: Axis | None, size: int, weight: Value, groups: int, transposed: bool) -> Axis | None:
    inputs, outputs = weight.axes[:2] if transposed else reversed(weight.axes[:2])
    call.unite(taken, inputs, "takes an input of the model, or one of fixed size")
    return outputs


def _grouped(call: Call, taken: Axis | None, size: int, weight: Value, groups: int, transposed: bool) -> Axis | None:
    """Whole groups go, or the same places of every group: whichever there are more of.

    conv: weight (g o, i, …), channels g i → g o. transposed: weight (g i, o, …).
    """
    whole, within = weight.axes[:2]
    if transposed:
        call.unite(taken, whole, "takes an input of the model, or one of fixed size")
        taken = taken and whole
    if groups > size // groups or size == groups:
        return _whole_groups(call, taken, weight, groups, transposed)
    row = taken and Axis(call.rows_alike(taken.ids.view(groups, -1)))
    if transposed:
        return within and Axis(within.ids.repeat(groups))
    call.unite(row, within, "takes an input of the model, or one of fixed size")
    if whole is not None:
        call.rows_alike(whole.ids.view(groups, -1))
    return whole


def _whole_groups(call: Call, taken: Axis | None, weight: Value, groups: int, transposed: bool) -> Axis | None:
    whole, within = weight.axes[:2]
    call.freeze(within, "its groups go as a whole")
    if taken is None or whole is None:
        call.unite(taken, whole, "takes an input of the model, or one of fixed size")
        return None
    table = taken.ids.view(groups, -1)
    if not transposed:
        table = torch.cat([table, whole.ids.view(groups, -1)], 1)
        call.rows_alike(table.T)
        return whole
    call.rows_alike(table.T)
    return Axis(table[:, :1].expand(-1, weight.shape[1]).reshape(-1))


def linear(call: Call) -> Any:
    """y = W x + b along the last dimension, W (outputs, inputs)."""
    if call.module is not None:
        weight, bias = call.parameter("weight", 0, 1), call.parameter("bias", 0)
    else:
        weight, bias = call["weight"], call["bias"]
    assert weight is not None
    x = call.input
    call.unite(x.axes[-1], weight.axes[-1], "takes an input of the model, or one of fixed size")
    made = weight.axes[0] if weight.ndim == 2 else None
    if bias is not None and weight.ndim == 2:
        call.unite(made, bias.axes[0])
    call.produces(made)
    call.takes(weight.axes[-1])
    before = list(zip(x.shape[:-1], x.axes[:-1], strict=True))
    call.costs([*before, *zip(weight.shape, weight.axes, strict=True)])
    rest = [axis and Axis(axis.ids, axis.zero and bias is None) for axis in x.axes[:-1]]
    return call.gives([*rest, made] if weight.ndim == 2 else rest)


def bilinear(call: Call) -> Any:
    """nn.Bilinear: y_o = x1ᵀ W_o x2 + b_o, W (outputs, inputs 1, inputs 2)."""
    weight, bias = call.parameter("weight", 0, 1, 2), call.parameter("bias", 0)
    assert weight is not None
    first, second = list(call.arguments.values())[:2]
    call.unite(first.axes[-1], weight.axes[1])
    call.unite(second.axes[-1], weight.axes[2])
    if bias is not None:
        call.unite(weight.axes[0], bias.axes[0])
    call.freeze_all([*first.axes[:-1], *second.axes[:-1]], "nn.Bilinear along it")
    call.produces(weight.axes[0])
    before = [(size, None) for size in first.shape[:-1]]
    call.costs([*before, *zip(weight.shape, weight.axes, strict=True)], 2)
    return call.gives([*[None] * (first.ndim - 1), weight.axes[0]])


def embedding(call: Call) -> Any:
    """A row of the weight (words, features) per index."""
    weight = call.parameter("weight", 1) if call.module is not None else call["weight"]
    indices = call.input if call.module is not None else call["indices"]
    assert weight is not None
    call.freeze(weight.axes[0], "words of a vocabulary")
    call.produces(weight.axes[1])
    return call.gives([*indices.axes, weight.axes[1]])


def normalised_per_channel(call: Call) -> Any:
    """BatchNorm, InstanceNorm, PReLU: one number per channel, dimension 1."""
    x = call.input
    names = ("weight", "bias", "running_mean", "running_var")
    if call.module is not None:
        tensors = {name: call.parameter(name, 0) for name in names}
    else:
        tensors = {name: call[name] for name in names}
    own = [value for value in tensors.values() if value is not None and value.shape[0] == x.shape[1] > 1]
    axis = call.unite_all([x.axes[1], *(value.axes[0] for value in own)]) if own else x.axes[1]
    affine = tensors["weight"] is not None
    zero = axis is not None and (affine or (isinstance(call.module, nn.PReLU) and axis.zero))
    axes: list[Axis | None] = [other and Axis(other.ids, False) for other in x.axes]
    axes[1] = axis and Axis(axis.ids, zero)
    if "Instance" in type(call.module).__name__ or "instance" in str(call.node.target):
        call.freeze_all(x.axes[2:], "normalised over")
    return call.gives(axes)


def layer_norm(call: Call) -> Any:
    """LayerNorm, RMSNorm over the last dimensions: statistics over the channels that are left."""
    x = call.input
    if call.module is not None:
        shape: Sequence[int] = call.module.normalized_shape  # type: ignore[assignment]
        dims = range(len(shape))
        weight, bias = call.parameter("weight", *dims), call.parameter("bias", *dims)
    else:
        shape, weight, bias = call["normalized_shape"], call["weight"], call["bias"]
    count = len(shape)
    centred = "rms" not in str(call.node.target).lower() and not isinstance(call.module, nn.RMSNorm)
    tail: list[Axis | None] = []
    for back in range(-count, 0):
        own = [value.axes[back] for value in (weight, bias) if value is not None and value.shape[back] > 1]
        axis = call.unite_all([x.axes[back], *own]) if own else x.axes[back]
        tail.append(axis and Axis(axis.ids, weight is not None or (axis.zero and not centred)))
    rest = [axis and Axis(axis.ids, axis.zero and bias is None) for axis in x.axes[:-count]]
    return call.gives([*rest, *tail])


def group_norm(call: Call) -> Any:
    """GroupNorm over channels g · i: every group loses the same places; with i = 1 the groups themselves go."""
    x = call.input
    if call.module is not None:
        groups: int = call.module.num_groups  # type: ignore[assignment]
        weight, bias = call.parameter("weight", 0), call.parameter("bias", 0)
    else:
        groups, weight, bias = call["num_groups"], call["weight"], call["bias"]
    own = [value.axes[0] for value in (weight, bias) if value is not None and value.shape[0] > 1]
    axis = call.unite_all([x.axes[1], *own]) if own else x.axes[1]
    call.freeze_all(x.axes[2:], "normalised over")
    if axis is not None and groups < axis.size:
        call.rows_alike(axis.ids.view(groups, -1))
    rest: list[Axis | None] = [x.axes[0] and Axis(x.axes[0].ids, False)]
    return call.gives([*rest, axis and Axis(axis.ids, weight is not None), *[None] * (x.ndim - 2)])


def prelu(call: Call) -> Any:
    """Slopes per channel, or one for all."""
    return normalised_per_channel(call) if call.module is not None else elementwise(call)


def recurrent(call: Call) -> Any:
    """LSTM, GRU, RNN: their channels stay, in and out."""
    for value in call.arguments.values():
        if isinstance(value, Value):
            call.freeze_all(value.axes, f"{type(call.module).__name__} takes it")
    assert call.module is not None
    weights = sum(p.numel() for p in call.module.parameters() if p.ndim == 2)
    call.costs([], weights * prod(call.input.shape[:-1]))
    return call.result
