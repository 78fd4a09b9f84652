"""A model of any form, in PyTorch or ONNX Runtime, as a function from a batch to its flat output tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .captured import CapturedModel
from .computed import dense
from .data import pair_of
from .errors import InputError
from .export.runtime import OnnxModel
from .export.tensor_names import named_inputs, named_outputs
from .inputs import Inputs
from .precision import full_precision
from .torch_private import tree_leaves
from .tracing import evaluating

Model = nn.Module | OnnxModel
Run = Callable[[Any], list[Tensor]]


def check_device(name: str) -> None:
    """Raises InputError where PyTorch has no such device here."""
    try:
        torch.zeros(1, device=name).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0]
        raise InputError(f"device {name!r} is not here: {reason}", fix=f"there is {' and '.join(here)}") from error


@contextmanager
def running(model: Model, *, signature: Model | None = None, device: str = "cpu") -> Iterator[Run]:
    """`model` as a function of a batch: a tensor, a tuple or a dict of arguments, or `Inputs`.

    A module runs in eval mode on `device`, as a copy if it lives elsewhere, and is given a clone of the batch.
    An ONNX file knows its inputs by name alone; `signature`, a module with the same arguments, says which is which.
    Weights that a captured model computes are computed once.
    """
    if isinstance(model, CapturedModel):
        model = dense(model)
    if isinstance(model, OnnxModel):
        yield lambda batch: _run_file(model, batch, signature)
        return
    local = _moved(model, torch.device(device))
    with evaluating(local), full_precision():
        yield lambda batch: _run_module(local, batch, device)


def batches_of(data: Any, labelled: bool) -> Iterator[tuple[Any, Any]]:
    """`(inputs, target)` of every batch, target None without labels. A lone tensor, dict or `Inputs` is one batch.

    Raises:
        InputError: there are no batches, or they are not what `labelled` says.
    """
    data = [data] if isinstance(data, Tensor | Mapping | Inputs) else data
    if not isinstance(data, Iterable):
        raise InputError(f"data is {type(data).__name__}, not an iterable of batches", fix="give a list of batches")
    number = -1
    for number, batch in enumerate(data):
        yield pair_of(batch, f"labelled batch {number}") if labelled else (batch, None)
    if number < 0:
        raise InputError("the data has no batches to compare models on", fix="give at least one")


def batch_size(batch: Any) -> int:
    """Leading size of the first tensor in `batch`; 1 where there is none."""
    if isinstance(batch, Inputs):
        return batch.batch_size
    return next((int(t.shape[0]) for t in tree_leaves(batch) if isinstance(t, Tensor) and t.ndim), 1)


def _run_module(model: nn.Module, batch: Any, device: str) -> list[Tensor]:
    inputs = Inputs.of(model, batch).to(device).clone()
    return list(named_outputs(model(*inputs.args, **inputs.kwargs)).values())


def _run_file(model: OnnxModel, batch: Any, signature: Model | None) -> list[Tensor]:
    if isinstance(signature, nn.Module):
        named = named_inputs(signature, Inputs.of(signature, batch))
    elif isinstance(batch, dict):
        named = batch
    else:
        named = {}
    if named.keys() == set(model.input_names):
        return model(**named)
    return model(*(named.values() or [t for t in tree_leaves(batch) if isinstance(t, Tensor)]))


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    tensors = [*model.parameters(), *model.buffers()]
    return model if all(t.device.type == device.type for t in tensors) else copy.deepcopy(model).to(device)
