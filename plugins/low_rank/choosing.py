"""Ranks for the layers, by the option that says how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from surgery import PassError, RecipeError

from .allocation import TOLERANCE, allocate, options
from .cost import Geometry, Rung, default_step, ladder, rung
from .kernel import Kernel
from .method import Method, Ranks
from .options import DEFAULT_LAYER_MACS, LowRank

ABOVE = "is above its maximum"


@dataclass
class Ladder:
    """What one layer may become. `scale` turns f / f(0) into the error of the model."""

    name: str
    geometry: Geometry
    rungs: list[Rung]
    scale: float = 1.0
    between: tuple[Rung, ...] = ()
    """Ranks that kernels do not like as much, to come near to a budget."""

    def keep_below(self, cost: int, measure: str) -> None:
        self.rungs = [rung for rung in self.rungs if rung.cost(measure) < cost]
        self.between = tuple(rung for rung in self.between if rung.cost(measure) < cost)

    def affordable(self, measure: str, least: int, most: float) -> list[Rung]:
        """Rungs between two costs, among which are those between."""
        return [r for r in (*self.rungs, *self.between) if least < r.cost(measure) <= most]


@dataclass(frozen=True)
class Chooser:
    options: LowRank
    method: Method
    place: str

    @property
    def needs_metric(self) -> bool:
        """Whether the weight in its metric decides a layer's ranks, and not only its shape or the weight as it stands.

        With `layer_macs` and one rank the shape does: the highest that leaves the share."""
        return self.options.energy is not None or (self.options.rank is None and len(self.method.names) > 1)

    def step(self, geometry: Geometry) -> int:
        return self.options.round_to or default_step(geometry.shape)

    def ladder(self, name: str, kernel: Kernel, geometry: Geometry, scale: float, measure: str) -> Ladder:
        rungs = ladder(self.method, kernel, geometry, self.step(geometry), measure)
        between: list[Rung] = []
        if self.options.round_to is None:
            between = ladder(self.method, kernel, geometry, 1, measure, 256 if len(self.method.names) == 1 else 32)
        return Ladder(name, geometry, rungs, scale, tuple(between))

    def own(self, kernel: Kernel, geometry: Geometry) -> Rung | str:
        """What one layer becomes by an option that looks at it alone, or why it stays: neither its MACs nor its weights
        may grow."""
        ranks = self._ranks(kernel, geometry)
        if isinstance(ranks, str):
            return ranks
        found = rung(self.method, geometry, ranks, 0.0)
        if found.macs >= geometry.macs:
            return f"rank {shown(ranks)} would not get cheaper: {found.macs:,} MACs instead of {geometry.macs:,}"
        if not found.fits(geometry):
            return f"rank {shown(ranks)} would get larger: {found.weights:,} weights instead of {geometry.weights:,}"
        return found

    def _ranks(self, kernel: Kernel, geometry: Geometry) -> Ranks | str:
        limits, step = self.method.limits(geometry.shape), self.step(geometry)
        given = self.options.rank
        if given == "vbmf":
            return self.method.ranks_by_vbmf(kernel.weight, step)
        if isinstance(given, int | tuple):
            ranks = given if isinstance(given, tuple) else (given,) * len(limits)
            if any(rank > limit for rank, limit in zip(ranks, limits, strict=True)):
                return f"rank {shown(ranks)} {ABOVE}, {shown(limits)}"
            return ranks
        if self.options.energy is not None:
            return self.method.ranks_by_energy(kernel, self.options.energy, step)
        share = self.options.layer_macs or DEFAULT_LAYER_MACS
        return self._within(kernel, geometry, share) or f"no rank leaves it {share:.3g} of its {geometry.macs:,} MACs"

    def _within(self, kernel: Kernel, geometry: Geometry, share: float) -> Ranks | None:
        """The ranks that lose least of those that leave at most this share of the layer's MACs."""
        step, most = self.step(geometry), share * geometry.macs
        if self.needs_metric:
            rungs = [own for own in ladder(self.method, kernel, geometry, step) if own.macs <= most]
            return rungs[-1].ranks if rungs else None
        every = (rung(self.method, geometry, (r,), 0.0) for r in range(1, self.method.limits(geometry.shape)[0] + 1))
        highest = max((own.ranks[0] for own in every if own.macs <= most and own.fits(geometry)), default=None)
        return None if highest is None else (highest // step * step or highest,)

    def within(
        self, ladders: Sequence[Ladder], whole: float, measure: str, target: float, unit: float = 1
    ) -> dict[str, Rung]:
        """Ranks with which the model keeps `target` of `whole`, for each layer that changes.

        Raises:
            PassError: it cannot be met within `TOLERANCE`; says how far it goes.
        """
        wholes = [own.geometry.cost(measure) for own in ladders]
        rest = whole - unit * sum(wholes)
        layers = [options(own.rungs, cost, own.scale, measure) for own, cost in zip(ladders, wholes, strict=True)]
        chosen, cost = allocate(layers, (target * whole - rest) / unit)
        left = (rest + unit * cost) / whole
        if left > target * (1 + TOLERANCE):
            raise PassError(
                f"{measure}: {target:g} cannot be met, {left:.3g} is as far as it goes with every layer at its lowest"
                f" rank ({rest / whole:.3g} belongs to layers that it leaves alone)",
                at=self.place,
                fix="give a larger share, leave fewer layers out, or add a pass for the other layers",
            )
        found = {
            own.name: picked
            for own, choices, number in zip(ladders, layers, chosen, strict=True)
            if (picked := choices[number].rung) is not None
        }
        _come_near(found, ladders, measure, (target * whole - rest) / unit, cost, TOLERANCE * target * whole / unit)
        return found

    def lowest(self, ladders: Sequence[Ladder], whole: float) -> float:
        """Share of the model's MACs that is left with every layer at its lowest rank."""
        saved = sum(own.geometry.macs - min(r.macs for r in own.rungs) for own in ladders if own.rungs)
        return 1 - saved / whole

    def check_ranks(self, ranks: Mapping[str, Rung], why_not: Mapping[str, str]) -> None:
        """Raises RecipeError where the rank that was given is above the maximum of every layer."""
        if not ranks and why_not and all(ABOVE in why for why in why_not.values()):
            name, why = next(iter(why_not.items()))
            raise RecipeError(f"{name}: {why}", at=self.place, fix="give a lower rank")


def _come_near(
    found: dict[str, Rung], ladders: Sequence[Ladder], measure: str, target: float, cost: int, allowed: float
) -> None:
    """Spends what a budget leaves over, in as few layers as it takes, on ranks between the steps."""
    while target - cost > allowed:
        offers = [
            (rung.cost(measure) - now.cost(measure), own.name, rung)
            for own in ladders
            if (now := found.get(own.name)) is not None
            for rung in own.affordable(measure, now.cost(measure), now.cost(measure) + target - cost)
            if rung.error <= now.error
        ]
        if not offers:
            return
        price, name, best = max(offers, key=lambda offer: (offer[0], -offer[2].error))
        found[name] = best
        cost += price


def shown(ranks: Ranks) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"({', '.join(map(str, ranks))})"
