"""YAML as plain data: no tags, no duplicate keys, and no more work than its length warrants.

Ten lines of aliases to aliases stand for 10^9 values, and whoever walks over them all, as checks, hashes and messages
do, does not come back. So aliases are counted as often as they are used, before anything is built from them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import yaml

from ..errors import RecipeError


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

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value = int(super().construct_yaml_int(node))
        if value.bit_length() > 64:  # YAML has numbers to the base of 60, and 1:1:1:… is one
            raise yaml.constructor.ConstructorError(None, None, "an integer beyond 64 bits", node.start_mark)
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


MOST_CHARACTERS, MOST_VALUES, DEEPEST = 200_000, 20_000, 32
"""Of a recipe. The longest of ours has 3,000 characters, 150 values and a depth of 5."""


def load_yaml(text: str, place: str) -> Any:
    """Plain YAML data.

    Raises:
        RecipeError: tags, duplicate keys, text that is no YAML, or more than a recipe may hold; with line and column.
    """
    if len(text) > MOST_CHARACTERS:
        raise too_large(f"{len(text):,} characters, more than {MOST_CHARACTERS:,}", place)
    loader = _StrictLoader(_checked(text, place))
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        check_size(node, _parts, place)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _no_yaml(error, place) from error
    except (ArithmeticError, ValueError) as error:  # dates and numbers that are none
        raise RecipeError(f"not plain YAML: {error}", at=place, fix="put text that is no number into quotes") from error
    finally:
        loader.dispose()


def _checked(text: str, place: str) -> str:
    """The text, if it has no tags and is not nested deeper than the parser's own recursion bears."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            tag = getattr(event, "tag", None)
            if tag is not None and tag != "!":  # "!" is what a quoted string has
                raise RecipeError(
                    f"YAML tag {tag}",
                    at=f"{place}, line {_line(event)}",
                    fix="a recipe is plain data; remove the tag",
                )
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise too_large(f"lists and mappings nested deeper than {DEEPEST}", f"{place}, line {_line(event)}")
    except yaml.YAMLError as error:
        raise _no_yaml(error, place) from error
    return text


def check_size(value: Any, parts: Callable[[Any], Iterable[Any]], place: str) -> None:
    """Raises RecipeError where there are too many values below `value`, or they are nested too deep, as in a circle."""
    waiting, count = [(value, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        count += 1
        if count > MOST_VALUES:
            raise too_large(f"more than {MOST_VALUES:,} values, aliases counted as often as they are used", place)
        if depth > DEEPEST:
            raise too_large(f"lists and mappings nested deeper than {DEEPEST}, or in a circle", place)
        waiting += ((part, depth + 1) for part in parts(value))


def _parts(node: yaml.Node) -> Iterable[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def plain_parts(value: Any) -> Iterable[Any]:
    """What lies in a dict or list."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list | tuple) else ()


def too_large(what: str, place: str) -> RecipeError:
    """Says what of a recipe is more than any needs."""
    return RecipeError(f"no recipe: {what}", at=place, fix="give a recipe; `surgery recipes` lists some")


def _no_yaml(error: yaml.YAMLError, place: str) -> RecipeError:
    mark: yaml.Mark | None = getattr(error, "problem_mark", None)
    where = f"{place}, line {mark.line + 1}, column {mark.column + 1}" if mark else place
    return RecipeError(f"not plain YAML: {getattr(error, 'problem', None) or error}", at=where)


def _line(event: yaml.Event) -> int:
    return event.start_mark.line + 1 if event.start_mark else 0
