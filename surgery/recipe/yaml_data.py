"""YAML as plain data: no tags, no duplicate keys."""

from __future__ import annotations

from collections.abc import Hashable
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
