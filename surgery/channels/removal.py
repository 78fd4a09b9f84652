"""Removes positions: slices parameters, and adapts the sizes that stand in modules and in the graph."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves

from ..captured import CapturedModel
from ..vocabulary import arguments
from .values import Value
from .walk import Walk

aten = torch.ops.aten


def shrink(model: CapturedModel, walk: Walk, alive: Tensor) -> None:
    """Keep only the `alive` positions (positions,), in place. Tensors are replaced, not written."""
    _slice_tensors(model, walk, alive)
    for node in model.graph.nodes:
        if node.op in ("call_module", "call_function") and "tensor_meta" in node.meta:
            Shrinking(model, walk, alive, node).apply()


def _slice_tensors(model: CapturedModel, walk: Walk, alive: Tensor) -> None:
    kept: dict[int, list[tuple[int, Tensor]]] = {}
    for (key, dim), slot in walk.facts.positions.slots.items():
        marks = alive[slot.first : slot.first + slot.size]
        if not bool(marks.all()):
            kept.setdefault(key, []).append((dim, torch.nonzero(marks).reshape(-1)))
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in kept:
                    if id(tensor) not in made:
                        made[id(tensor)] = sliced(tensor, kept[id(tensor)])
                    store[name] = made[id(tensor)]  # type: ignore[assignment]


def sliced(tensor: Tensor, kept: list[tuple[int, Tensor]]) -> Tensor:
    """`tensor` at the positions `kept` by dimension; a parameter stays one."""
    result = tensor.detach()
    for dim, index in kept:
        result = result.index_select(dim, index.to(result.device))
    return nn.Parameter(result, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result


@dataclass
class Shrinking:
    """One call whose tensors have shrunk: sets the sizes that it names."""

    model: CapturedModel
    walk: Walk
    alive: Tensor
    node: fx.Node

    def apply(self) -> None:
        if self.node.op == "call_module":
            module = self.model.get_submodule(str(self.node.target))
            for cls in type(module).__mro__:
                if cls in MODULES:
                    return MODULES[cls](self, module)
            return None
        rule = OPERATORS.get(getattr(self.node.target, "overloadpacket", None))
        if rule is not None and self._shrinks():
            rule(self, arguments(self.node))
        return None

    def _shrinks(self) -> bool:
        nodes = [self.node, *self.node.all_input_nodes]
        values = [v for n in nodes for v in tree_leaves(self.walk.values[n]) if isinstance(v, Value)]
        return any(axis is not None and not bool(self.alive[axis.ids].all()) for v in values for axis in v.axes)

    @property
    def input(self) -> Value:
        value = self.walk.values[self.node.all_input_nodes[0]]
        assert isinstance(value, Value)
        return value

    @property
    def result(self) -> Any:
        return self.walk.values[self.node]

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
        assert isinstance(target, torch._ops.OpOverload)
        names = [a.name for a in target._schema.arguments]
        place = names.index(name)
        if place < len(self.node.args):
            self.node.update_arg(place, new)
        else:
            self.node.update_kwarg(name, new)


Arguments = dict[str, Any]


def _convolution(call: Shrinking, module: Any) -> None:
    weight, transposed = module.weight, isinstance(module, _ConvTransposeNd)
    groups = _groups(call, weight, transposed)
    given, taken = (
        (weight.shape[1] * groups, weight.shape[0]) if transposed else (weight.shape[0], weight.shape[1] * groups)
    )
    module.in_channels, module.out_channels, module.groups = taken, given, groups


def _groups(call: Shrinking, weight: Tensor, transposed: bool) -> int:
    value = call.result if transposed else call.input
    return call.size(value, value.ndim - weight.ndim + 1) // weight.shape[1]


def _linear(call: Shrinking, module: Any) -> None:
    module.out_features, module.in_features = module.weight.shape


def _bilinear(call: Shrinking, module: Any) -> None:
    module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _embedding(call: Shrinking, module: Any) -> None:
    module.num_embeddings, module.embedding_dim = module.weight.shape


def _features(call: Shrinking, module: Any) -> None:
    module.num_features = call.size(call.input, 1)


def _normalised_shape(call: Shrinking, module: Any) -> None:
    count = len(module.normalized_shape)
    module.normalized_shape = tuple(call.size(call.input, d) for d in range(call.input.ndim - count, call.input.ndim))


def _group_norm(call: Shrinking, module: Any) -> None:
    if module.num_groups == call.input.shape[1]:
        module.num_groups = call.size(call.input, 1)
    module.num_channels = call.size(call.input, 1)


def _prelu(call: Shrinking, module: Any) -> None:
    module.num_parameters = module.weight.numel()


MODULES: dict[type[nn.Module], Callable[[Shrinking, Any], None]] = {
    _ConvNd: _convolution,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.Embedding: _embedding,
    _BatchNorm: _features,
    _InstanceNorm: _features,
    nn.LayerNorm: _normalised_shape,
    nn.RMSNorm: _normalised_shape,
    nn.GroupNorm: _group_norm,
    nn.PReLU: _prelu,
}


def _sizes(name: str) -> Callable[[Shrinking, Arguments], None]:
    """The argument `name` lists the result's sizes."""

    def rule(call: Shrinking, given: Arguments) -> None:
        new = []
        for d, size in enumerate(given[name]):
            shrinks = call.result.axes[d] is not None and size != -1
            symbolic = isinstance(size, fx.Node)
            new.append(-1 if shrinks and symbolic else call.size(call.result, d) if shrinks else size)
        call.set(name, new)

    return rule


