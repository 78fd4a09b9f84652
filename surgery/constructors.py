"""How to build a layer anew: the constructor arguments of a module, read from its attributes.

The one rule, for torch.nn and for plugins alike: a constructor argument is kept as the attribute of the same name. A
boolean argument may instead be answered by a parameter that is there or not (`bias=True` → `module.bias`). Arguments
whose names start with an underscore keep their defaults; `device` and `dtype` belong to the tensors.
"""

from __future__ import annotations

import inspect
import sys
import typing
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ExportError

_PLACEMENT = ("device", "dtype")
_SCALARS = (bool, int, float, str, type(None), torch.dtype)
_MISSING = object()


def constructor(module: nn.Module) -> dict[str, Any]:
    """Arguments by name that build a module of the same structure: plain values and tuples of them.

    Raises:
        ExportError: an argument is no attribute or no plain value, or the module built from them has other tensors.
    """
    cls = type(module)
    arguments = {p.name: _argument(module, p) for p in parameters(cls)}
    try:
        built = build(cls, arguments)
    except Exception as error:
        raise _unbuildable(cls, f"cannot be built from its attributes: {error}") from error
    if tensor_shapes(built) != tensor_shapes(module):
        raise _unbuildable(cls, f"has other tensors when built with {arguments}")
    for p in parameters(cls):
        if repr(_argument(built, p)) != repr(arguments[p.name]):
            raise _unbuildable(cls, f"built with {p.name}={arguments[p.name]!r} keeps another value")
    return arguments


def parameters(cls: type[nn.Module]) -> list[inspect.Parameter]:
    """The constructor's parameters that describe the layer; the first overload where it has several."""
    described = [p for p in _signature(cls).values() if p.name not in _PLACEMENT]
    for p in described:
        if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD, p.POSITIONAL_ONLY):
            raise _unbuildable(cls, f"takes the constructor argument {str(p)!r}, which names no attribute")
    return [p for p in described if not p.name.startswith("_") or p.default is p.empty]


def takes(cls: type[nn.Module], name: str) -> bool:
    """Whether the constructor has an argument `name`."""
    return name in _signature(cls)


def build(cls: type[nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    """A module without values: on the meta device, or on the CPU where its constructor needs real tensors, which none
    of torch.nn does.

    The random number generators stay as they are.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            with torch.device("meta"):
                return cls(**arguments)
        except (NotImplementedError, RuntimeError):
            if cls.__module__.startswith("torch."):
                raise
            with torch.device("cpu"):
                return cls(**arguments)


def builds_on_meta(module: nn.Module) -> bool:
    """Whether the module's class can be built without real tensors."""
    tensors = [*(built := build(type(module), constructor(module))).parameters(), *built.buffers()]
    return all(tensor.is_meta for tensor in tensors)


def shortest(module: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments a person would write: without defaults, and `3` for `(3, 3)`; they build the same module."""
    cls = type(module)
    required = {p.name for p in parameters(cls) if p.default is p.empty}
    chosen = {name: value for name, value in arguments.items() if name in required}
    for name in chosen:
        chosen[name] = _scalar(cls, arguments, chosen, name)
    while differing := _differing(cls, arguments, chosen):
        name = differing[0]
        if name in chosen:
            return dict(arguments)
        chosen[name] = arguments[name]
        chosen[name] = _scalar(cls, arguments, chosen, name)
    return {name: chosen[name] for name in arguments if name in chosen}


def leaf_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Layers by name, each under every name it has; plain containers and what lies inside a layer left out."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name and type(module) is not nn.Module and not any(parent in found for parent in enclosing(name)):
            found[name] = module
    return found


def enclosing(name: str) -> Iterator[str]:
    """Names of the modules that hold `name`, nearest first, the root left out."""
    while name := name.rpartition(".")[0]:
        yield name


def class_path(cls: type[nn.Module]) -> str:
    """`module:Class`.

    Raises:
        ExportError: the class cannot be imported by that path, as one defined inside a function.
    """
    path = f"{cls.__module__}:{cls.__qualname__}"
    if _resolve(sys.modules.get(cls.__module__), cls.__qualname__) is not cls:
        raise ExportError(
            f"the layer class {cls.__qualname__} cannot be imported from {cls.__module__}",
            fix="the plugin's author must define it at the top level of a module",
        )
    return path


def tensor_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter and buffer by name."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in named}


def _signature(cls: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """The constructor's parameters after `self`."""
    if cls.__init__ is nn.Module.__init__:
        return {}
    overloads = typing.get_overloads(cls.__init__)
    signature = inspect.signature(overloads[0] if overloads else cls.__init__)
    return dict([*signature.parameters.items()][1:])


def _argument(module: nn.Module, parameter: inspect.Parameter) -> Any:
    value = getattr(module, parameter.name, _MISSING)
    if value is _MISSING:
        raise _unbuildable(type(module), f"does not keep its constructor argument {parameter.name!r} as an attribute")
    boolean = isinstance(parameter.default, bool) or parameter.annotation in (bool, "bool")
    if boolean and (value is None or isinstance(value, Tensor)):
        return value is not None
    if not _plain(value):
        raise _unbuildable(type(module), f"keeps {parameter.name!r} as a {type(value).__name__}, not as a plain value")
    return _tuples(value)


def _plain(value: Any) -> bool:
    return isinstance(value, _SCALARS) or (isinstance(value, tuple | list) and all(map(_plain, value)))


def _tuples(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_tuples, value))
    return [_tuples(v) for v in value] if isinstance(value, list) else value


def _scalar(cls: type[nn.Module], target: Mapping[str, Any], chosen: Mapping[str, Any], name: str) -> Any:
    """`3` for `(3, 3)` where that gives the same attribute."""
    value = chosen[name]
    if not (isinstance(value, tuple) and value and all(v == value[0] for v in value)):
        return value
    return value[0] if name not in _differing(cls, target, {**chosen, name: value[0]}) else value


def _differing(cls: type[nn.Module], target: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[str]:
    """Arguments that come out other than in `target` when the module is built from `chosen`."""
    try:
        built = build(cls, chosen)
    except Exception:
        return [*chosen, *(set(target) - set(chosen))]
    return [p.name for p in parameters(cls) if repr(_argument(built, p)) != repr(target[p.name])]


def _resolve(module: Any, qualified: str) -> Any:
    for part in qualified.split("."):
        module = getattr(module, part, None)
    return module


def _unbuildable(cls: type[nn.Module], problem: str) -> ExportError:
    return ExportError(
        f"the layer class {cls.__qualname__} {problem}",
        at=f"{cls.__module__}.{cls.__qualname__}",
        fix="its author must keep each constructor argument as an attribute of the same name (number, string, tuple)",
    )
