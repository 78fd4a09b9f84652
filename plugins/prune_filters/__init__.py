"""Remove whole filters, and everything before and after them that belonged to them.

    before:  conv (O, C, k) → BatchNorm (O) → conv (P, O, k)
    after:   conv (O', C, k) → BatchNorm (O') → conv (P, O', k)

The channels that live or die together are found by the core (`Context.channels`); this pass chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

import surgery
from surgery import Criterion, Edit, Pass, PassError, PassReport, PluginError, RecipeError, Skip, hookimpl

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import CapturedModel, Channels, Context, Layer

    from .choice import Budget

Share = Annotated[float, Field(gt=0, le=1)]
Ratio = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, kw_only=True)
class PruneFilters(Pass):
    """Remove whole filters (channels, hidden units, attention features or heads) and all that belongs to them.

    Exactly one of `ratio`, `macs`, `parameters` and `bytes` says how much. Li et al. 2017 (arXiv:1608.08710); the
    dependencies between layers are found by running the graph on numbered channels.
    """

    idempotent: ClassVar[bool] = False

    ratio: Annotated[Ratio | None, Field(description="share of each group's units that is removed")] = None
    macs: Annotated[Share | None, Field(description="share of the model's MACs that remains")] = None
    parameters: Annotated[Share | None, Field(description="share of the model's parameters that remains")] = None
    bytes: Annotated[Share | None, Field(description="share of the parameters' bytes that remains")] = None
    criterion: Annotated[str, Field(description="importance of a unit; `surgery passes` lists the criteria")] = "l1"
    scope: Annotated[
        Literal["group", "global"], Field(description="the same share everywhere, or the least important anywhere")
    ] = "group"
    overrides: Annotated[
        dict[str, Ratio], Field(description="ratio by pattern on layer names; 0 protects; the first that fits counts")
    ] = field(default_factory=dict)
    reconstruct: Annotated[
        bool | None, Field(description="solve the weights left anew on data; null = when there is some")
    ] = None
    round_to: Annotated[int, Field(ge=1, description="what is left of a group is a multiple of this")] = 1
    min_width: Annotated[int, Field(ge=1, description="fewest units that are left of a group")] = 1
    heads: Annotated[bool, Field(description="attention loses whole heads, not features of every head")] = False

    def __post_init__(self) -> None:
        given = [name for name in ("ratio", "macs", "parameters", "bytes") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(
                f"{' and '.join(given)} are both given", at=f"pass {self.name()}", fix="say one of them how much goes"
            )

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        criterion = context.criterion(self.criterion)
        found = context.channels(model, heads=self.heads)
        ratios = self._ratios(found)
        if not any(ratio is None or ratio > 0 for ratio in ratios):
            raise self._nothing(found)
        marks = found.spared(self._marks(found, criterion, context, ratios))
        edits, skips = _edits(found, marks), _skips(found)
        before = surgery.snapshot(model)
        keep = found.kept(marks)
        found.remove(marks)
        if self.reconstruct if self.reconstruct is not None else context.has_calibration:
            from .repair import reconstruct

            reconstruct(model, before, keep, context)
        return PassReport(tuple(edits), tuple(skips))

    def _ratios(self, found: Channels) -> list[float | None]:
        """Per group the ratio that an override demands, 0 where `select` and `exclude` leave it out, else None.

        A group is left out as soon as one of its layers is.
        """
        layers = {node: layer for layer in surgery.layers(found.model) for node in layer.nodes}
        owners = {side.layer: layers[side.node] for side in found.outputs if side.node in layers}
        chosen = {layer.name for layer in self.selected(owners.values())}
        self._check_overrides(owners)
        return [
            self._ratio([owners[m.layer] for m in g.of("output") if m.layer in owners], chosen) for g in found.groups
        ]

    def _ratio(self, layers: Sequence[Layer], chosen: set[str]) -> float | None:
        if any(layer.name not in chosen for layer in layers):
            return 0.0
        given = (r for pattern, r in self.overrides.items() if any(surgery.matches(layer, pattern) for layer in layers))
        return next(given, None)

    def _check_overrides(self, owners: dict[str, Any]) -> None:
        for pattern in self.overrides:
            if not any(surgery.matches(layer, pattern) for layer in owners.values()):
                raise RecipeError(
                    f"overrides: {pattern!r} matches no layer with channels",
                    at=f"pass {self.name()}",
                    fix="`surgery inspect` lists the groups of channels",
                )

    def _marks(
        self, found: Channels, criterion: Criterion, context: Context, ratios: Sequence[float | None]
    ) -> list[Tensor]:
        """Which units go."""
        from .choice import cut_for, marks_at, share_of

        scores = self._scores(found, criterion, context)
        budget = self._budget(found)
        keys = self._keys(found, scores, criterion, ratios, budget)
        if budget is None:
            ratio = DEFAULT_RATIO if self.ratio is None else self.ratio
            return marks_at(keys, ratio if self.scope == "group" else share_of(keys, ratio))
        marks, left = cut_for(found, keys, budget)
        if left > budget.target * (1 + TOLERANCE):
            raise self._unmet(found, budget, left, ratios)
        return marks

    def _scores(self, found: Channels, criterion: Criterion, context: Context) -> list[Tensor]:
        scores = criterion.scores(found, context)
        if len(scores) != len(found.groups) or any(
            s.shape != (g.size,) for s, g in zip(scores, found.groups, strict=True)
        ):
            raise PluginError(f"criterion {self.criterion} gives scores of other shapes than the groups")
        for score, group in zip(scores, found.groups, strict=True):
            if not bool(score.isfinite().all()):
                raise PassError(
                    f"criterion {self.criterion} gives NaN or infinity for the group of {group.name}",
                    at=f"pass {self.name()}",
                    fix="look for NaN in the weights or the data, or choose another criterion",
                )
        return scores

    def _budget(self, found: Channels) -> Budget | None:
        from .choice import Budget

        for name in BUDGETS:
            if (target := getattr(self, name)) is not None:
                return Budget(name, target, getattr(found.cost, name))
        return None

    def _keys(
        self,
        found: Channels,
        scores: Sequence[Tensor],
        criterion: Criterion,
        ratios: Sequence[float | None],
        budget: Budget | None,
    ) -> list[Tensor]:
        """Order of removal over all groups; units that overrides demand go first, protected ones never."""
        from .choice import Limits, forced, keys_by_score, keys_by_share, savings

        limits = Limits(self.min_width, self.round_to)
        shares = [keys_by_share(score, limits) for score in scores]
        if self.scope == "global":
            costs = savings(found, budget) if budget and criterion.comparable else [1.0] * len(scores)
            scale = [1.0 if criterion.comparable else float(s.mean().clamp_min(1e-300)) for s in scores]
            keys = [keys_by_score(s / n, limits, c) for s, n, c in zip(scores, scale, costs, strict=True)]
        else:
            keys = shares
        return [
            key if ratio is None else forced(share, ratio)
            for key, share, ratio in zip(keys, shares, ratios, strict=True)
        ]

    def _nothing(self, found: Channels) -> PassError:
        reasons = sorted({f.why for f in found.frozen})
        return PassError(
            "nothing can be removed: " + ("; ".join(reasons[:3]) if not found.groups else "every group is left out"),
            at=f"pass {self.name()}",
            fix="`surgery inspect` lists the groups of channels, and what has to stay and why",
        )

    def _unmet(self, found: Channels, budget: Budget, left: float, ratios: Sequence[float | None]) -> PassError:
        limits = [f"at least {self.min_width} units stay in each group"]
        limits += (
            [f"{sum(r is not None for r in ratios)} groups are left out or overridden"]
            if any(r is not None for r in ratios)
            else []
        )
        limits += [f"round_to is {self.round_to}"] if self.round_to > 1 else []
        limits += [f"{sum(f.channels for f in found.frozen)} channels have to stay"]
        return PassError(
            f"{budget.name}: {budget.target:g} cannot be met; at least {left:.3f} is left: {'; '.join(limits)}",
            at=f"pass {self.name()}",
            fix="ask for less, or loosen these limits",
        )


DEFAULT_RATIO = 0.5
BUDGETS = ("macs", "parameters", "bytes")
TOLERANCE = 0.01


def _edits(found: Channels, marks: Sequence[Tensor]) -> list[Edit]:
    """One per layer that loses output channels."""
    lost: dict[str, tuple[int, int]] = {}
    for group, mark in zip(found.groups, marks, strict=True):
        for member in group.of("output"):
            before, gone = lost.get(member.layer, (member.slot.size, 0))
            lost[member.layer] = before, gone + int(mark[member.units].sum())
    return [
        Edit(
            layer, f"{before} → {before - gone} channels", {"channels_before": before, "channels_after": before - gone}
        )
        for layer, (before, gone) in lost.items()
        if gone
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
