"""Remove whole filters, and everything before and after them that belonged to them.

    before:  conv (O, C, k) → BatchNorm (O) → conv (P, O, k)
    after:   conv (O', C, k) → BatchNorm (O') → conv (P, O', k)

The channels that live or die together are found by the core (`Context.channels`); this pass chooses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

import surgery
from surgery import Criterion, Edit, Pass, PassReport, RecipeError, Skip, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import CapturedModel, Channels, Context, Data, Registry

    Kept = dict[str, dict[int, Tensor]]

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
    patterns: ClassVar[tuple[str, ...]] = ("select", "exclude", "overrides")
    strength: ClassVar[Mapping[str, float]] = {"ratio": 0.0, "macs": 1.0, "parameters": 1.0, "bytes": 1.0}
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "no channel can be taken out of a weight that is looked up",
    }

    ratio: Annotated[Ratio | None, Field(description="share of each group's units that is removed")] = None
    macs: Annotated[Share | None, Field(description="share of the model's MACs that remains")] = None
    parameters: Annotated[Share | None, Field(description="share of the model's parameters that remains")] = None
    bytes: Annotated[Share | None, Field(description="share of the parameters' bytes that remains")] = None
    criterion: Annotated[
        str | None,
        Field(description="importance, see `surgery criteria`; null = reconstruction with calibration data, else l2"),
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
    ] = field(default_factory=dict, hash=False)
    reconstruct: Annotated[
        bool | None, Field(description="solve the weights left anew on data; null = when there is some")
    ] = None
    round_to: Annotated[
        Annotated[int, Field(ge=1)] | Literal["auto"],
        Field(
            description="what is left of a group is a multiple of this; auto = what kernels are fastest with: 16 in"
            " a group of 24 units or more, 4 from 8 on, 2 from 4 on"
        ),
    ] = 1
    steps: Annotated[int, Field(ge=1, description="remove a little, solve anew, judge again, so many times")] = 1
    min_width: Annotated[int, Field(ge=1, description="fewest units that are left of a group")] = 1
    heads: Annotated[bool, Field(description="attention loses whole heads, not features of every head")] = False

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", *BUDGETS) if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(
                f"{' and '.join(given)} are both given", at=f"pass {self.name()}", fix="say one of them how much goes"
            )

    def check(self, registry: Registry) -> None:
        if self.criterion is not None:
            registry.find_criterion(self.criterion)

    def check_data(self, data: Data, registry: Registry) -> None:
        if self.criterion is not None:
            registry.find_criterion(self.criterion).check_data(data)
        if self.reconstruct:
            data.require_calibration(f"pass {self.name()} with reconstruct")

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .choosing import Start
        from .removal import Removal

        criterion = context.criterion(self.criterion or ("reconstruction" if context.has_calibration else "l2"))
        repairs = context.has_calibration if self.reconstruct is None else self.reconstruct
        reference = surgery.snapshot(model) if repairs else model
        keep: Kept = {}
        repaired: tuple[Edit, ...] = ()
        found = context.channels(model, heads=self.heads)
        widths, skips, start = _widths(found), _skips(found), Start.of(found)
        lost: Counter[str] = Counter()
        notes: list[str] = []
        removal = Removal(self, model, context, criterion, start)
        for step in range(1, self.steps + 1):
            choice, marks = removal.step(step / self.steps)
            if self.steps == 1:
                skips += [Skip(layer, why) for layer, why in choice.why_left([int(own.sum()) for own in marks])]
            if step == self.steps and (note := choice.note(marks)):
                notes.append(note)
            if not any(bool(own.any()) for own in marks):
                continue
            lost += _lost(choice.found, marks)
            if repairs:
                keep = _kept_of(keep, choice.found.kept(marks))
                repaired = self._repair(model, reference, keep, context)
        skips += removal.skips()
        if repairs:
            skips += _not_solved(model)
        if lost:
            notes.append(removal.note())
        return PassReport((*_edits(widths, lost), *repaired), tuple(skips), tuple(notes))

    def _repair(self, model: CapturedModel, reference: CapturedModel, keep: Kept, context: Context) -> tuple[Edit, ...]:
        from .repair import reconstruct

        return tuple(
            Edit(r.layer, "weights solved anew", {"error_before": r.before, "error_after": r.after})
            for r in reconstruct(model, reference, keep, context, self.exclude)
        )


DEFAULT_RATIO = 0.5
BUDGETS = ("macs", "parameters", "bytes")


def _kept_of(before: Kept, now: Kept) -> Kept:
    """Places that are left of the original's, from those left before and those left of these."""
    merged = {name: dict(dims) for name, dims in before.items()}
    for name, dims in now.items():
        own = merged.setdefault(name, {})
        own.update({dim: own[dim][left] if dim in own else left for dim, left in dims.items()})
    return merged


def _widths(found: Channels) -> Counter[str]:
    """Output channels by layer; several layers may be cut out of one weight."""
    widths: Counter[str] = Counter()
    for side in found.outputs:
        widths[side.layer] += len(side.ids)
    return widths


def _lost(found: Channels, marks: list[Tensor]) -> Counter[str]:
    """Output channels that go, by layer."""
    lost: Counter[str] = Counter()
    for group, own in zip(found.groups, marks, strict=True):
        for member in group.of("output"):
            lost[member.layer] += int(own[member.units].sum())
    return lost


def _edits(widths: dict[str, int], lost: Counter[str]) -> list[Edit]:
    """One per layer that has lost output channels."""
    left = {layer: (before, before - lost[layer]) for layer, before in widths.items() if lost[layer]}
    return [
        Edit(layer, f"{before} → {after} channels", {"channels_before": before, "channels_after": after})
        for layer, (before, after) in left.items()
    ]


def _not_solved(model: CapturedModel) -> list[Skip]:
    """Layers without weights, and those whose weights could not be solved anew without losing what they are computed
    by, such as their zeros."""
    found = []
    for layer in surgery.layers(model):
        if layer.computed:
            found.append(Skip(layer.name, f"not solved anew: its weight is computed from {', '.join(layer.computed)}"))
        elif layer.type.startswith(("Conv", "Linear")) and not layer.module.get_parameter("weight").numel():
            found.append(Skip(layer.name, "not solved anew: it has no weights"))
    return found


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
