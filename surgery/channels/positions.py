"""Positions along dimensions as numbers, and which of them live or die together.

Every position along a dimension of a parameter has a number; so has every position that an operator adds (padding).
Number 0 stands for a position that always stays. `unite` and `freeze` collect facts while the graph is walked, `solve`
turns them into classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """A dimension of a parameter or buffer, whose positions have the numbers `first` … `first + size - 1`."""

    tensor: str
    """Name in the model; the first one of a tied parameter."""
    dim: int
    size: int
    first: int


class Positions:
    """Hands out numbers and gathers what is known about them."""

    def __init__(self, names: dict[int, str]) -> None:
        """`names` of the model's tensors by their `id`."""
        self._names = names
        self.count = 1
        self.slots: dict[tuple[int, int], Slot] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self.frozen: list[tuple[Tensor, str]] = []

    def fresh(self, size: int) -> Tensor:
        """Numbers of `size` new positions."""
        self.count += size
        return torch.arange(self.count - size, self.count)

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Numbers of the positions along `dim` of a parameter or buffer: the same at every call."""
        key = id(tensor), dim
        slot = self.slots.get(key)
        if slot is None:
            size = tensor.shape[dim]
            slot = self.slots[key] = Slot(self._names[id(tensor)], dim, size, self.count)
            self.count += size
        return torch.arange(slot.first, slot.first + slot.size)

    def unite(self, first: Tensor, second: Tensor) -> None:
        """Equal places of both live or die together; both (n,)."""
        assert first.shape == second.shape, (first.shape, second.shape)
        self._pairs.append((first, second))

    def freeze(self, ids: Tensor, why: str) -> None:
        """These positions stay."""
        self.frozen.append((ids, why))

    def solve(self) -> tuple[Tensor, Tensor]:
        """The class of every position (count,), numbered by its smallest position; and per position the index in
        `frozen` of the first reason why its class stays, -1 = it may go."""
        self.freeze(torch.zeros(1, dtype=torch.long), "joined to a position that always stays")
        classes = components(self.count, *(_flat(self._pairs, side) for side in (0, 1)))
        reasons = torch.full((self.count,), -1)
        for index in reversed(range(len(self.frozen))):
            reasons[classes[self.frozen[index][0].reshape(-1)]] = index
        return classes, reasons[classes]


def _flat(pairs: list[tuple[Tensor, Tensor]], side: int) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.long), *(pair[side].reshape(-1) for pair in pairs)])


def components(count: int, first: Tensor, second: Tensor) -> Tensor:
    """Smallest member of each number's connected component. Hooking and pointer jumping: O(log count) rounds."""
    root = torch.arange(count)
    while True:
        a, b = root[first], root[second]
        open_ = a != b
        if not bool(open_.any()):
            return root
        first, second, a, b = first[open_], second[open_], a[open_], b[open_]
        root.scatter_reduce_(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(jumped := root[root], root):
            root = jumped
