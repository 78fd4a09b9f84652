"""Sizes that modules and operators name, after positions are gone: one small rule for each kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..captured import CapturedModel
from ..torch_private import (
    UNSAFE_VIEW,
    BatchNorm,
    ConvNd,
    ConvTransposeNd,
    InstanceNorm,
    OpOverload,
    schema_of,
    tree_leaves,
)
from ..vocabulary import arguments
from .values import Value

aten = torch.ops.aten


@dataclass
class Shrinking:
    """A node whose tensors may have shrunk: a rule sets the sizes that it names."""

    model: CapturedModel
    values: Mapping[fx.Node, Any]
    alive: Tensor
    node: fx.Node

    @cached_property
    def module(self) -> Any:
        """The module it calls; None for an operator."""
        return self.model.get_submodule(str(self.node.target)) if self.node.op == "call_module" else None

    @cached_property
    def _arguments(self) -> dict[str, Any]:
        return arguments(self.node)

    def __getitem__(self, name: str) -> Any:
        """An argument of the operator by its name in the schema."""
        return self._arguments.get(name)

    @property
    def shrinks(self) -> bool:
        """Whether anything that it takes or gives has lost positions."""
        nodes = [self.node, *self.node.all_input_nodes]
        values = [v for n in nodes for v in tree_leaves(self.values[n]) if isinstance(v, Value)]
        return any(axis is not None and not bool(self.alive[axis.ids].all()) for v in values for axis in v.axes)

    @property
    def input(self) -> Value:
        value = self.values[self.node.all_input_nodes[0]]
        assert isinstance(value, Value)
        return value

    @property
    def result(self) -> Any:
        return self.values[self.node]

    def size(self, value: Value, dim: int) -> int:
        """What is left of a dimension."""
        return self.before(value, dim, value.shape[dim])

    def before(self, value: Value, dim: int, place: int) -> int:
        """How many positions are left before `place`."""
        axis = value.axes[dim]
        return place if axis is None else int(self.alive[axis.ids[:place]].sum())

    def set(self, name: str, new: Any) -> None:
        """An argument of the operator by its name in the schema."""
        target = self.node.target
        assert isinstance(target, OpOverload)
        names = [a.name for a in schema_of(target).arguments]
        place = names.index(name)
        if place < len(self.node.args):
            self.node.update_arg(place, new)
        else:
            self.node.update_kwarg(name, new)


Shrink = Callable[[Shrinking], None]


def _convolution(call: Shrinking) -> None:
    weight, transposed = call.module.weight, isinstance(call.module, ConvTransposeNd)
    groups = _groups(call, weight, transposed)
    given, taken = (
        (weight.shape[1] * groups, weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1] * groups)
    )
    call.module.in_channels, call.module.out_channels, call.module.groups = taken, given, groups


def _groups(call: Shrinking, weight: Tensor, transposed: bool) -> int:
    value = call.result if transposed else call.input
    return call.size(value, value.ndim - weight.ndim + 1) // weight.shape[1]


def _linear(call: Shrinking) -> None:
    call.module.out_features, call.module.in_features = call.module.weight.shape


def _bilinear(call: Shrinking) -> None:
    call.module.out_features, call.module.in1_features, call.module.in2_features = call.module.weight.shape


def _embedding(call: Shrinking) -> None:
    call.module.num_embeddings, call.module.embedding_dim = call.module.weight.shape


def _features(call: Shrinking) -> None:
    call.module.num_features = call.size(call.input, 1)


def _normalised_shape(call: Shrinking) -> None:
    count = len(call.module.normalized_shape)
    call.module.normalized_shape = tuple(
        call.size(call.input, d) for d in range(call.input.ndim - count, call.input.ndim)
    )


def _group_norm(call: Shrinking) -> None:
    if call.module.num_groups == call.input.shape[1]:
        call.module.num_groups = call.size(call.input, 1)
    call.module.num_channels = call.size(call.input, 1)


def _prelu(call: Shrinking) -> None:
    call.module.num_parameters = call.module.weight.numel()


def _sizes(name: str) -> Shrink:
    """The argument `name` lists the result's sizes."""

    def rule(call: Shrinking) -> None:
        new = []
        for d, size in enumerate(call[name]):
            shrinks = call.result.axes[d] is not None and size != -1
            symbolic = isinstance(size, fx.Node)
            new.append(-1 if shrinks and symbolic else call.size(call.result, d) if shrinks else size)
        call.set(name, new)

    return rule


def _unflatten(call: Shrinking) -> None:
    dim = call["dim"] % call.input.ndim
    free = [call.result.axes[dim + i] is None or size == -1 for i, size in enumerate(call["sizes"])]
    call.set("sizes", [n if free[i] else call.size(call.result, dim + i) for i, n in enumerate(call["sizes"])])


