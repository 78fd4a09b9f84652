"""Orders of passes that cannot work, seen before anything runs.

gives     traits of the whole model                                       quantised → int8
marks     traits of the layers it edits; of the model, where no option    clustered → shared
          leaves layers to other passes
clears    traits that layers have no longer
refuses   traits after which a pass cannot run, with the reason
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..errors import RecipeError
from ..passes import Pass
from ..registry import Registry


@dataclass(frozen=True)
class Conflict:
    """Step `later` refuses the `trait` that step `earlier` leaves."""

    earlier: int
    later: int
    trait: str


def check_order(steps: Sequence[Pass], place: str, registry: Registry) -> None:
    """Raises RecipeError where a step refuses what an earlier one leaves; its remedies are orders that work."""
    found = first_conflict(steps)
    if found is None:
        return
    step, giver = steps[found.later], steps[found.earlier]
    remedies = list(_remedies(list(steps[: found.later + 1]), found, registry))
    raise RecipeError(
        f"{step.name()} cannot run after {giver.name()}: {step.refuses[found.trait]}",
        at=f"{place}, passes.{found.later}",
        fix="; or ".join(remedies) or "leave one of the two out",
    )


def first_conflict(steps: Sequence[Pass]) -> Conflict | None:
    """The first step that refuses a trait which the model has by then."""
    givers: dict[str, int] = {}
    for index, step in enumerate(steps):
        for trait in sorted(step.refuses.keys() & givers.keys()):
            return Conflict(givers[trait], index, trait)
        givers = {trait: giver for trait, giver in givers.items() if trait not in step.clears}
        givers |= dict.fromkeys(step.gives if step.partial else step.gives | step.marks, index)
    return None


def _remedies(steps: list[Pass], found: Conflict, registry: Registry) -> Iterator[str]:
    """Ways to have all of `steps`, of which the last is refused."""
    *before, last = steps
    for place in reversed(range(len(before))):
        if first_conflict([*before[:place], last, *before[place:]]) is None:
            yield f"put {last.name()} before {before[place].name()}"
            break
    for cls in registry.passes.values():
        if found.trait in cls.clears and first_conflict([*before, cls(), last]) is None:
            yield f"put {cls.name()} between the two"
    giver = before[found.earlier]
    if found.trait in giver.marks:
        before[found.earlier] = replace(giver, exclude=(*giver.exclude, "*"))
        if first_conflict([*before, last]) is None:
            yield "divide the layers between the two, with `select` or `exclude`"
