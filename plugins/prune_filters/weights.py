"""Criteria that read weights only. A unit's score adds up over all layers whose output channels it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from surgery import Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Channels, Context, Group


def filters(found: Channels, group: Group) -> list[tuple[Tensor, Tensor]]:
    """For each layer that gives the group's channels: its filters (n, features), and the unit (n,) of each."""
    result = []
    for member in group.of("output"):
        weight = found.tensor(member).detach().double()
        rows = weight.movedim(member.slot.dim, 0).flatten(1)
        result.append((rows[member.positions], member.units))
    return result


def added(group: Group, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(size,) sums over all layers of values (n,) by unit (n,)."""
    import torch

    total = torch.zeros(group.size, dtype=torch.float64)
    for values, units in parts:
        total.index_add_(0, units, values.double())
    return total


class _OfFilters(Criterion):
    def _measure(self, rows: Tensor) -> Tensor:
        """(n, features) → (n,)"""
        raise NotImplementedError

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        return [added(g, [(self._measure(rows), units) for rows, units in filters(found, g)]) for g in found.groups]


class L1(_OfFilters):
    """Sum of the absolute weights of the unit's filters.

    Li et al. 2017, Pruning Filters for Efficient ConvNets (arXiv:1608.08710), section 3.1.
    """

    def _measure(self, rows: Tensor) -> Tensor:
        return rows.abs().sum(1)
