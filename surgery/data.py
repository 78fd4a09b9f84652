"""Data in the four roles a recipe may need, and factories named on the command line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import InputError, did_you_mean

NAMED = 12
"""Names in an error, at most."""


@dataclass(frozen=True)
class Data:
    """Data for a run. Each role is an iterable of batches that can be iterated more than once.

    `calibration` yields model inputs without labels (a tensor, a tuple or a dict of arguments); `evaluation` and
    `training` yield `(inputs, target)`. `loss(output, target)` is a scalar tensor; `metric(output, target)` a number
    per batch, higher is better, averaged over samples (default: top-1 accuracy).
    """

    calibration: Iterable[Any] | None = None
    evaluation: Iterable[Any] | None = None
    training: Iterable[Any] | None = None
    loss: Callable[[Any, Any], Any] | None = None
    metric: Callable[[Any, Any], float] | None = None

    @classmethod
    def of(cls, value: Any) -> Data:
        """`None`, an iterable of batches, or `Data`, as `Data`; a one-shot iterator is read into memory once, and a
        lone tensor or dict is one batch."""
        if value is None:
            return cls()
        data = value if isinstance(value, cls) else cls(calibration=value)
        roles = {role: _repeatable(getattr(data, role), role) for role in ("calibration", "evaluation", "training")}
        return cls(**roles, loss=data.loss, metric=data.metric)

    def require_calibration(self, who: str) -> None:
        """Raises InputError, in the name of `who`, where there is no calibration data."""
        if self.calibration is None:
            raise InputError(
                f"{who} needs calibration data and there is none",
                fix="give data= in Python or --data module:function on the command line; labels are not needed",
            )


def pair_of(batch: Any, place: str) -> tuple[Any, Any]:
    """Inputs and target of a batch with labels. `place` names the batch.

    Raises:
        InputError: it is no pair.
    """
    if not (isinstance(batch, tuple | list) and len(batch) == 2):
        raise InputError(f"the batch is {type(batch).__name__}, no pair", at=place, fix="give pairs (inputs, target)")
    from .inputs import ordinary

    return batch[0], ordinary(batch[1])


def _repeatable(batches: Any, role: str) -> Iterable[Any] | None:
    if batches is None:
        return None
    from torch import Tensor

    if isinstance(batches, Tensor | Mapping):
        return [batches]
    if not isinstance(batches, Iterable):
        raise InputError(
            f"{role} data is {type(batches).__name__}, not an iterable of batches",
            fix="give a list of batches or a DataLoader",
        )
    return list(batches) if isinstance(batches, Iterator) else batches


def import_object(reference: str, purpose: str) -> Any:
    """The object named `module:name`, looked for in the working directory as well.

    Raises:
        InputError: no such module or name; says which part is missing.
    """
    module_name, _, name = reference.partition(":")
    if not (module_name and name):
        raise InputError(
            f"{purpose} {reference!r} is not of the form module:name", fix="for example mypackage.models:build"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        file = Path(module_name)
        fix = f"write {file.stem}:{name}" if file.suffix == ".py" else "is it in this folder or installed?"
        raise InputError(f"{purpose}: module {module_name!r} cannot be imported: {error}", fix=fix) from error
    value: Any = module
    for part in name.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_")]
            own = [n for n in public if getattr(getattr(value, n, None), "__module__", None) == module_name]
            listed = ", ".join(own[:NAMED]) + (", …" if len(own) > NAMED else "")
            raise InputError(
                f"{purpose}: {module_name} has no {name!r}{did_you_mean(part, public)}",
                fix=f"it defines {listed or 'nothing'}",
            )
        value = getattr(value, part)
    return value
