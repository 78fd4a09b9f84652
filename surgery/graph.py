"""Questions to and edits of a captured graph: layers, who owns what, names, replacement, shapes."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from .inputs import Inputs
from .names import get_attribute
from .operands import constants, expression, stand_in
from .torch_private import TO_COPY as TO_COPY
from .torch_private import BatchNorm as BatchNorm
from .torch_private import ConvNd as ConvNd
from .torch_private import NormBase as NormBase
from .torch_private import buffers_of as buffers_of
from .torch_private import children_of as children_of
from .torch_private import parameters_of as parameters_of
from .torch_private import register_decomposed as register_decomposed
from .torch_private import set_parameters as set_parameters
from .torch_private import tensor_metadata
from .torch_private import tree_leaves as tree_leaves
from .torch_private import tree_map_only as tree_map_only
from .tracing import evaluating
from .vocabulary import arguments


@dataclass(frozen=True)
class Layer:
    """A layer with weights, however it was written.

    `module` holds weights and options; it is registered at `name` for module calls, and a stand-in that shares the
    parameters for a functional call such as `F.conv2d(x, self.w)` (`functional` is then true).
    `nodes` are its call sites in order of execution.
    `computed` names the tensors that the weight is computed from in the graph, such as a codebook and indices; () for
    an ordinary weight. The stand-in's weight is then computed when its values are first read.
    """

    name: str
    module: nn.Module
    nodes: tuple[fx.Node, ...]
    functional: bool = False
    computed: tuple[str, ...] = ()

    @property
    def type(self) -> str:
        return type(self.module).__name__

    @property
    def weight_node(self) -> fx.Node | None:
        """What a functional call reads as its weight."""
        weight = arguments(self.nodes[0]).get("weight") if self.functional else None
        return weight if isinstance(weight, fx.Node) else None


def layers(model: fx.GraphModule) -> list[Layer]:
    """Every layer that owns parameters or running statistics, in order of first execution."""
    found: dict[str, Layer] = {}
    for node in model.graph.nodes:
        layer = _layer(model, node)
        if layer is None or next(chain(layer.module.parameters(), layer.module.buffers()), None) is None:
            continue
        known = found.get(layer.name)
        if known and not _same(known, layer):
            layer = replace(layer, name=f"{layer.name}@{node.name}")
            known = None
        found[layer.name] = replace(known, nodes=(*known.nodes, node)) if known else layer
    return list(found.values())


def _layer(model: fx.GraphModule, node: fx.Node) -> Layer | None:
    if node.op == "call_module":
        return Layer(str(node.target), model.get_submodule(str(node.target)), (node,))
    view = stand_in(model, node) if node.op == "call_function" else None
    return None if view is None else Layer(view[0], view[1], (node,), functional=True, computed=view[2])


def _same(a: Layer, b: Layer) -> bool:
    """Whether two calls under one name are calls of one layer."""
    computed = bool(a.computed or b.computed)
    options = a.functional == b.functional and a.module.extra_repr() == b.module.extra_repr()
    return options and (not computed or a.weight_node is b.weight_node)


def matches(layer: Layer, pattern: str) -> bool:
    """Whether `pattern` selects `layer`: its name, a module it stands in, or its type (`*`, `?`, `[…]`)."""
    parts = layer.name.split(".")
    names = [".".join(parts[:n]) for n in range(1, len(parts) + 1)]
    return any(fnmatch.fnmatchcase(name, pattern) for name in (*names, layer.type))


def could_match(layers: Iterable[Layer], pattern: str) -> bool:
    """Whether `pattern` might select a layer that a pass makes of `layers`: one below the name of one of them, or of a
    type of torch.nn."""
    head = re.split(r"[*?[]", pattern)[0]
    wild = head != pattern
    below = [f"{layer.name}." for layer in layers]
    return hasattr(nn, pattern) or any(head.startswith(b) or (wild and b.startswith(head)) for b in below)


def sharing(model: fx.GraphModule, layer: Layer, computed: bool = False) -> str | None:
    """Why `layer` may not be changed on its own, or None: it is called twice, or `tied` has a reason."""
    return f"called {len(layer.nodes)} times" if len(layer.nodes) > 1 else tied(model, layer, computed)


def tied(model: fx.GraphModule, layer: Layer, computed: bool = False) -> str | None:
    """Why `layer` may not be changed at all its calls, or None: its parameters belong to others too, or its weight is
    computed in the graph. With `computed` the latter is no reason."""
    if layer.computed and not computed:
        return f"its weight is computed from {', '.join(layer.computed)}"
    own = {id(p) for p in layer.module.parameters()} | {id(get_attribute(model, name)) for name in layer.computed}
    if alias := _alias(model, layer, own):
        return f"shares its parameters with {alias}"
    readers = {n for n in model.graph.nodes if n.op == "get_attr" and id(get_attribute(model, str(n.target))) in own}
    inside = {*layer.nodes, *weight_expression(layer)}
    outside = [user for reader in readers for user in reader.users if user not in inside]
    return f"shares its parameters with node {outside[0].name}" if outside else None


def _alias(model: fx.GraphModule, layer: Layer, own: set[int]) -> str | None:
    """Another name of one of the layer's parameters, in another layer."""
    called = tuple(f"{n.target}." for n in model.graph.nodes if n.op == "call_module")
    for name, p in model.named_parameters(remove_duplicate=False):
        elsewhere = name.startswith(called) if layer.functional else not name.startswith(f"{layer.name}.")
        if id(p) in own and elsewhere:
            return name
    return None


