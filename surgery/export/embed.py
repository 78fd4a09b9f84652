"""The source of a plugin's layer class, with what it uses from its own module."""

from __future__ import annotations

import ast
import builtins
import inspect
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, nn

from ..errors import ExportError
from .literals import literal

_KNOWN: dict[str, Any] = {
    "torch": torch,
    "nn": nn,
    "F": torch.nn.functional,
    "math": sys.modules.get("math"),
    "Tensor": Tensor,
}


_TAKEN = ("Model", "load", "build", "load_file", "Path", "INPUTS", "check_inputs", "number_kind", "Any")


@dataclass
class _Embedded:
    """Definitions in the order in which they must stand."""

    definitions: list[str] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_TAKEN))


def embed(classes: Iterable[type[nn.Module]]) -> list[str]:
    """The source of `classes` and of what they use from their modules: functions, classes, plain constants; in order.

    Raises:
        ExportError: a class without source, or one that uses more than torch, nn, F, math, Tensor and its module.
    """
    result = _Embedded()
    for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.__qualname__)):
        _add(result, cls.__name__, cls, cls)
    return result.definitions


def _add(result: _Embedded, name: str, value: Any, cls: type[nn.Module]) -> None:
    if name in result.names:
        if result.names[name] is not value:
            raise _not_alone(cls, f"shares the name {name} with another definition")
        return
    result.names[name] = value
    if not isinstance(value, type | FunctionType):
        result.definitions.append(f"{name} = {literal(value)}")
        return
    try:
        text = textwrap.dedent(inspect.getsource(value)).rstrip()
    except (OSError, TypeError) as error:
        raise _not_alone(cls, f"has no source ({error})") from error
    scope = vars(sys.modules[value.__module__])
    for used in _free_names(ast.parse(text)):
        if used == value.__name__ or (used in _KNOWN and scope.get(used) is _KNOWN[used]):
            continue
        if used in scope and _own(scope[used], value.__module__):
            _add(result, used, scope[used], cls)
        elif not hasattr(builtins, used):
            raise _not_alone(cls, f"uses {used!r}")
    result.definitions.append(text)


def _own(value: Any, module: str) -> bool:
    """Whether `value` is defined in `module`, or a plain constant."""
    if isinstance(value, type | FunctionType):
        return value.__module__ == module and value.__name__ == value.__qualname__
    return isinstance(value, int | float | str | bool | None) or (
        isinstance(value, tuple | list) and all(isinstance(v, int | float | str | None) for v in value)
    )


def _free_names(tree: ast.AST) -> list[str]:
    """Names that are read but not bound anywhere in `tree`, in order; annotations do not count."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    return list(dict.fromkeys(node.id for node in names if isinstance(node.ctx, ast.Load) and node.id not in bound))


def _not_alone(cls: type[nn.Module], problem: str) -> ExportError:
    return ExportError(
        f"the layer class {cls.__qualname__} cannot be written into a standalone file: it {problem}",
        at=f"{cls.__module__}.{cls.__qualname__}",
        fix="its author must use only torch, nn, F, math, Tensor and functions of the module it is defined in",
    )
