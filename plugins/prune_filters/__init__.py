"""Remove whole filters, and everything before and after them that belonged to them.

    before:  conv (O, C, k) → BatchNorm (O) → conv (P, O, k)
    after:   conv (O', C, k) → BatchNorm (O') → conv (P, O', k)

The channels that live or die together are found by the core (`Context.channels`); this pass chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

import surgery
from surgery import Criterion, Edit, Pass, PassReport, RecipeError, Skip, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import CapturedModel, Channels, Context

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class PruneFilters(Pass):
    """Remove whole filters (channels, hidden units, attention features or heads) and all that belongs to them.

    One of `ratio`, `macs`, `parameters` and `bytes` says how much; without any, half of every group goes. Filter
    pruning: Li et al. 2017 (arXiv:1608.08710). The dependencies between layers are found by running the graph on
    numbered channels.
    """

    idempotent: ClassVar[bool] = False

    ratio: Annotated[Ratio | None, Field(description="share of each group's units that is removed")] = None
    macs: Annotated[Share | None, Field(description="share of the model's MACs that remains")] = None
    parameters: Annotated[Share | None, Field(description="share of the model's parameters that remains")] = None
    bytes: Annotated[Share | None, Field(description="share of the parameters' bytes that remains")] = None
    criterion: Annotated[
        str | None, Field(description="importance of a unit; null = reconstruction with calibration data, else l2")
    ] = None
    scope: Annotated[
        Literal["group", "global"] | None,
        Field(
            description="the same share of every group, or the least important anywhere; null = global for a budget"
            " and a criterion that compares groups"
        ),
    ] = None
    overrides: Annotated[
        dict[str, Ratio], Field(description="ratio by pattern on layer names; 0 protects; the first that fits counts")
    ] = field(default_factory=dict)
    reconstruct: Annotated[
        bool | None, Field(description="solve the weights left anew on data; null = when there is some")
    ] = None
    round_to: Annotated[int, Field(ge=1, description="what is left of a group is a multiple of this")] = 1
    steps: Annotated[int, Field(ge=1, description="remove a little, solve anew, judge again, so many times")] = 1
    min_width: Annotated[int, Field(ge=1, description="fewest units that are left of a group")] = 1
    heads: Annotated[bool, Field(description="attention loses whole heads, not features of every head")] = False

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", *BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(
                f"{' and '.join(given)} are both given", at=f"pass {self.name()}", fix="say one of them how much goes"
            )

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .choosing import Choice

        criterion = context.criterion(self.criterion or ("reconstruction" if context.has_calibration else "l2"))
        repairs = context.has_calibration if self.reconstruct is None else self.reconstruct
        if repairs:
            context.require_calibration(f"{self.name()} with reconstruct")
        reference = surgery.snapshot(model)
        keep: dict[str, Tensor] = {}
        repaired: tuple[Edit, ...] = ()
        found = context.channels(model, heads=self.heads)
        widths, skips = _widths(found), _skips(found)
        for part in self._parts():
            marks = Choice(part, found, criterion, context).marks()
            keep = _kept_of(keep, found.kept(marks))
            found.remove(marks)
            if repairs:
                repaired = part._repair(model, reference, keep, context)
            found = context.channels(model, heads=self.heads)
        return PassReport((*_edits(widths, _widths(found)), *repaired), tuple(skips))

    def _parts(self) -> list[PruneFilters]:
        """The same in `steps` equal steps, each said in shares of what the one before leaves."""
        return [self._part(step) for step in range(self.steps)] if self.steps > 1 else [self]

    def _part(self, step: int) -> PruneFilters:
        def ratio(whole: float) -> float:
            return whole / self.steps / (1 - whole * step / self.steps)

        shares: dict[str, Any] = {
            name: 1 - ratio(1 - share) for name in BUDGETS if (share := getattr(self, name)) is not None
        }
        whole = None if shares else ratio(DEFAULT_RATIO if self.ratio is None else self.ratio)
        overrides = {pattern: ratio(share) for pattern, share in self.overrides.items()}
        return replace(self, **shares, ratio=whole, overrides=overrides, steps=1)

    def _repair(
        self, model: CapturedModel, reference: CapturedModel, keep: dict[str, Tensor], context: Context
    ) -> tuple[Edit, ...]:
        from .repair import reconstruct

        return tuple(
            Edit(r.layer, "weights solved anew", {"error_before": r.before, "error_after": r.after})
            for r in reconstruct(model, reference, keep, context)
        )


DEFAULT_RATIO = 0.5
BUDGETS = ("macs", "parameters", "bytes")


def _kept_of(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    """Places that are left of the original's, from those left before and those left of these."""
    return {**before, **{name: before[name][kept] if name in before else kept for name, kept in now.items()}}


def _widths(found: Channels) -> dict[str, int]:
    """Output channels by layer."""
    return {side.layer: len(side.ids) for side in found.outputs}


def _edits(before: dict[str, int], after: dict[str, int]) -> list[Edit]:
    """One per layer that has lost output channels."""
    return [
        Edit(
            layer,
            f"{n} → {after.get(layer, 1)} channels",
            {"channels_before": n, "channels_after": after.get(layer, 1)},
        )
        for layer, n in before.items()
        if after.get(layer, 1) < n
    ]


def _skips(found: Channels) -> list[Skip]:
    """Layers with output channels that have to stay."""
    return [Skip(f.layer, f"{f.channels} channels stay: {f.why}") for f in found.frozen]


@hookimpl
def surgery_criteria() -> list[type[Criterion]]:
    from .activations import ActivationMean, Apoz, MutualInformation
    from .losses import Oracle, Taylor
    from .reconstruction import Reconstruction
    from .thinet import Thinet
    from .weights import L1, L2, BatchnormScale, GeometricMedian, Random

    of_weights: list[type[Criterion]] = [L1, L2, Random, BatchnormScale, GeometricMedian]
    return [*of_weights, ActivationMean, Apoz, MutualInformation, Taylor, Oracle, Thinet, Reconstruction]


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [PruneFilters]
