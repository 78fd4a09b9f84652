"""Weights solved anew after units have gone, so that the network makes up for them without training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import surgery
from surgery import CapturedModel, Context


@dataclass(frozen=True)
class Repaired:
    """A layer whose weights were solved anew, with the error of its output before and after a linear fit (1 = no better
    than the mean); where a ReLU follows, the weights that are put in go on from that fit."""

    layer: str
    before: float
    after: float


def reconstruct(
    model: CapturedModel,
    before: CapturedModel,
    keep: Mapping[str, Mapping[int, Tensor]],
    context: Context,
    exclude: Sequence[str] = (),
) -> list[Repaired]:
    """Solve every layer of `model` anew from the first that lost anything on, in order of execution, from its present
    inputs towards `before`'s outputs.

    Layers that a pattern in `exclude` matches keep their weights.

    `keep`: by name of a node and dimension, counted from the end, which places of `before`'s value are left; all where
    it is not named.
    """
    limit = context.calibration.gram_bytes
    order = [node.name for node in model.graph.nodes]
    touched = set(order[min((order.index(name) for name in keep if name in order), default=0) :])
    maps = {
        affine.layer.name: affine
        for affine in surgery.affine_maps(model)
        if surgery.gram_bytes(affine.layer) <= limit
        and not any(surgery.matches(affine.layer, p) for p in exclude)
        and affine.end.name in touched
    }
    steps = [affine.step(keep.get(affine.end.name, {})) for affine in maps.values()]
    repaired = []
    for number, task in enumerate(context.calibration.sweep(model, steps, before)):
        context.progress("reconstruct", number, len(steps))
        repaired.append(Repaired(task.layer.name, *maps[task.layer.name].solve(task)))
    return repaired
