"""Weights that the graph computes at every forward from smaller tensors, by plain aten operators.

    conv(x)   →   conv2d(x, f(codebook, indices), bias)

Training, state, source and ONNX need nothing new for them: f is part of the graph. The exporter keeps what would grow
when folded, and ONNX Runtime folds it when it loads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from .captured import CapturedModel
from .contract import snapshot
from .errors import PluginError
from .graph import MUCH, Layer, held_bytes, layers, remove_unread, weight_expression
from .names import get_attribute, set_module, submodule
from .operands import evaluate, lowered
from .replacement import erase, release, replace_layer
from .torch_private import OpOverload, parameters_of, schema_of, tensor_metadata, tree_map_only
from .vocabulary import arguments

_REMEDY = "compute the weight by operators of torch from the tensors given, without writing in place"


def weight_of(layer: Layer) -> Tensor:
    """The layer's weight, detached, as an ordinary tensor; one that the graph computes is computed for it."""
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def replace_weight(
    model: CapturedModel, layer: Layer, function: Callable[..., Tensor], tensors: Mapping[str, Tensor]
) -> None:
    """Have the weight of `layer` computed as `function(**tensors)` at every forward, at all its call sites.

    Parameters among `tensors` are trained, other tensors become buffers. They stand below the layer's name
    (`features.3.codebook`) beside its bias; a single one takes the name of the weight itself, so that the keys of the
    state_dict stay. What the weight was or was computed from is dropped.

    Raises:
        PluginError: `function` gives another shape or type than the weight has, or does what a graph cannot hold
            (writing in place, tensors of its own); or the layer is neither a convolution nor linear.
    """
    traced = _traced(layer, function, tensors)
    _check(layer, function(**{name: tensor.detach() for name, tensor in tensors.items()}))
    old = _weight_name(layer)
    released = _make_room(model, layer)
    names = [old] if len(tensors) == 1 else [f"{_container(model, _home(layer))}.{name}" for name in tensors]
    for name, tensor in zip(names, tensors.values(), strict=True):
        _register(model, name, tensor)
    _put_last(model, _home(layer), "bias")
    nodes = list(layer.nodes) if layer.functional else _functional_calls(model, layer)
    with model.graph.inserting_before(min(nodes)):
        readers = [model.graph.get_attr(name) for name in names]
        weight = _inlined(model, traced, readers, layer.name)
    for node in nodes:
        _set_weight(node, weight)
    erase(model.graph, [*readers, *released])  # and no more: looking through the graph takes long in deep models
    remove_unread(model)


def weight_function(model: CapturedModel, layer: Layer) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """What the weight of `layer` is computed by and from, as `replace_weight` takes them. The tensors go by the last
    part of their names; the function stays what it is when the model changes.

    Raises:
        PluginError: the weight is not computed in the graph.
    """
    if not layer.computed or layer.weight_node is None:
        raise PluginError("its weight is an ordinary one", at=layer.name, fix="ask for layers with `computed`")
    graph, placed, found = fx.Graph(), dict[fx.Node, fx.Node](), dict[str, Tensor]()
    readers = {name: graph.placeholder(_leaf(name, layer.computed)) for name in layer.computed}
    for node in weight_expression(layer):
        reads = node.op == "get_attr"
        placed[node] = readers[str(node.target)] if reads else graph.node_copy(node, placed.__getitem__)
    for name, reader in readers.items():
        found[str(reader.target)] = get_attribute(model, name)
    graph.output(placed[layer.weight_node])
    return fx.GraphModule(nn.Module(), graph), found


def _leaf(name: str, among: Sequence[str]) -> str:
    """The last part of `name`, with a number where one before it has the same."""
    leaf = name.rpartition(".")[2]
    same = [other for other in among if other.rpartition(".")[2] == leaf].index(name)
    return f"{leaf}_{same}" if same else leaf


def dense(model: CapturedModel) -> CapturedModel:
    """`model` itself, or a copy where it computes weights that do not take much room: they are ordinary ones of
    ordinary layers there. The outputs are the same bit for bit."""
    weights = [layer.weight_node for layer in layers(model) if layer.computed]
    if not weights or held_bytes(node for node in weights if node is not None) >= MUCH:
        return model
    copied = snapshot(model)
    for layer in [layer for layer in layers(copied) if layer.computed]:
        make_dense(copied, layer)
    copied.recompile()
    return copied


def make_dense(model: CapturedModel, layer: Layer) -> None:
    """Give `layer`, whose weight is computed, that weight as an ordinary one. It can be trained where what it was
    computed from could be."""
    weight: Any = layer.module.weight
    layer.module.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    replace_layer(model, layer, {"": layer.module})


