"""Takes units out of a model and proves it: the smaller model computes what the original does with the units' weights
at zero, on the example, before anything is solved anew.

Where the two differ, a channel rule is wrong about some operator. Which groups meet it is found by removing them apart,
on copies of the model; these stay.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Channels, Context, Criterion, PassError, Skip
from surgery.channels import masking_bytes, remove_and_compare
from surgery.graph import buffers_of, children_of, parameters_of

from .choosing import Choice, Key, Start, numbered

if TYPE_CHECKING:
    from . import PruneFilters

BOUND = 84
"""Roundings, 1e-5 in float32, that two orders of adding up may be apart, in parts of the largest output; what is
further apart has to agree in float64."""
EXACT = 1e-9
"""The same in float64: far above its own rounding, far below that of float32."""
MOST_BYTES = 2**31
"""That a comparison may hold beside two runs of the example."""


@dataclass
class Removal:
    """Of units of `model`, a step at a time. `errors`: largest difference of every step that was compared. `wrong`:
    groups that stay because their removal gives something else than masking them, and how far it is off."""

    options: PruneFilters
    model: CapturedModel
    context: Context
    criterion: Criterion
    start: Start
    errors: list[float] = field(default_factory=list)
    wrong: dict[Key, str] = field(default_factory=dict)

    def step(self, part: float) -> tuple[Choice, list[Tensor]]:
        """`part` of all that is to go is gone then. What was chosen, and the marks of what this step took, per group.

        Raises:
            PassError: the removal is wrong, and right for every group alone.
        """
        while True:
            trial = surgery.snapshot(self.model)
            found = self._channels(trial)
            choice = Choice(self.options, found, self.criterion, self.context, self.start, part, self.wrong)
            marks = choice.marks()
            if not any(bool(own.any()) for own in marks):
                return choice, marks
            keys = [key for key, _ in numbered(found)]
            if not (problem := self._taken(found, marks)):
                _adopt(self.model, trial)
                return choice, marks
            wrong = self._wrong(marks, range(len(keys)))
            if not wrong:
                raise PassError(
                    f"a channel rule is wrong: without the units {problem}",
                    at=f"pass {self.options.name()}",
                    fix="ask for less, or leave layers out with `exclude:`; and report it, as a channel rule is wrong",
                )
            self.wrong |= {keys[number]: why for number, why in wrong.items()}

    def note(self) -> str:
        """What was proven."""
        if not self.errors:
            limit = f"more than {MOST_BYTES:,} bytes beside two runs of the example"
            return f"removal was not compared with masking: one layer's weights and the outputs take {limit}"
        error = f"{max(self.errors):.1e} of the largest output on the example"
        return (
            f"removed = masked: the model without the units is off from the one with their weights at zero by {error}"
        )

    def skips(self) -> list[Skip]:
        return [
            Skip(name, f"its units stay: a channel rule is wrong, for without them {why}")
            for (name, _), why in self.wrong.items()
        ]

    def _channels(self, model: CapturedModel) -> Channels:
        return self.context.channels(model, heads=self.options.heads)

    def _taken(self, found: Channels, marks: Sequence[Tensor]) -> str:
        """Remove; what is wrong with it, "" = nothing."""
        if masking_bytes(self.model) > MOST_BYTES:
            found.remove(marks)
            return ""
        error, problem = _compared(found, marks)
        if problem or (error > _bound(self.model) and self._in_float64(marks) > EXACT):
            return problem or f"outputs are off by {error:.1e} of the largest from what masked units give"
        self.errors.append(error)
        return ""

    def _in_float64(self, marks: Sequence[Tensor]) -> float:
        """The difference without float32's rounding; infinite where the model does not run so."""
        model = copy.deepcopy(self.model).double()
        inputs = self.model.inputs.map(lambda t: t.double() if t.is_floating_point() else t)
        error, problem = _compared(self._channels(model), marks, inputs)
        return math.inf if problem else error

    def _wrong(self, marks: Sequence[Tensor], groups: Sequence[int]) -> dict[int, str]:
        """Numbers of those `groups` whose removal alone is wrong, by halving; with what is wrong."""
        own = [m if number in groups else torch.zeros_like(m) for number, m in enumerate(marks)]
        problem = replace(self, errors=[])._taken(self._channels(surgery.snapshot(self.model)), own)
        if not problem or len(groups) == 1:
            return {groups[0]: problem} if problem else {}
        half = len(groups) // 2
        return self._wrong(marks, groups[:half]) | self._wrong(marks, groups[half:])


def _compared(found: Channels, marks: Sequence[Tensor], inputs: surgery.Inputs | None = None) -> tuple[float, str]:
    """The difference, or the error that the removal ends with."""
    try:
        return remove_and_compare(found, marks, inputs), ""
    except Exception as error:  # a wrong rule may fail in any way
        return (
            math.inf,
            f"the model ends with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
        )


def _bound(model: CapturedModel) -> float:
    return BOUND * max((torch.finfo(p.dtype).eps for p in model.parameters() if p.is_floating_point()), default=0.0)


def _adopt(model: CapturedModel, trial: CapturedModel) -> None:
    """`model` becomes what `trial` is, a copy of it that was edited."""
    stores: tuple[Callable[[nn.Module], dict[str, Any]], ...] = (parameters_of, buffers_of, children_of)
    for store in stores:
        store(model).clear()
        store(model).update(store(trial))
    model.graph = trial.graph
