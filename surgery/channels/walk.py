"""Runs a captured graph on numbered positions instead of numbers: what every node's dimensions are made of."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.shape_prop import TensorMetadata

from ..captured import CapturedModel
from ..graph import layers
from ..names import get_attribute, tensors
from ..torch_private import OpOverload, tree_leaves, tree_map, tree_map_only
from ..tracing import first_line
from ..vocabulary import arguments
from .arithmetic import unknown
from .call import Call, Facts, Heads, parameter_value
from .heads import heads_by_node
from .positions import Positions
from .rules import ChannelRule, read
from .shuffling import Shuffle, find_shuffle
from .values import Value, values_in


class Walk:
    """`values` of every node after `run`, and the `facts` the rules stated."""

    def __init__(self, model: CapturedModel, rules: Mapping[Any, ChannelRule], heads: bool) -> None:
        names: dict[int, str] = {}
        for name, tensor in tensors(model).items():
            names.setdefault(id(tensor), name)
        self.model, self.rules = model, rules
        self.facts = Facts(Positions(names))
        self.values: dict[fx.Node, Any] = {}
        self.shuffles: list[Shuffle] = []
        self._within: dict[fx.Node, Shuffle] = {}
        self._heads = {n: Heads(dims, heads) for n, dims in heads_by_node(model.graph, joined=heads).items()}
        self._layers = {node: layer.name for layer in layers(model) for node in layer.nodes if layer.functional}

    def run(self) -> Walk:
        for node in self.model.graph.nodes:
            try:
                self.values[node] = self._value(node)
            except Exception as error:  # whatever it is, it ends no run
                self.values[node] = self._given_up(node, f"{type(error).__name__}: {first_line(error)}")
        return self

    def _given_up(self, node: fx.Node, problem: str) -> Any:
        for value in values_in([self.values[source] for source in node.all_input_nodes]):
            for axis in filter(None, value.axes):
                self.facts.positions.freeze(axis.ids, f"{node.name}: {node.target} cannot be followed: {problem}")
        return rigid_result(node)

    def _value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return rigid_result(node)
        if node.op == "get_attr":
            tensor = get_attribute(self.model, str(node.target))
            known = isinstance(tensor, Tensor)  # the body of a higher-order operator is none
            return parameter_value(self.facts.positions, tensor, range(tensor.ndim)) if known else None
        if node.op == "output":
            self._freeze_outputs(node)
            return None
        call = self._call(node)
        if "tensor_meta" not in node.meta:
            return _number(call)
        if node.target is operator.getitem:
            values, index = call.arguments.values()
            return values[index]
        shuffle = self._within.get(node) or self._shuffle_from(node)
        return self._shuffled(shuffle, node) if shuffle else read(self.rules, call)

    def _shuffle_from(self, node: fx.Node) -> Shuffle | None:
        shuffle = find_shuffle(self.model, node, self.values)
        if shuffle:
            self.shuffles.append(shuffle)
            self._within |= dict.fromkeys(shuffle.nodes, shuffle)
        return shuffle

    def _shuffled(self, shuffle: Shuffle, node: fx.Node) -> Value:
        """The permuted channels at the end; on the way there is nothing to say."""
        result = rigid_result(node)
        assert isinstance(result, Value)
        axis = self.values[shuffle.source].axes[shuffle.dim]
        axes = [shuffle.axis(axis) if d == shuffle.dim else None for d in range(result.ndim)]
        return Value(result.shape, tuple(axes), result.dtype) if node is shuffle.nodes[-1] else result

    def _call(self, node: fx.Node) -> Call:
        module, layer = None, self._layers.get(node) or _weight_of(node)
        if node.op == "call_module":
            module, layer = self.model.get_submodule(str(node.target)), str(node.target)
        named = arguments(node) if isinstance(node.target, OpOverload) else _in_order(node)
        known = tree_map_only(fx.Node, self.values.__getitem__, named)
        computed = frozenset(name for name, value in named.items() if any(map(_is_number, _nodes(value))))
        return Call(node, known, rigid_result(node), module, layer, self.facts, self._heads.get(node), computed)

    def _freeze_outputs(self, node: fx.Node) -> None:
        for value in values_in(tree_map_only(fx.Node, self.values.__getitem__, node.args)):
            for axis in filter(None, value.axes):
                self.facts.positions.freeze(axis.ids, "an output of the model")


def _weight_of(node: fx.Node) -> str:
    """The parameter that the weight of a functional layer is cut out of, as those of queries, keys and values are;
    the node's own name where there is none."""
    cut = isinstance(node.target, OpOverload) and str(node.target).startswith(("aten.linear", "aten.conv"))
    weight = arguments(node).get("weight") if cut else None
    while isinstance(weight, fx.Node) and weight.op == "call_function" and weight.args:
        weight = weight.args[0]
    return str(weight.target) if isinstance(weight, fx.Node) and weight.op == "get_attr" else node.name


def rigid_result(node: fx.Node) -> Any:
    """What `node` returns, as values whose dimensions keep their sizes; None where it is no tensor."""
    meta = node.meta.get("tensor_meta")
    if meta is None:
        return None

    def value(entry: Any) -> Any:
        return Value.rigid(tuple(entry.shape), entry.dtype) if isinstance(entry, TensorMetadata) else entry

    return tree_map(value, meta, is_leaf=lambda entry: isinstance(entry, TensorMetadata))


def _in_order(node: fx.Node) -> dict[str, Any]:
    return {str(i): value for i, value in enumerate(node.args)} | dict(node.kwargs)


def _nodes(tree: Any) -> list[fx.Node]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, fx.Node)]


def _is_number(node: fx.Node) -> bool:
    return "tensor_meta" not in node.meta and node.op == "call_function"


def _number(call: Call) -> Any:
    """What is no tensor: a size at the example batch, or arithmetic on sizes. Other numbers are not known on paper,
    and what they are taken from stays as it is."""
    target: Any = call.node.target
    if target is torch.ops.aten.sym_size.int:
        call.freeze(call.input.axis(call["dim"]), "the model computes with its size")
        return call.input.shape[call["dim"]]
    if values_in(call.arguments):
        unknown(call)
        numel = target is torch.ops.aten.sym_numel.default
        return prod(call.input.shape) if numel else NotImplemented
    try:
        return target(*call.arguments.values())
    except Exception:
        return NotImplemented
