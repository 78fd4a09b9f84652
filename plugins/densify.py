"""Make weights that the graph computes ordinary ones again.

conv2d(x, f(codebook, indices), b)   →   conv2d(x, W, b),  W = f(codebook, indices)
conv2d(x, W * (W != 0), b)           →   conv2d(x, W, b):  zeros that training may move again
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import surgery
from surgery import Edit, Pass, PassReport, hookimpl

if TYPE_CHECKING:
    from surgery import CapturedModel, Context


@dataclass(frozen=True, kw_only=True)
class Densify(Pass):
    """Make weights that are computed in the graph (masked, clustered, hashed) ordinary ones of the same values.

    The last stage of dense-sparse-dense training (Han et al. 2017, arXiv:1607.04381, section 3) begins with it: all
    weights are trained again, from the zeros that pruning has left. Passes that skip computed weights also work then.
    """

    exact: ClassVar[bool] = True
    clears: ClassVar[frozenset[str]] = frozenset({"masked", "shared"})
    refuses: ClassVar[Mapping[str, str]] = {"int8": "the integers would not become floats again"}

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        edits = []
        for layer in self.selected(surgery.layers(model)):
            if layer.computed:
                surgery.make_dense(model, layer)
                edits.append(Edit(layer.name, f"its weight is no longer computed from {', '.join(layer.computed)}"))
        return PassReport(tuple(edits))


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [Densify]