def _unflatten(call: Shrinking, given: Arguments) -> None:
    dim = given["dim"] % call.input.ndim
    call.set("sizes", [call.size(call.result, dim + i) for i in range(len(given["sizes"]))])


def _slice(call: Shrinking, given: Arguments) -> None:
    dim = (given["dim"] or 0) % call.input.ndim
    size = call.input.shape[dim]
    if call.input.axes[dim] is None or (given["step"] or 1) > 1:
        return
    for name in ("start", "end"):
        if given[name] is not None:
            place = given[name]
            place = max(0, place + size) if place < 0 else min(place, size)
            call.set(name, call.before(call.input, dim, place))


def _select(call: Shrinking, given: Arguments) -> None:
    dim = given["dim"] % call.input.ndim
    call.set("index", call.before(call.input, dim, given["index"] % call.input.shape[dim]))


def _split(call: Shrinking, given: Arguments) -> None:
    dim = (given["dim"] or 0) % call.input.ndim
    if call.input.axes[dim] is not None:
        sizes = [call.size(part, dim) for part in call.result]
        call.node.target = aten.split_with_sizes.default
        call.node.args, call.node.kwargs = (call.node.args[0], sizes, dim), {}


def _pad(call: Shrinking, given: Arguments) -> None:
    amounts = list(given["pad"])
    for pair in range(len(amounts) // 2):
        dim = call.input.ndim - 1 - pair
        left, size = amounts[2 * pair], call.input.shape[dim]
        if call.result.axes[dim] is not None and any(amounts[2 * pair : 2 * pair + 2]):
            first, second, whole = (
                call.before(call.result, dim, n) for n in (left, left + size, call.result.shape[dim])
            )
            amounts[2 * pair : 2 * pair + 2] = [first, whole - second]
    call.set("pad", amounts)


def _scale(call: Shrinking, given: Arguments) -> None:
    """Attention divides by the root of the original's features per head."""
    if given["scale"] is None:
        call.set("scale", 1 / math.sqrt(call.input.shape[-1]))


def _functional_groups(call: Shrinking, given: Arguments) -> None:
    if given["groups"] > 1:
        value = call.walk.values[given["weight"]]
        transposed = "transpose" in str(call.node.target)
        side = call.result if transposed else call.input
        call.set("groups", call.size(side, side.ndim - value.ndim + 1) // call.size(value, 1))


def _functional_shape(call: Shrinking, given: Arguments) -> None:
    count = len(given["normalized_shape"])
    call.set("normalized_shape", [call.size(call.input, d) for d in range(call.input.ndim - count, call.input.ndim)])


def _functional_group_norm(call: Shrinking, given: Arguments) -> None:
    if given["num_groups"] == call.input.shape[1]:
        call.set("num_groups", call.size(call.input, 1))


OPERATORS: dict[Any, Callable[[Shrinking, Arguments], None]] = {
    aten.view: _sizes("size"),
    aten._unsafe_view: _sizes("size"),
    aten.reshape: _sizes("shape"),
    aten.expand: _sizes("size"),
    aten.unflatten: _unflatten,
    aten.slice: _slice,
    aten.slice_scatter: _slice,
    aten.select: _select,
    aten.split: _split,
    aten.split_with_sizes: _split,
    aten.chunk: _split,
    aten.tensor_split: _split,
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