def _slice(call: Shrinking) -> None:
    dim = (call["dim"] or 0) % call.input.ndim
    size = call.input.shape[dim]
    if call.input.axes[dim] is None or (call["step"] or 1) > 1:
        return
    for name in ("start", "end"):
        if call[name] is not None:
            place = call[name]
            place = max(0, place + size) if place < 0 else min(place, size)
            call.set(name, call.before(call.input, dim, place))


def _narrow(call: Shrinking) -> None:
    dim = call["dim"] % call.input.ndim
    if call.input.axes[dim] is not None:
        start = call["start"] % call.input.shape[dim] if call["length"] else 0
        first, last = (call.before(call.input, dim, place) for place in (start, start + call["length"]))
        call.set("start", first)
        call.set("length", last - first)


def _select(call: Shrinking) -> None:
    dim = call["dim"] % call.input.ndim
    call.set("index", call.before(call.input, dim, call["index"] % call.input.shape[dim]))


def _split(call: Shrinking) -> None:
    dim = (call["dim"] or 0) % call.input.ndim
    if call.input.axes[dim] is not None:
        sizes = [call.size(part, dim) for part in call.result]
        call.node.target = aten.split_with_sizes.default
        call.node.args, call.node.kwargs = (call.node.args[0], sizes, dim), {}


def _squeeze(call: Shrinking) -> None:
    """squeeze(x) of all dimensions of size 1: not of one that has a single channel left."""
    x = call.input
    every = call.node.target is aten.squeeze.default
    if every and any(axis and call.size(x, d) == 1 for d, axis in enumerate(x.axes)):
        batch = call.model.dynamic_batch and x.shape[0] == call.model.inputs.batch_size
        dims = [d for d, size in enumerate(x.shape) if size == 1 and not (batch and d == 0)]
        call.node.target, call.node.args = aten.squeeze.dims, (call.node.args[0], dims)


def _pad(call: Shrinking) -> None:
    amounts = list(call["pad"])
    for pair in range(len(amounts) // 2):
        dim = call.input.ndim - 1 - pair
        left, size = amounts[2 * pair], call.input.shape[dim]
        if call.result.axes[dim] is not None and any(amounts[2 * pair : 2 * pair + 2]):
            first, second, whole = (
                call.before(call.result, dim, n) for n in (left, left + size, call.result.shape[dim])
            )
            amounts[2 * pair : 2 * pair + 2] = [first, whole - second]
    call.set("pad", amounts)


def _scale(call: Shrinking) -> None:
    """Attention divides by the root of the original's features per head."""
    if call["scale"] is None:
        call.set("scale", 1 / math.sqrt(call.input.shape[-1]))


def _functional_groups(call: Shrinking) -> None:
    if call["groups"] > 1:
        value = call.values[call["weight"]]
        transposed = "transpose" in str(call.node.target)
        side = call.result if transposed else call.input
        call.set("groups", call.size(side, side.ndim - value.ndim + 1) // call.size(value, 1))


def _functional_shape(call: Shrinking) -> None:
    count = len(call["normalized_shape"])
    call.set("normalized_shape", [call.size(call.input, d) for d in range(call.input.ndim - count, call.input.ndim)])


def _functional_group_norm(call: Shrinking) -> None:
    if call["num_groups"] == call.input.shape[1]:
        call.set("num_groups", call.size(call.input, 1))


RULES: dict[Any, Shrink] = {
    ConvNd: _convolution,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.Embedding: _embedding,
    BatchNorm: _features,
    InstanceNorm: _features,
    nn.LayerNorm: _normalised_shape,
    nn.RMSNorm: _normalised_shape,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
    aten.view: _sizes("size"),
    UNSAFE_VIEW: _sizes("size"),
    aten.reshape: _sizes("shape"),
    aten.expand: _sizes("size"),
    aten.unflatten: _unflatten,
    aten.slice: _slice,
    aten.slice_scatter: _slice,
    aten.select: _select,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _split,
    aten.unsafe_split: _split,
    aten.unsafe_chunk: _split,
    aten.narrow: _narrow,
    aten.tensor_split: _split,
    aten.squeeze: _squeeze,
    aten.pad: _pad,
    aten.constant_pad_nd: _pad,
    aten.scaled_dot_product_attention: _scale,
    aten.conv1d: _functional_groups,
    aten.conv2d: _functional_groups,
    aten.conv3d: _functional_groups,
    aten.conv_transpose1d: _functional_groups,
    aten.conv_transpose2d: _functional_groups,
    aten.conv_transpose3d: _functional_groups,
    aten.layer_norm: _functional_shape,
    aten.rms_norm: _functional_shape,
    aten.group_norm: _functional_group_norm,
}
