"""Recipes resolved: every pass built and the order checked before the first one runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError

from ..errors import RecipeError, did_you_mean
from ..passes import RESERVED, Pass
from ..registry import Registry
from .form import OnBreak, Recipe, describe, validated
from .including import expanded, overridden, read
from .ordering import check_order
from .yaml_data import check_size, plain_parts


@dataclass(frozen=True)
class Plan:
    """A recipe with every pass built."""

    recipe: Recipe
    steps: tuple[Pass, ...]
    on_break: tuple[OnBreak, ...]
    """What to do where a step breaks the budget, for each."""

    @property
    def lock(self) -> dict[str, Any]:
        """The recipe with every option written out; JSON-able and in a fixed order."""
        passes = [
            {step.name(): plain(step.options)} | ({} if how == self.recipe.on_break else {"on_break": how})
            for step, how in zip(self.steps, self.on_break, strict=True)
        ]
        return self.recipe.model_dump(mode="json") | {"passes": passes}

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe, in hexadecimal; of what it does, not of how it is described."""
        return self.hash_of(len(self.steps))

    def hash_of(self, count: int) -> str:
        """`hash` of the recipe with its first `count` passes alone."""
        lock = self.lock
        decisive = {key: value for key, value in lock.items() if key != "description"}
        decisive["passes"] = lock["passes"][:count]
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def resolve(
    recipe: str | Path | Mapping[str, Any], registry: Registry, overrides: Mapping[str, Any] | None = None
) -> Plan:
    """Read, check and build a recipe given by name, path or as a dict. `overrides`: values by path, such as
    `{"passes.1.ratio": 0.3, "budget.sqnr_db": 20.0}`; a pass goes by its index or its name.

    Raises:
        RecipeError: the recipe is not strict YAML, has unknown or wrong entries, names no known pass, uses other
            recipes in a circle, or orders passes so that one refuses what another leaves; or an override names
            nothing. Nothing has run then.
    """
    source = read(recipe, registry)
    raw = overridden(expanded(source, registry), overrides or {}, source.place)
    check_size(raw, plain_parts, source.place)
    parsed = validated(raw, source.place)
    place = f"{source.place} with the passes it uses" if _uses_others(source.raw) else source.place
    built = [_build(i, entry, parsed, registry, place) for i, entry in enumerate(parsed.passes)]
    steps = tuple(step for step, _ in built)
    check_order(steps, source.place, registry)
    return Plan(parsed, steps, tuple(how for _, how in built))


def _uses_others(raw: Mapping[str, Any]) -> bool:
    return any(isinstance(item, dict) and "use" in item for item in raw["passes"])


def _build(
    index: int, entry: Mapping[str, Any], recipe: Recipe, registry: Registry, place: str
) -> tuple[Pass, OnBreak]:
    named = {key: value for key, value in entry.items() if key != "on_break"}
    if len(named) != 1:
        raise RecipeError(
            f"passes.{index} has {len(named)} keys, not one pass name",
            at=place,
            fix="write each pass as its own list item",
        )
    [(name, options)] = named.items()
    try:
        how = _how(entry.get("on_break", recipe.on_break))
        step = build_pass(registry.find_pass(name), _options(options))
        step.check(registry)
        if how == "soften" == entry.get("on_break") and not step.strength:
            raise RecipeError(f"{name} has no strength that could be softened", fix="on_break: undo, stop or continue")
        return step, how
    except RecipeError as error:
        raise RecipeError(error.problem, at=f"{place}, passes.{index} ({name})", fix=error.fix) from error


def _how(value: Any) -> OnBreak:
    if value not in get_args(OnBreak):
        raise RecipeError(f"on_break: {value!r}", fix=f"one of {', '.join(get_args(OnBreak))}")
    how: OnBreak = value
    return how


def _options(value: Any) -> Mapping[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise RecipeError(f"options {value!r} are no mapping", fix="write {option: value}")
    if wrong := [key for key in value or {} if not isinstance(key, str)]:
        raise RecipeError(f"{wrong[0]!r} is no name of an option", fix="write {option: value}")
    return value or {}


def build_pass(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    """The pass with checked options.

    Raises:
        RecipeError: an unknown option (with the nearest name and the list), or a value of the wrong type or range.
    """
    known = [option.name for option in fields(cls)]
    unknown = [key for key in options if key not in known]
    if unknown:
        beside = f"write {unknown[0]} beside the pass: {{{cls.name()}: {{…}}, {unknown[0]}: …}}"
        raise RecipeError(
            f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], known)}",
            fix=beside if unknown[0] in RESERVED else f"options of {cls.name()}: {', '.join(known)}",
        )
    try:
        return adapter(cls).validate_json(json.dumps(dict(options)), strict=True)  # strict: no "2" for 2
    except ValidationError as error:
        raise RecipeError(
            describe(error.errors(), known), fix=f"`surgery show {cls.name()}` explains the options"
        ) from error
    except (TypeError, ValueError) as error:
        raise RecipeError(str(error), fix=f"`surgery show {cls.name()}` explains the options") from error


def adapter(cls: type[Pass]) -> TypeAdapter[Pass]:
    """pydantic's view of the options of a pass."""
    return TypeAdapter(cls)


def plain(value: Any) -> Any:
    """Options as JSON knows them."""
    return json.loads(
        json.dumps(value, default=lambda v: v.model_dump(mode="json") if isinstance(v, BaseModel) else str(v))
    )


def schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema of a recipe with every installed pass, for editors."""
    document = Recipe.model_json_schema()
    on_break = {"enum": list(get_args(OnBreak))}
    steps: list[dict[str, Any]] = [_USE | {"properties": {**_USE["properties"], "on_break": on_break}}]
    for name, cls in registry.passes.items():
        options = adapter(cls).json_schema()
        document.setdefault("$defs", {}).update(options.pop("$defs", {}))
        keys = {name: {"anyOf": [options, {"type": "null"}]}, "on_break": on_break}
        steps.append({"type": "object", "properties": keys, "required": [name], "additionalProperties": False})
        steps.append({"const": name})
    document["properties"]["passes"] = {"type": "array", "minItems": 1, "items": {"anyOf": steps}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


_USE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "use": {"type": "string", "description": "name or path of a recipe whose passes come here"},
        "with": {
            "type": "object",
            "additionalProperties": {"type": "object"},
            "description": "changed options by pass, by its name or index",
        },
    },
    "required": ["use"],
    "additionalProperties": False,
}
