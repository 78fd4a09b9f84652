"""Calibration batches as inputs of a model, each checked before it runs."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from ..captured import CapturedModel
from ..errors import InputError
from ..inputs import Inputs, ordinary


def checked_batches(model: CapturedModel, batches: Iterable[Any], samples: int | None = None) -> Iterator[Inputs]:
    """Each batch as inputs of `model`, until `samples` samples have come (None = all; the last batch is cut to fit).

    Raises:
        InputError: no batch, an empty one, one that does not fit the example the model was captured with, or one that
            holds NaN or infinity; names the batch and the input.
    """
    seen = 0
    for number, batch in enumerate(batches):
        inputs = checked_inputs(model, batch, f"calibration batch {number}")
        if samples is not None and model.dynamic_batch and inputs.batch_size > samples - seen:
            inputs = inputs.with_batch(samples - seen)
        seen += inputs.batch_size
        yield inputs
        if samples is not None and seen >= samples:
            return
    if not seen:
        raise InputError(
            "the calibration data has no batches",
            fix="give at least one batch, in a list or a DataLoader",
        )


_FIX = "a batch holds the arguments of the example inputs and no others; calibration data has no labels"


def checked_inputs(model: CapturedModel, batch: Any, place: str) -> Inputs:
    """`batch` as inputs of `model`. Errors name it by `place`.

    Raises:
        InputError: it does not fit the example the model was captured with, is empty, or holds NaN or infinity.
    """
    try:
        inputs = _as_captured(model, Inputs.of(model, batch).map(ordinary))
    except InputError as error:
        raise InputError(error.problem, at=place, fix=_FIX) from error
    _check_sizes(model, inputs, place)
    inputs.check_finite(place)
    return inputs


def _as_captured(model: CapturedModel, inputs: Inputs) -> Inputs:
    """The same arguments, by position and by keyword as in the call the model was captured with."""
    signature = inspect.signature(model.forward)
    bound = signature.bind(*inputs.args, **inputs.kwargs).arguments
    by_keyword = {name: bound.pop(name) for name in model.inputs.kwargs if name in bound}
    return Inputs(tuple(bound.values()), by_keyword, tuple(bound))


def _check_sizes(model: CapturedModel, inputs: Inputs, place: str) -> None:
    """The same tensors as the example, of the sizes that the model takes and the very same types."""
    example, given = model.inputs.named_tensors, inputs.named_tensors
    if example.keys() != given.keys():
        raise InputError(
            f"the batch has the inputs {', '.join(given) or 'none'}, the model was captured with {', '.join(example)}",
            at=place,
            fix=_FIX,
        )
    for name, tensor in given.items():
        if not tensor.numel() and example[name].numel():
            raise InputError(f"input {name} is empty, {tuple(tensor.shape)}", at=place, fix="leave the batch out")
        if tensor.dtype != example[name].dtype:
            raise InputError(
                f"input {name} is {tensor.dtype}, the model was captured with {example[name].dtype}", at=place, fix=_FIX
            )
    try:
        model.check_inputs(*inputs.named_leaves.values())
    except InputError as error:
        raise InputError(error.problem, at=place, fix=error.fix) from error
