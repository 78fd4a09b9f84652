"""Which units go: the options of the pass, held against the groups of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import surgery
from surgery import Channels, Context, Criterion, Group, Layer, ModelError, PassError, PluginError

from . import BUDGETS, DEFAULT_RATIO
from .choice import (
    TOLERANCE,
    Budget,
    Limits,
    cut_for,
    first_units,
    forced,
    keys_by_score,
    keys_by_share,
    marks_at,
    ranks_of,
    savings,
)

if TYPE_CHECKING:
    from . import PruneFilters

ATTEMPTS = 8
"""To meet a budget of which units that have to be spared take some back."""


Key = tuple[str, int]
"""A group's name, and its number among those of this name."""


@dataclass(frozen=True)
class Start:
    """The model before the pass: output channels of its groups, by their names in order, and what it costs."""

    channels: dict[Key, int]
    costs: dict[str, float]

    @classmethod
    def of(cls, found: Channels) -> Start:
        alive = found.alive([torch.zeros(group.size, dtype=torch.bool) for group in found.groups])
        costs = {name: getattr(found.cost, name)(alive) for name in BUDGETS}
        return cls({key: _channels(group) for key, group in numbered(found)}, costs)

    def is_now(self, found: Channels) -> bool:
        """Whether `found` has lost nothing yet."""
        return sum(self.channels.values()) == sum(map(_channels, found.groups))

    def gone(self, found: Channels) -> list[float]:
        """Units that each group of `found` has lost since. A fraction where units are others now, such as heads in
        place of the features of every head."""
        pairs = [(group.size, _channels(group), self.channels.get(key)) for key, group in numbered(found)]
        return [size * max(0, (then or now) - now) / now for size, now, then in pairs]


def _channels(group: Group) -> int:
    return sum(len(member.positions) for member in group.of("output"))


def numbered(found: Channels) -> list[tuple[Key, Group]]:
    """Groups by name; those that begin at the same layer are numbered."""
    seen: Counter[str] = Counter()
    numbered = []
    for group in found.groups:
        numbered.append(((group.name, seen[group.name]), group))
        seen[group.name] += 1
    return numbered


