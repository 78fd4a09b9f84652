"""Which units go: the options of the pass, held against the groups of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import Tensor

import surgery
from surgery import Channels, Context, Criterion, Layer, PassError, PluginError, RecipeError

from .choice import Budget, Limits, cut_for, forced, keys_by_score, keys_by_share, marks_at, savings, share_of

if TYPE_CHECKING:
    from . import PruneFilters

TOLERANCE = 0.01
"""Share of a budget by which it may be missed."""


@dataclass
class Choice:
    """What `options` choose among the units of `found`."""

    options: PruneFilters
    found: Channels
    criterion: Criterion
    context: Context

    @property
    def _place(self) -> str:
        return f"pass {self.options.name()}"

    def marks(self) -> list[Tensor]:
        """Per group (size,) which units go.

        Raises:
            RecipeError: a pattern matches no layer with channels.
            PassError: nothing can be removed, the budget cannot be met, or the scores hold NaN.
        """
        ratios = self.ratios
        if not any(ratio is None or ratio > 0 for ratio in ratios):
            raise self._nothing()
        budget = self._budget()
        keys = self._keys(self._scores(), budget)
        if budget is None:
            ratio = 0.5 if self.options.ratio is None else self.options.ratio
            return self.found.spared(marks_at(keys, share_of(keys, ratio) if self._is_global(budget) else ratio))
        marks, left = cut_for(self.found, keys, budget)
        if left > budget.target * (1 + TOLERANCE):
            raise self._unmet(budget, left)
        return self.found.spared(marks)

    @cached_property
    def ratios(self) -> list[float | None]:
        """Per group the ratio that an override demands, 0 where `select` and `exclude` leave it out, else None.

        A group is left out as soon as one of its layers is.
        """
        layers = {node: layer for layer in surgery.layers(self.found.model) for node in layer.nodes}
        owners = {side.layer: layers[side.node] for side in self.found.outputs if side.node in layers}
        chosen = {layer.name for layer in self.options.selected(owners.values())}
        self._check_overrides(owners)
        return [
            self._ratio([owners[m.layer] for m in g.of("output") if m.layer in owners], chosen)
            for g in self.found.groups
        ]

    def _ratio(self, layers: Sequence[Layer], chosen: set[str]) -> float | None:
        if any(layer.name not in chosen for layer in layers):
            return 0.0
        given = (
            r
            for pattern, r in self.options.overrides.items()
            if any(surgery.matches(layer, pattern) for layer in layers)
        )
        return next(given, None)

    def _check_overrides(self, owners: dict[str, Any]) -> None:
        for pattern in self.options.overrides:
            if not any(surgery.matches(layer, pattern) for layer in owners.values()):
                raise RecipeError(
                    f"overrides: {pattern!r} matches no layer with channels",
                    at=self._place,
                    fix="`surgery inspect` lists the groups of channels",
                )

    def _scores(self) -> list[Tensor]:
        name, groups = self.criterion.name(), self.found.groups
        scores = self.criterion.scores(self.found, self.context)
        if [tuple(score.shape) for score in scores] != [(group.size,) for group in groups]:
            raise PluginError(f"criterion {name} gives scores of other shapes than the groups have")
        for score, group in zip(scores, groups, strict=True):
            if not bool(score.isfinite().all()):
                raise PassError(
                    f"criterion {name} gives NaN or infinity for the group of {group.name}",
                    at=self._place,
                    fix="look for NaN in the weights or the data, or choose another criterion",
                )
        return scores

    def _budget(self) -> Budget | None:
        for name in ("macs", "parameters", "bytes"):
            if (target := getattr(self.options, name)) is not None:
                return Budget(name, target, getattr(self.found.cost, name))
        return None

    def _is_global(self, budget: Budget | None) -> bool:
        if self.options.scope is None:
            return budget is not None and self.criterion.comparable
        return self.options.scope == "global"

    def _keys(self, scores: Sequence[Tensor], budget: Budget | None) -> list[Tensor]:
        """Order of removal over all groups; units that overrides demand go first, protected ones never."""
        limits = Limits(self.options.min_width, self.options.round_to)
        shares = [keys_by_share(score, limits) for score in scores]
        keys = self._global_keys(scores, budget, limits) if self._is_global(budget) else shares
        return [
            key if ratio is None else forced(share, ratio)
            for key, share, ratio in zip(keys, shares, self.ratios, strict=True)
        ]

    def _global_keys(self, scores: Sequence[Tensor], budget: Budget | None, limits: Limits) -> list[Tensor]:
        """By score per saving where scores compare, else by score in parts of the group's mean."""
        if not self.criterion.comparable:
            return [keys_by_score(s / s.abs().mean().clamp_min(1e-300), limits, 1.0) for s in scores]
        costs = savings(self.found, budget) if budget else [1.0] * len(scores)
        return [keys_by_score(score, limits, cost) for score, cost in zip(scores, costs, strict=True)]

    def _nothing(self) -> PassError:
        reasons = sorted({frozen.why for frozen in self.found.frozen})[:3]
        return PassError(
            "nothing can be removed: " + ("every group is left out" if self.found.groups else "; ".join(reasons)),
            at=self._place,
            fix="`surgery inspect` lists the groups of channels, and what has to stay and why",
        )

    def _unmet(self, budget: Budget, left: float) -> PassError:
        """Says how far it goes, and what keeps it from going further."""
        out = sum(ratio is not None for ratio in self.ratios)
        stay = sum(frozen.channels for frozen in self.found.frozen)
        limits = [
            f"at least {self.options.min_width} of each group stays",
            f"what is left is a multiple of {self.options.round_to}" if self.options.round_to > 1 else "",
            f"{out} groups are left out or overridden" if out else "",
            f"{stay} channels have to stay" if stay else "",
        ]
        return PassError(
            f"{budget.name}: {budget.target:g} cannot be met, {left:.3g} is as far as it goes: "
            + "; ".join(filter(None, limits)),
            at=self._place,
            fix="ask for less, or loosen these limits; `surgery inspect` says why channels have to stay",
        )
