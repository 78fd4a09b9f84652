"""Units and groups: from classes of positions to what can be removed, and what it costs.

A unit is a class of positions with output channels of at least one layer in it, none of which has to stay. Units that
are output channels of the same layers form a group: they are alternatives, and a share of them can go.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from .call import Facts, Side
from .positions import Slot

Role = Literal["output", "input", "other"]


@dataclass(frozen=True)
class Member:
    """Positions along a dimension of a parameter that belong to a group."""

    slot: Slot
    role: Role
    """Output channels of a layer, its input channels, or other (normalisation, bias, a parameter in the graph)."""
    layer: str
    """The layer that gives or takes the channels; the name of the tensor for other roles."""
    positions: Tensor
    """(n,) along the dimension, ascending."""
    units: Tensor
    """(n,) unit of the group that each position belongs to."""


@dataclass(frozen=True)
class Group:
    """Units of which a share can go. `name`: the first layer whose output channels they are."""

    name: str
    units: Tensor
    """(size,) their numbers, ascending."""
    members: tuple[Member, ...]

    @property
    def size(self) -> int:
        return len(self.units)

    def of(self, role: Role) -> list[Member]:
        return [member for member in self.members if member.role == role]


@dataclass(frozen=True)
class Frozen:
    """Output channels of a layer that stay, and why."""

    layer: str
    channels: int
    why: str


class Units:
    """Every unit by number, with the positions that belong to it."""

    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.classes, self._reasons = facts.positions.solve()
        produced = torch.zeros(facts.positions.count, dtype=torch.bool)
        for side in facts.outputs.values():
            produced[self.classes[side.ids]] = True
        free = produced[self.classes] & (self._reasons < 0)
        known, numbers = self.classes[free].unique(return_inverse=True)
        self.count = len(known)
        self.of_position = torch.full((facts.positions.count,), -1)
        """(positions,) the unit it belongs to, -1 = it stays."""
        self.of_position[free] = numbers

    @cached_property
    def group_of(self) -> Tensor:
        """(units,) number of each unit's group, in the order of the layers: equal for units of the same outputs."""
        generator = torch.Generator().manual_seed(0)
        signature = torch.zeros(self.count, dtype=torch.long)
        for side in self.facts.outputs.values():
            units = self.of_position[side.ids]
            token = torch.randint(1, 2**62, (1,), generator=generator)  # sums of tokens differ where the sets differ
            signature.index_add_(0, units[units >= 0], token.expand(int((units >= 0).sum())))
        _, kinds = signature.unique(return_inverse=True)
        first = torch.full((int(kinds.max()) + 1 if self.count else 0,), self.count)
        first.scatter_reduce_(0, kinds, torch.arange(self.count), "amin")
        rank = torch.empty_like(first)
        rank[first.argsort()] = torch.arange(len(first))
        return rank[kinds]

    def groups(self) -> tuple[Group, ...]:
        group_of = self.group_of
        order = torch.argsort(group_of, stable=True)
        counts = torch.bincount(group_of) if self.count else torch.empty(0, dtype=torch.long)
        parts = order.split(counts.tolist())
        place = torch.empty_like(order)
        for part in parts:
            place[part] = torch.arange(len(part))
        members: list[list[Member]] = [[] for _ in parts]
        for group, member in self._members(group_of, place):
            members[group].append(member)
        return tuple(
            Group(next(m.layer for m in own if m.role == "output"), part, tuple(own))
            for part, own in zip(parts, members, strict=True)
        )

    def _members(self, group_of: Tensor, place: Tensor) -> Iterator[tuple[int, Member]]:
        facts = self.facts
        for slot in facts.positions.slots.values():
            units = self.of_position[slot.first : slot.first + slot.size]
            positions = torch.nonzero(units >= 0).reshape(-1)
            if not len(positions):
                continue
            role, layer = _role(facts, slot)
            units = units[positions]
            groups: Tensor = group_of[units]
            alone = bool((groups == groups[0]).all())
            for group in groups[:1].tolist() if alone else groups.unique().tolist():
                own = groups == group
                yield group, Member(slot, role, layer, positions[own], place[units[own]])

    def frozen(self) -> tuple[Frozen, ...]:
        """Output channels that stay, by layer and reason."""
        found = []
        for side in self.facts.outputs.values():
            reasons = self._reasons[side.ids]
            indices, counts = reasons[reasons >= 0].unique(return_counts=True)
            for index, count in zip(indices.tolist(), counts.tolist(), strict=True):
                found.append(Frozen(side.layer, count, self.facts.positions.frozen[index][1]))
        return tuple(found)


def _role(facts: Facts, slot: Slot) -> tuple[Role, str]:
    roles: tuple[tuple[Role, dict[int, Side]], ...] = (("output", facts.outputs), ("input", facts.inputs))
    for role, sides in roles:
        if slot.first in sides:
            return role, sides[slot.first].layer
    return "other", slot.tensor
