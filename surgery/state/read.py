"""`graph.json` and safetensors files back to a captured model; each part is checked before it is used."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeInfo
from torch.utils._pytree import tree_unflatten

from ..captured import CallCodeGen, CapturedModel, CaptureInfo
from ..constructors import build, find_class, leaf_modules
from ..errors import RunError
from ..graph import propagate
from ..inputs import Inputs
from . import specs
from .encoding import decode, decode_target, encode
from .form import (
    GRAPH,
    INPUTS,
    REMEDY,
    WEIGHTS,
    Document,
    Example,
    ModuleRecord,
    NodeRecord,
    Signature,
    TensorRecord,
    read_document,
)


def load_state(folder: str | Path) -> CapturedModel:
    """The model that `save_state` wrote, on the CPU, with shapes noted on its nodes.

    Raises:
        RunError: a file is missing or damaged, names an operator or class that is not known here, or does not fit the
            other files; it names the file and the place.
    """
    source = Path(folder)
    document = read_document(source / GRAPH)
    path = str(source / GRAPH)
    model = CapturedModel(nn.Module(), fx.Graph())
    layers = _restore_modules(model, document.modules, path)
    _restore_tensors(model, document.tensors, source)
    _check_complete(layers, path)
    graph = _restore_graph(model, document, path)
    with _damage(path, "nodes"):
        model.graph = graph
    with _damage(path, "inputs"):
        inputs = _restore_inputs(document.inputs, source / INPUTS)
    with _damage(path, "meta"):
        error = float(decode(document.capture.error))
        model.meta = {key: decode(value) for key, value in document.meta.items()}
    model.meta["capture"] = CaptureInfo(inputs, document.capture.dynamic_batch, tuple(document.capture.notes), error)
    with _damage(path, "running it on the example inputs"):
        propagate(model.eval(), inputs)
    _set_training(model, document.modules)
    return model


@contextmanager
def _damage(path: str, place: str) -> Iterator[None]:
    """Whatever goes wrong inside is a damaged file, at this place."""
    try:
        yield
    except RunError as error:
        raise RunError(error.problem, at=error.at or f"{path}, {place}", fix=error.fix or REMEDY) from error
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise RunError(f"the state is damaged: {reason}", at=f"{path}, {place}", fix=REMEDY) from error


def _restore_modules(model: nn.Module, records: list[ModuleRecord], path: str) -> dict[str, nn.Module]:
    """Containers and layers without values below `model`; the layers come back by name."""
    layers: dict[str, nn.Module] = {}
    known: dict[str, nn.Module] = {"": model}
    for i, record in enumerate(records):
        with _damage(path, f"modules[{i}] {record.name!r}"):
            if i == 0 and record.name == "":
                continue
            parent, _, key = record.name.rpartition(".")
            if parent in layers or record.name in known:
                raise ValueError("lies inside a layer, or is there twice")
            module = _restore_module(record, known)
            known[parent].add_module(key, module)
            known[record.name] = module
            if type(module) is not nn.Module:
                layers[record.name] = module
    return layers


def _restore_module(record: ModuleRecord, known: Mapping[str, nn.Module]) -> nn.Module:
    if record.same_as is not None:
        return known[record.same_as]
    if record.cls is None:
        return nn.Module()
    return build(find_class(record.cls), {key: decode(value) for key, value in record.arguments.items()})


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in memory of their own: those of `load_file` lie in the mapped file, at odd addresses."""
    try:
        return {name: tensor.clone() for name, tensor in load_file(str(path)).items()}
    except FileNotFoundError as error:
        raise RunError(f"there is no {path.name}", at=str(path), fix=REMEDY) from error
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise RunError(f"the file is damaged: {error}", at=str(path), fix=REMEDY) from error


def _restore_tensors(model: nn.Module, records: list[TensorRecord], folder: Path) -> None:
    stored = _read_tensors(folder / WEIGHTS)
    restored: dict[str, Tensor] = {}
    for i, record in enumerate(records):
        with _damage(str(folder / GRAPH), f"tensors[{i}] {record.name!r}"):
            if record.same_as is not None:
                tensor = restored[record.same_as]
            else:
                tensor = _restore_tensor(record, stored.pop(record.name, None))
            owner, _, key = record.name.rpartition(".")
            _place_tensor(model.get_submodule(owner), key, tensor, record)
            restored[record.name] = tensor
    if stored:
        raise RunError(f"tensor {min(stored)!r} belongs to no layer", at=str(folder / WEIGHTS), fix=REMEDY)


