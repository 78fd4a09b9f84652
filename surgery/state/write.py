"""A captured model to `graph.json` and safetensors files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.fx.graph import _PyTreeCodeGen
from torch.utils._pytree import tree_flatten

from ..captured import CapturedModel, CaptureInfo
from ..constructors import class_path, constructor, enclosing, leaf_modules
from ..errors import ExportError
from . import specs
from .encoding import encode, encode_target
from .form import (
    GRAPH,
    INPUTS,
    WEIGHTS,
    Capture,
    Document,
    Example,
    ModuleRecord,
    NodeRecord,
    Signature,
    TensorRecord,
    UsedNames,
)


def save_state(model: CapturedModel, folder: str | Path) -> None:
    """Write `model` into `folder`, which is made where it is missing. The same model always gives the same bytes.

    Raises:
        ExportError: a layer class or a value in the graph that cannot be stored; it names the node or class.
    """
    target = Path(folder)
    info: CaptureInfo = model.meta["capture"]
    leaves, inputs_spec = tree_flatten((info.inputs.args, info.inputs.kwargs))
    tensors, weights = _tensors(model)
    document = Document(
        format="surgery-state",
        version=1,
        capture=Capture(dynamic_batch=info.dynamic_batch, notes=list(info.notes), error=encode(info.error)),
        meta=_plain_meta({k: v for k, v in model.meta.items() if k != "capture"}),
        inputs=Example(
            spec=specs.dumps(inputs_spec),
            leaves=[None if isinstance(leaf, Tensor) else encode(leaf) for leaf in leaves],
        ),
        signature=_signature(model.graph),
        used_names=_used_names(model.graph),
        modules=list(_modules(model)),
        tensors=tensors,
        nodes=[_node(node) for node in model.graph.nodes],
    )
    target.mkdir(parents=True, exist_ok=True)
    _save_tensors(weights, target / WEIGHTS)
    example = {str(i): leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    _save_tensors(example, target / INPUTS)
    (target / GRAPH).write_bytes(document.to_bytes())
    _sync(target / GRAPH)


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


def _tensors(model: nn.Module) -> tuple[list[TensorRecord], dict[str, Tensor]]:
    """A record for every name of a parameter or buffer, and the tensors themselves once each."""
    records: list[TensorRecord] = []
    weights: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for owner, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = f"{owner}.{key}" if owner else key
            known = first.setdefault(id(tensor), name)
            persistent = key not in module._non_persistent_buffers_set
            records.append(_tensor_record(name, tensor, persistent, None if known == name else known))
            weights.setdefault(known, tensor.detach())
    return records, weights


def _tensor_record(name: str, tensor: Tensor, persistent: bool, same_as: str | None) -> TensorRecord:
    fields: dict[str, Any] = {"name": name, "shape": list(tensor.shape), "dtype": encode(tensor.dtype)["dtype"]}
    if isinstance(tensor, nn.Parameter):
        fields |= {"kind": "parameter", "requires_grad": tensor.requires_grad}
    else:
        fields |= {"kind": "buffer", "persistent": persistent}
    if same_as:
        fields["same_as"] = same_as
    elif not tensor.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(tensor):
        fields["strides"] = list(tensor.stride())
    return TensorRecord(**fields)


def _node(node: fx.Node) -> NodeRecord:
    try:
        return NodeRecord(
            name=node.name,
            op=node.op,  # type: ignore[arg-type]
            target=encode_target(node.target) if node.op == "call_function" else str(node.target),
            args=[encode(value) for value in node.args],
            kwargs={key: encode(value) for key, value in node.kwargs.items()},
            meta=_plain_meta(node.meta),
        )
    except (TypeError, ValueError) as error:
        raise ExportError(
            f"node {node.name} cannot be stored: {error}",
            at=node.format_node() or "",
            fix="the pass that made it must use aten operators, torch.nn layers and plain values",
        ) from error


def _plain_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What of `meta` is text, a number or None. Shapes are computed anew; stack traces name files of this machine."""
    kept = {key: value for key, value in meta.items() if isinstance(value, str | int | float | None)}
    return {key: encode(value) for key, value in kept.items() if key != "stack_trace"}


def _signature(graph: fx.Graph) -> Signature:
    codegen = graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen) or codegen.pytree_info.out_spec is None:
        raise ExportError("the graph does not say how its inputs and outputs are nested", fix="capture the model")
    info = codegen.pytree_info
    assert info.out_spec is not None
    return Signature(names=list(info.orig_args), inputs=specs.dumps(info.in_spec), outputs=specs.dumps(info.out_spec))


def _used_names(graph: fx.Graph) -> UsedNames:
    namespace = graph._graph_namespace
    present = {node.name for node in graph.nodes}
    return UsedNames(gone=sorted(namespace._used_names - present), counts=dict(sorted(namespace._base_count.items())))


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.to("cpu").contiguous().clone() for name, tensor in tensors.items()}, str(path))
    _sync(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
