"""Recipes that ship with the SDK, offered by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable

from surgery import hookimpl


@hookimpl
def surgery_recipes() -> Sequence[Traversable]:
    return [entry for entry in files(__name__).iterdir() if entry.name.endswith(".yaml")]
