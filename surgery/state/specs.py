"""Structures of nested arguments and outputs (pytree specs) as text, without running anything a file names."""

from __future__ import annotations

import json
import sys
from typing import Any

from torch.utils import _pytree as pytree
from torch.utils._pytree import TreeSpec

from ..errors import ExportError


def dumps(spec: TreeSpec) -> str:
    """`spec` as JSON text.

    Raises:
        ExportError: it holds a class that is not registered under a name, or dict keys other than strings and numbers.
    """
    for cls in _namedtuples(spec):
        _register(cls)
    try:
        text = pytree.treespec_dumps(spec)
        if loads(text) == spec:
            return text
        problem = "its dict keys are not kept by JSON"
    except (NotImplementedError, TypeError, ValueError) as error:
        problem = str(error)
    raise ExportError(
        f"the structure of the model's inputs or outputs cannot be stored: {problem}",
        fix="use tuples, lists, dicts with string keys, or a class registered with a serialized_type_name",
    )


def loads(text: str) -> TreeSpec:
    """The spec of `dumps`; named tuples are looked up among the modules that are imported already.

    Raises:
        ValueError: no spec, or a class that is not known here.
    """
    if "__enum__" in text:
        raise ValueError("a structure with enum keys is not accepted")
    try:
        _, schema = json.loads(text)
        for name in _namedtuple_names(schema):
            if (cls := _find(name)) is not None:
                _register(cls)
        return pytree.treespec_loads(text)
    except (NotImplementedError, TypeError, ValueError, KeyError, AttributeError, AssertionError) as error:
        raise ValueError(f"no structure, or one of a class that is not imported here: {error}") from error


def _namedtuples(spec: TreeSpec) -> list[type[Any]]:
    own = [spec.context] if pytree.is_namedtuple_class(spec.context) else []
    return own + [cls for child in spec.children() for cls in _namedtuples(child)]


def _namedtuple_names(schema: dict[str, Any]) -> list[str]:
    own = [str(schema["context"])] if schema["type"] == "collections.namedtuple" else []
    return own + [name for child in schema["children_spec"] for name in _namedtuple_names(child)]


def _register(cls: type[Any]) -> None:
    name = f"{cls.__module__}:{cls.__qualname__}"
    if _find(name) is cls and cls not in pytree.SUPPORTED_SERIALIZED_TYPES:
        pytree._register_namedtuple(cls, serialized_type_name=name)


def _find(name: str) -> type[Any] | None:
    module, _, qualified = name.partition(":")
    value: Any = sys.modules.get(module)
    for part in qualified.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, type) and pytree.is_namedtuple_class(value) else None
