"""How many units of each group go: an order over all units, cut where the target is met.

Every unit has a key; units go in the order of their keys. Within groups the key is the share of the group that is gone
with the unit, over the whole network it is the importance per cost. A cut gives nested sets, so any budget is found by
bisection, to one unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from surgery import Channels

NEVER = math.inf
AUTO = {16: 24, 4: 8, 2: 4, 1: 0}
"""Multiples that kernels compute fastest, each with the narrowest group that is rounded to it.

ONNX Runtime computes channels 16 at a time where there are 16 (AVX-512, VNNI): in float, 24 of 32 take as long as 32.
With fewer, it has kernels of another kind, and time follows the channels again, by fours (`make widths`).
"""


@dataclass(frozen=True)
class Limits:
    """What is left of each group: at least `least` units, in multiples of `round_to` where it loses any."""

    least: int = 1
    round_to: int | Literal["auto"] = 1

    def multiple(self, size: int) -> int:
        """Of what is left of a group of `size` units."""
        if self.round_to != "auto":
            return self.round_to
        return next(multiple for multiple, width in AUTO.items() if size >= width)

    def counts(self, size: int) -> list[int]:
        """How many units may go, ascending; 0 is always among them."""
        multiple = self.multiple(size)
        kept = [k for k in range(size - 1, max(1, self.least) - 1, -1) if k % multiple == 0]
        return [0, *(size - k for k in kept)]


def keys_by_share(scores: Tensor, limits: Limits, gone: float = 0) -> Tensor:
    """(size,) share of the group that is gone with each unit; the lowest `scores` go first. `gone`: units that the
    group has lost before, of which the share counts too."""
    size = len(scores)
    counts = torch.tensor(limits.counts(size))
    return _stepped(scores, counts, (counts.double() + gone) / (size + gone))


def keys_by_score(scores: Tensor, limits: Limits, cost: float) -> Tensor:
    """(size,) mean score per cost of the units that go together, rising in the order of the scores."""
    size = len(scores)
    counts = torch.tensor(limits.counts(size))
    totals = torch.cat([torch.zeros(1, dtype=torch.float64), scores.double().sort(stable=True).values.cumsum(0)])[
        counts
    ]
    means = torch.cat([torch.full((1,), -math.inf, dtype=torch.float64), totals.diff() / counts.diff()])
    return _stepped(scores, counts, _rising(means / cost))


def _rising(values: Tensor) -> Tensor:
    """Values that never fall, each a hair above the last: units of equal score are steps of their own all the same."""
    found = values.tolist()
    for i in range(1, len(found)):
        if found[i - 1] > -math.inf:
            found[i] = max(found[i], math.nextafter(found[i - 1], math.inf))
    return torch.tensor(found, dtype=torch.float64)


def _stepped(scores: Tensor, counts: Tensor, values: Tensor) -> Tensor:
    """Keys that let `counts[i]` units go at `values[i]`, none of them sooner."""
    order = torch.argsort(scores, stable=True)
    step = torch.searchsorted(counts, torch.arange(1, len(scores) + 1))
    keys = torch.full((len(scores),), NEVER, dtype=torch.float64)
    reached = step < len(counts)
    keys[order[reached]] = values.double()[step[reached]]
    return keys


def marks_at(keys: Sequence[Tensor], cut: float) -> list[Tensor]:
    """Per group (size,) whether each unit goes: those whose keys, shares of the group, are at most `cut`."""
    return [(k <= cut + 1e-9) & (k < NEVER) for k in keys]


def first_units(keys: Sequence[Tensor], count: int) -> list[Tensor]:
    """Per group (size,) whether each unit goes: `count` of all, or as many as may go, or as go together below that.
    Those that overrides demand go in any case."""
    flat, _, steps = _in_order(keys)
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    for step in steps:
        if float(flat[step[0]]) > -math.inf and len(step) > count:
            break
        chosen[torch.tensor(step)] = True
        count -= len(step)
    return list(chosen.split([len(k) for k in keys]))


def forced(shares: Tensor, ratio: float) -> Tensor:
    """Keys for a group that loses `ratio` of its units, before anything else goes, and no more."""
    return torch.where(shares <= ratio + 1e-9, -math.inf, NEVER)


def ranks_of(keys: Sequence[Tensor], scores: Sequence[Tensor]) -> list[Tensor]:
    """Per group (size,) place of each unit in the order over all groups: by key, by score where keys are equal."""
    order = torch.argsort(torch.cat([torch.empty(0, dtype=torch.float64), *(s.double() for s in scores)]), stable=True)
    order = order[torch.argsort(torch.cat([torch.empty(0, dtype=torch.float64), *keys])[order], stable=True)]
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order))
    return list(ranks.split([len(key) for key in keys]))


def savings(found: Channels, budget: Budget) -> list[float]:
    """Per group how much of the budget's measure one unit takes with it."""
    none = [torch.zeros(group.size, dtype=torch.bool) for group in found.groups]
    whole = budget.measure(found.alive(none))
    costs = []
    for index, group in enumerate(found.groups):
        one = list(none)
        one[index] = torch.arange(group.size) == 0
        costs.append(max(1.0, whole - budget.measure(found.alive(one))))
    return costs


