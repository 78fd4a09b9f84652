"""Recipes: strict YAML, resolved so that every step is built before the first one runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from .errors import RecipeError
from .passes import Pass
from .registry import Registry, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Format = Literal["onnx", "source", "pack"]


class Budget(BaseModel):
    """What the result may lose against the original, measured on the evaluation data, else on the calibration data."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    accuracy_drop: float | None = Field(
        None, ge=0, le=1, description="largest loss of accuracy (0.01 = one point of 100); needs evaluation data"
    )
    top1_agreement: float | None = Field(
        None, ge=0, le=1, description="smallest share of samples with the original's top-1 class"
    )
    sqnr_db: float | None = Field(None, description="smallest signal-to-quantisation-noise ratio of the outputs, in dB")
    parity: float | None = Field(
        None, gt=0, description="largest deviation of ONNX Runtime from PyTorch, relative to the largest output"
    )


class Recipe(BaseModel):
    """Passes in order, and what the result is held to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1, description="shown in reports and written into artifacts")]
    description: str = Field("", description="when to use the recipe, and what it did on what")
    seed: int = Field(0, ge=0, description="decides every random choice")
    passes: Annotated[list[dict[str, dict[str, Any] | None]], Field(min_length=1)]
    budget: Budget = Field(default_factory=Budget)
    export: list[Format] = Field(default=["onnx", "source"], description="files to write")
    opset: int | None = Field(None, ge=18, le=25, description="ONNX opset; by default the exporter's own")


@dataclass(frozen=True)
class Plan:
    """A recipe with every pass built."""

    recipe: Recipe
    steps: tuple[Pass, ...]

    @property
    def lock(self) -> dict[str, Any]:
        """The recipe with every option written out; JSON-able and in a fixed order."""
        passes = [{step.name(): _plain(step.options)} for step in self.steps]
        return self.recipe.model_dump(mode="json") | {"passes": passes}

    @property
    def hash(self) -> str:
        """SHA-256 of the resolved recipe, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.lock, sort_keys=True).encode()).hexdigest()


def resolve(recipe: str | Path | Mapping[str, Any], registry: Registry) -> Plan:
    """Read, check and build a recipe given by name, path or as a dict.

    Raises:
        RecipeError: the recipe is not strict YAML, has unknown or wrong entries, names no known pass, or orders passes
            so that one refuses what another leaves. Nothing has run then.
    """
    raw, place = _read(recipe, registry)
    parsed = _validated(raw, place)
    steps = tuple(_build(i, entry, registry, place) for i, entry in enumerate(parsed.passes))
    _check_order(steps, place)
    return Plan(parsed, steps)


def _read(recipe: str | Path | Mapping[str, Any], registry: Registry) -> tuple[Any, str]:
    if isinstance(recipe, Mapping):
        return dict(recipe), f"recipe {recipe.get('name', 'given as a dict')!s}"
    if not isinstance(recipe, str | Path):
        raise RecipeError(f"the recipe is no mapping but {type(recipe).__name__}", fix="give a name, a path or a dict")
    path = Path(recipe)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return load_yaml(path.read_text(encoding="utf-8"), str(path)), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {str(path)!r} cannot be read: {error}", fix="check the path") from error
    return load_yaml(
        registry.find_recipe(str(recipe)).read_text(encoding="utf-8"), f"recipe {recipe}"
    ), f"recipe {recipe}"


def _validated(raw: Any, place: str) -> Recipe:
    if not isinstance(raw, dict) or not raw:
        raise RecipeError("the recipe is empty or no mapping", at=place, fix="it needs at least `name:` and `passes:`")
    normal = dict(raw)
    if isinstance(raw.get("passes"), Sequence) and not isinstance(raw["passes"], str):
        normal["passes"] = [{p: {}} if isinstance(p, str) else p for p in raw["passes"]]
    try:
        return Recipe.model_validate(normal)
    except ValidationError as error:
        raise RecipeError(
            describe(error.errors(), Recipe.model_fields), at=place, fix="`surgery schema` prints the schema"
        ) from error


