"""Questions to and edits of a captured graph: layers, who owns what, names, replacement, shapes."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata, _extract_tensor_metadata
from torch.utils._pytree import tree_leaves, tree_map_only

from .inputs import Inputs
from .names import get_attribute, set_module
from .vocabulary import stand_in


@dataclass(frozen=True)
class Layer:
    """A layer with weights, however it was written.

    `module` holds weights and options; it is registered at `name` for module calls, and a stand-in that shares the
    parameters for a functional call such as `F.conv2d(x, self.w)` (`functional` is then true).
    `nodes` are its call sites in order of execution.
    """

    name: str
    module: nn.Module
    nodes: tuple[fx.Node, ...]
    functional: bool = False

    @property
    def type(self) -> str:
        return type(self.module).__name__


class Operator(nn.Module):
    """`target(value, *args)`, or `target(value, parameter, *args)`: what `replace_layer` writes as a call of the
    operator and not of a module."""

    def __init__(
        self, target: torch._ops.OpOverload, args: tuple[Any, ...] = (), parameter: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.target, self.args, self.parameter = target, args, parameter

    def forward(self, value: Tensor) -> Any:
        own = () if self.parameter is None else (self.parameter,)
        return self.target(value, *own, *self.args)


def layers(model: fx.GraphModule) -> list[Layer]:
    """Every layer that owns parameters or running statistics, in order of first execution."""
    found: dict[str, Layer] = {}
    for node in model.graph.nodes:
        functional = node.op == "call_function"
        if node.op == "call_module":
            name, module = str(node.target), model.get_submodule(str(node.target))
        elif functional and (view := stand_in(model, node)) is not None:
            name, module = view
        else:
            continue
        if next(chain(module.parameters(), module.buffers()), None) is None:
            continue
        known = found.get(name)
        if known and (known.functional != functional or known.module.extra_repr() != module.extra_repr()):
            name = f"{name}@{node.name}"
            known = None
        nodes = (*known.nodes, node) if known else (node,)
        found[name] = Layer(name, known.module if known else module, nodes, functional)
    return list(found.values())


def matches(layer: Layer, pattern: str) -> bool:
    """Whether `pattern` selects `layer`: its name, a module it stands in, or its type (`*`, `?`, `[…]`)."""
    parts = layer.name.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (*names, layer.type))


def sharing(model: fx.GraphModule, layer: Layer) -> str | None:
    """Why `layer` may not be changed on its own (called twice, or its parameters belong to others too), or None."""
    return f"called {len(layer.nodes)} times" if len(layer.nodes) > 1 else tied(model, layer)


def tied(model: fx.GraphModule, layer: Layer) -> str | None:
    """Why `layer` may not be changed at all its calls (its parameters belong to others too), or None."""
    own = {id(p) for p in layer.module.parameters()}
    called = tuple(f"{n.target}." for n in model.graph.nodes if n.op == "call_module")
    aliases = [
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if id(p) in own and (name.startswith(called) if layer.functional else not name.startswith(f"{layer.name}."))
    ]
    if aliases:
        return f"shares its parameters with {aliases[0]}"
    readers = {n for n in model.graph.nodes if n.op == "get_attr" and id(get_attribute(model, str(n.target))) in own}
    outside = [user for reader in readers for user in reader.users if user not in layer.nodes]
    return f"shares its parameters with node {outside[0].name}" if outside else None


def replace_layer(model: fx.GraphModule, layer: Layer, parts: Mapping[str, nn.Module]) -> None:
    """Put the modules `parts`, called one after the other, where `layer` was called; an `Operator` as its call.

    `parts`, of an operator its parameter, are registered below the layer's name (`{"depthwise": …}` →
    `features.3.depthwise`); a single part named "" takes the layer's own name. Training mode follows the model's.
    """
    base = layer.name.replace("@", "_")
    released = _release(model, layer) if layer.functional else []
    while layer.functional and _exists(model, base):
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
    for reader in released:
        model.graph.erase_node(reader)
    if layer.functional:
        remove_unused(model)


def _release(model: fx.GraphModule, layer: Layer) -> list[fx.Node]:
    """Take the parameters that only this functional layer reads off the model, so that their name is free.

    Their readers come back: they must go once nothing uses them.
    """
    inputs = {node.args[0] for node in layer.nodes}
    readers = dict.fromkeys(n for node in layer.nodes for n in node.all_input_nodes if n.op == "get_attr")
    released = []
    for reader in readers:
        name = str(reader.target)
        others = [n for n in model.graph.nodes if n.op == "get_attr" and n.target == name and n is not reader]
        if reader not in inputs and not others and all(user in layer.nodes for user in reader.users):
            path, _, leaf = name.rpartition(".")
            delattr(model.get_submodule(path), leaf)
            released.append(reader)
    return released


def _exists(model: nn.Module, name: str) -> bool:
    try:
        get_attribute(model, name)
    except AttributeError:
        return False
    return True


def _replace_call(graph: fx.Graph, node: fx.Node, path: str, parts: Mapping[str, nn.Module]) -> None:
    value = node.args[0]
    with graph.inserting_before(node):
        for name, part in parts.items():
            if isinstance(part, Operator):
                own = () if part.parameter is None else (graph.get_attr(name),)
                value = graph.call_function(part.target, (value, *own, *part.args))
            else:
                value = graph.call_module(name, (value,))
            value.meta["module_path"] = path if isinstance(part, Operator) else name
    assert isinstance(value, fx.Node)
    if "tensor_meta" in node.meta:
        value.meta["tensor_meta"] = node.meta["tensor_meta"]
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def bypass(model: fx.GraphModule, node: fx.Node) -> None:
    """Remove `node`; its users read its first input."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    node.replace_all_uses_with(source)
    model.graph.erase_node(node)


