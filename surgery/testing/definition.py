"""Rules a pass keeps whatever it is applied to: its class, its options, its repr."""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import BaseModel

from ..passes import Pass, check_class
from ..recipe import adapter, build_pass


def follows_the_rules_for_definitions(step: Pass) -> None:
    """its class is a frozen dataclass with a summary"""
    check_class(type(step), "surgery.testing")


def repr_round_trips(step: Pass) -> None:
    """evaluating its repr gives an equal pass"""
    cls = type(step)
    text = repr(step).replace(cls.__qualname__, cls.__name__, 1)
    names: dict[str, Any] = {**vars(sys.modules[cls.__module__]), cls.__name__: cls}
    again = eval(text, names)
    assert again == step, f"{text} gives {again!r}"
    assert hash(again) == hash(step), "equal passes have different hashes"


def options_survive_json(step: Pass) -> None:
    """its options, written as JSON and read by a recipe, give an equal pass"""
    text = json.dumps(step.options, default=_dumped)
    again = build_pass(type(step), json.loads(text))
    assert again == step, f"{text} gives {again!r}"


def options_are_described(step: Pass) -> None:
    """every option says in its `Field(description=…)` what it means"""
    properties = adapter(type(step)).json_schema()["properties"]
    silent = [name for name, option in properties.items() if not option.get("description")]
    assert not silent, f"no description: {', '.join(silent)}"


def _dumped(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    raise AssertionError(f"{value!r} is not JSON")


DEFINITION = (
    follows_the_rules_for_definitions,
    repr_round_trips,
    options_survive_json,
    options_are_described,
)
