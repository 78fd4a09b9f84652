"""A document and its tensors back to a captured model; each part is checked before it is used.

Work and memory are bounded by the size of the document and the tensors, whatever it declares.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from ..captured import CallCodeGen, CapturedModel, CaptureInfo
from ..constructors import build, leaf_modules, parameters
from ..inputs import Inputs
from ..torch_private import (
    TreeInfo,
    TreeSpec,
    buffers_of,
    namespace_of,
    parameters_of,
    tree_unflatten,
)
from ..tracing import first_line
from .allowed import Known
from .encoding import decode
from .files import own_tensors
from .form import Document, ModuleRecord, NodeRecord, TensorRecord
from .structure import decode_structure

_LARGEST = 1 << 32
"""Elements of an example input that is not given."""
_CALLS = 64
"""Calls into torch that building the layers may take for each of them and of their tensors; an LSTM's take seven."""


@contextmanager
def place(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is wrong at this place of the document."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name}: {first_line(error)}") from error


def build_model(
    document: Document, tensors: Mapping[str, Tensor], known: Known, example: Mapping[str, Tensor] | None = None
) -> CapturedModel:
    """The model in eval mode, which has `tensors` as its own; nothing is run.

    `example`: the example inputs by their number; without them they are zeros, which take no memory.

    Raises:
        ValueError: the document contradicts itself, does not fit the tensors, or names what is not known.
    """
    model = CapturedModel(nn.Module(), fx.Graph())
    _restore_modules(model, document, known)
    _restore_tensors(model, document.tensors, dict(tensors))
    _check_complete(model, document.tensors)
    graph = _restore_graph(model, document, known)
    with place("nodes"):
        model.graph = graph
    with place("inputs"):
        inputs = _restore_inputs(document, example)
    with place("meta"):
        error = float(decode(document.capture.error))
        model.meta = {key: decode(value) for key, value in document.meta.items()}
    model.meta["capture"] = CaptureInfo(inputs, document.capture.dynamic_batch, tuple(document.capture.notes), error)
    return model.eval()


def _restore_modules(model: nn.Module, document: Document, known: Known) -> None:
    """Containers, and layers without values, below `model`."""
    layers: set[str] = set()
    found: dict[str, nn.Module] = {"": model}
    bounded = _FewCalls(_CALLS * (len(document.modules) + len(document.tensors)))
    for i, record in enumerate(document.modules):
        with place(f"modules[{i}] {record.name!r}"), bounded:
            if i == 0 and record.name == "":
                continue
            parent, _, key = record.name.rpartition(".")
            if parent in layers or record.name in found:
                raise ValueError("lies inside a layer, or is there twice")
            module = _restore_module(record, found, known)
            found[parent].add_module(key, module)
            found[record.name] = module
            if type(module) is not nn.Module:
                layers.add(record.name)


def _restore_module(record: ModuleRecord, found: Mapping[str, nn.Module], known: Known) -> nn.Module:
    if record.same_as is not None:
        return found[record.same_as]
    if record.cls is None:
        return nn.Module()
    cls = known.layer(record.cls)
    arguments = {key: decode(value) for key, value in record.arguments.items()}
    if further := arguments.keys() - {parameter.name for parameter in parameters(cls)}:
        raise ValueError(f"{cls.__name__} has no argument {min(further)!r}")
    return build(cls, arguments)


class _FewCalls(TorchFunctionMode):
    """Ends what calls torch more often than `left` times: a layer that declares a billion of its kind."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError("the layers have more tensors than the document lists")
        return function(*args, **(kwargs or {}))


def _restore_tensors(model: nn.Module, records: list[TensorRecord], stored: dict[str, Tensor]) -> None:
    restored: dict[str, Tensor] = {}
    for i, record in enumerate(records):
        with place(f"tensors[{i}] {record.name!r}"):
            if record.same_as is not None:
                tensor = restored[record.same_as]
            elif record.name in stored:
                tensor = _restore_tensor(record, stored.pop(record.name))
            else:
                raise ValueError("it is not among the weights")
            owner, _, key = record.name.rpartition(".")
            _place_tensor(model.get_submodule(owner), key, tensor, record)
            restored[record.name] = tensor
    if stored:
        raise ValueError(f"tensor {min(stored)!r} belongs to no layer")


def _restore_tensor(record: TensorRecord, stored: Tensor) -> Tensor:
    if record.strides is not None:
        if not _dense(list(stored.shape), record.strides):
            raise ValueError(f"strides {record.strides} do not cover the shape {tuple(stored.shape)}")
        stored = torch.empty_strided(stored.shape, record.strides, dtype=stored.dtype, device=stored.device).copy_(
            stored
        )
    return nn.Parameter(stored, record.requires_grad) if record.kind == "parameter" else stored


def _dense(shape: list[int], strides: list[int]) -> bool:
    """Whether the strides are those of some order of the dimensions, without gaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _place_tensor(owner: nn.Module, key: str, tensor: Tensor, record: TensorRecord) -> None:
    """Register `tensor`; a layer must have been built with a tensor of this name and shape."""
    is_parameter = record.kind == "parameter"
    if type(owner) is nn.Module or isinstance(owner, CapturedModel):
        if is_parameter:
            owner.register_parameter(key, tensor)  # type: ignore[arg-type]
        else:
            owner.register_buffer(key, tensor, persistent=record.persistent)
        return
    store: dict[str, Any] = parameters_of(owner) if is_parameter else buffers_of(owner)
    if getattr(store.get(key), "shape", None) != tensor.shape:
        raise ValueError(f"{type(owner).__name__} has no {record.kind} of shape {tuple(tensor.shape)} here")
    if is_parameter:
        setattr(owner, key, tensor)
    else:
        owner.register_buffer(key, tensor, persistent=record.persistent)


