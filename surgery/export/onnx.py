"""A model as one ONNX file that is the same, byte for byte, wherever it is written.

    model, inputs ─torch.export→ aten program ─torch.onnx→ ONNX ─fold, merge, name, strip→ file

Opset 18 is the default: torch's own operator library is written in it (newer ones are converted from it), and edge
runtimes lag behind ONNX by years.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .. import __version__
from ..capture import CapturedModel
from ..errors import ExportError
from ..inputs import Inputs
from ..tracing import evaluating, first_line, quiet, user_line
from .names import fresh, named_inputs, named_outputs, unique

OPSET = 18
MAX_PROTO_BYTES = 2**31 - 2**20
"""A protobuf message ends at 2 GiB, the weights and a little more; larger weights go into a second file."""
FOLDING_MAY_ADD_BYTES = 2**10
VECTOR_MAY_ADD_BYTES = 2**16


@dataclass(frozen=True)
class OnnxTrace:
    """A model as ONNX in memory, beside the aten program it was translated from. Both name their values alike."""

    onnx: ir.Model
    program: ExportedProgram
    """From flat tensors to flat tensors. The model is its submodule `model`."""
    example: Inputs
    """The arguments it was traced with."""


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    dynamic_batch: bool | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Writes `model`, in eval mode and on the CPU, to `path`. The model itself stays as it is.

    The batch dimension of every input is named `batch`. `dynamic_batch=None` takes a captured model's word for it, and
    for any other model leaves the batch open if that can be traced. `metadata` goes into the file, beside the versions
    of this SDK, torch and onnx. The file appears whole or not at all. Weights above 2 GiB go into `<path>.data`.

    Raises:
        ExportError: an operator has no ONNX form, the batch cannot stay open as asked, or the file cannot be written.
    """
    trace = trace_onnx(model, example_inputs, opset=opset, dynamic_batch=dynamic_batch)
    versions = {"surgery": __version__, "torch": torch.__version__, "onnx": onnx.__version__}
    trace.onnx.metadata_props.update(sorted({**versions, **(metadata or {})}.items()))
    target = Path(path)
    try:
        _write(trace.onnx, target)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"torch.onnx made an invalid file of {type(model).__name__}: {first_line(error)}",
            fix="try another opset; an older file there is untouched",
        ) from error
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror or error}",
            at=str(target.parent),
            fix="check that the folder exists, is writable and has room; an older file there is untouched",
        ) from error
    return target


def trace_onnx(
    model: nn.Module, example_inputs: Any, *, opset: int = OPSET, dynamic_batch: bool | None = None
) -> OnnxTrace:
    """Translates `model` to ONNX in memory, as `export_onnx` writes it.

    torch.export takes a batch of one for a constant, so it is doubled where the batch shall stay open.
    """
    example = Inputs.of(model, example_inputs).to("cpu").clone()
    wanted = model.dynamic_batch if dynamic_batch is None and isinstance(model, CapturedModel) else dynamic_batch
    model = _on_cpu(model)
    if wanted is not False:
        try:
            return _trace(model, example.with_batch(max(2, example.batch_size)), opset, dynamic=True)
        except ExportError:
            if wanted:
                raise
    return _trace(model, example, opset, dynamic=False)


class _Flat(nn.Module):
    """`model` from flat tensors to flat tensors; whatever else its arguments and results hold is left out."""

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        super().__init__()
        self.model, self.example = model, example

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        remaining = iter(tensors)
        inputs = self.example.map(lambda _: next(remaining))
        return named_outputs(self.model(*inputs.args, **inputs.kwargs))


def _trace(model: nn.Module, example: Inputs, opset: int, *, dynamic: bool) -> OnnxTrace:
    flat, batch = _Flat(model, example), example.batch_size
    shapes = tuple({0: Dim.AUTO} if dynamic and t.ndim and t.shape[0] == batch else {} for t in example.tensors)
    with evaluating(model), quiet():
        program = _export(flat, shapes)
        if dynamic and not _is_dynamic(program):
            raise ExportError(
                f"{type(model).__name__} computes with a fixed batch size of {batch}",
                fix="export with dynamic_batch=False, or take the batch size from the input in forward",
            )
        try:
            result: Any = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, opset_version=opset)
        except Exception as error:  # noqa: BLE001 - the exporter's own classes are private
            raise _untranslatable(model, error) from error
        _finish(result.model, unique([*named_inputs(model, example), *_output_names(program)]))
    return OnnxTrace(result.model, result.exported_program, example)