def _traced(layer: Layer, function: Callable[..., Tensor], tensors: Mapping[str, Tensor]) -> fx.Graph:
    """`function` as a graph of aten operators whose placeholders are `tensors` in order."""

    def positional(*values: Tensor) -> Tensor:
        return function(**dict(zip(tensors, values, strict=True)))

    try:
        values = [tensor.detach() for tensor in tensors.values()]
        tracer = make_fx(positional, pre_dispatch=True, tracing_mode="fake", _allow_non_fake_inputs=True)
        graph: fx.Graph = tracer(*values).graph  # of shapes alone: what real values give would stay for long
    except Exception as error:
        raise PluginError(f"the weight cannot be computed: {error}", at=layer.name, fix=_REMEDY) from error
    for node in graph.nodes:
        writes = isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable
        if writes or node.op in ("get_attr", "call_module"):
            what = f"{node.target} writes in place" if writes else "it holds a tensor that is not among those given"
            raise PluginError(f"the weight cannot be computed in a graph: {what}", at=layer.name, fix=_REMEDY)
    graph.eliminate_dead_code()
    return graph


def _check(layer: Layer, result: Tensor) -> None:
    if lowered(layer.module) is None:
        raise PluginError(f"{layer.type} has no weight that could be computed", at=layer.name)
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    if result.shape != weight.shape or result.dtype != weight.dtype:
        raise PluginError(
            f"the weight computed is {tuple(result.shape)} {result.dtype}, the layer's is {tuple(weight.shape)} "
            f"{weight.dtype}",
            at=layer.name,
        )


def _home(layer: Layer) -> str:
    return layer.name.replace("@", "_")


def _weight_name(layer: Layer) -> str:
    """The name that the weight has, or had before it was computed."""
    if layer.functional and not layer.computed:
        return str(layer.weight_node.target)  # type: ignore[union-attr]
    return layer.computed[0] if len(layer.computed) == 1 else f"{_home(layer)}.weight"


def _make_room(model: CapturedModel, layer: Layer) -> list[fx.Node]:
    """Take the old weight, and what it was computed from, off the model; nodes to erase in the end."""
    if layer.functional:
        return release(model, layer, weight_only=True)
    container = nn.Module().train(model.training)
    if layer.module.bias is not None:
        container.register_parameter("bias", layer.module.bias)  # type: ignore[arg-type]
    set_module(model, layer.name, container)
    return []


def _container(model: nn.Module, path: str) -> str:
    """`path` as a plain container, under another name where it is taken."""
    try:
        found = get_attribute(model, path)
    except AttributeError:
        set_module(model, path, nn.Module().train(model.training))
        return path
    return path if type(found) is nn.Module else _container(model, f"{path}_weight")


def _register(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    home = model.get_submodule(path)
    if isinstance(tensor, nn.Parameter):
        home.register_parameter(leaf, tensor)
    else:
        home.register_buffer(leaf, tensor)


def _put_last(model: nn.Module, path: str, key: str) -> None:
    """A parameter `key` behind those that its container got later, where torch.nn has it."""
    home = submodule(model, path)
    if home is not None and key in parameters_of(home):
        home.register_parameter(key, parameters_of(home).pop(key))


def _functional_calls(model: CapturedModel, layer: Layer) -> list[fx.Node]:
    """Calls of an operator in place of those of the module; their weight is still to be set."""
    call = lowered(layer.module)
    assert call is not None
    made = []
    with model.graph.inserting_before(layer.nodes[0]):
        bias = None if layer.module.bias is None else model.graph.get_attr(f"{layer.name}.bias")
    for node in layer.nodes:
        with model.graph.inserting_before(node):
            new = model.graph.call_function(call.target, (node.args[0], node.args[0], bias, *call.args))
        new.meta = {**node.meta, "module_path": layer.name}
        node.replace_all_uses_with(new)
        model.graph.erase_node(node)
        made.append(new)
    return made


def _set_weight(node: fx.Node, weight: fx.Node) -> None:
    names = list(arguments(node))
    if "weight" in node.kwargs:
        node.update_kwarg("weight", weight)
    else:
        node.update_arg(names.index("weight"), weight)


def _inlined(model: CapturedModel, traced: fx.Graph, readers: list[fx.Node], path: str) -> fx.Node:
    """The nodes of `traced` in the graph of `model`, with their shapes noted; the one that gives the weight."""
    placed: dict[fx.Node, fx.Node] = {}
    values: dict[fx.Node, Any] = {}
    given = iter(readers)
    for node in [node for node in traced.nodes if node.op != "output"]:
        new = next(given) if node.op == "placeholder" else model.graph.node_copy(node, placed.__getitem__)
        values[new] = get_attribute(model, str(new.target)) if new.op == "get_attr" else evaluate([new], values)
        shapes = tree_map_only(Tensor, tensor_metadata, values[new])
        new.meta = {"module_path": path, "tensor_meta": shapes}
        placed[node] = new
    result: Any = next(node for node in traced.nodes if node.op == "output").args[0]
    return placed[result]
