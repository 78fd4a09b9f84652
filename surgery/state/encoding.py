"""fx arguments and targets as tagged JSON, strictly in both directions.

    None, bool, int, str, finite floats and lists    themselves
    everything else                                   an object with one key: {"node": "conv1"}, {"tuple": [1, 2]},
                                                      {"dtype": "float32"}, {"slice": [0, null, 2]}, {"float": "inf"} …

What a file may call is in `allowed`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ..torch_private import OpOverload

_OPERATORS = {
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "pow", "abs", "lshift", "rshift"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_"),
}
_SIZES = {name for name in vars(torch) if name.startswith("sym_") and callable(vars(torch)[name])}
_DEEPEST = 32
_TORCH_TYPES: dict[str, type] = {
    "dtype": torch.dtype,
    "layout": torch.layout,
    "memory_format": torch.memory_format,
}


def encode(value: Any) -> Any:
    """`value` as JSON.

    Raises:
        TypeError: a kind of value that a captured graph does not hold.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": repr(value)}
    if isinstance(value, list):
        return [encode(v) for v in value]
    for tag, writer in _ENCODERS.items():
        if isinstance(value, writer[0]):
            return {tag: writer[1](value)}
    raise TypeError(f"cannot store a {type(value).__name__}: {value!r}")


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None, depth: int = _DEEPEST) -> Any:
    """The value `encode` was given; nodes are looked up by name among `nodes`.

    Raises:
        ValueError: not the JSON of a value, or a node that does not come earlier.
    """
    if data is None or isinstance(data, bool | int | str | float):
        return data
    if not depth:
        raise ValueError("a value is nested too deeply")
    if isinstance(data, list):
        return [decode(v, nodes, depth - 1) for v in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"{data!r} is no stored value")
    ((tag, content),) = data.items()
    if tag == "node":
        if not nodes or content not in nodes:
            raise ValueError(f"node {content!r} is used before it is computed")
        return nodes[content]
    if tag in ("tuple", "dict", "slice"):
        return _container(tag, decode(content, nodes, depth - 1))
    return _plain(tag, content)


def encode_target(target: Any) -> str:
    """The name of a function in a graph, such as `aten.conv2d.default`, `operator.getitem`, `torch.sym_max`.

    Raises:
        TypeError: a function that is none of an operator overload, Python arithmetic, or an operation on sizes.
    """
    if isinstance(target, OpOverload):
        return str(target)
    name = str(getattr(target, "__name__", ""))
    for prefix in ("operator", "math", "torch"):
        if python_function(f"{prefix}.{name}") is target:
            return f"{prefix}.{name}"
    raise TypeError(f"cannot store a call of {target!r}")


def python_function(text: str) -> Callable[..., Any] | None:
    """The function `text` names, if it is arithmetic of Python or one of torch's operations on sizes."""
    prefix, _, name = text.partition(".")
    if prefix == "operator" and name in _OPERATORS:
        return getattr(operator, name)  # type: ignore[no-any-return]
    if prefix == "torch" and name in _SIZES:
        return getattr(torch, name)  # type: ignore[no-any-return]
    function = vars(math).get(name) if prefix == "math" else None
    return function if callable(function) and not name.startswith("_") else None


def _encode_complex(value: complex) -> list[Any]:
    return [encode(value.real), encode(value.imag)]


_ENCODERS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "node": (fx.Node, lambda v: v.name),
    "tuple": (tuple, lambda v: [encode(x) for x in v]),
    "dict": (dict, lambda v: [[encode(k), encode(x)] for k, x in v.items()]),
    "slice": (slice, lambda v: [encode(v.start), encode(v.stop), encode(v.step)]),
    "complex": (complex, _encode_complex),
    "device": (torch.device, str),
    "ellipsis": (type(...), lambda v: True),
    **{tag: (kind, lambda v: str(v).removeprefix("torch.")) for tag, kind in _TORCH_TYPES.items()},
}


def _container(tag: str, content: Any) -> Any:
    if not isinstance(content, list):
        raise ValueError(f"{content!r} is no {tag}")
    if tag == "tuple":
        return tuple(content)
    return slice(*content) if tag == "slice" else dict(content)


def _plain(tag: str, content: Any) -> Any:
    if tag in _TORCH_TYPES and isinstance(content, str):
        value = vars(torch).get(content)  # getattr would import what torch loads lazily
        if isinstance(value, _TORCH_TYPES[tag]):
            return value
    if tag == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if tag == "complex" and isinstance(content, list):
        return complex(*map(decode, content))
    if tag == "device" and isinstance(content, str):
        try:
            return torch.device(content)
        except RuntimeError as error:
            raise ValueError(f"{content!r} is no device") from error
    if tag == "ellipsis" and content is True:
        return ...
    raise ValueError(f"{{{tag!r}: {content!r}}} is no stored value")
