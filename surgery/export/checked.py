"""A model as an ONNX file that computes what the model computes, or none at all."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ExportError, SurgeryError
from ..inputs import Inputs
from ..parity import parity
from .corrections import REMEDIES, operator_name
from .onnx import ANOTHER_WAY, OPSET, write_onnx


def export_onnx(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    dynamic_batch: bool | None = None,
    metadata: Mapping[str, str] | None = None,
    check: bool = True,
) -> Path:
    """Writes `model`, in eval mode and on the CPU, to `path`. The model itself stays as it is.

    The batch dimension of every input is named `batch`. `dynamic_batch=None` takes a captured model's word for it, and
    for any other model leaves the batch open if that can be traced. `metadata` goes into the file, beside the versions
    of this SDK, torch and onnx. The file appears whole or not at all. Weights above 2 GiB go into `<path>.data`.

    With `check`, ONNX Runtime computes the example before the file appears, and has to agree with PyTorch.

    Raises:
        ExportError: an operator has no ONNX form or is computed otherwise by the file, the batch cannot stay open as
            asked, or the file cannot be written. An older file at `path` is untouched.
    """
    accept = partial(_compare, model, Inputs.of(model, example_inputs)) if check else None
    return write_onnx(
        model, example_inputs, path, opset=opset, dynamic_batch=dynamic_batch, metadata=metadata, accept=accept
    )


def _compare(model: nn.Module, example: Inputs, file: Path) -> None:
    """Raises ExportError where an operator of `file` computes something else than in PyTorch, or the file does not run.

    Rounding that adds up over many operators is none of this.
    """
    try:
        found = parity(model, file, [example])
    except SurgeryError as error:
        raise ExportError(
            f"{type(model).__name__} cannot be run as ONNX: {error.problem.replace(str(file), file.name)}",
            fix=f"{error.fix}; or {ANOTHER_WAY}",
        ) from error
    place = found.first_divergence
    if place is not None:
        raise ExportError(
            f"the ONNX file of {type(model).__name__} would be wrong: {place.node} is off by {place.error:.2g} of its "
            "largest value in ONNX Runtime",
            at=place.module and f"module {place.module}",
            fix="; or ".join(filter(None, [REMEDIES.get(operator_name(place.node.partition("(")[2])), ANOTHER_WAY])),
        )
