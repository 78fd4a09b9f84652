"""Every error a user can cause: the value, its place, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class SurgeryError(Exception):
    """Base of all errors of this SDK.

    `problem` names the offending value, `at` the place (file and line, recipe step, node), `fix` what to do.
    """

    exit_code = 2

    def __init__(self, problem: str, *, at: str = "", fix: str = "") -> None:
        problem, at, fix = map(_cut, (problem, at, fix))
        self.problem, self.at, self.fix = problem, at, fix
        lines = [problem, at and f"  at:  {at}", fix and f"  fix: {fix}"]
        super().__init__("\n".join(line for line in lines if line))


LONGEST = 1000
"""Characters of each part of an error; who gives a megabyte as a name need not read it again."""


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class CaptureError(SurgeryError):
    """The model cannot be turned into a graph that reproduces it."""


class ModelError(SurgeryError):
    """The model, its weights or its factory are not what was asked for."""


class InputError(SurgeryError):
    """Example inputs or data do not fit the model, are empty, or hold NaN."""


class RecipeError(SurgeryError):
    """A recipe, or an option in it, is wrong. The person who wrote the recipe must act."""


class PluginError(SurgeryError):
    """A plugin does not load, clashes with another, or breaks the pass contract. Its author must act."""


class PassError(SurgeryError):
    """A pass failed on this model. The model stands as it was before the pass."""


class CrashError(PassError):
    """A pass failed in a way that it does not foresee. Its author must act; no `on_break` goes on from here."""


class ExportError(SurgeryError):
    """The model could not be written in the format asked for."""


class RunError(SurgeryError):
    """A run folder is damaged, or belongs to another recipe, model or data."""


class MemoryLimitError(SurgeryError):
    """The machine has too little memory for what was asked for."""


class PathError(SurgeryError):
    """A path that no file can have, or that cannot be reached."""


class BudgetError(SurgeryError):
    """The result breaks the recipe's budget. Artifacts and report are kept."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question to put behind an unknown `name`; empty where no known one is near."""
    close = get_close_matches(name, list(known), 3, 0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""