def remove_unused(model: fx.GraphModule) -> None:
    """Drop nodes without users, then modules, parameters and buffers that no node reads."""
    model.graph.eliminate_dead_code()
    called = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in model.graph.nodes if n.op == "get_attr"}

    def prune(module: nn.Module, name: str) -> bool:
        if name in called:
            return True
        path = f"{name}." if name else ""
        for store in (module._parameters, module._buffers):
            for key in [k for k in store if f"{path}{k}" not in read]:
                delattr(module, key)
        for key in [k for k, child in module._modules.items() if child is None or not prune(child, f"{path}{k}")]:
            del module._modules[key]
        return bool(module._parameters or module._buffers or module._modules)

    prune(model, "")


def leaf_inputs(inputs: Inputs) -> list[Any]:
    """The inputs as the graph's placeholders take them, in order."""
    return tree_leaves((inputs.args, inputs.kwargs))


class Recorder(fx.Interpreter):
    """Runs a captured graph and shows every node's value to `see(node, value)`."""

    def see(self, node: fx.Node, value: Any) -> None:
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.see(n, value)
        return value

    def run_inputs(self, inputs: Inputs) -> Any:
        """Flat outputs of one forward; no gradients."""
        with torch.no_grad():
            return self.run(*leaf_inputs(inputs), enable_io_processing=False)


class _Shapes(Recorder):
    def see(self, node: fx.Node, value: Any) -> None:
        node.meta.pop("val", None)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            node.meta["tensor_meta"] = tree_map_only(Tensor, _extract_tensor_metadata, value)


def propagate(model: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Run the model once and note every node's shape and type in `node.meta["tensor_meta"]`. Gives the flat outputs."""
    return list(tree_leaves(_Shapes(model).run_inputs(inputs)))


def shape(node: fx.Node) -> tuple[int, ...]:
    """Shape of the node's (single) result at the example batch."""
    meta = node.meta["tensor_meta"]
    assert isinstance(meta, TensorMetadata)
    return tuple(meta.shape)


def retarget(graph: fx.Graph, device: torch.device) -> None:
    """Constants made inside the graph (`zeros(…, device=cpu)`) move to `device`."""
    for node in graph.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = tree_map_only(torch.device, lambda _: device, (node.args, node.kwargs))
