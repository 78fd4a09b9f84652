"""The data to train on: inputs of the model, and labels where there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch

import surgery
from surgery import CapturedModel, Context, InputError, Inputs

FIX = "give surgery.Data(training=…), batches of (inputs, target), or calibration=…, batches of inputs"


@dataclass(frozen=True)
class Batches:
    """Batches for `model`, in an order by chance where they can be asked for by number, else as they come."""

    model: CapturedModel
    items: Iterable[Any]
    role: str

    @classmethod
    def of(cls, model: CapturedModel, context: Context) -> Batches:
        """Training data, else calibration data; there is one of them."""
        role = "calibration" if context.data.training is None else "training"
        return cls(model, getattr(context.data, role), role)

    @property
    def labelled(self) -> bool:
        return self.role == "training"

    def count(self) -> int:
        """Of an epoch; data that does not know it is gone through for it.

        Raises:
            InputError: there are none.
        """
        found = len(self.items) if isinstance(self.items, Sized) else sum(1 for _ in self.items)
        if not found:
            raise InputError(f"the {self.role} data has no batches", fix=FIX)
        return found

    def epoch(self) -> Iterator[tuple[Inputs, Any, str]]:
        """Inputs, the target or None, and the name of the batch. Draws from torch's generator.

        Raises:
            InputError: a batch does not fit the model, holds NaN, or is no pair.
        """
        for number, item in self._in_order():
            place = f"{self.role} batch {number}"
            inputs, target = surgery.pair_of(item, place) if self.labelled else (item, None)
            yield surgery.checked_inputs(self.model, inputs, place), target, place

    def _in_order(self) -> Iterable[tuple[int, Any]]:
        """Batches, each with its place in the data."""
        items = self.items
        if isinstance(items, Sequence):
            return ((place, items[place]) for place in torch.randperm(len(items)).tolist())
        return enumerate(items)
