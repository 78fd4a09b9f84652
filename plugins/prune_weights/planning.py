"""Which layers lose weights, in which pattern, and how many of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import surgery
from surgery import CapturedModel, Layer, Skip

from . import PruneWeights
from .patterns import Blocks, Pattern, Single, Windows
from .scores import matrix_of

aten = torch.ops.aten


@dataclass(eq=False)
class Job:
    """One layer. `target`: how many of its units are gone in the end."""

    name: str
    pattern: Pattern
    shape: tuple[int, ...]
    target: int
    before: Tensor
    """W (groups, outputs, features) as it came."""
    numbers: dict[str, float] = field(default_factory=dict)
    how: str = ""

    @property
    def units(self) -> int:
        return self.pattern.units(self.shape)


def planned(options: PruneWeights, model: CapturedModel) -> tuple[list[Job], list[Skip]]:
    """The layers that lose something, in order of execution, and those that do not with the reason.

    Raises:
        PassError: a weight holds NaN or infinity; names the layer.
    """
    jobs, skips = [], []
    wanted = [layer for layer in surgery.layers(model) if layer.type.startswith(("Conv", "Linear"))]
    for layer in options.selected(wanted):
        options.finite_weight(layer)
        weight = matrix_of(layer)
        reason = surgery.tied(model, layer, computed=is_masked(layer))
        pattern = reason or _pattern(options, layer, weight)
        if isinstance(pattern, str):
            skips.append(Skip(layer.name, pattern))
        else:
            jobs.append(_job(options, layer.name, pattern, weight))
    needed = _needed_over_all if options.scope == "global" else _needed
    left, done = needed(options, jobs)
    return left, [*skips, *done]


def _pattern(options: PruneWeights, layer: Layer, weight: Tensor) -> Pattern | str:
    """What goes together, or why it cannot."""
    if options.block is not None:
        rows, columns = options.block
        outputs, features = weight.shape[1:]
        if rows > outputs or columns > features:
            return f"a block {rows} × {columns} is larger than its {outputs} × {features} weights"
        return Blocks(rows, columns)
    if options.window is None:
        return Single()
    kept, size = options.window
    module: Any = layer.module
    places = module.weight[0, 0].numel()
    inputs = weight.shape[2] // places
    return f"its {inputs} inputs are no multiple of {size}" if inputs % size else Windows(kept, size, places)


def _job(options: PruneWeights, name: str, pattern: Pattern, weight: Tensor) -> Job:
    """With the number of units that go; one stays. Over all layers together the number is not known yet."""
    job = Job(name, pattern, weight.shape, 0, weight)
    if isinstance(pattern, Windows):
        job.target = pattern.gone(job.shape)
    elif options.sensitivity is not None:
        threshold = options.sensitivity * float(weight.double().std(correction=0))
        job.target = min(int((weight.abs() < threshold).sum()), job.units - 1)
        job.numbers["threshold"] = threshold
    else:
        job.target = min(round(options.share * job.units), job.units - 1)
    return job


def _needed(options: PruneWeights, jobs: list[Job]) -> tuple[list[Job], list[Skip]]:
    left, skips = [], []
    for job in jobs:
        gone = _gone(job)
        if gone < job.target:
            left.append(job)
        elif job.target or options.sensitivity is None:
            skips.append(Skip(job.name, f"already {gone:,} of {job.units:,} {_unit(job)}s are zero"))
        else:
            skips.append(Skip(job.name, "no weight is below the threshold"))
    return left, skips


def _needed_over_all(options: PruneWeights, jobs: list[Job]) -> tuple[list[Job], list[Skip]]:
    gone, units = sum(map(_gone, jobs)), sum(job.units for job in jobs)
    if gone < min(round(options.share * units), units - len(jobs)):
        return jobs, []
    return [], [Skip(job.name, f"already {gone:,} of all {units:,} {_unit(job)}s are zero") for job in jobs]


def is_masked(layer: Layer) -> bool:
    """Whether its weight is `masked` of a parameter."""
    node = layer.weight_node
    if len(layer.computed) != 1 or node is None or node.target is not aten.mul.Tensor or len(node.args) != 2:
        return False
    weight, mask = node.args
    return getattr(mask, "target", None) is aten.ne.Scalar and mask.args == (weight, 0)  # type: ignore[union-attr]


def _gone(job: Job) -> int:
    """Units of the weight as it came that are zero; with windows, those that have to be."""
    zero = job.before == 0
    if isinstance(job.pattern, Windows):
        kept = job.pattern.mask(torch.where(zero, -1.0, 1.0), job.target)
        return 0 if bool((~kept & ~zero).any()) else job.target
    return int((job.pattern.scores(torch.where(zero, -1.0, 1.0)) < 0).sum())


def _unit(job: Job) -> str:
    return "block" if isinstance(job.pattern, Blocks) else "weight"
