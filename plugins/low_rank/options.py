"""The options that every decomposition has."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery import Pass, PassReport, RecipeError

if TYPE_CHECKING:
    from surgery import CapturedModel, Context, Data, Registry

    from .method import Method

Share = Annotated[float, Field(gt=0, le=1)]
Rank = Annotated[int, Field(ge=1)]

BUDGETS = ("macs", "parameters", "bytes")
TARGETS = ("rank", "layer_macs", "decomposed_macs", "energy", *BUDGETS, "output_error")
DEFAULT_LAYER_MACS = 0.5


@dataclass(frozen=True, kw_only=True)
class LowRank(Pass):
    """What decompositions have in common.

    At most one of the options in `TARGETS` is given; without any, every layer keeps half of its MACs. No layer ends
    with more MACs or more weights than it had.
    """

    idempotent: ClassVar[bool] = False
    strength: ClassVar[Mapping[str, float]] = {
        "layer_macs": 1.0,
        "decomposed_macs": 1.0,
        "energy": 1.0,
        "macs": 1.0,
        "parameters": 1.0,
        "bytes": 1.0,
        "output_error": 0.0,
    }
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "the factors would be ordinary weights, which share no values",
        "masked": "the factors would be ordinary weights, without the zeros",
    }

    rank: Annotated[
        Rank | Literal["vbmf"] | None,
        Field(description="the rank of every layer, or vbmf: what stands out of the noise of its weight"),
    ] = None
    layer_macs: Annotated[Share | None, Field(description="share of each layer's MACs that remains")] = None
    decomposed_macs: Annotated[
        Share | None,
        Field(
            description="share of the MACs of all layers that can be decomposed that remains, spread over them so that"
            " outputs lose least"
        ),
    ] = None
    energy: Annotated[
        Annotated[float, Field(gt=0, le=1)] | None, Field(description="share of the squared signal that is kept")
    ] = None
    macs: Annotated[Share | None, Field(description="share of the model's MACs that remains")] = None
    parameters: Annotated[Share | None, Field(description="share of the model's parameters that remains")] = None
    bytes: Annotated[Share | None, Field(description="share of the parameters' bytes that remains")] = None
    output_error: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None,
        Field(description="error of the model's outputs on the calibration data, relative, that is reached"),
    ] = None
    metric: Annotated[
        Literal["weight", "output"] | None,
        Field(description="minimise the error of weights or of outputs on data; null = outputs when there is data"),
    ] = None
    sequential: Annotated[
        bool | None,
        Field(
            description="each layer makes up for those before, and layers that are not decomposed too; null = with the"
            " output metric"
        ),
    ] = None
    only_if_faster: Annotated[
        bool, Field(description="leave layers whose factors are no faster in ONNX Runtime on this machine")
    ] = False
    round_to: Annotated[
        Rank | None, Field(description="ranks are multiples of this; null = 8, less for layers below 128 channels")
    ] = None

    def __post_init__(self) -> None:
        place = f"pass {self.name()}"
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} are both given", at=place, fix="say with one of them how much")
        if self.sequential and self.metric == "weight":
            raise RecipeError(
                "sequential: true fits the outputs, which metric: weight forbids", at=place, fix="drop one of the two"
            )

    @property
    @abstractmethod
    def method(self) -> Method:
        """The decomposition, with its own options."""

    @property
    def budget(self) -> tuple[str, float] | None:
        """The budget on the whole model's cost and its share, or None."""
        return next(((name, value) for name in BUDGETS if (value := getattr(self, name)) is not None), None)

    def check_data(self, data: Data, registry: Registry) -> None:
        if self.metric == "output" or self.sequential or self.output_error is not None:
            data.require_calibration(f"pass {self.name()}")

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .decomposition import Decomposition

        return Decomposition(self, model, context).run()