@dataclass(frozen=True)
class Budget:
    """Share `target` of `whole`, what the model before the pass costs, that is to remain."""

    name: str
    target: float
    measure: Callable[[Tensor], float]
    """From (positions,) alive to MACs, parameters or bytes."""
    whole: float


def cut_for(found: Channels, keys: Sequence[Tensor], budget: Budget) -> tuple[list[Tensor], float]:
    """Marks with which the budget is just met, and the share that then remains: the nearest one not above the target
    by more than `TOLERANCE`, or the smallest that there is. What overrides demand goes in any case."""
    flat, _, steps = _in_order(keys)
    demanded = sum(float(flat[step[0]]) == -math.inf for step in steps)

    def marks(count: int) -> list[Tensor]:
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[torch.tensor([i for step in steps[:count] for i in step], dtype=torch.long)] = True
        return list(chosen.split([len(k) for k in keys]))

    def share(count: int) -> float:
        return budget.measure(found.alive(marks(count))) / budget.whole

    low, high = demanded, len(steps)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if share(middle) <= budget.target else (middle + 1, high)
    if low > demanded and share(low) < budget.target * (1 - CLOSE):
        return _finer(found, steps, low - 1, budget, keys)
    return marks(low), share(low)


TOLERANCE = 0.01
"""Share of a budget by which it may be missed."""
CLOSE = 0.005
"""A cut that undershoots the target by more than this share of it is refined with smaller steps."""


def _finer(
    found: Channels, steps: list[list[int]], count: int, budget: Budget, keys: Sequence[Tensor]
) -> tuple[list[Tensor], float]:
    """From `count` steps, which leave too much, on: steps in their order, less those that would take too much, and the
    later ones of their groups."""
    sizes = [len(k) for k in keys]
    group = torch.repeat_interleave(torch.tensor(sizes, dtype=torch.long))
    chosen = torch.zeros(len(group), dtype=torch.bool)
    chosen[torch.tensor([i for step in steps[:count] for i in step], dtype=torch.long)] = True
    closed: set[int] = set()
    best, left, most = chosen, math.inf, math.inf
    for step in steps[count:]:
        owner = int(group[step[0]])
        if owner in closed:
            continue
        tried = chosen.clone()
        tried[torch.tensor(step)] = True
        share = budget.measure(found.alive(tried.split(sizes))) / budget.whole
        if share < budget.target * (1 - CLOSE):
            closed.add(owner)
            if abs(share - budget.target) < abs(left - budget.target):
                best, left = tried, share
            continue
        chosen, most = tried, share
        if share <= budget.target:
            return list(chosen.split(sizes)), share
    if most <= budget.target * (1 + TOLERANCE) and most - budget.target < budget.target - left:
        best, left = chosen, most
    return list(best.split(sizes)), left


def _in_order(keys: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[list[int]]]:
    """All keys in a row, the group of each, and the places of those that may go, in steps of what goes together."""
    flat = torch.cat([torch.empty(0, dtype=torch.float64), *keys])
    group = torch.repeat_interleave(torch.tensor([len(k) for k in keys], dtype=torch.long))
    order = [int(i) for i in torch.argsort(flat, stable=True) if flat[i] < NEVER]
    return flat, group, _together(flat, group, order)


def _together(flat: Tensor, group: Tensor, order: list[int]) -> list[list[int]]:
    """The order cut into steps of units of one group with the same key."""
    steps: list[list[int]] = []
    last: tuple[float, int] | None = None
    for i in sorted(order, key=lambda i: (float(flat[i]), int(group[i]))):
        this = float(flat[i]), int(group[i])
        if this == last:
            steps[-1].append(i)
        else:
            steps.append([i])
        last = this
    return steps
