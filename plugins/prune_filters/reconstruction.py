"""The criterion that least squares gives: what the layers that read a unit cannot make up for."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import surgery
from surgery import Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Channels, Context


class Reconstruction(Criterion):
    """Error that least squares cannot make up for when the unit goes, at the layers that read it.

    Group optimal brain surgeon (Hassibi & Stork 1993; see `elimination`) on the second moments of the layers' inputs;
    relative to the variance of what the layer's output goes into, the shortcut of a residual block included, which
    makes layers comparable. A layer of more than 4,608 features, and one with groups, counts what the unit
    contributes to its output, uncompensated; a unit that no layer reads counts its share of its own layer's output
    variance.
    """

    needs_calibration: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from .judging import Evidence, Judge

        maps = {affine.layer.name: affine for affine in surgery.affine_maps(found.model)}
        judges = [Judge(found, group, maps) for group in found.groups]
        names = {name for judge in judges for name in judge.awaited}
        steps = [affine.step() for name, affine in maps.items() if name in names]
        for number, task in enumerate(context.calibration.sweep(found.model, steps, found.model)):
            context.progress("importance", number, len(steps))
            evidence = Evidence(task, maps[task.layer.name])
            for judge in judges:
                judge.hear(evidence)
        return [judge.verdict() for judge in judges]
