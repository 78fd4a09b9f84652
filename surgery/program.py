"""`torch.export` with a free batch dimension where the model has one, and its failures in words."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from .errors import CaptureError
from .inputs import Inputs
from .normalising import NAME, opaque_norms, plain_norms
from .torch_private import buffers_of, tree_map
from .tracing import first_line, plain_attention, quiet, user_line


def export(candidates: Iterable[nn.Module], inputs: Inputs, *, free_batch: bool) -> tuple[ExportedProgram, nn.Module]:
    """The exported program of the first of `candidates` that can be exported, and that one.

    Raises:
        CaptureError: none can; it names the line of the first failure.
    """
    failures: list[Exception] = []
    attempts = (Dim("batch", min=1), Dim.AUTO) if free_batch else (None,)
    for model in candidates:
        for dim in attempts:
            try:
                program = _without_writes(_export(model, inputs, dim))
            except Exception as error:
                failures.append(error)
                continue
            if dim is None or _is_dynamic(program):
                return program, model
    if not failures:
        raise CaptureError("the model computes with the batch size")
    if isinstance(failures[0], CaptureError):
        raise failures[0]
    raise _in_words(failures[0]) from failures[0]


def _export(model: nn.Module, inputs: Inputs, dim: Any) -> ExportedProgram:
    shapes = None
    if dim is not None:
        inputs = inputs.with_batch(max(2, inputs.batch_size))  # export takes sizes 0 and 1 for constants
        shapes = _dynamic_shapes(model, inputs, dim)

    def program() -> ExportedProgram:
        return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=shapes, strict=False)

    with plain_attention(), quiet(), _without_counters(model):
        try:
            with opaque_norms(model):
                exported = program()
        except Exception as error:
            if NAME.partition("::")[2] not in str(error):
                raise
            return program()  # what stands around the layer, such as vmap, does not know the operator
    plain_norms(exported.graph_module)
    return exported


@contextmanager
def _without_counters(model: nn.Module) -> Iterator[None]:
    """Makes plain attributes of the batch counters of BatchNorm, which only training mode uses.

    To export every buffer is an input that is followed through the model, used or not.
    """
    layers = [m for m in model.modules() if type(m) in _BATCH_NORMS and not m.training]
    counting = [m for m in layers if buffers_of(m).get(_COUNTER) is not None]
    try:
        for module in counting:
            vars(module)[_COUNTER] = buffers_of(module).pop(_COUNTER)
        yield
    finally:
        for module in counting:
            buffers_of(module)[_COUNTER] = vars(module).pop(_COUNTER)


def _without_writes(program: ExportedProgram) -> ExportedProgram:
    """Raises CaptureError where the forward leaves another buffer behind, such as one made on the first call."""
    buffers = list(program.graph_signature.buffers_to_mutate.values())
    if buffers:
        raise CaptureError(f"the model writes to {', '.join(buffers)} in its forward")
    return program


def _dynamic_shapes(model: nn.Module, inputs: Inputs, dim: Any) -> dict[str, Any]:
    """`dim` for dimension 0 of every tensor that carries the batch, in the form torch.export takes."""
    batch = inputs.batch_size

    def spec(leaf: Any) -> Any:
        return {0: dim} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None

    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: tree_map(spec, value) for name, value in bound.arguments.items()}


def _is_dynamic(program: ExportedProgram) -> bool:
    user = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    return any(isinstance(v, Tensor) and v.ndim and isinstance(v.shape[0], torch.SymInt) for v in values)


_COUNTER = "num_batches_tracked"
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_REMEDIES = {
    "data-dependent": "the forward decides on the values of a tensor: use torch.where instead of a Python if",
    "unbacked": "the forward decides on the values of a tensor: use torch.where instead of a Python if",
    "not a known type": "return and take tensors in tuples, lists or dicts, or call torch.export.register_dataclass",
}


def _in_words(error: Exception) -> CaptureError:
    fix = next(
        (remedy for words, remedy in _REMEDIES.items() if words in str(error)),
        "write the line with tensor operations; torch.export.draft_export(model, inputs) reports every obstacle",
    )
    return CaptureError(f"torch.export cannot follow the model: {first_line(error)}", at=user_line(error), fix=fix)
