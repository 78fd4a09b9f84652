"""Weights looked up in a short list of shared values by a hash of their position.

W (n weights)   →   w (K = factor · n),   W_ij = ξ(i, j) w_h(i, j)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery import Pass, PassReport, hookimpl

if TYPE_CHECKING:
    from surgery import CapturedModel, Context, Data, Registry

MIN_WEIGHTS = 1024


@dataclass(frozen=True, kw_only=True)
class Hashed(Pass):
    """Share few values among all weights of a layer, by a hash of their position.

    Chen et al. 2015 (arXiv:1504.04788), section 4, with the sign hash: of every convolution and linear layer. It starts
    from the trained weights, as the least squares optimum, with calibration data that of the layers' outputs, one after
    the other. The values can be trained as they stand.
    """

    marks: ClassVar[frozenset[str]] = frozenset({"shared"})
    strength: ClassVar[Mapping[str, float]] = {"factor": 1.0}
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "the weights share their values already",
        "masked": "what a hash shares among all weights is not zero where they were",
    }

    factor: Annotated[float, Field(gt=0, lt=1, description="shared values per weight, the compression factor")] = 0.125
    seed: Annotated[int, Field(ge=0, description="decides the hash of every layer, together with its name")] = 0
    metric: Annotated[
        Literal["weight", "output"] | None,
        Field(description="minimise the error of weights or of outputs on data; null = outputs when there is data"),
    ] = None
    min_weights: Annotated[
        int,
        Field(ge=1, description="smaller layers stay: in an ONNX file the hash itself takes about 3 kB per layer"),
    ] = MIN_WEIGHTS

    @property
    def partial(self) -> bool:
        return super().partial or self.min_weights > MIN_WEIGHTS

    def check_data(self, data: Data, registry: Registry) -> None:
        if self.metric == "output":
            data.require_calibration(f"pass {self.name()}")

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .application import Application

        return Application(self, model, context).run()


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [Hashed]
