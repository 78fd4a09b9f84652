"""What a recipe says before it is checked: the recipes it uses, and values changed from outside.

{use: small, with: {squeeze: {ratio: 0.3}}} → the passes of `small`, `squeeze` with another ratio
passes.1.ratio = 0.3                        → the second pass with another ratio
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RecipeError, did_you_mean
from ..paths import path_from
from ..registry import Registry
from .form import Recipe, validated
from .yaml_data import MOST_CHARACTERS, check_size, load_yaml, plain_parts, too_large


@dataclass(frozen=True)
class Source:
    """A recipe as it was given."""

    raw: Any
    place: str
    """For errors, and what tells recipes apart in a circle."""
    folder: Path | None = None
    """What the paths of recipes it uses start from."""


def read(recipe: str | Path | Mapping[str, Any], registry: Registry, folder: Path | None = None) -> Source:
    """A recipe by name, path (from `folder`, if it is relative) or as a dict.

    Raises:
        RecipeError: there is none, or it is no plain YAML.
    """
    if isinstance(recipe, Mapping):
        return Source(dict(recipe), f"recipe {recipe.get('name', 'given as a dict')!s}")
    if not isinstance(recipe, str | Path):
        raise RecipeError(f"the recipe is no mapping but {type(recipe).__name__}", fix="give a name, a path or a dict")
    if "\n" in str(recipe):
        raise RecipeError("the recipe is a text of several lines", fix="give a name, a path or a dict")
    path = path_from((folder or Path()) / path_from(recipe, "the recipe"), "the recipe")
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        text = registry.find_recipe(str(recipe)).read_text(encoding="utf-8")
        return Source(load_yaml(text, f"recipe {recipe}"), f"recipe {recipe}")
    try:
        return Source(load_yaml(_text(path), str(path)), str(path), path.parent)
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {str(path)!r} cannot be read: {error}", fix="check the path") from error


def _text(path: Path) -> str:
    """What the file holds. Devices and pipes, which may never end, are no files."""
    if path.exists() and not path.is_file():
        raise IsADirectoryError("it is no file")
    if path.stat().st_size > 4 * MOST_CHARACTERS:
        raise too_large(f"a file of {path.stat().st_size:,} bytes", str(path))
    return path.read_text(encoding="utf-8")


MOST_PASSES, DEEPEST_USE = 200, 16


def expanded(source: Source, registry: Registry, users: Sequence[str] = ()) -> Any:
    """The recipe with each pass as {name: options} and those of other recipes in place of `use:`. What has no form
    that this knows stays, for the check to complain of.

    Raises:
        RecipeError: recipes use each other in a circle, or `with:` names a pass that the other recipe does not have.
    """
    raw = source.raw
    if not isinstance(raw, dict) or not isinstance(raw.get("passes"), list):
        return raw
    check_size(raw, plain_parts, source.place)
    passes: list[Any] = []
    for index, item in enumerate(raw["passes"]):
        if isinstance(item, dict) and "use" in item:
            passes += _included(item, source, registry, (*users, source.place), f"{source.place}, passes.{index}")
        else:
            passes.append({item: {}} if isinstance(item, str) else item)
        if len(passes) > MOST_PASSES:
            raise too_large(f"more than {MOST_PASSES:,} passes, with those of the recipes it uses", source.place)
    return {**raw, "passes": passes}


def _included(
    item: Mapping[str, Any], source: Source, registry: Registry, users: Sequence[str], at: str
) -> list[dict[str, Any]]:
    unknown = [key for key in item if key not in ("use", "with", "on_break")]
    if unknown or not isinstance(item["use"], str):
        problem = f"unknown key {unknown[0]!r} beside `use`" if unknown else f"use: {item['use']!r} is no name or path"
        raise RecipeError(problem, at=at, fix="write `use: recipe`, with `with: {pass: {option: value}}` if need be")
    try:
        other = read(item["use"], registry, source.folder)
    except RecipeError as error:
        raise RecipeError(error.problem, at=error.at or at, fix=error.fix) from error
    if len(users) > DEEPEST_USE:
        raise too_large(f"recipes that use each other deeper than {DEEPEST_USE}", at)
    if other.place in users:
        circle = " uses ".join([*users[users.index(other.place) :], other.place])
        raise RecipeError(f"recipes use each other in a circle: {circle}", at=at, fix="remove one `use:`")
    recipe = validated(expanded(other, registry, users), other.place)
    passes = [dict(step) for step in recipe.passes]
    _change(passes, item.get("with") or {}, other.place, at)
    how = item.get("on_break")
    own = recipe.on_break if "on_break" in recipe.model_fields_set else None
    for step in passes:
        if chosen := how or step.get("on_break") or own:
            step["on_break"] = chosen
    return passes


def _change(passes: Sequence[dict[str, Any]], changes: Any, other: str, at: str) -> None:
    """Other options for passes of the recipe `other`, given by name or index."""
    if not isinstance(changes, dict) or not all(isinstance(options, dict) for options in changes.values()):
        raise RecipeError(f"with: {changes!r} does not map passes to options", at=at, fix="with: {pass: {option: 1}}")
    for which, options in changes.items():
        try:
            step, name = _found(passes, str(which))
        except LookupError as error:
            problem, known = error.args
            raise RecipeError(f"with: {problem} in {other}", at=at, fix=f"it has {', '.join(known)}") from None
        step[name] = {**(step[name] or {}), **options}


def overridden(raw: Any, overrides: Mapping[str, Any], place: str) -> Any:
    """An expanded recipe with values replaced by path: a key of recipes such as `seed` or `budget.sqnr_db`, or
    `passes.<index or name>.<option>`, further keys of an option that is a mapping after that.

    Raises:
        RecipeError: there is no such path. Whether the value fits is checked with the rest of the recipe.
    """
    if not overrides or not isinstance(raw, dict) or not isinstance(raw.get("passes"), list):
        return raw
    result = {**raw, "passes": [dict(item) if isinstance(item, dict) else item for item in raw["passes"]]}
    for path, value in overrides.items():
        first, _, rest = str(path).partition(".")
        if first not in Recipe.model_fields:
            known = [*Recipe.model_fields, "passes.0.…"]
            raise _no_path(str(path), f"a recipe has no {first!r}{did_you_mean(first, known)}", place, ", ".join(known))
        if first == "passes":
            _set_in_pass(result["passes"], path, rest, value, place)
        else:
            result[first] = _replaced(result.get(first), rest, value)
    return result


def _set_in_pass(passes: list[Any], path: str, rest: str, value: Any, place: str) -> None:
    which, _, option = rest.partition(".")
    try:
        item, name = _found(passes, which)
    except LookupError as error:
        problem, known = error.args
        raise _no_path(path, problem, place, ", ".join(f"passes.{which}" for which in known)) from None
    if option == "on_break":
        item[option] = value
    elif option:
        item[name] = _replaced(item[name] or {}, option, value)
    else:
        raise _no_path(path, "it names a pass and no option", place, f"passes.{which}.<option>")


def _found(passes: Sequence[Any], which: str) -> tuple[dict[str, Any], str]:
    """The list item of the pass at an index or of a name, and that name.

    Raises:
        LookupError: there is none, or more than one: with the problem, and a list of what there is.
    """
    named = [(item, name) for item in passes if isinstance(item, dict) for name in item if name != "on_break"]
    found = named[int(which) : int(which) + 1] if which.isdecimal() else [n for n in named if n[1] == which]
    if len(found) == 1:
        return found[0]
    names = [name for _, name in named]
    many, none = f"{len(found)} passes are named {which!r}", f"there is no pass {which!r}{did_you_mean(which, names)}"
    raise LookupError(many if found else none, [f"{i} ({name})" for i, name in enumerate(names)])


def _replaced(old: Any, rest: str, value: Any) -> Any:
    """`old` with `value` at the key `rest`; a key with dots, such as a layer's name, is one key."""
    if not rest:
        return value
    if not isinstance(old, dict):
        old = {}
    first, _, deeper = rest.partition(".")
    if deeper and isinstance(old.get(first, {}), dict):
        return {**old, first: {**old.get(first, {}), deeper: value}}
    return {**old, rest: value}


def _no_path(path: str, problem: str, place: str, known: str) -> RecipeError:
    return RecipeError(f"{path!r} cannot be set: {problem}", at=place, fix=f"what can be set: {known}")


def overrides_from(settings: Sequence[str]) -> dict[str, Any]:
    """`["passes.1.ratio=0.3", …]` as `{"passes.1.ratio": 0.3, …}`; values are read as JSON, else as plain YAML.

    Raises:
        RecipeError: one is not of the form PATH=VALUE, its value is no YAML, or a path is given twice.
    """
    found: dict[str, Any] = {}
    for setting in settings:
        path, separator, value = setting.partition("=")
        if not (path and separator):
            raise RecipeError(f"{setting!r} sets nothing", fix="write PATH=VALUE, such as passes.1.ratio=0.3")
        if path in found:
            raise RecipeError(f"{path!r} is set twice", fix="give one value")
        found[path] = _value(value, f"--set {setting}")
    return found


def _value(text: str, place: str) -> Any:
    try:
        return json.loads(text)  # 1e-4 is a number here, and a string in YAML
    except (RecursionError, ValueError):
        return load_yaml(text, place)
