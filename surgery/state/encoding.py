"""fx arguments and targets as tagged JSON, strictly in both directions.

    None, bool, int, str, finite floats and lists    themselves
    everything else                                   an object with one key: {"node": "conv1"}, {"tuple": [1, 2]},
                                                      {"dtype": "float32"}, {"slice": [0, null, 2]}, {"float": "inf"} …

A decoded target is an operator that computes: an aten (or other loaded) overload that neither writes to its arguments
nor opens files, plain Python arithmetic, or one of torch's operations on sizes. Nothing else can be named.
"""

from __future__ import annotations

import importlib
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

_OPERATORS = {
    *("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "pow", "abs", "lshift", "rshift"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_"),
}
_LIBRARIES = {"quantized_decomposed": "torch.ao.quantization.fx._decomposed"}
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


def decode(data: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    """The value `encode` was given; nodes are looked up by name among `nodes`.

    Raises:
        ValueError: not the JSON of a value, or a node that does not come earlier.
    """
    if data is None or isinstance(data, bool | int | str | float):
        return data
    if isinstance(data, list):
        return [decode(v, nodes) for v in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise ValueError(f"{data!r} is no stored value")
    ((tag, content),) = data.items()
    if tag == "node":
        if not nodes or content not in nodes:
            raise ValueError(f"node {content!r} is used before it is computed")
        return nodes[content]
    if tag in ("tuple", "dict", "slice"):
        return _container(tag, decode(content, nodes))
    return _plain(tag, content)


def encode_target(target: Any) -> str:
    """The name of a function in a graph, such as `aten.conv2d.default`, `operator.getitem`, `torch.sym_max`.

    Raises:
        TypeError: a function that is none of an operator overload, Python arithmetic, or an operation on sizes.
    """
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    name = str(getattr(target, "__name__", ""))
    for prefix in ("operator", "math", "torch"):
        if _python_function(prefix, name) is target:
            return f"{prefix}.{name}"
    raise TypeError(f"cannot store a call of {target!r}")


def decode_target(text: str) -> Callable[..., Any]:
    """The function `encode_target` named.

    Raises:
        ValueError: there is no such function, or it writes to its arguments or to files.
    """
    namespace, _, rest = text.partition(".")
    if rest and (function := _python_function(namespace, rest)) is not None:
        return function
    return _overload(namespace, *rest.split("."))


def _python_function(prefix: str, name: str) -> Callable[..., Any] | None:
    if prefix == "operator" and name in _OPERATORS:
        return getattr(operator, name)  # type: ignore[no-any-return]
    if prefix == "torch" and name.startswith("sym_") and callable(getattr(torch, name, None)):
        return getattr(torch, name)  # type: ignore[no-any-return]
    function = getattr(math, name, None) if prefix == "math" else None
    return function if callable(function) and not name.startswith("_") else None


def _overload(namespace: str, name: str = "", overload: str = "", *rest: str) -> torch._ops.OpOverload:
    text = ".".join((namespace, name, overload, *rest))
    if namespace in _LIBRARIES:
        importlib.import_module(_LIBRARIES[namespace])
    if rest or not all(part.isidentifier() for part in (namespace, name, overload)):
        raise ValueError(f"{text!r} is no operator")
    function = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    if not isinstance(function, torch._ops.OpOverload):
        raise ValueError(f"operator {text!r} is not known to torch {torch.__version__}")
    if function._schema.is_mutable or any(argument.name == "filename" for argument in function._schema.arguments):
        raise ValueError(f"operator {text!r} writes to its arguments or to files")
    return function


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
        value = getattr(torch, content, None)
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