def _export(flat: _Flat, shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
    try:
        tensors = tuple(flat.example.tensors)
        program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # noqa: BLE001 - whatever the user's forward raises
        raise ExportError(
            f"torch.export cannot follow {type(flat.model).__name__}: {first_line(error)}",
            at=user_line(error),
            fix="rewrite this line so that it does not decide on the values of tensors",
        ) from error
    if not _output_names(program):
        raise ExportError(f"{type(flat.model).__name__} returns no tensor", fix="return the tensors to be exported")
    return program


def _output_names(program: ExportedProgram) -> list[str]:
    assert program.call_spec.out_spec is not None
    return list(program.call_spec.out_spec.context)


def _is_dynamic(program: ExportedProgram) -> bool:
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return any(isinstance(v, Tensor) and v.ndim and isinstance(v.shape[0], torch.SymInt) for v in values)


def _untranslatable(model: nn.Module, error: BaseException) -> ExportError:
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    node = re.search(r"Error when translating node (.*?)\. See", "\n".join(map(str, chain)), re.DOTALL)
    return ExportError(
        f"{type(model).__name__} cannot be translated to ONNX: {first_line(chain[-1])}",
        at=node[1] if node else "",
        fix="replace this operator in the model by operators that ONNX has, or try a newer opset",
    )


def _on_cpu(model: nn.Module) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    return model if all(t.device.type == "cpu" for t in tensors) else copy.deepcopy(model).cpu()


def _finish(model: ir.Model, names: list[str]) -> None:
    """Folds constants, merges equal weights, names inputs and outputs, and drops what tells of this machine."""
    optimizer.optimize_ir(model, should_fold=_may_fold)
    _make_contiguous(model.graph)
    common.DeduplicateHashedInitializersPass()(model)
    for name, weight in list(model.graph.initializers.items()):
        weight.name = name.removeprefix("model.")
    _rename([*model.graph.inputs, *model.graph.outputs], names, model.graph)
    _name_batch(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()


def _may_fold(node: ir.Node) -> bool | None:
    """False where the result is larger than the constants it replaces, such as weights looked up in a codebook.

    Vectors may grow, since biases are made by expanding a zero, and fusing them needs their values.
    """
    constants = {v for v in node.inputs if v is not None and v.const_value is not None and len(v.uses()) == 1}
    before = sum(v.const_value.nbytes for v in constants if v.const_value is not None)
    after = sum(_bytes(value) for value in node.outputs)
    is_vector = node.op_type != "Range" and all(v.shape is not None and v.shape.rank() <= 1 for v in node.outputs)
    return False if after > before + (VECTOR_MAY_ADD_BYTES if is_vector else FOLDING_MAY_ADD_BYTES) else None


def _bytes(value: ir.Value) -> float:
    if value.shape is None or value.dtype is None or not value.shape.is_static():
        return 0
    return prod(value.shape.numpy()) * value.dtype.itemsize


def _make_contiguous(graph: ir.Graph) -> None:
    """Folded transposes are views, which cannot be hashed."""
    for name, value in graph.initializers.items():
        if isinstance(value.const_value, ir.Tensor) and not value.const_value.numpy().flags.c_contiguous:
            value.const_value = ir.tensor(value.const_value.numpy().copy(order="C"), value.dtype, name=name)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _rename(values: list[ir.Value], names: list[str], graph: ir.Graph) -> None:
    """Gives each value its name; another value that held it gives way."""
    holders = {str(value.name): value for value in _values(graph)}
    for name in names:
        if name in holders:
            holders[name].name = fresh(name, {*holders, *names})
    for value, name in zip(values, names, strict=True):
        value.name = name


def _name_batch(graph: ir.Graph) -> None:
    """Replaces torch's symbol for the batch, such as s77, by `batch` in every shape."""
    leading = [value.shape[0] for value in graph.inputs if value.shape]
    symbols = {str(dim.value) for dim in leading if isinstance(dim, ir.SymbolicDim)}
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(symbols)) or r"(?!)")
    for value in _values(graph):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([pattern.sub("batch", dim) if isinstance(dim, str) else dim for dim in dims])


def _write(model: ir.Model, target: Path) -> None:
    """Writes into a folder beside the target, checks the result, then moves it into place; the model comes last."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = f"{target.name}.data" if weights > MAX_PROTO_BYTES else None
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        ir.save(model, folder / target.name, external_data=data)
        onnx.checker.check_model(folder / target.name, full_check=True)
        for name in filter(None, (data, target.name)):
            os.replace(folder / name, target.parent / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
