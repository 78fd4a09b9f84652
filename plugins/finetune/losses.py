"""What training makes small.

    T² KL(softmax(t / T) ‖ softmax(y / T))      of logits: a first output (samples, classes) with several classes
    E (y - t)² / Var t                          of every other output

y are the outputs, t those of the teacher (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2: T² keeps the size
of the gradient whatever T is).
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from surgery import InputError
from surgery.graph import tree_leaves


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


def _of_logits(y: Tensor, t: Tensor, temperature: float) -> Tensor:
    own, wanted = (F.log_softmax(logits.float() / temperature, 1) for logits in (y, t))
    return temperature**2 * F.kl_div(own, wanted, reduction="batchmean", log_target=True)


def _of_values(y: Tensor, t: Tensor) -> Tensor:
    spread = t.float().var(correction=0)
    return F.mse_loss(y.float(), t.float()) / spread.where(spread > 0, 1.0)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
