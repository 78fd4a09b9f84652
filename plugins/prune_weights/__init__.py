"""Set weights to zero for good.

    before:  conv2d(x, W, b)                W (outputs, inputs, *kernel)
    after:   conv2d(x, W * (W != 0), b)     of the same shape, under the same name, a share of it zero

The product gives W itself and has no gradient where W is zero: no optimiser brings a zero back. Exported, the weight is
an ordinary one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery import Pass, PassReport, RecipeError, hookimpl

if TYPE_CHECKING:
    from surgery import CapturedModel, Context, Data, Registry

DEFAULT_SPARSITY = 0.5
Size = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class PruneWeights(Pass):
    """Set the least important weights of convolutions and linear layers to zero; training leaves them there.

    `sparsity` says how many, `sensitivity` (Han et al. 2015, arXiv:1506.02626, section 3) or `pattern` in its place.
    `criterion` says which: `magnitude` the smallest (Han et al. 2015); `obd` those with the least ½ h w² for the
    diagonal h of the Hessian (LeCun, Denker and Solla 1990, equation 5), of the loss with training data, else of each
    layer's output error; `obs` those that the others can best make up for on calibration data, a few at a time, the
    others solved anew each time (Hassibi and Stork 1993; layer by layer Dong et al. 2017, arXiv:1705.07565).
    """

    marks: ClassVar[frozenset[str]] = frozenset({"masked"})
    strength: ClassVar[Mapping[str, float]] = {"sparsity": 0.0}
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "a value that weights share is not zero in one place alone",
    }

    sparsity: Annotated[
        Annotated[float, Field(ge=0, lt=1)] | None,
        Field(description="share of the weights that are zero then; null = half, or what sensitivity or pattern say"),
    ] = None
    scope: Annotated[
        Literal["layer", "global"], Field(description="the same share of every layer, or of all layers together")
    ] = "layer"
    sensitivity: Annotated[
        Annotated[float, Field(gt=0)] | None,
        Field(description="instead: weights below this many standard deviations of their layer's weights go"),
    ] = None
    criterion: Annotated[
        Literal["magnitude", "obd", "obs"] | None,
        Field(description="which weights go; null = obs with calibration data, else magnitude"),
    ] = None
    reconstruct: Annotated[
        bool | None, Field(description="solve the weights left anew on calibration data; null = with obs")
    ] = None
    pattern: Annotated[
        str | None,
        Field(description='"N:M": at most N of M consecutive inputs, at each place of the kernel, are not zero'),
    ] = None
    block: Annotated[
        tuple[Size, Size] | None, Field(description="[outputs, features]: whole blocks of the weight matrix go")
    ] = None
    steps: Annotated[
        Size, Field(description="in so many steps, judged anew before each, ever smaller ones (Zhu and Gupta 2017)")
    ] = 1

    def __post_init__(self) -> None:
        window = _window(self.pattern) if self.pattern is not None else None
        if window and self.sparsity not in (None, 1 - window[0] / window[1]):
            self._refuse(f"sparsity {self.sparsity} contradicts pattern {self.pattern}", "drop one of the two")
        for one, other in (
            ("sparsity", "sensitivity"),
            ("pattern", "block"),
            ("pattern", "sensitivity"),
            ("block", "sensitivity"),
        ):
            if getattr(self, one) is not None and getattr(self, other) is not None:
                self._refuse(f"{one} and {other} are both given", "drop one of the two")
        if self.scope == "global" and (window or self.sensitivity is not None):
            what = "pattern" if window else "sensitivity"
            self._refuse(f"scope: global with {what}, which says what every layer loses", "drop one of the two")
        if self.sensitivity is not None and (self.criterion or "magnitude") != "magnitude":
            self._refuse(f"sensitivity is a magnitude, not a criterion {self.criterion}", "drop one of the two")
        if self.steps > 1 and (window or self.sensitivity is not None):
            what = "pattern" if window else "sensitivity"
            self._refuse(f"{what} says how many weights go, in one step, and steps is {self.steps}", "drop steps")
        if self.criterion == "obs" and self.reconstruct is False:
            self._refuse("criterion obs solves the weights left anew", "drop reconstruct, or choose criterion obd")

    def _refuse(self, problem: str, fix: str) -> None:
        raise RecipeError(problem, at=f"pass {self.name()}", fix=fix)

    @property
    def window(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        return None if self.pattern is None else _window(self.pattern)

    @property
    def share(self) -> float:
        """Of the weights that are zero then, where neither sensitivity nor pattern say it."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def check_data(self, data: Data, registry: Registry) -> None:
        what = f"pass {self.name()} with "
        if self.reconstruct or self.criterion == "obs":
            data.require_calibration(what + ("criterion obs" if self.criterion == "obs" else "reconstruct"))
        elif self.criterion == "obd" and data.training is None:
            data.require_calibration(f"{what}criterion obd and no training data")

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .pruning import Pruning

        return Pruning(self, model, context).run()


def _window(pattern: str) -> tuple[int, int]:
    kept, _, size = pattern.partition(":")
    if not (kept.isdecimal() and size.isdecimal() and 0 < int(kept) < int(size)):
        raise RecipeError(
            f"pattern {pattern!r} is not of the form N:M with 0 < N < M",
            at="pass prune_weights",
            fix='write it in quotes, such as "2:4": two of four consecutive inputs stay',
        )
    return int(kept), int(size)


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [PruneWeights]
