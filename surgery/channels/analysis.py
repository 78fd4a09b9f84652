"""The channels of a model: groups of units that can go, what they cost, and their removal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..captured import CapturedModel
from ..changes import note_reach
from ..graph import layers
from ..names import get_attribute, tensors
from .call import Side
from .carriers import Carrier, carriers
from .groups import Frozen, Group, Member, Units
from .removal import remove
from .rules import RULES, ChannelRule
from .values import Value, values_in
from .walk import Walk


def find_channels(
    model: CapturedModel, rules: Mapping[Any, ChannelRule] | None = None, *, heads: bool = False
) -> Channels:
    """Which channels of `model` live or die together.

    `rules` add to the built-in ones, by operator or class of module. With `heads`, attention loses whole heads
    instead of the same features of every head.
    """
    walk = Walk(model, {**RULES, **(rules or {})}, heads).run()
    return Channels(model, walk, Units(walk.facts))


@dataclass
class Channels:
    """What `find_channels` found out about `model`; holds for as long as the model is not edited."""

    model: CapturedModel
    walk: Walk
    units: Units

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """In the order of the layers."""
        return self.units.groups()

    @cached_property
    def frozen(self) -> tuple[Frozen, ...]:
        """Output channels that have to stay, by layer, and why."""
        return self.units.frozen()

    @property
    def outputs(self) -> list[Side]:
        """Output channels of every layer."""
        return list(self.walk.facts.outputs.values())

    @property
    def inputs(self) -> list[Side]:
        """Input channels of every layer."""
        return list(self.walk.facts.inputs.values())

    @cached_property
    def carriers(self) -> tuple[tuple[Carrier, ...], ...]:
        """Per group the values that layers read its units from. See `surgery.channels.carriers`."""
        return carriers(self.walk, self.units, self.groups)

    def alive(self, removed: Sequence[Tensor]) -> Tensor:
        """(positions,) which positions stay when in each group the units marked in `removed` (size,) go."""
        dead = torch.zeros(self.units.count + 1, dtype=torch.bool)  # the last one is for positions of no unit
        for group, marks in zip(self.groups, removed, strict=True):
            dead[group.units] = marks
        return ~dead[self.units.of_position]

    def kept(self, removed: Sequence[Tensor]) -> dict[str, dict[int, Tensor]]:
        """By name of a node and dimension of its result, counted from the end, that loses channels: the places that
        are left there."""
        alive = self.alive(removed)
        found: dict[str, dict[int, Tensor]] = {}
        for node, value in self.walk.values.items():
            if isinstance(value, Value):
                for dim, axis in enumerate(value.axes):
                    if axis is not None and not bool(alive[axis.ids].all()):
                        left = torch.nonzero(alive[axis.ids]).reshape(-1)
                        found.setdefault(node.name, {})[dim - len(value.axes)] = left
        return found

    @cached_property
    def cost(self) -> Cost:
        return Cost(self.walk)

    def tensor(self, member: Member) -> Tensor:
        """The parameter or buffer that `member` is about."""
        found: Tensor = get_attribute(self.model, member.slot.tensor)
        return found

    def spared(self, removed: Sequence[Tensor], importance: Sequence[Tensor] = ()) -> list[Tensor]:
        """The same marks, less one unit for every dimension of the graph's tensors that would be left with nothing.

        `importance`: (size,) per group; the unit that is spared has the highest. The first one where it says nothing.
        """
        dead = torch.cat([torch.empty(0, dtype=torch.bool), *removed])
        nothing = torch.empty(0, dtype=torch.long)
        places = torch.cat([nothing, *(group.units for group in self.groups)])
        along = torch.cat([nothing, *self._axes])
        worth = torch.zeros(self.units.count, dtype=torch.float64)
        worth[places] = torch.cat([worth[:0], *importance]).double() if importance else 0.0
        while True:
            alive = self.alive(dead.split([group.size for group in self.groups]))
            counts = torch.zeros(len(self._axes), dtype=torch.long)
            counts.index_add_(0, self._axis_of, alive[along].long())
            empty = torch.nonzero(counts == 0).reshape(-1).tolist()
            if not empty:
                return list(dead.split([group.size for group in self.groups]))
            for axis in empty:
                units = self.units.of_position[self._axes[axis]]
                best = units[worth[units] == worth[units].max()][0]
                dead[places == best] = False

    @cached_property
    def _axes(self) -> list[Tensor]:
        """Numbers along every dimension of every tensor of the graph that may shrink, once each."""
        found: dict[tuple[int, ...], Tensor] = {}
        for value in values_in(list(self.walk.values.values())):
            for axis in filter(None, value.axes):
                key = axis.size, int(axis.ids[0]), int(axis.ids[-1]), int(axis.ids.sum())
                found.setdefault(key, axis.ids)
        return [ids for ids in found.values() if bool((self.units.of_position[ids] >= 0).all())]

    @cached_property
    def _axis_of(self) -> Tensor:
        return torch.repeat_interleave(torch.tensor([len(ids) for ids in self._axes], dtype=torch.long))

    def remove(self, removed: Sequence[Tensor]) -> None:
        """Shrink the model in place: parameters are replaced, sizes in the graph adapted. `removed` as for `alive`.

        What is known about channels is about the model before; ask `find_channels` again.
        """
        self._note([group for group, marks in zip(self.groups, removed, strict=True) if bool(marks.any())])
        remove(self.model, self.walk, self.alive(removed))

    def _note(self, groups: Sequence[Group]) -> None:
        """For the report: what loses channels with the first layer of each group, tied layers included."""
        owners: dict[int, list[str]] = {}
        for layer in layers(self.model):
            own = [get_attribute(self.model, name) for name in layer.computed] or tensors(layer.module).values()
            for tensor in own:
                owners.setdefault(id(tensor), []).append(layer.name)
        for group in groups:
            for member in group.members:
                for name in owners.get(id(self.tensor(member)), [member.slot.tensor]):
                    note_reach(self.model, group.name, name)


class Cost:
    """MACs and parameters as functions of what is alive: sums of products of sizes."""

    def __init__(self, walk: Walk) -> None:
        self.batch = walk.model.inputs.batch_size
        self._macs = _Products([(work.fixed, work.dims) for work in walk.facts.work])
        slots = walk.facts.positions.slots
        terms, weights = [], []
        seen: set[int] = set()
        for tensor in dict(walk.model.named_parameters()).values():
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            own = [slots.get((id(tensor), d)) for d in range(tensor.ndim)]
            fixed = 1
            for size, slot in zip(tensor.shape, own, strict=True):
                fixed *= 1 if slot else size
            terms.append((fixed, tuple(torch.arange(s.first, s.first + s.size) for s in own if s)))
            weights.append(tensor.element_size())
        self._parameters, self._sizes = _Products(terms), torch.tensor(weights, dtype=torch.float64)

    def macs(self, alive: Tensor) -> float:
        """Of one sample."""
        return float(self._macs(alive).sum()) / self.batch

    def parameters(self, alive: Tensor) -> float:
        return float(self._parameters(alive).sum())

    def bytes(self, alive: Tensor) -> float:
        return float((self._parameters(alive) * self._sizes).sum())


class _Products:
    """Terms `fixed` · ∏ (number of alive positions of each dimension)."""

    def __init__(self, terms: Sequence[tuple[int, tuple[Tensor, ...]]]) -> None:
        self._fixed = torch.tensor([float(fixed) for fixed, _ in terms], dtype=torch.float64)
        dims = [(term, ids) for term, (_, all_ids) in enumerate(terms) for ids in all_ids]
        self._term = torch.tensor([term for term, _ in dims], dtype=torch.long)
        self._ids = torch.cat([torch.empty(0, dtype=torch.long), *(ids for _, ids in dims)])
        self._dim = torch.repeat_interleave(torch.tensor([len(ids) for _, ids in dims], dtype=torch.long))

    def __call__(self, alive: Tensor) -> Tensor:
        counts = torch.zeros(len(self._term), dtype=torch.float64)
        counts.index_add_(0, self._dim, alive[self._ids].double())
        return self._fixed.scatter_reduce(0, self._term, counts, "prod")
