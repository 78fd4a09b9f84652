"""Ordered pairs of passes on the networks of the contract kit: refused before anything runs, or held to what every
result is held to."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn

from surgery import CapturedModel, Context, Data, ModelError, Pass, PassReport, RecipeError, Registry, capture
from surgery.recipe import build_pass, resolve
from surgery.testing import NETWORKS as KIT
from surgery.testing import Network
from surgery.testing.convolutional import conv, images
from surgery.testing.result import (
    exports_to_onnx,
    exports_to_source,
    graph_is_sound,
    runs,
    shapes_are_known,
    survives_a_restart,
    trains,
)
from surgery.testing.trial import Trial, first_difference, state_of


def small_cnn() -> nn.Module:
    """Convolutions with BatchNorm, and a linear layer of composite size: every pass finds something to do."""
    hidden = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 20), nn.ReLU())
    return nn.Sequential(conv(3, 6), nn.MaxPool2d(2), conv(6, 8), hidden, nn.Linear(20, 5))


FITTING = Network("small_cnn", small_cnn, images)
NETWORKS = {FITTING.name: FITTING, **KIT}
REGISTRY = Registry.load()
NAMES = tuple(REGISTRY.passes)
PAIRS = [(first, second) for first in NAMES for second in NAMES]

OPTIONS: dict[str, dict[str, Any]] = {
    "cp": {"regularisation": 0.01},
    "hashed": {"factor": 0.25, "min_weights": 8},
    "kmeans": {"bits": 2},
    "prune_filters": {"ratio": 0.4},
    "tensor_train": {"min_features": 4},
}
"""What makes a pass find something to do, and `cp` converge, with random weights in small networks."""
AGAIN: dict[str, dict[str, Any]] = {"prune_weights": {"sparsity": 0.75}}
"""Of a pass that follows itself."""
RULES = (graph_is_sound, shapes_are_known, runs, survives_a_restart, exports_to_source, trains)
"""What every result is held to, beside that the models before it stay as they were and that ONNX Runtime agrees."""


def options(name: str, after: str | None = None) -> dict[str, Any]:
    return {**OPTIONS.get(name, {}), **(AGAIN.get(name, {}) if name == after else {})}


def recipe(*names: str) -> dict[str, Any]:
    """The passes in this order, with the options that they are tried with."""
    steps = zip(names, (None, *names), strict=False)
    return {"name": " → ".join(names), "passes": [{name: options(name, before)} for name, before in steps]}


def refusal(*names: str) -> RecipeError | None:
    """What `resolve` says of passes in this order, each with the options it is tried with."""
    try:
        resolve(recipe(*names), REGISTRY)
    except RecipeError as error:
        return error
    return None


@dataclass(frozen=True)
class Applied:
    """What passes, one after the other, made of `network`; `reports` has one per pass."""

    network: Network
    model: nn.Module
    captured: CapturedModel
    after: CapturedModel
    reports: tuple[PassReport, ...] = ()
    refused: str = ""
    """What the last pass says where it has nothing to do on this model at all."""

    @classmethod
    def of(cls, network: Network) -> Applied:
        """Nothing yet."""
        model = network.model()
        captured = capture(model, network.inputs())
        return cls(network, model, captured, captured)

    @property
    def all_edit(self) -> bool:
        return not self.refused and all(report.modified for report in self.reports)

    @property
    def reasons(self) -> set[str]:
        """Why the last pass has left layers alone."""
        return {self.refused} if self.refused else {skip.why for skip in self.reports[-1].skips}

    def then(self, step: Pass) -> Applied:
        """With one pass more, whose context is that of a run: the original is the model before the first pass."""
        context = Context(self.captured, Data.of(self.network.calibration()))
        try:
            after, report = step(self.after, context)
        except ModelError as error:
            if not error.fix:
                raise
            return replace(self, refused=error.problem)
        return replace(self, after=after, reports=(*self.reports, report))


@cache
def untouched(network: str) -> Applied:
    return Applied.of(NETWORKS[network])


@cache
def first(name: str, network: str) -> Applied:
    """The first pass alone: every second one works on this."""
    return untouched(network).then(built(name))


def built(name: str, after: str | None = None, **more: Any) -> Pass:
    return build_pass(REGISTRY.passes[name], {**options(name, after), **more})


@cache
def chained(*names: str, network: str) -> Applied:
    """The passes in this order; it stops at one that finds nothing to do."""
    applied = first(names[0], network)
    for before, name in pairwise(names):
        if not applied.all_edit:
            break
        applied = applied.then(built(name, before))
    return applied


def hold(*names: str, applied: Applied, onnx: bool = True) -> None:
    """Asserts that the result of these passes keeps every rule, and that the caller's model is as it was."""
    states = [state_of(model) for model in (applied.model, applied.captured)]
    chain, batches = " → ".join(names), applied.network.calibration()
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        trial = Trial(
            built(names[-1]), applied.network, applied.model, applied.captured, applied.after, applied.reports[-1],
            batches, 0, Path(folder),
        )  # fmt: skip
        for rule in (*RULES, exports_to_onnx) if onnx else RULES:
            _ask(rule, trial, chain)
    for model, state in zip((applied.model, applied.captured), states, strict=True):
        difference = first_difference(state_of(model), state)
        assert difference is None, f"{chain} on {applied.network} changed {difference}"


def _ask(rule: Callable[[Trial], None], trial: Trial, chain: str) -> None:
    try:
        rule(trial)
    except Exception as error:
        raise AssertionError(f"{chain} on {trial.network} breaks {rule.__name__!r}: {error}") from error


def in_turns(pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """One of `pairs` for each ordered pair of plugins, every pass of a plugin in its turn."""
    chosen: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for pair in pairs:
        chosen.setdefault((REGISTRY.provider(pair[0]), REGISTRY.provider(pair[1])), []).append(pair)
    return {found[(7 * place) % len(found)] for place, found in enumerate(chosen.values())}


# --- docs/composition.md ---

SIGNS = {"composes": "✓", "refused": "✗", "nothing": "–"}


def matrix(verdicts: Mapping[tuple[str, str], str]) -> str:
    """The table: the first pass to the left, the second above."""
    rows = [["", *(f"`{name}`" for name in NAMES)], ["---", *[":---:"] * len(NAMES)]]
    rows += [[f"`{one}`", *(SIGNS[verdicts[one, other]] for other in NAMES)] for one in NAMES]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def refusals() -> str:
    """Every order that is refused, why, and what works instead; those that differ in the second pass alone together."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for one, other in PAIRS:
        if error := refusal(one, other):
            instead = error.fix.replace(f"put {other} before", "put it before")
            alike.setdefault((one, error.problem.partition(": ")[2], instead), []).append(f"`{other}`")
    rows = [["first", "then", "why not", "instead"], ["---"] * 4]
    rows += [[f"`{one}`", ", ".join(others), why, instead] for (one, why, instead), others in alike.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
