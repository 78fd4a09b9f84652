"""What is known about a tensor of the graph: its shape, and the numbers of the positions along each dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..torch_private import tree_map_only


@dataclass(frozen=True)
class Axis:
    """A dimension whose positions may be removed."""

    ids: Tensor
    """(size,) numbers of the positions; 0 = stays."""
    zero: bool = True
    """The values at removed positions would be zero if the parameters that belong to them were: then a sum over the
    dimension does not change when they go."""

    @property
    def size(self) -> int:
        return len(self.ids)


Axes = tuple[Axis | None, ...]


@dataclass(frozen=True)
class Value:
    """A tensor on paper. A dimension without an axis keeps its size."""

    shape: tuple[int, ...]
    axes: Axes
    dtype: torch.dtype = torch.float32

    @classmethod
    def rigid(cls, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Value:
        return cls(shape, (None,) * len(shape), dtype)

    def axis(self, dim: int) -> Axis | None:
        """By dimension, also counted from the end; None where there is no such dimension."""
        return self.axes[dim] if -len(self.axes) <= dim < len(self.axes) else None

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def index(self, dim: int) -> Tensor:
        """The numbers along `dim`, broadcast over the whole shape without taking memory."""
        axis = self.axes[dim]
        assert axis is not None
        return axis.ids.view(-1, *[1] * (self.ndim - dim - 1)).expand(self.shape)


def values_in(tree: Any) -> list[Value]:
    """Every `Value` in nested lists, tuples and dicts."""
    found: list[Value] = []

    def note(value: Value) -> Value:
        found.append(value)
        return value

    tree_map_only(Value, note, tree)
    return found
