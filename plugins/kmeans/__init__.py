"""Write weights as indices into small codebooks.

W (O, I, *k) → codebook (groups, 2^bits), indices of `bits` bits each, packed

points      values on a line, or a histogram of them, with prefix sums
optimum     their best cells, by dynamic programming
codebooks   starts and Lloyd's rounds
fitting     codebook and indices in the metric of weights or of outputs
packing, lookup   indices as bytes, and the weight that the graph computes from them
clustering  the way through a model
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery import Pass, PassReport, RecipeError, hookimpl

if TYPE_CHECKING:
    from surgery import CapturedModel, Context, Data, Registry


@dataclass(frozen=True, kw_only=True)
class Kmeans(Pass):
    """Share few values among the weights of each layer: a codebook and an index of a few bits per weight.

    Han et al. 2016 (arXiv:1510.00149), section 3. The codebook is a parameter, so that training goes on with it (their
    equation 3); weights that are zero stay zero. With calibration data the error of the outputs decides: values that
    meet strong inputs count more, later weights make up for earlier ones, and later layers for earlier layers.
    """

    marks: ClassVar[frozenset[str]] = frozenset({"shared"})
    strength: ClassVar[Mapping[str, float]] = {"bits": 8}
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "the weights share their values already",
    }

    bits: Annotated[int, Field(ge=1, le=8, description="bits of an index; a codebook holds 2^bits values")] = 4
    per: Annotated[
        Literal["layer", "channels", "block"],
        Field(description="what has a codebook of its own: a layer, some output channels, or some weights in a row"),
    ] = "layer"
    size: Annotated[
        Annotated[int, Field(ge=1)] | None,
        Field(description="channels or weights that share a codebook; null = 1 channel, blocks of 4096 weights"),
    ] = None
    start: Annotated[
        Literal["optimal", "exact", "linear", "density", "random"],
        Field(
            description="first values: the best of a coarse histogram, the best there are (takes a hundred times as"
            " long), at equal distances, at equal shares of the weights, or at random"
        ),
    ] = "optimal"
    metric: Annotated[
        Literal["weight", "output"] | None,
        Field(description="minimise the error of weights or of outputs on data; null = outputs when there is data"),
    ] = None

    def __post_init__(self) -> None:
        if self.per == "layer" and self.size is not None:
            raise RecipeError(
                f"size: {self.size} says how much shares a codebook, and per: layer that the whole layer does",
                at=f"pass {self.name()}",
                fix="say per: channels or per: block, or drop size",
            )

    def span(self, count: int, features: int) -> int:
        """Weights that share a codebook, of a layer with `count` of them, `features` per output channel."""
        own = {"layer": count, "channels": (self.size or 1) * features, "block": self.size or 4096}[self.per]
        return min(own, count)

    def check_data(self, data: Data, registry: Registry) -> None:
        if self.metric == "output":
            data.require_calibration(f"pass {self.name()}")

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .clustering import Clustering

        return Clustering(self, model, context).run()


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [Kmeans]