@dataclass
class Choice:
    """What `options` choose among the units of `found`, in order that `part` of all that is to go since `start` is
    gone; nothing of the groups in `wrong`, whose removal was tried and is wrong."""

    options: PruneFilters
    found: Channels
    criterion: Criterion
    context: Context
    start: Start
    part: float = 1.0
    wrong: Collection[Key] = ()

    @cached_property
    def _gone(self) -> list[float]:
        return self.start.gone(self.found)

    @property
    def _place(self) -> str:
        return f"pass {self.options.name()}"

    def marks(self) -> list[Tensor]:
        """Per group (size,) which units go.

        Raises:
            RecipeError: a pattern matches no layer with channels.
            ModelError: nothing can be removed.
            PassError: the budget cannot be met, or the scores hold NaN.
        """
        if not self.found.groups and self.start.is_now(self.found):
            raise self._nothing()
        budget = self._budget()
        scores = self._scores()
        keys = self._keys(scores, budget)
        ranks = ranks_of(keys, scores)
        if budget is not None:
            return self._within(budget, keys, ranks)
        ratio = self.part * (DEFAULT_RATIO if self.options.ratio is None else self.options.ratio)
        if not self._is_global(budget):
            return self.found.spared(marks_at(keys, ratio), ranks)
        gone = sum(self._gone)
        count = int(ratio * (sum(map(len, keys)) + gone) - gone + 1e-9)
        return self.found.spared(first_units(keys, count), ranks)

    def why_left(self, lost: Sequence[int]) -> list[tuple[str, str]]:
        """Groups that lose nothing, by the layer that they begin at, and why; `lost`: units that go, per group."""
        limits = Limits(self.options.min_width, self.options.round_to)
        found = []
        for (key, group), ratio, gone in zip(numbered(self.found), self.ratios, lost, strict=True):
            if gone or key in self.wrong:
                continue
            if ratio == 0:
                why = "left out by select, exclude or overrides"
            elif len(limits.counts(group.size)) == 1:
                why = f"min_width {limits.least} and round_to {limits.round_to} leave them no choice"
            else:
                why = "the share is less than one step of this group, or others go first"
            found.append((group.name, f"all {group.size} units stay: {why}"))
        return found

    def note(self, marks: Sequence[Tensor]) -> str | None:
        """That `marks` take more than the budget asks for, and why, if they do."""
        budget = self._budget()
        if budget is None:
            return None
        left = budget.measure(self.found.alive(marks)) / budget.whole
        if left >= budget.target * (1 - TOLERANCE):
            return None
        why = "units that go together, and what overrides ask for, leave nothing between"
        if (multiple := self.options.round_to) != 1:
            why = f"what is left of a group is a multiple (round_to: {multiple}); `round_to: 1` comes nearest"
        return f"{budget.name}: {left:.3g} are left where {budget.target:g} was asked for: {why}"

    def _within(self, budget: Budget, keys: Sequence[Tensor], ranks: Sequence[Tensor]) -> list[Tensor]:
        """Marks that meet the budget once units are spared."""
        aim, left = budget, 0.0
        for _ in range(ATTEMPTS):
            marks, reached = cut_for(self.found, keys, aim)
            marks = self.found.spared(marks, ranks)
            left = budget.measure(self.found.alive(marks)) / budget.whole
            if left <= budget.target * (1 + TOLERANCE):
                return marks
            if reached > aim.target * (1 + TOLERANCE):
                break
            aim = replace(aim, target=aim.target - (left - budget.target))
        raise self._unmet(budget, left)

    @cached_property
    def ratios(self) -> list[float | None]:
        """Per group the ratio that an override demands, 0 where `select` and `exclude` leave it out, else None.

        A group is left out as soon as one of its layers is.
        """
        layers = {node: layer for layer in surgery.layers(self.found.model) for node in layer.nodes}
        owners = {side.layer: layers[side.node] for side in self.found.outputs if side.node in layers}
        known = list(owners.values() if self.start.is_now(self.found) else layers.values())  # a single one has no axis
        chosen = {layer.name for layer in self.options.selected(known)}
        self.options.check_patterns(known, "overrides")
        return [
            0.0
            if key in self.wrong
            else self._ratio([owners[m.layer] for m in g.of("output") if m.layer in owners], chosen)
            for key, g in numbered(self.found)
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

    def _scores(self) -> list[Tensor]:
        name, groups = self.criterion.name(), self.found.groups
        scores = self.criterion.scores(self.found, self.context)
        shapes = [tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__ for score in scores]
        if shapes != [(group.size,) for group in groups]:
            raise PluginError(
                f"criterion {name} gives scores of other shapes than the groups have",
                at=self._place,
                fix="its author has to give one tensor (size,) per group, see docs/plugins.md",
            )
        for score, group in zip(scores, groups, strict=True):
            if not bool(score.isfinite().all()):
                raise PassError(
                    f"criterion {name} gives NaN or infinity for the group of {group.name}",
                    at=self._place,
                    fix="look for NaN in the weights or the data, or choose another criterion",
                )
        return scores

    def _budget(self) -> Budget | None:
        for name in BUDGETS:
            if (target := getattr(self.options, name)) is not None:
                part = 1 - (1 - target) * self.part
                return Budget(name, part, getattr(self.found.cost, name), self.start.costs[name])
        return None

    def _is_global(self, budget: Budget | None) -> bool:
        if self.options.scope is None:
            return budget is not None and self.criterion.comparable
        return self.options.scope == "global"

    def _keys(self, scores: Sequence[Tensor], budget: Budget | None) -> list[Tensor]:
        """Order of removal over all groups; units that overrides demand go first, protected ones never."""
        limits = Limits(self.options.min_width, self.options.round_to)
        shares = [keys_by_share(score, limits, gone) for score, gone in zip(scores, self._gone, strict=True)]
        keys = self._global_keys(scores, budget, limits) if self._is_global(budget) else shares
        return [
            key if ratio is None else forced(share, ratio * self.part)
            for key, share, ratio in zip(keys, shares, self.ratios, strict=True)
        ]

    def _global_keys(self, scores: Sequence[Tensor], budget: Budget | None, limits: Limits) -> list[Tensor]:
        """By score per saving where scores compare, else by score in parts of the group's mean."""
        if not self.criterion.comparable:
            return [keys_by_score(s / s.abs().mean().clamp_min(1e-300), limits, 1.0) for s in scores]
        costs = savings(self.found, budget) if budget else [1.0] * len(scores)
        return [keys_by_score(score, limits, cost) for score, cost in zip(scores, costs, strict=True)]

    def _nothing(self) -> ModelError:
        reasons = sorted({frozen.why for frozen in self.found.frozen})[:3]
        return ModelError(
            f"nothing can be removed: {'; '.join(reasons) or 'no layer has output channels'}",
            at=self._place,
            fix="leave the pass out for this model; `surgery inspect` lists what has to stay and why",
        )

    def _unmet(self, budget: Budget, left: float) -> PassError:
        """Says how far it goes, and what keeps it from going further."""
        out = sum(ratio is not None for ratio in self.ratios) - len(self.wrong)
        stay = sum(frozen.channels for frozen in self.found.frozen)
        limits = [
            f"at least {self.options.min_width} of each group stays",
            f"what is left is a multiple ({self.options.round_to})" if self.options.round_to != 1 else "",
            f"{out} groups are left out or overridden" if out else "",
            f"{stay} channels have to stay" if stay else "",
            f"{len(self.wrong)} groups stay, as their removal is wrong" if self.wrong else "",
        ]
        return PassError(
            f"{budget.name}: {budget.target:g} cannot be met, {left:.3g} is as far as it goes: "
            + "; ".join(filter(None, limits)),
            at=self._place,
            fix="ask for less, or loosen these limits; `surgery inspect` says why channels have to stay",
        )
