"""A captured model to a document and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from ..captured import CapturedModel, CaptureInfo
from ..constructors import class_path, constructor, enclosing, leaf_modules
from ..errors import ExportError
from ..torch_private import TreeCodeGen, TreeSpec, codegen_of, namespace_of, transient_of, tree_flatten
from .encoding import encode, encode_target
from .files import check_names, digest, own_tensors, sync, write_tensors
from .form import (
    GRAPH,
    INPUTS,
    WEIGHTS,
    Capture,
    Document,
    ModuleRecord,
    NodeRecord,
    TensorRecord,
    UsedNames,
)
from .structure import encode_structure


def save_state(model: CapturedModel, folder: str | Path) -> str:
    """Write `model` into `folder`, which is made where it is missing; gives the `digest`. The same model always gives
    the same bytes.

    Raises:
        ExportError: a layer class, a name or a value in the graph that cannot be stored; the message says which.
    """
    target = Path(folder)
    document = document_of(model, used_names=_used_names(model.graph))
    leaves, _ = tree_flatten((model.meta["capture"].inputs.args, model.meta["capture"].inputs.kwargs))
    target.mkdir(parents=True, exist_ok=True)
    write_tensors(weights_of(model), target / WEIGHTS)
    write_tensors({str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}, target / INPUTS)
    (target / GRAPH).write_bytes(document.to_bytes())
    sync(target / GRAPH)
    return str(digest(target))


def document_of(model: CapturedModel, **fields: Any) -> Document:
    """The document of `model`; `fields` are further ones of `Document`.

    Raises:
        ExportError: a layer class, a name or a value in the graph that cannot be stored; the message says which.
    """
    check_names([*weights_of(model), *(name for name, _ in model.named_modules(remove_duplicate=False))])
    info: CaptureInfo = model.meta["capture"]
    leaves, inputs = tree_flatten((info.inputs.args, info.inputs.kwargs))
    names, outputs = _signature(model.graph)
    return Document(
        format="surgery-graph",
        version=2,
        capture=Capture(dynamic_batch=info.dynamic_batch, notes=list(info.notes), error=encode(info.error)),
        meta=_plain_meta(model.meta),
        names=names,
        inputs=_structure(inputs),
        outputs=_structure(outputs),
        example=[_leaf(leaf) for leaf in leaves],
        modules=list(_modules(model)),
        tensors=list(_tensors(model)),
        nodes=[_node(node) for node in model.graph.nodes],
        **fields,
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer once, under its first name."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in named_tensors(model):
        unique.setdefault(id(tensor), (name, tensor.detach()))
    return dict(unique.values())


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters, then buffers, under every name they have."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _modules(model: nn.Module) -> Iterator[ModuleRecord]:
    layers = leaf_modules(model)
    seen: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if any(parent in layers for parent in enclosing(name)):
            continue
        common: dict[str, Any] = {"name": name, "training": module.training}
        if module in seen:
            common["same_as"] = seen[module]
        elif name in layers:
            arguments = {key: encode(value) for key, value in constructor(module).items()}
            common |= {"cls": class_path(type(module)), "arguments": arguments}
        seen.setdefault(module, name)
        yield ModuleRecord(**common)


def _tensors(model: nn.Module) -> Iterator[TensorRecord]:
    """A record for every name of a parameter or buffer."""
    first = {id(tensor): name for name, tensor in reversed([*named_tensors(model)])}
    for name, tensor in own_tensors(model):
        fields: dict[str, Any] = {"name": name}
        if isinstance(tensor, nn.Parameter):
            fields |= {"requires_grad": tensor.requires_grad}
        else:
            owner, _, key = name.rpartition(".")
            persistent = key not in transient_of(model.get_submodule(owner))
            fields |= {"kind": "buffer", "persistent": persistent}
        if first[id(tensor)] != name:
            fields["same_as"] = first[id(tensor)]
        elif not tensor.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(tensor):
            fields["strides"] = list(tensor.stride())
        yield TensorRecord(**fields)


def _usual_path(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_module" else ""


def _node(node: fx.Node) -> NodeRecord:
    path = node.meta.get("module_path", _usual_path(node))
    try:
        return NodeRecord(
            name=node.name,
            op=node.op,  # type: ignore[arg-type]
            target=encode_target(node.target) if node.op == "call_function" else str(node.target),
            args=[encode(value) for value in node.args],
            kwargs={key: encode(value) for key, value in node.kwargs.items()},
            path=None if path == _usual_path(node) else path,
            rank=ranks(node),
        )
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"node {node.name} cannot be stored: {error}",
            at=node.format_node() or "",
            fix="the pass that made it must use aten operators, torch.nn layers and plain values",
        ) from error


def ranks(node: fx.Node) -> Any:
    """Dimensions of the node's result at the example, or what a file says they are."""
    meta = node.meta.get("tensor_meta")
    return _ranks(meta) if meta is not None else node.meta.get("rank")


def _ranks(meta: Any) -> Any:
    """Dimensions of a result, a list for a tuple of results; None where it is no tensor."""
    if isinstance(meta, TensorMetadata):
        return len(meta.shape)
    return [_ranks(part) for part in meta] if isinstance(meta, tuple | list) else None


def _leaf(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return {"tensor": [encode(leaf.dtype)["dtype"], list(leaf.shape)]}
    return encode(leaf)


def _plain_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What passes noted on the model, if it is text, a number or None."""
    kept = {key: value for key, value in meta.items() if isinstance(value, str | int | float | None)}
    return {key: encode(value) for key, value in kept.items()}


def _signature(graph: fx.Graph) -> tuple[list[str], TreeSpec]:
    """Names of the arguments, and how the outputs are nested."""
    codegen = codegen_of(graph)
    if not isinstance(codegen, TreeCodeGen) or codegen.pytree_info.out_spec is None:
        raise ExportError("the graph does not say how its inputs and outputs are nested", fix="capture the model")
    return list(codegen.pytree_info.orig_args), codegen.pytree_info.out_spec


def _structure(spec: TreeSpec) -> Any:
    try:
        return encode_structure(spec)
    except TypeError as error:
        raise ExportError(
            f"the structure of the model's inputs or outputs cannot be stored: {error}",
            fix="use tuples, lists and dicts whose keys are strings or numbers",
        ) from error


def _used_names(graph: fx.Graph) -> UsedNames:
    names, counts = namespace_of(graph)
    present = {node.name for node in graph.nodes}
    return UsedNames(gone=sorted(names - present), counts=dict(sorted(counts.items())))
