"""What training makes small.

    T² KL(softmax(t / T) ‖ softmax(y / T))      of logits: a first output (samples, classes) with several classes
    E (y - t)² / Var t                          of every other output

y are the outputs, t those of the teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2: T² keeps the size
of the gradient whatever T is). Labels add the user's loss, or cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from surgery import Context, InputError


def distillation(outputs: Any, wanted: Any, temperature: float) -> Tensor:
    """Sum over all floating-point outputs; 0 where they are what the teacher's are, `wanted`.

    Raises:
        InputError: there is none to compare.
    """
    pairs = zip(_tensors(outputs), _tensors(wanted), strict=True)
    terms = [
        _of_logits(y, t, temperature) if number == 0 and y.ndim == 2 and y.shape[1] > 1 else _of_values(y, t)
        for number, (y, t) in enumerate(pairs)
        if y.is_floating_point()
    ]
    if not terms:
        raise InputError("the model gives no floating-point output to be trained towards", fix="choose loss: labels")
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def of_labels(context: Context, output: Any, target: Any, place: str) -> Tensor:
    """`surgery.Data.loss`, or the cross-entropy of the first output. Errors name the batch by `place`.

    Raises:
        InputError: cross-entropy is not defined for this output and target, or the user's loss is no scalar.
    """
    if context.data.loss is not None:
        value = _own(context.data.loss, output, target, place)
    else:
        value = _cross_entropy(next(iter(_tensors(output)), None), target, place)
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


def _of_logits(y: Tensor, t: Tensor, temperature: float) -> Tensor:
    own, wanted = (F.log_softmax(logits.float() / temperature, 1) for logits in (y, t))
    return temperature**2 * F.kl_div(own, wanted, reduction="batchmean", log_target=True)


def _of_values(y: Tensor, t: Tensor) -> Tensor:
    spread = t.float().var(correction=0)
    return F.mse_loss(y.float(), t.float()) / spread.where(spread > 0, 1.0)


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


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