def _build(index: int, entry: Mapping[str, Any], registry: Registry, place: str) -> Pass:
    if len(entry) != 1:
        raise RecipeError(
            f"passes.{index} has {len(entry)} keys, not one pass name",
            at=place,
            fix="write each pass as its own list item",
        )
    [(name, options)] = entry.items()
    try:
        step = build_pass(registry.find_pass(name), options or {})
        step.check(registry)
        return step
    except RecipeError as error:
        raise RecipeError(error.problem, at=f"{place}, passes.{index} ({name})", fix=error.fix) from error


def build_pass(cls: type[Pass], options: Mapping[str, Any]) -> Pass:
    """The pass with checked options.

    Raises:
        RecipeError: an unknown option (with the nearest name and the list), or a value of the wrong type or range.
    """
    known = [option.name for option in fields(cls)]
    unknown = [key for key in options if key not in known]
    if unknown:
        raise RecipeError(
            f"unknown option {unknown[0]!r}{did_you_mean(unknown[0], known)}",
            fix=f"options of {cls.name()}: {', '.join(known)}",
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


def describe(errors: Sequence[ErrorDetails], known: Any) -> str:
    """pydantic's first complaint in a sentence: where, what was given, what is expected. Where a value may be of
    several kinds it complains once for each, and all are named."""
    error = errors[0]
    alike = [e for e in errors if e["loc"][:-1] == error["loc"][:-1] and e["input"] == error["input"]]
    if len(alike) > 1 and len(error["loc"]) > 1:
        expected = " or ".join(e["msg"].removeprefix("Input should be ") for e in alike)
        return f"{'.'.join(map(str, error['loc'][:-1]))}: should be {expected}, got {error['input']!r}"
    where = ".".join(str(part) for part in error["loc"]) or "value"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {where!r}{did_you_mean(where, known)}"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _check_order(steps: Sequence[Pass], place: str) -> None:
    givers: dict[str, str] = {}
    for index, step in enumerate(steps):
        for trait in sorted(step.refuses.keys() & givers.keys()):
            raise RecipeError(
                f"{step.name()} cannot run after {givers[trait]}: {step.refuses[trait]}",
                at=f"{place}, passes.{index}",
                fix=f"put {step.name()} before {givers[trait]}",
            )
        givers |= dict.fromkeys(step.gives, step.name())


def _plain(value: Any) -> Any:
    return json.loads(
        json.dumps(value, default=lambda v: v.model_dump(mode="json") if isinstance(v, BaseModel) else str(v))
    )


def schema(registry: Registry) -> dict[str, Any]:
    """JSON Schema of a recipe with every installed pass, for editors."""
    document = Recipe.model_json_schema()
    steps: list[dict[str, Any]] = []
    for name, cls in registry.passes.items():
        options = adapter(cls).json_schema()
        document.setdefault("$defs", {}).update(options.pop("$defs", {}))
        steps.append(
            {"type": "object", "properties": {name: options}, "required": [name], "additionalProperties": False}
        )
        steps.append({"const": name})
    document["properties"]["passes"] = {"type": "array", "minItems": 1, "items": {"anyOf": steps}}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **document}


class _StrictLoader(yaml.SafeLoader):
    """Plain data only: no tags, no duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} as a key", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str, place: str) -> Any:
    """Plain YAML data.

    Raises:
        RecipeError: tags, duplicate keys, or text that is no YAML; with line and column.
    """
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            tag = getattr(event, "tag", None)
            if tag is not None and tag != "!":  # "!" is what a quoted string has
                raise RecipeError(
                    f"YAML tag {tag}",
                    at=f"{place}, line {_line(event)}",
                    fix="a recipe is plain data; remove the tag",
                )
        return yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark: yaml.Mark | None = getattr(error, "problem_mark", None)
        where = f"{place}, line {mark.line + 1}, column {mark.column + 1}" if mark else place
        raise RecipeError(f"not plain YAML: {getattr(error, 'problem', None) or error}", at=where) from error


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0
