"""Evidence on units from the layers that read them, and the verdict on a group."""

from __future__ import annotations

from functools import cached_property
from math import prod

import torch
from torch import Tensor

from surgery import Affine, Channels, Group, Layer, Member, Task

from .elimination import Reader, eliminate, inverted

MOST_FEATURES = 4608
"""Of a layer whose covariance is inverted: 512 channels of a 3×3 kernel."""


class Evidence:
    """What a layer's statistics say about its input channels; computed once for all groups that it reads."""

    def __init__(self, task: Task, affine: Affine) -> None:
        self.task, self.layer = task, task.layer
        self._affine = affine

    @cached_property
    def inverse(self) -> Tensor | None:
        """P (features, features) of the layer's input; None where it is too large or has groups."""
        groups, _, features = self.matrix.shape
        if groups > 1 or features > MOST_FEATURES:
            return None
        inputs = self.task.inputs(full=True)
        return inverted(inputs.full_covariance[0], inputs.damping()[0])

    @cached_property
    def matrix(self) -> Tensor:
        """(groups, outputs, features) of the layer with its BatchNorm."""
        return self._affine.scaled(self.task.matrix)

    @cached_property
    def contributions(self) -> Tensor:
        """(groups, features) variance that each feature brings into the output, in parts of what that goes into."""
        return self.matrix.square().sum(1) * self.task.inputs().variance / self.scale

    @cached_property
    def shares(self) -> Tensor:
        """(outputs,) share of each output channel in the variance of all."""
        variance = self.task.targets().variance.reshape(-1)
        return variance / variance.sum().clamp_min(1e-300)

    @cached_property
    def scale(self) -> float:
        return self.task.spread


class Judge:
    """Gathers the evidence on one group; decides as soon as it is complete, so that little is held."""

    def __init__(self, found: Channels, group: Group, maps: dict[str, Affine]) -> None:
        self.group = group
        self._reads = {m.layer: m for m in group.of("input") if m.layer in maps}
        self._gives = {} if self._reads else {m.layer: m for m in group.of("output") if m.layer in maps}
        self.awaited = {*self._reads, *self._gives}
        self._readers: list[Reader] = []
        self._fixed = torch.zeros(group.size, dtype=torch.float64)
        self._scores = None if self.awaited else _shares_of_filters(found, group)

    def hear(self, evidence: Evidence) -> None:
        name = evidence.layer.name
        if name not in self.awaited:
            return
        if name in self._gives:
            self._add(self._gives[name], evidence.shares)
        elif evidence.inverse is not None and (features := self._features(evidence.layer)) is not None:
            self._readers.append(Reader.of(features, evidence.matrix[0], evidence.inverse, evidence.scale))
        else:
            self._add(self._reads[name], _per_channel(evidence, self._reads[name]))
        self.awaited.discard(name)
        if not self.awaited:
            self.verdict()

    def verdict(self) -> Tensor:
        if self._scores is None:
            self._scores = eliminate(self.group.size, self._readers, self._fixed)
            self._readers.clear()
        return self._scores

    def _add(self, member: Member, values: Tensor) -> None:
        self._fixed.index_add_(0, member.units, values[member.positions].double())

    def _features(self, layer: Layer) -> Tensor | None:
        """(units, k) columns of W for each unit; None where units have different numbers of them."""
        member = self._reads[layer.name]
        counts = torch.bincount(member.units, minlength=self.group.size)
        if len(counts.unique()) > 1:
            return None
        order = torch.argsort(member.units, stable=True)
        positions = member.positions[order].view(self.group.size, -1)
        kernel = _kernel(layer)
        return (positions.unsqueeze(2) * kernel + torch.arange(kernel)).flatten(1)


def _per_channel(evidence: Evidence, member: Member) -> Tensor:
    """(channels,) contributions along the weight's input dimension, which all groups share, or all have a part of."""
    by_group = evidence.contributions.unflatten(1, (-1, _kernel(evidence.layer))).sum(2)
    values: Tensor = by_group.flatten() if by_group.numel() == member.slot.size else by_group.sum(0)
    return values


def _kernel(layer: Layer) -> int:
    return prod(getattr(layer.module, "kernel_size", ()))


def _shares_of_filters(found: Channels, group: Group) -> Tensor:
    """(size,) share of each unit in the squared weights of its layers: where no statistics reach."""
    total = torch.zeros(group.size, dtype=torch.float64)
    for member in group.of("output"):
        rows = found.tensor(member).detach().double().movedim(member.slot.dim, 0).flatten(1).square().sum(1)
        total.index_add_(0, member.units, rows[member.positions])
    return total / total.sum().clamp_min(1e-300)
