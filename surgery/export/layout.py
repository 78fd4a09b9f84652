"""The module tree as a person would write it in `__init__`, and how each part of it is then reached.

Names that are identifiers become attributes (`self.layer1.conv`), others keys of a ModuleDict (`self.layers["0"]`).
Where a key would clash with a method of ModuleDict, the container is a plain Module with `get_submodule("0")`.
"""

from __future__ import annotations

import itertools
import keyword
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..constructors import constructor, enclosing, leaf_modules, shortest, takes
from ..torch_private import buffers_of, children_of, parameters_of, transient_of
from .literals import literal, quoted

# Layers up to which a container reads as one block.
BLOCK = 16


class Layout:
    """Containers, layers and loose tensors of a captured model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers = leaf_modules(model)
        self.containers = {
            name: module
            for name, module in model.named_modules(remove_duplicate=False)
            if name not in self.layers and not any(parent in self.layers for parent in enclosing(name))
        }
        self.keyed = {name for name, module in self.containers.items() if _needs_keys(module)}
        self.first_name = self._first_names()
        self.tied = {name: first for name, first in ties(model).items() if not self._is_shared(name)}
        self.sizes = dict.fromkeys(self.containers, 0)
        for layer in self.layers:
            for parent in enclosing(layer):
                self.sizes[parent] += 1

    def _first_names(self) -> dict[nn.Module, str]:
        """For each module the first name of it, or of an equal layer that has the very same tensors."""
        names = {module: name for name, module in self.model.named_modules()}
        equal: dict[tuple[Any, ...], str] = {}
        for layer in self.layers.values():
            tensors = tuple((key, id(t)) for key, t in (*layer.named_parameters(), *layer.named_buffers()))
            if tensors:
                names[layer] = equal.setdefault((type(layer), repr(constructor(layer)), tensors), names[layer])
        return names

    def _is_shared(self, tensor: str) -> bool:
        """Whether `tensor` belongs to a layer that is written as another name of an earlier one."""
        home = next((name for name in enclosing(tensor) if name in self.layers), "")
        return bool(home) and self.first_name[self.layers[home]] != home

    @property
    def base_class(self) -> str:
        return "nn.ModuleDict" if "" in self.keyed else "nn.Module"

    def block(self, path: str) -> str:
        """The container around `path` that reads as one block: an element of a list, or small; "" at the top level."""
        around = [name for name in (*reversed([*enclosing(path)]), path) if name in self.containers and name]
        for name, inner in itertools.pairwise(around):
            in_list = inner.rpartition(".")[2].isdigit() and _is_list(self.containers[name])
            if self.sizes[name] <= BLOCK and not in_list:
                return name
        return around[-1] if around else ""

    def text(self, path: str, base: str = "", base_text: str = "self") -> str:
        """The expression for the module or tensor at `path`, seen from the container `base`."""
        name, text = base, base_text
        rest = path[len(base) :].removeprefix(".")
        for part in rest.split(".") if rest else []:
            is_module = name in self.containers and part in children_of(self.containers[name])
            if is_module and name in self.keyed:
                text = f"{text}[{quoted(part)}]"
            elif plain_name(part):
                text = f"{text}.{part}"
            else:
                text = f"{text}.get_submodule({quoted(part)})" if is_module else f"getattr({text}, {quoted(part)})"
            name = f"{name}.{part}" if name else part
        return text

    def lines(self) -> Iterator[str]:
        """The logical lines of `__init__` after `super().__init__()`, without indentation."""
        yield from self._container("", "", "self", self._frozen(""))
        if self.tied:
            yield ""
            yield "self.tie_weights()"

    def _frozen(self, name: str) -> bool:
        parameters = list(self.model.get_submodule(name).parameters())
        return bool(parameters) and not any(p.requires_grad for p in parameters)

    def _container(self, name: str, base: str, base_text: str, frozen: bool) -> Iterator[str]:
        """Content of the container `name`; `frozen` where all its parameters are, so that one line says it."""
        text = self.text(name, base, base_text)
        yield from _tensor_lines(self.containers[name], text, frozen)
        below_block = False
        for key, child in children_of(self.containers[name]).items():
            path = f"{name}.{key}" if name else key
            is_block = not name and path in self.containers
            if is_block or below_block:
                yield ""
            if is_block:
                yield f"# {key}"
            assert child is not None
            yield from self._child(path, child, base, base_text, frozen)
            below_block = is_block
        if frozen and not (name and self._frozen(name.rpartition(".")[0])):
            yield f"{text}.requires_grad_(False)"

    def _child(self, path: str, child: nn.Module, base: str, base_text: str, frozen: bool) -> Iterator[str]:
        first = self.first_name[child]
        if first != path:
            yield self._assign(path, self.text(first), base, base_text)
        elif path in self.layers:
            yield self._assign(path, layer_text(child), base, base_text)
            yield from [] if frozen else _freeze_lines(child, self.text(path, base, base_text))
        else:
            made = "nn.ModuleDict()" if path in self.keyed else "nn.Module()"
            alias = not base and "." in path and self.block(path) == path
            yield self._assign(path, f"block = {made}" if alias else made, base, base_text)
            inner = (path, "block") if alias else (base, base_text)
            yield from self._container(path, *inner, frozen or self._frozen(path))

    def _assign(self, path: str, value: str, base: str, base_text: str) -> str:
        parent, _, key = path.rpartition(".")
        if parent in self.keyed or plain_name(key):
            return f"{self.text(path, base, base_text)} = {value}"
        name, _, made = value.rpartition(" = ")
        call = f"{self.text(parent, base, base_text)}.add_module({quoted(key)}, {made})"
        return f"{call}\n{name} = {self.text(path, base, base_text)}" if name else call


def plain_name(text: str) -> bool:
    """Whether `text` can be written as an attribute."""
    return text.isidentifier() and not keyword.iskeyword(text)


def ties(model: nn.Module) -> dict[str, str]:
    """Every further name of a shared parameter or buffer, and its first name; whole modules shared do not count."""
    first: dict[int, str] = {}
    further: dict[str, str] = {}
    for owner, module in model.named_modules():
        for key, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
            name = f"{owner}.{key}" if owner else key
            if tensor is not None and first.setdefault(id(tensor), name) != name:
                further[name] = first[id(tensor)]
    return further


def layer_text(layer: nn.Module) -> str:
    """`nn.Conv2d(3, 64, 7, stride=2)`."""
    cls = type(layer)
    arguments = shortest(layer, constructor(layer))
    dtype = next((t.dtype for t in layer.parameters() if t.is_floating_point()), torch.float32)
    if dtype is not torch.float32 and takes(cls, "dtype"):
        arguments["dtype"] = dtype
    required = required_names(cls)
    texts = [literal(v) if k in required else f"{k}={literal(v)}" for k, v in arguments.items()]
    return f"{class_text(cls)}({', '.join(texts)})"


def required_names(cls: type[nn.Module]) -> set[str]:
    from ..constructors import parameters

    return {p.name for p in parameters(cls) if p.default is p.empty and p.kind is not p.KEYWORD_ONLY}


def class_text(cls: type[nn.Module]) -> str:
    """`nn.Conv2d`, the longer path of a class that torch.nn does not offer, or the bare name of an embedded class."""
    if getattr(nn, cls.__name__, None) is cls:
        return f"nn.{cls.__name__}"
    if cls.__module__.startswith("torch.nn."):
        return f"{cls.__module__.removeprefix('torch.')}.{cls.__qualname__}"
    return cls.__name__


def _needs_keys(module: nn.Module) -> bool:
    """Whether the container must be a ModuleDict, and can be one."""
    names = [*children_of(module), *parameters_of(module), *buffers_of(module)]
    odd = any(not plain_name(name) for name in children_of(module))
    return odd and not any(hasattr(nn.ModuleDict, name) for name in names)


def _is_list(container: nn.Module) -> bool:
    """Whether it holds a series of containers named by numbers."""
    numbered = [key for key, child in children_of(container).items() if key.isdigit() and type(child) is nn.Module]
    return len(numbered) > 1


def _tensor_lines(container: nn.Module, text: str, frozen: bool) -> Iterator[str]:
    for key, parameter in parameters_of(container).items():
        if parameter is not None:
            free = parameter.requires_grad or (frozen and parameter.is_floating_point())
            value = f"nn.Parameter({_zeros(parameter)}{'' if free else ', requires_grad=False'})"
            odd = f"{text}.register_parameter({quoted(key)}, {value})"
            yield f"{text}.{key} = {value}" if plain_name(key) else odd
    for key, buffer in buffers_of(container).items():
        if buffer is not None:
            option = ", persistent=False" if key in transient_of(container) else ""
            yield f"{text}.register_buffer({quoted(key)}, {_zeros(buffer)}{option})"


def _zeros(tensor: Tensor) -> str:
    size: Any = ", ".join(map(str, tensor.shape)) if tensor.ndim else "()"
    dtype = "" if tensor.dtype is torch.float32 else f", dtype={tensor.dtype}"
    return f"torch.zeros({size}{dtype})"


def _freeze_lines(layer: nn.Module, text: str) -> Iterator[str]:
    named = dict(layer.named_parameters())
    frozen = [name for name, parameter in named.items() if not parameter.requires_grad]
    if frozen and len(frozen) == len(named):
        yield f"{text}.requires_grad_(False)"
    else:
        yield from (f"{text}.{name}.requires_grad_(False)" for name in frozen)
