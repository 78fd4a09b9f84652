"""A budget of the whole model spread over its layers: where a saving costs the least error."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from .cost import Rung

TOLERANCE = 0.01
"""Share of a budget by which it may be missed."""


@dataclass(frozen=True)
class Option:
    """What a layer may cost, and the error of the model that this brings about; `rung` None = as it is."""

    cost: int
    error: float
    rung: Rung | None


def options(rungs: Sequence[Rung], whole: int, scale: float, measure: str) -> list[Option]:
    """Of one layer, cheapest first, the layer as it is last. `scale` turns its f / f(0) into the model's error."""
    return [*(Option(r.cost(measure), r.error * scale, r) for r in rungs), Option(whole, 0.0, None)]


def allocate(layers: Sequence[Sequence[Option]], target: float) -> tuple[list[int], int]:
    """The option of every layer with which all cost `target` at the most and lose little, and their cost.

    Steps down the lower convex hulls in the order of error per saving (the optimum for every cost that a step ends at),
    and then the choice that comes nearest to the target without stepping over it. Where even the cheapest cost more
    than the target, it is those.
    """
    hulls = [_hull(own) for own in layers]
    chosen = [len(own) - 1 for own in layers]
    cost = sum(own[-1].cost for own in layers)
    queue = [step for number in range(len(layers)) if (step := _step(layers, hulls, chosen, number))]
    heapq.heapify(queue)
    while cost > target and queue:
        _, number, goal = heapq.heappop(queue)
        cost += layers[number][goal].cost - layers[number][chosen[number]].cost
        chosen[number] = goal
        if step := _step(layers, hulls, chosen, number):
            heapq.heappush(queue, step)
    return _filled(layers, chosen, cost, target)


def _hull(own: Sequence[Option]) -> list[int]:
    """Indices of the options on the lower convex hull of error over cost, cheapest first."""
    hull: list[int] = []
    for i, option in enumerate(own):
        while len(hull) > 1 and _slope(own[hull[-2]], own[hull[-1]]) >= _slope(own[hull[-1]], option):
            hull.pop()
        hull.append(i)
    return hull


def _slope(cheap: Option, dear: Option) -> float:
    return (dear.error - cheap.error) / max(1, dear.cost - cheap.cost)


def _step(
    layers: Sequence[Sequence[Option]], hulls: Sequence[Sequence[int]], chosen: Sequence[int], number: int
) -> tuple[float, int, int] | None:
    """Error per saving, layer and option of a layer's next step down its hull."""
    below = [i for i in hulls[number] if i < chosen[number]]
    return (-_slope(layers[number][below[-1]], layers[number][chosen[number]]), number, below[-1]) if below else None


def _filled(layers: Sequence[Sequence[Option]], chosen: list[int], cost: int, target: float) -> tuple[list[int], int]:
    """Spends what is left below the target, each time where it takes the most error away per cost."""
    while cost < target:
        best: tuple[float, int, int] | None = None
        for number, own in enumerate(layers):
            now = own[chosen[number]]
            for i in range(chosen[number] + 1, len(own)):
                gain, price = now.error - own[i].error, own[i].cost - now.cost
                if price > 0 and gain > 0 and cost + price <= target and (best is None or gain / price > best[0]):
                    best = gain / price, number, i
        if best is None:
            break
        _, number, goal = best
        cost += layers[number][goal].cost - layers[number][chosen[number]].cost
        chosen[number] = goal
    return chosen, cost
