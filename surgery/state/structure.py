"""How arguments and outputs are nested, as plain data that names no class.

    null                                 a leaf
    {"tuple": [part, …]}                 and {"list": …}
    {"dict": [[key, part], …]}           and {"ordered": …} for an OrderedDict
    {"named": [name, [[field, part], …]]}     a named tuple
    {"fields": [[key, part], …]}         any other class that torch's pytree knows
    {"parts": [part, …]}                 one whose parts have no names

What is built from a file has plain containers: a named tuple of its own, a dict for `fields`, a tuple for `parts`. The
user's classes come back from the user's model.
"""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..torch_private import TreeSpec, is_namedtuple_class, tree_structure
from .encoding import decode, encode

_DEEPEST = 32
_DICTS = {dict: "dict", OrderedDict: "ordered"}


def encode_structure(spec: TreeSpec) -> Any:
    """`spec` as JSON.

    Raises:
        TypeError: a dict key that is no plain value.
    """
    if spec.is_leaf():
        return None
    parts = [encode_structure(child) for child in spec.children()]
    if spec.type in (tuple, list):
        return {spec.type.__name__: parts}
    if is_namedtuple_class(spec.context):
        return {"named": [spec.context.__name__, _pairs(spec.context._fields, parts)]}
    keys = keys_of(spec)
    if keys is None:
        return {"parts": parts}
    return {_DICTS.get(spec.type, "fields"): _pairs(keys, parts)}


def keys_of(spec: TreeSpec) -> list[Any] | None:
    """Names of the parts: a dict's keys, the fields of a class registered with its field names."""
    context = spec.context
    if spec.type in (tuple, list):
        return None
    inner = context[0] if isinstance(context, tuple | list) and context else None
    second = context[1] if isinstance(context, tuple | list) and len(context) > 1 else None  # of a defaultdict
    for candidate in (context, inner, second):
        if not isinstance(candidate, list | tuple) or len(candidate) != spec.num_children:
            continue
        if issubclass(spec.type, dict) or all(isinstance(key, str) for key in candidate):
            return list(candidate)
    return None


def decode_structure(data: Any) -> TreeSpec:
    """The spec of plain containers.

    Raises:
        ValueError, TypeError: no structure.
    """
    return tree_structure(_plain(data, _DEEPEST))


def plain(spec: TreeSpec) -> TreeSpec:
    """`spec` with plain containers."""
    return decode_structure(encode_structure(spec))


def has_classes(data: Any) -> bool:
    """Whether a structure has a class of the user's anywhere."""
    if isinstance(data, dict) and data.keys() & {"named", "fields", "parts"}:
        return True
    return any(map(has_classes, data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()))


def _pairs(keys: Any, parts: list[Any]) -> list[Any]:
    return [[encode(key), part] for key, part in zip(keys, parts, strict=True)]


def _plain(data: Any, depth: int) -> Any:
    """The containers, with a 0 at every leaf."""
    if data is None:
        return 0
    if not isinstance(data, dict) or len(data) != 1 or not depth:
        raise ValueError("no structure of inputs or outputs, or one that is nested too deeply")
    ((kind, parts),) = data.items()
    if kind not in _MAKERS or not isinstance(parts, list):
        raise ValueError(f"{kind!r} is no kind of structure")
    return _MAKERS[kind](parts, lambda part: _plain(part, depth - 1))


def _named(parts: list[Any], plain: Callable[[Any], Any]) -> Any:
    name, pairs = parts
    return named_tuple(name, tuple(field for field, _ in pairs))(*(plain(part) for _, part in pairs))


@lru_cache(256)
def named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    """A class of its own; ValueError where a name is none."""
    return namedtuple(name, fields)


def _items(parts: list[Any], plain: Callable[[Any], Any]) -> list[tuple[Any, Any]]:
    return [(decode(key), plain(part)) for key, part in parts]


_MAKERS: dict[str, Callable[[list[Any], Callable[[Any], Any]], Any]] = {
    "tuple": lambda parts, plain: tuple(map(plain, parts)),
    "list": lambda parts, plain: [*map(plain, parts)],
    "dict": lambda parts, plain: dict(_items(parts, plain)),
    "ordered": lambda parts, plain: OrderedDict(_items(parts, plain)),
    "named": _named,
    "fields": lambda parts, plain: dict(_items(parts, plain)),
    "parts": lambda parts, plain: tuple(map(plain, parts)),
}
