"""What a file may name: operators that compute and layer classes, of torch and of plugins. Nothing is imported for it.

Operators: those of `aten`, `prims`, `quantized_decomposed` and `torchvision` that PyTorch's dispatcher runs, that give
something and write neither to their arguments nor to files; plain arithmetic; and those that a plugin describes to
`surgery_channel_rules`. Layers: the classes of `torch.nn`, and those that a plugin describes there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from ..constructors import class_path, leaf_modules
from ..torch_private import OpOverload, OpOverloadPacket, has_kernel, register_decomposed, schema_of
from .encoding import python_function

if TYPE_CHECKING:
    from ..registry import Registry

_NAMESPACES = ("aten", "prims", "quantized_decomposed", "torchvision")
_REMEDY = "its plugin has to be installed and offer it by the hook surgery_channel_rules"


class Known:
    """Operators and layer classes by the names that files give them."""

    def __init__(self, registry: Registry | None = None, model: fx.GraphModule | None = None) -> None:
        """Those of `registry`, by default of all installed plugins, and those that `model`, which is at hand, has."""
        self._registry, self._model = registry, [] if model is None else [*_described_by(model)]

    def operator(self, text: str) -> Callable[..., Any]:
        """The function that `encode_target` named; ValueError where it is none that a file may call."""
        function = python_function(text) or _of_torch(text) or self._described.get(text)
        if not callable(function):
            raise ValueError(f"{text!r} is no operator that a file may call: {_REMEDY}")
        return function

    def layer(self, path: str) -> type[nn.Module]:
        """The class at `module:Class`; ValueError where it is none that a file may name."""
        cls = _of_torch_nn(path) or self._described.get(path)
        if not isinstance(cls, type):
            raise ValueError(f"{path!r} is no layer class that a file may name: {_REMEDY}")
        return cls

    @cached_property
    def _described(self) -> dict[str, Any]:
        """What plugins describe, and what the model at hand has."""
        from ..registry import Registry

        return dict(_named([*(self._registry or Registry.load()).channel_rules, *self._model]))


def _described_by(model: fx.GraphModule) -> Iterable[Any]:
    yield from (node.target for node in model.graph.nodes if node.op == "call_function")
    yield from map(type, leaf_modules(model).values())


def _named(found: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    for thing in found:
        if isinstance(thing, OpOverloadPacket):
            yield from ((str(overload), overload) for overload in (getattr(thing, name) for name in thing.overloads()))
        elif isinstance(thing, type) and issubclass(thing, nn.Module):
            yield f"{thing.__module__}:{thing.__qualname__}", thing
        else:
            yield str(thing), thing


def _of_torch_nn(path: str) -> type[nn.Module] | None:
    module, _, name = path.partition(":")
    known = module.startswith("torch.nn.modules.") and module in sys.modules
    cls = vars(sys.modules[module]).get(name) if known else None
    return cls if isinstance(cls, type) and issubclass(cls, nn.Module) and class_path(cls) == path else None


def _of_torch(text: str) -> Callable[..., Any] | None:
    namespace, name, overload = text.split(".") if text.count(".") == 2 else ("", "", "")
    if namespace not in _NAMESPACES or name.startswith("_op") or not (name.isidentifier() and overload.isidentifier()):
        return None
    if namespace == "quantized_decomposed":
        register_decomposed()
    function = getattr(getattr(getattr(torch.ops, namespace), name, None), overload, None)
    return function if isinstance(function, OpOverload) and _computes(function) else None


def _computes(function: OpOverload) -> bool:
    """Whether calling it does nothing but give a result."""
    schema = schema_of(function)
    writes = schema.is_mutable or any(argument.name == "filename" for argument in schema.arguments)
    return bool(schema.returns) and not writes and has_kernel(function)
