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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram

from .. import __version__
from ..captured import CapturedModel
from ..deviation import Deviation
from ..errors import ExportError, ModelError
from ..inputs import Inputs
from ..names import tensors
from ..paths import path_from
from ..precision import full_precision
from ..process import exclusive
from ..tracing import evaluating, first_line, quiet, user_line
from .corrections import correct
from .streaming import save
from .tensor_names import named_inputs, named_outputs, unique
from .tidy import forget_inner_shapes, tidy

OPSET = 18
MAX_PROTO_BYTES = 2**31 - 2**20
"""A protobuf message ends at 2 GiB, the weights and a little more; larger weights go into a second file."""
ANOTHER_WAY = (
    "compute it by other operators in the model, or leave ONNX out: `export: [source]` in a recipe, "
    "`surgery.export_source` without one"
)
SAME = 1e-3
"""Relative error of a program that computes the same; rounding stays far below, another branch far above."""


@dataclass(frozen=True)
class OnnxTrace:
    """A model as ONNX in memory, beside the aten program it was translated from. Both name their values alike."""

    onnx: ir.Model
    program: ExportedProgram
    """From flat tensors to flat tensors. The model is its submodule `model`."""
    example: Inputs
    """The arguments it was traced with."""


@exclusive()
@full_precision()
def write_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    dynamic_batch: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    accept: Callable[[Path], None] | None = None,
) -> Path:
    """What `export_onnx` does; before the file appears, `accept` is given it and may raise."""
    target = path_from(path, "the path of the ONNX file")
    trace = trace_onnx(model, example_inputs, opset=opset, dynamic_batch=dynamic_batch)
    forget_inner_shapes(trace.onnx.graph)
    versions = {"surgery": __version__, "torch": torch.__version__, "onnx": onnx.__version__}
    trace.onnx.metadata_props.update(sorted({**versions, **(metadata or {})}.items()))
    try:
        _write(trace.onnx, target, accept)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        rare = any(t.dtype in (torch.bfloat16, torch.float64) for t in tensors(model).values())
        remedy = "`model.float()`: ONNX has few operators for its number type" if rare else "try another opset"
        raise ExportError(
            f"torch.onnx made an invalid file of {type(model).__name__}: {first_line(error)}",
            fix=f"{remedy}; an older file there is untouched",
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
            return _trace(model, example, opset, dynamic=True)
        except ExportError:
            if wanted:
                raise
    return _trace(model, example, opset, dynamic=False)


def arguments(program: ExportedProgram, inputs: Inputs) -> list[Tensor]:
    """Everything that a traced program's graph takes: weights and the tensors of `inputs`, in its order."""
    tensors = iter(inputs.tensors)
    weights = {**program.state_dict, **program.constants}
    specs = program.graph_signature.input_specs
    return [next(tensors) if spec.target is None else weights[spec.target] for spec in specs]


class _Flat(nn.Module):
    """`model` from flat tensors to flat tensors; whatever else its arguments and results hold is left out."""

    def __init__(self, model: nn.Module, example: Inputs) -> None:
        super().__init__()
        self.model, self.example = model, example

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        remaining = iter(tensors)
        inputs = self.example.map(lambda _: next(remaining))
        return named_outputs(self.model(*inputs.args, **inputs.kwargs))


def _trace(model: nn.Module, sample: Inputs, opset: int, *, dynamic: bool) -> OnnxTrace:
    batch = max(2, sample.batch_size) if dynamic else sample.batch_size
    example = sample.with_batch(batch)
    shapes = tuple({0: Dim.AUTO} if dynamic and t.ndim and t.shape[0] == batch else {} for t in example.tensors)
    with evaluating(model), quiet():
        program = _export(_Flat(model, example), shapes)
        if dynamic:
            _check_batch(model, program, sample)
        correct(program, ANOTHER_WAY)
        try:
            result: Any = torch.onnx.export(program, dynamo=True, verbose=False, optimize=False, opset_version=opset)
        except Exception as error:  # the exporter's own classes are private
            raise _untranslatable(model, error) from error
        tidy(result.model, unique([*named_inputs(model, example), *_output_names(program)]))
    return OnnxTrace(result.model, result.exported_program, example)


def _export(flat: _Flat, shapes: tuple[dict[int, Any], ...]) -> ExportedProgram:
    try:
        tensors = tuple(flat.example.tensors)
        program = torch.export.export(flat, tensors, dynamic_shapes=(shapes,), strict=False)
    except Exception as error:  # whatever the user's forward raises
        raise ExportError(
            f"torch.export cannot follow {type(flat.model).__name__}: {first_line(error)}",
            at=user_line(error),
            fix="rewrite this line so that it does not decide on the values of tensors",
        ) from error
    if not _output_names(program):
        raise ExportError(f"{type(flat.model).__name__} returns no tensor", fix="return the tensors to be exported")
    return program


def _check_batch(model: nn.Module, program: ExportedProgram, sample: Inputs) -> None:
    """The batch is open, and what was traced with two samples holds for one: a model may tell them apart."""
    if not (_is_dynamic(program) and (sample.batch_size > 1 or _holds(model, program, sample))):
        raise ExportError(
            f"{type(model).__name__} computes differently with another batch size",
            fix="export with dynamic_batch=False, or take the batch size from the input in forward",
        )


def _holds(model: nn.Module, program: ExportedProgram, sample: Inputs) -> bool:
    if isinstance(model, CapturedModel):  # capture compared it at several batch sizes
        return True
    inputs, deviation = sample.clone(), Deviation()
    expected = named_outputs(model(*inputs.args, **inputs.kwargs))
    try:
        deviation.add(list(expected.values()), fx.Interpreter(program.graph_module).run(*arguments(program, sample)))
    except ModelError:  # other shapes
        return False
    return deviation.relative_error < SAME


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


def _write(model: ir.Model, target: Path, accept: Callable[[Path], None] | None) -> None:
    """Writes into a folder beside the target, checks the result, then moves it into place; the model comes last."""
    weights = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)
    data = f"{target.name}.data" if weights > MAX_PROTO_BYTES else None
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        if data:
            ir.save(model, folder / target.name, external_data=data)
            onnx.checker.check_model(folder / target.name, full_check=True)
        else:  # the checker would read large weights several times
            onnx.save(save(model, folder / target.name), folder / "outline.onnx")
            onnx.checker.check_model(folder / "outline.onnx", full_check=True)
        if accept:
            accept(folder / target.name)
        for name in filter(None, (data, target.name)):
            os.replace(folder / name, target.parent / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
