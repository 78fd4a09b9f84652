"""Where a model and its ONNX file part: the first operator, in the order of execution, that they compute differently.

The aten program that an export starts from and the ONNX graph name their values alike, so the file is asked for its
intermediate values, and each is held against the one PyTorch computes from the same values before it. Rounding that
adds up from operator to operator is no operator's fault and is not found.
"""

from __future__ import annotations

import operator
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from .deviation import Deviation
from .errors import ModelError
from .export.onnx import OnnxTrace, arguments, trace_onnx
from .export.runtime import CPU, OnnxModel, runtime_session
from .export.tensor_names import named_inputs
from .inputs import Inputs
from .tracing import evaluating


@dataclass(frozen=True)
class Divergence:
    """The first value that PyTorch and ONNX Runtime compute differently from the same operands."""

    node: str
    """Name and operator of the value in PyTorch's program."""
    module: str
    """Qualified names of the layers whose weights went into it since the last value that agreed; empty if none did."""
    error: float
    """Largest deviation of this value, relative to the largest magnitude it holds."""


def first_divergence(
    model: nn.Module, path: str | os.PathLike[str], inputs: Any, bound: float, *, provider: str = CPU
) -> Divergence | None:
    """The first value of `model` that its file computes from the same operands with a relative error above `bound`.

    None if there is none: the file is right up to rounding, however far that carries.

    All intermediate values of a batch are held in memory, so the batch should be small. Values that the exporter fused
    away have no counterpart and are passed over. The file must have been written by `export_onnx` from `model`.

    Raises:
        ModelError: the file is another model's.
    """
    file = ir.load(path)
    leading = [value.shape[0] for value in file.graph.inputs if value.shape]
    dynamic = any(isinstance(dim, ir.SymbolicDim) for dim in leading)
    trace = trace_onnx(model, inputs, opset=file.opset_imports[""], dynamic_batch=dynamic)
    example = Inputs.of(model, inputs).to("cpu")
    with evaluating(model), tempfile.TemporaryDirectory() as folder:
        session = _probing_session(file, trace, Path(folder), provider)
        actual = dict(zip(session.output_names, session(**named_inputs(model, example)), strict=True))
        forced = _Forced(trace, actual, bound)
        forced.run(*arguments(trace.program, example))
        return forced.found


def _probing_session(file: ir.Model, trace: OnnxTrace, folder: Path, provider: str) -> OnnxModel:
    """A session that also returns every intermediate value that the program computes."""
    wanted = {node.name for node in trace.program.graph.nodes}
    known = {value.name for node in file.graph for value in node.outputs}
    if not known & {value.name for node in trace.onnx.graph for value in node.outputs}:
        raise ModelError("the ONNX file has no value in common with the model", fix="compare a file with its own model")
    types = {value.name: value.type for node in trace.onnx.graph for value in node.outputs}
    outputs = set(file.graph.outputs)
    for node in file.graph:
        for value in node.outputs:
            value.type = value.type or types.get(value.name)
            if value.name in wanted and value not in outputs and value.type is not None:
                file.graph.outputs.append(value)
    ir.save(file, folder / "model.onnx", external_data="model.onnx.data")
    return runtime_session(folder / "model.onnx", [provider])


def _onnx_names(trace: OnnxTrace) -> dict[str, str]:
    """Outputs bear other names in the file than in the program."""
    specs = trace.program.graph_signature.user_outputs
    return {str(name): str(value.name) for name, value in zip(specs, trace.onnx.graph.outputs, strict=True)}


class _Forced(fx.Interpreter):
    """Computes every value from what the file gave for those before it: where it parts, that operator's doing alone."""

    def __init__(self, trace: OnnxTrace, actual: dict[str, Tensor], bound: float) -> None:
        super().__init__(trace.program.graph_module)
        self._program, self._names, self._actual, self._bound = trace.program, _onnx_names(trace), actual, bound
        self._since: list[fx.Node] = []
        self.found: Divergence | None = None

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op != "call_function" or self.found:
            return value
        self._since.append(n)
        theirs = self._actual.get(self._names.get(n.name, n.name))
        if theirs is None or not isinstance(value, Tensor) or theirs.shape != value.shape:
            return value
        if _is_order_of_ties(n):
            return theirs.to(value.dtype)
        error = _relative_error(value, theirs)
        if not error <= self._bound:
            self.found = Divergence(f"{n.name} ({n.target})", _layers(self._since, self._program), error)
        self._since.clear()
        return theirs.to(value.dtype)


def _is_order_of_ties(node: fx.Node) -> bool:
    """Indices of topk or sort: equal values may stand in either order, and the values are compared themselves."""
    source = node.args[0] if node.target is operator.getitem and node.args[1] == 1 else None
    return isinstance(source, fx.Node) and str(source.target).startswith(("aten.topk", "aten.sort"))


def _relative_error(expected: Tensor, actual: Tensor) -> float:
    """Of one value from the same operands; what is NaN in both agrees."""
    deviation, undefined = Deviation(), expected.isnan() & actual.isnan()
    deviation.add([expected.masked_fill(undefined, 0)], [actual.masked_fill(undefined, 0)])
    return deviation.relative_error


def _layers(nodes: list[fx.Node], program: ExportedProgram) -> str:
    """The layers that own the weights used by `nodes`; without any, the module that the last node stands in."""
    signature = program.graph_signature
    targets = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    names = [targets[arg.name] for node in nodes for arg in node.all_input_nodes if arg.name in targets]
    owners = list(dict.fromkeys(_local(name).rpartition(".")[0] or _local(name) for name in names))
    stack = nodes[-1].meta.get("nn_module_stack") or {"": ("", None)}
    return ", ".join(owners) or _local(list(stack.values())[-1][0])


def _local(name: str) -> str:
    """The traced program holds the model as its submodule `model`."""
    return "" if name == "model" else name.removeprefix("model.")