def _restore_tensor(record: TensorRecord, stored: Tensor | None) -> Tensor:
    if stored is None:
        raise ValueError(f"not in {WEIGHTS}")
    if list(stored.shape) != record.shape or encode(stored.dtype)["dtype"] != record.dtype:
        found = f"{tuple(stored.shape)} {stored.dtype}"
        raise ValueError(f"{WEIGHTS} has {found}, expected {tuple(record.shape)} torch.{record.dtype}")
    if record.strides is not None:
        if not _dense(record.shape, record.strides):
            raise ValueError(f"strides {record.strides} do not cover the shape {record.shape}")
        stored = torch.empty_strided(record.shape, record.strides, dtype=stored.dtype).copy_(stored)
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
    store: dict[str, Any] = owner._parameters if is_parameter else owner._buffers
    if getattr(store.get(key), "shape", None) != tensor.shape:
        raise ValueError(f"{type(owner).__name__} has no {record.kind} of shape {tuple(tensor.shape)} here")
    if is_parameter:
        setattr(owner, key, tensor)
    else:
        owner.register_buffer(key, tensor, persistent=record.persistent)


def _check_complete(layers: Mapping[str, nn.Module], path: str) -> None:
    for name, layer in layers.items():
        for key, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_meta:
                raise RunError(f"tensor '{name}.{key}' is not among the tensors", at=path, fix=REMEDY)


def _restore_graph(model: nn.Module, document: Document, path: str) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    layers, tensors = leaf_modules(model), {record.name for record in document.tensors}
    for i, record in enumerate(document.nodes):
        with _damage(path, f"nodes[{i}] {record.name!r}"):
            target = _target(record, layers.keys(), tensors)
            args = tuple(decode(value, nodes) for value in record.args)
            kwargs = {key: decode(value, nodes) for key, value in record.kwargs.items()}
            node = graph.create_node(record.op, target, args, kwargs, name=record.name)
            if node.name != record.name:
                raise ValueError("this name is there twice")
            node.meta = {key: decode(value) for key, value in record.meta.items()}
            nodes[node.name] = node
    with _damage(path, "signature"):
        graph.set_codegen(CallCodeGen(_restore_signature(document.signature, graph)))
    graph._graph_namespace._used_names |= set(document.used_names.gone)
    graph._graph_namespace._base_count = dict(document.used_names.counts)
    return graph


def _target(record: NodeRecord, layers: Collection[str], tensors: Collection[str]) -> Any:
    if record.op == "call_function":
        return decode_target(record.target)
    if record.op in ("call_module", "get_attr"):
        known = record.target in (layers if record.op == "call_module" else tensors)
    else:
        known = record.target.isidentifier()
    if not known:
        raise ValueError(f"{record.target!r} is no name of a layer, tensor or input of this model")
    return record.target


def _restore_signature(record: Signature, graph: fx.Graph) -> _PyTreeInfo:
    in_spec, out_spec = specs.loads(record.inputs), specs.loads(record.outputs)
    ops = [node.op for node in graph.nodes]
    count = ops.count("placeholder")
    if ops[:count] != ["placeholder"] * count or ops.index("output") != len(ops) - 1:
        raise ValueError("inputs must come first and the one output last")
    results: Any = next(reversed(graph.nodes)).args[0]
    if in_spec.num_leaves != count or out_spec.num_leaves != len(results):
        raise ValueError("inputs or outputs do not match their structure")
    args, kwargs = in_spec.children()
    if [*record.names[args.num_children :]] != list(kwargs.context):
        raise ValueError("the argument names do not match their structure")
    return _PyTreeInfo(list(record.names), in_spec, out_spec)


def _restore_inputs(record: Example, path: Path) -> Inputs:
    stored = _read_tensors(path)
    leaves = [stored.pop(str(i)) if str(i) in stored else decode(leaf) for i, leaf in enumerate(record.leaves)]
    if stored:
        raise ValueError(f"{path.name} holds {min(stored)!r}, which is no input")
    args, kwargs = tree_unflatten(leaves, specs.loads(record.spec))
    return Inputs(args, kwargs)


def _set_training(model: nn.Module, records: list[ModuleRecord]) -> None:
    for record in records:
        module = model.get_submodule(record.name)
        if record.cls is None:
            module.training = record.training
        else:
            module.train(record.training)
