"""The loss of a batch by its labels: the user's, or cross-entropy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .data import Data
from .errors import InputError
from .torch_private import tree_leaves


def loss_of(data: Data, output: Any, target: Any, place: str = "training data") -> Tensor:
    """A scalar: `Data.loss`, or the cross-entropy of the first output. Errors name the batch by `place`.

    Raises:
        InputError: cross-entropy is not defined for this output and target, or the user's loss is no scalar.
    """
    if data.loss is not None:
        value = _own(data.loss, output, target, place)
    else:
        value = _cross_entropy(next((t for t in tree_leaves(output) if isinstance(t, Tensor)), None), target, place)
    if not isinstance(value, Tensor) or value.numel() != 1:
        what = f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}"
        raise InputError(f"the loss gives {what}", at=place, fix="return a scalar tensor")
    return value.reshape(())


def _own(loss: Callable[[Any, Any], Any], output: Any, target: Any, place: str) -> Any:
    try:
        return loss(output, target)
    except Exception as error:  # whatever the user's function raises
        raise InputError(
            f"the loss fails: {type(error).__name__}: {error}",
            at=f"{place}, surgery.Data(loss=…)",
            fix="it is called with the model's output and the target of a batch",
        ) from error


def _cross_entropy(logits: Tensor | None, target: Any, place: str) -> Tensor:
    _check_labels(logits, target, place)
    try:
        return F.cross_entropy(logits, target)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__ for t in (logits, target)]
        raise InputError(
            f"no cross-entropy of an output {shapes[0]} with a target {shapes[1]}: {error}",
            at=place,
            fix="give surgery.Data(loss=…), or training data with class numbers (samples,)",
        ) from error


def _check_labels(logits: Tensor | None, target: Any, place: str) -> None:
    """Raises InputError where class numbers are too few, too many or out of range."""
    numbered = isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point()
    if not numbered or logits is None or logits.ndim != 2 or not len(target):
        return
    samples, classes = logits.shape
    if len(target) != samples:
        raise InputError(f"{len(target)} labels for {samples} samples", at=place, fix="give a label for every sample")
    low, high = int(target.min()), int(target.max())
    if low < 0 or high >= classes:
        raise InputError(
            f"label {low if low < 0 else high}, the model's output has the classes 0 to {classes - 1}",
            at=place,
            fix="number the classes as the model was trained; is this the data of this model?",
        )