def _check_complete(model: nn.Module, records: list[TensorRecord]) -> None:
    """Raises ValueError where a layer has a tensor beside those that were given to it."""
    listed = {record.name for record in records}
    for name, _ in own_tensors(model):
        if name not in listed:
            raise ValueError(f"tensor {name!r} is not among the tensors")


def _restore_graph(model: nn.Module, document: Document, known: Known) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    layers, tensors = leaf_modules(model), {record.name for record in document.tensors}
    for i, record in enumerate(document.nodes):
        with place(f"nodes[{i}] {record.name!r}"):
            target = _target(record, known, layers.keys(), tensors)
            args = tuple(decode(value, nodes) for value in record.args)
            kwargs = {key: decode(value, nodes) for key, value in record.kwargs.items()}
            node = graph.create_node(record.op, target, args, kwargs, name=record.name)
            if node.name != record.name:
                raise ValueError("this name is there twice")
            usual = record.target if record.op == "call_module" else ""
            node.meta = {"module_path": usual if record.path is None else record.path}
            node.meta |= {"rank": record.rank} if record.rank is not None else {}
            nodes[node.name] = node
    with place("names, inputs and outputs"):
        graph.set_codegen(CallCodeGen(_restore_signature(document, graph)))
    if used := document.used_names:
        names, counts = namespace_of(graph)
        names.update(used.gone)
        counts.clear()
        counts.update(used.counts)
    return graph


def _target(record: NodeRecord, known: Known, layers: Collection[str], tensors: Collection[str]) -> Any:
    if record.op == "call_function":
        return known.operator(record.target)
    if record.op in ("call_module", "get_attr"):
        found = record.target in (layers if record.op == "call_module" else tensors)
    else:
        found = record.target.isidentifier()
    if not found:
        raise ValueError(f"{record.target!r} is no name of a layer, tensor or input of this model")
    return record.target


def _restore_signature(document: Document, graph: fx.Graph) -> TreeInfo:
    inputs, outputs = decode_structure(document.inputs), decode_structure(document.outputs)
    ops = [node.op for node in graph.nodes]
    count = ops.count("placeholder")
    if ops[:count] != ["placeholder"] * count or ops.index("output") != len(ops) - 1:
        raise ValueError("inputs must come first and the one output last")
    results: Any = graph.output_node().args[0]
    if inputs.num_leaves != count or outputs.num_leaves != len(results):
        raise ValueError("inputs or outputs do not match their structure")
    check_signature(inputs, document.names)
    return TreeInfo(list(document.names), inputs, outputs)


def check_signature(inputs: TreeSpec, names: list[str]) -> None:
    """Raises ValueError where `inputs` is no (args, kwargs) of these names: torch writes the keys into code."""
    args, kwargs = inputs.children()
    if args.type is not tuple or kwargs.type is not dict:
        raise ValueError("the inputs are no arguments")
    if len(names) != args.num_children + kwargs.num_children or names[args.num_children :] != list(kwargs.context):
        raise ValueError("the argument names do not match their structure")


def _restore_inputs(document: Document, example: Mapping[str, Tensor] | None) -> Inputs:
    stored = None if example is None else dict(example)
    leaves = [_leaf(leaf, i, stored) for i, leaf in enumerate(document.example)]
    if stored:
        raise ValueError(f"the example holds {min(stored)!r}, which is no input")
    args, kwargs = tree_unflatten(leaves, decode_structure(document.inputs))
    return Inputs(args, kwargs)


def _leaf(leaf: Any, index: int, stored: dict[str, Tensor] | None) -> Any:
    if not (isinstance(leaf, dict) and "tensor" in leaf):
        return decode(leaf)
    if stored is not None:
        return stored.pop(str(index))
    dtype, shape = leaf["tensor"]
    zeros = torch.zeros((), dtype=decode({"dtype": dtype})).expand(shape)
    if zeros.numel() > _LARGEST:
        raise ValueError(f"an input of shape {tuple(shape)}")
    return zeros
