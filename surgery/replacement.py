"""Other modules or operators in the place of a layer, without leaving behind what it alone read."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from itertools import chain, count
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from .graph import Layer, remove_unread, weight_expression
from .names import get_attribute, set_module
from .torch_private import OpOverload, buffers_of, children_of, parameters_of, tensor_metadata, tree_leaves, tree_map


class Place(Enum):
    """What stands in the arguments of an `Operator` for a value."""

    VALUE = "value"


class Operator(nn.Module):
    """What `replace_layer` writes as a call of the operator and not of a module.

    `target(value, *args)`, or `target(value, parameter, *args)`; where `args` say `Operator.VALUE`, the value stands
    there, and not in front.
    """

    VALUE: ClassVar = Place.VALUE

    def __init__(self, target: OpOverload, args: tuple[Any, ...] = (), parameter: nn.Parameter | None = None) -> None:
        super().__init__()
        self.target, self.args, self.parameter = target, args, parameter

    def forward(self, value: Tensor) -> Any:
        return self.target(*self.arguments(value, self.parameter))

    def arguments(self, value: Any, parameter: Any) -> tuple[Any, ...]:
        """Of the call: `value` and the parameter, if it has one, with `args`."""
        own = () if self.parameter is None else (parameter,)
        if not any(argument is Place.VALUE for argument in tree_leaves(self.args)):
            return (value, *own, *self.args)
        found: tuple[Any, ...] = tree_map(lambda a: value if a is Place.VALUE else a, self.args)
        return found


def replace_layer(model: fx.GraphModule, layer: Layer, parts: Mapping[str, nn.Module]) -> None:
    """Put the modules `parts`, called one after the other, where `layer` was called; an `Operator` as its call.

    `parts`, of an operator its parameter, are registered below the layer's name (`{"depthwise": …}` →
    `features.3.depthwise`); a single part named "" takes the layer's own name. Training mode follows the model's.
    """
    base = layer.name.replace("@", "_")
    released = release(model, layer) if layer.functional else []
    while layer.functional and _taken(model, base):
        base = f"{base}_{layer.type.lower()}"
    if list(parts) != [""]:
        set_module(model, base, nn.Module().train(model.training))
    named = {f"{base}.{suffix}" if suffix else base: part for suffix, part in parts.items()}
    for name, part in named.items():
        if not isinstance(part, Operator):
            set_module(model, name, part.train(model.training))
        elif part.parameter is not None:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_parameter(leaf, part.parameter)
    for node in layer.nodes:
        _replace_call(model.graph, node, base, named)
    erase(model.graph, released)
    if layer.functional:
        remove_unread(model)


def release(model: fx.GraphModule, layer: Layer, weight_only: bool = False) -> list[fx.Node]:
    """Take the tensors that only this functional layer reads off the model, so that their names are free. Those of a
    module that is called as well stay.

    Nodes that must go once the layer's calls are others come back, last first: readers, and what they compute the
    weight by.
    """
    inputs = {node.args[0] for node in layer.nodes}
    weight = layer.weight_node
    inside = [*layer.nodes, *weight_expression(layer)]
    read = [weight] if weight_only else [n for node in layer.nodes for n in node.all_input_nodes]
    readers = dict.fromkeys(n for n in (*read, *weight_expression(layer)) if n is not None and n.op == "get_attr")
    released = [node for node in weight_expression(layer) if node.op != "get_attr"]
    called = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    for reader in readers:
        name = str(reader.target)
        others = [n for n in model.graph.nodes if n.op == "get_attr" and n.target == name and n is not reader]
        if reader not in inputs and not others and all(user in inside for user in reader.users):
            path, _, leaf = name.rpartition(".")
            if path not in called:
                delattr(model.get_submodule(path), leaf)
            released.append(reader)
    return sorted(released, reverse=True)


def erase(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    """Erase those of `nodes`, last first, that nothing uses any more."""
    for node in nodes:
        if not node.users:
            graph.erase_node(node)


def _taken(model: nn.Module, path: str) -> bool:
    """Whether something other than an empty container stands at `path`."""
    try:
        found = get_attribute(model, path)
    except AttributeError:
        return False
    return type(found) is not nn.Module or any((parameters_of(found), buffers_of(found), children_of(found)))


def _replace_call(graph: fx.Graph, node: fx.Node, path: str, parts: Mapping[str, nn.Module]) -> None:
    value = node.args[0]
    with graph.inserting_before(node):
        for name, part in parts.items():
            if isinstance(part, Operator):
                own = None if part.parameter is None else graph.get_attr(name)
                value = graph.call_function(part.target, part.arguments(value, own))
            else:
                value = graph.call_module(name, (value,))
            value.meta["module_path"] = path if isinstance(part, Operator) else name
    assert isinstance(value, fx.Node)
    if "tensor_meta" in node.meta:
        value.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def add_buffer(model: fx.GraphModule, name: str, value: Tensor, *, persistent: bool = True) -> fx.Node:
    """A new node, where the graph inserts, that reads `value`, which becomes a buffer of the model, on its device.

    Its name is `name` or, where that is taken, `name` with the first free number behind.
    """
    names = chain([name], (f"{name}_{number}" for number in count(1)))
    free = next(name for name in names if not hasattr(model, name))
    model.register_buffer(free, value.to(next((p.device for p in model.parameters()), value.device)), persistent)
    node = model.graph.get_attr(free)
    node.meta["tensor_meta"] = tensor_metadata(value)
    return node


def bypass(model: fx.GraphModule, node: fx.Node) -> None:
    """Remove `node`; its users read its first input."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    model.graph.erase_node(node)
