"""Criteria that read weights only. A unit's score adds up over all layers whose output channels it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import surgery
from surgery import Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Channels, Context, Group, Member


def filters(found: Channels, member: Member) -> Tensor:
    """(channels, features) weights of every filter of the layer whose output channels `member` is about."""
    weight = found.tensor(member).detach().cpu().movedim(member.slot.dim, 0)
    return weight.reshape(len(weight), -1)


def norms(found: Channels, member: Member, order: int) -> Tensor:
    """(n,) 1- or 2-norm of the filters that `member` is about. No copy of the weights is made."""
    import torch

    rows = filters(found, member)
    lengths: Tensor = torch.linalg.vector_norm(rows, order, dim=1).double()[member.positions]
    return lengths


def added(group: Group, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """(size,) sums over all layers of values (n,) by unit (n,)."""
    import torch

    total = torch.zeros(group.size, dtype=torch.float64)
    for values, units in parts:
        total.index_add_(0, units, values)
    return total


def l1_norms(found: Channels, group: Group) -> Tensor:
    """(size,) absolute weights of each unit's filters, added up."""
    return added(group, [(norms(found, m, 1), m.units) for m in group.of("output")])


class L1(Criterion):
    """Sum of the absolute weights of the unit's filters.

    Li et al. 2017, Pruning Filters for Efficient ConvNets (arXiv:1608.08710), section 3.1.
    """

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        return [l1_norms(found, group) for group in found.groups]


class L2(Criterion):
    """Euclidean norm of the unit's filters, added up over layers.

    Li et al. 2017 (arXiv:1608.08710), which compares it with `l1` in its appendix and finds little between them.
    """

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        return [added(g, [(norms(found, m, 2), m.units) for m in g.of("output")]) for g in found.groups]


class Random(Criterion):
    """Chance, from the seed of the step: what every other criterion has to beat.

    Li et al. 2017 (arXiv:1608.08710), section 4.4, prunes random filters for comparison.
    """

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        import torch

        generator = context.generator()
        return [torch.rand(group.size, dtype=torch.float64, generator=generator) for group in found.groups]


class BatchnormScale(Criterion):
    """Absolute scale |γ| of the unit in its BatchNorms, added up over them.

    Liu et al. 2017, Network Slimming (arXiv:1708.06519), section 3, which first trains with an L1 penalty on γ. A
    group with a unit that no BatchNorm scales, as after fold_batchnorm, has the scores of `l1`.
    """

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from surgery.graph import BatchNorm

        layers = [layer.module for layer in surgery.layers(found.model) if isinstance(layer.module, BatchNorm)]
        scales = {id(norm.weight) for norm in layers if norm.weight is not None}
        return [self._of_group(found, group, scales) for group in found.groups]

    def _of_group(self, found: Channels, group: Group, scales: set[int]) -> Tensor:
        members = [member for member in group.members if id(found.tensor(member)) in scales]
        scaled = added(group, [(m.units.new_ones(len(m.units)).double(), m.units) for m in members])
        if not bool((scaled > 0).all()):
            return l1_norms(found, group)
        gammas = [found.tensor(m).detach().double().cpu().abs()[m.positions] for m in members]
        return added(group, [(gamma, m.units) for gamma, m in zip(gammas, members, strict=True)])


class GeometricMedian(Criterion):
    """Sum of the distances of the unit's filters to all other filters of their layers: the replaceable go first.

    He et al. 2019, Filter Pruning via Geometric Median (arXiv:1811.00250), section 3.3.
    """

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        return [added(g, [self._distances(found, m) for m in g.of("output")]) for g in found.groups]

    def _distances(self, found: Channels, member: Member) -> tuple[Tensor, Tensor]:
        import torch

        rows = filters(found, member).double()
        return torch.cdist(rows[member.positions], rows).sum(1), member.units
