"""Where the values of units are read: what criteria that look at activations look at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from .groups import Group, Units
from .values import Value, values_in
from .walk import Walk


@dataclass(frozen=True)
class Carrier:
    """A value of the graph that has units of a group along a dimension."""

    node: fx.Node
    dim: int
    positions: Tensor
    """(n,) along the dimension, ascending."""
    units: Tensor
    """(n,) unit of the group that stands at each position."""
    readers: tuple[fx.Node, ...]
    """Layers and products of activations that take these units in and do not pass them on."""


def carriers(walk: Walk, units: Units, groups: Sequence[Group]) -> tuple[tuple[Carrier, ...], ...]:
    """Per group the values that readers take its units from, in the order of the graph.

    Those are the units as everything between the layers (normalisation, activation, pooling, the sum with a shortcut)
    has left them. Units that nothing reads have the last values that they stand in.
    """
    return _Search(walk, units, groups).run()


class _Search:
    def __init__(self, walk: Walk, units: Units, groups: Sequence[Group]) -> None:
        self.walk, self.units = walk, units
        self._place = torch.zeros(units.count, dtype=torch.long)
        for group in groups:
            self._place[group.units] = torch.arange(group.size)
        self._found: list[dict[tuple[fx.Node, int], Carrier]] = [{} for _ in groups]
        self._seen = torch.zeros(units.count, dtype=torch.bool)
        self._active: set[fx.Node] = set()  # what depends on the model's inputs, and so is no weight
        for node in walk.values:
            if node.op == "placeholder" or any(source in self._active for source in node.all_input_nodes):
                self._active.add(node)

    def run(self) -> tuple[tuple[Carrier, ...], ...]:
        taken = self._taken()
        for node, result in self.walk.values.items():
            if node.name in taken:
                passed = self._units_in([result])
                passed = passed[~torch.isin(passed, taken[node.name])]
                for source in node.all_input_nodes:
                    self._note(source, passed, (node,))
        seen = torch.nonzero(self._seen).reshape(-1)
        if len(seen) < self.units.count:
            for node in self.walk.values:
                users = [self.walk.values[user] for user in node.users]
                self._note(node, torch.cat([seen, self._units_in(users)]), ())
        order = {node: index for index, node in enumerate(self.walk.values)}
        return tuple(tuple(sorted(own.values(), key=lambda c: (order[c.node], c.dim))) for own in self._found)

    def _taken(self) -> dict[str, Tensor]:
        """Units that a node multiplies with its weight's input dimension and adds up, by the name of every reader.

        What it gives may well be the same units again: a layer between two sums of one residual stream.
        """
        facts = self.walk.facts
        taken = {side.node.name: self.units.of_position[side.ids] for side in facts.inputs.values()}
        for work in facts.work:
            ids = [dim for dim in work.dims if int(dim[0]) in facts.inputs]
            taken[work.node] = self.units.of_position[torch.cat([NONE, *ids])]
        return taken

    def _note(self, node: fx.Node, passed: Tensor, readers: tuple[fx.Node, ...]) -> None:
        """A carrier for every dimension and group of units at `node` that are not among `passed`."""
        value = self.walk.values[node]
        for dim, axis in enumerate(value.axes if isinstance(value, Value) and node in self._active else ()):
            if axis is None:
                continue
            here = self.units.of_position[axis.ids]
            positions = torch.nonzero((here >= 0) & ~torch.isin(here, passed)).reshape(-1)
            for carrier, group in self._by_group(node, dim, positions, here[positions], readers):
                known = self._found[group].get((node, dim))
                self._found[group][node, dim] = replace(known, readers=(*known.readers, *readers)) if known else carrier

    def _by_group(
        self, node: fx.Node, dim: int, positions: Tensor, units: Tensor, readers: tuple[fx.Node, ...]
    ) -> Iterator[tuple[Carrier, int]]:
        self._seen[units] = True
        kinds: Tensor = self.units.group_of[units]
        for group in kinds.unique().tolist():
            own = kinds == group
            yield Carrier(node, dim, positions[own], self._place[units[own]], readers), group

    def _units_in(self, values: list[object]) -> Tensor:
        """Numbers of the units that stand in any of `values`."""
        ids = [axis.ids for value in values_in(values) for axis in value.axes if axis is not None]
        units: Tensor = self.units.of_position[torch.cat([NONE, *ids])].unique()
        return units


NONE = torch.empty(0, dtype=torch.long)