def weight_expression(layer: Layer) -> list[fx.Node]:
    """The nodes that compute the layer's weight."""
    return expression(layer.weight_node) if layer.computed and layer.weight_node else []


def remove_unused(model: fx.GraphModule) -> None:
    """Drop nodes without users, then what `remove_unread` does."""
    model.graph.eliminate_dead_code()
    remove_unread(model)


def remove_unread(model: fx.GraphModule) -> None:
    """Drop modules, parameters and buffers that no node reads."""
    called = {str(n.target) for n in model.graph.nodes if n.op == "call_module"}
    read = {str(n.target) for n in model.graph.nodes if n.op == "get_attr"}

    def prune(module: nn.Module, name: str) -> bool:
        if name in called:
            return True
        path = f"{name}." if name else ""
        for store in (parameters_of(module), buffers_of(module)):
            for key in [k for k in store if f"{path}{k}" not in read]:
                delattr(module, key)
        for key in [k for k, child in children_of(module).items() if child is None or not prune(child, f"{path}{k}")]:
            del children_of(module)[key]
        return bool(parameters_of(module) or buffers_of(module) or children_of(module))

    prune(model, "")


def leaf_inputs(inputs: Inputs) -> list[Any]:
    """The inputs as the graph's placeholders take them, in order."""
    return tree_leaves((inputs.args, inputs.kwargs))


class Recorder(fx.Interpreter):
    """Runs a captured graph and shows every node's value to `see(node, value)`.

    What no input decides is computed in the first run only, unless it takes much room: edit no weight between two runs.
    """

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        found = {node for node in constants(model.graph) if node.op != "get_attr"}
        self._constants = found if held_bytes(n for n in found if not found.issuperset(n.users)) < MUCH else set()
        self._known: dict[fx.Node, Any] = {}

    def see(self, node: fx.Node, value: Any) -> None:
        raise NotImplementedError

    def run_node(self, n: fx.Node) -> Any:
        value = self._known[n] if n in self._known else super().run_node(n)
        if n in self._constants:  # those that only constants read are not needed again
            self._known[n] = value if any(user not in self._constants for user in n.users) else None
        self.see(n, value)
        return value

    def run_inputs(self, inputs: Inputs) -> Any:
        """Flat outputs of one forward; no gradients."""
        with torch.no_grad():
            return self.run(*leaf_inputs(inputs), enable_io_processing=False)


MUCH = 256 * 2**20
"""Bytes of computed weights that are rather computed at every run than kept beside the model."""


def held_bytes(nodes: Iterable[fx.Node]) -> int:
    """What the results of `nodes` take, as far as their shapes are known."""
    metas = tree_leaves([n.meta.get("tensor_meta") for n in nodes], is_leaf=lambda m: isinstance(m, TensorMetadata))
    return sum(prod(m.shape) * m.dtype.itemsize for m in metas if isinstance(m, TensorMetadata))


class _Shapes(Recorder):
    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self._constants = set()  # it runs once

    def see(self, node: fx.Node, value: Any) -> None:
        node.meta.pop("val", None)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            node.meta["tensor_meta"] = tree_map_only(Tensor, tensor_metadata, value)


def propagate(model: fx.GraphModule, inputs: Inputs) -> list[Tensor]:
    """Run the model once and note every node's shape and type in `node.meta["tensor_meta"]`. Gives the flat outputs."""
    return list(tree_leaves(_Shapes(model).run_inputs(inputs)))


class _Sizes(Recorder):
    """Keeps the sizes of every tensor."""

    def __init__(self, model: fx.GraphModule) -> None:
        super().__init__(model)
        self.sizes: dict[str, tuple[int, ...]] = {}

    def see(self, node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor):
            self.sizes[node.name] = tuple(value.shape)


def batch_dims(model: fx.GraphModule, inputs: Inputs, *, free_batch: bool) -> dict[str, tuple[int, ...]]:
    """By name of the node, the dimensions of its value that grow with the batch: where it stands, or is a factor.

    Found by running another batch size, however the model moves the batch about; with a fixed one by the size itself.
    """
    inputs = inputs.to(next((t.device for t in chain(model.parameters(), model.buffers())), torch.device("cpu")))
    batch = inputs.batch_size
    own = _sizes(model, inputs)
    if not free_batch:
        return {name: (0,) if sizes[:1] == (batch,) else () for name, sizes in own.items()}
    for size in (batch + 1, 2 * batch + 2, 3 * batch):  # a model may take multiples alone
        with suppress(RuntimeError, ValueError):
            other = _sizes(model, inputs.with_batch(size))
            return {name: _different(sizes, other[name]) for name, sizes in own.items()}
    return {}


def _different(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dim for dim, sizes in enumerate(zip(one, other, strict=True)) if sizes[0] != sizes[1])


def _sizes(model: fx.GraphModule, inputs: Inputs) -> dict[str, tuple[int, ...]]:
    run = _Sizes(model)
    with evaluating(model):
        run.run_inputs(inputs)
    return run.sizes


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
