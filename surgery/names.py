"""Modules, parameters and buffers by their dotted names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .torch_private import children_of


def get_attribute(model: nn.Module, name: str) -> Any:
    """The module, parameter or buffer at the dotted `name`."""
    value: Any = model
    for part in name.split("."):
        value = getattr(value, part)
    return value


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, or None."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Register `module` at the dotted `name`, making containers on the way."""
    *path, leaf = name.split(".")
    parent = model
    for part in path:
        if part not in children_of(parent):
            parent.add_module(part, nn.Module())
        child = children_of(parent)[part]
        assert child is not None
        parent = child
    parent.add_module(leaf, module)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, shared ones under each name, non-persistent buffers included."""
    named: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return dict(named)


def bytes_of(tensor: Tensor) -> memoryview:
    """The values as they stand in memory, row by row."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return flat.numpy().data
