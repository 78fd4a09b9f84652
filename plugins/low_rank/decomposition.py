"""The way of a decomposition through a model: which layers, which ranks, the factors, the new layers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import surgery
from surgery import (
    Affine,
    CapturedModel,
    Context,
    Edit,
    Inputs,
    Layer,
    Operator,
    PassError,
    PassReport,
    Regression,
    Skip,
    Task,
)
from surgery.graph import tree_leaves

from .allocation import TOLERANCE
from .choosing import Chooser, Ladder, shown
from .cost import Geometry, Rung
from .fitting import Fit, fit, judged, measured
from .kernel import Kernel
from .method import Method
from .options import LowRank
from .timing import Stopwatch

PENDING = 8
"""Layers that wait for an executor at a time; each holds its covariance."""
TRIALS = 10
"""Most models that are tried for `output_error`."""
CLOSE = 0.01
"""Share of `output_error` by which it may be missed."""


@dataclass(frozen=True)
class Target:
    """A layer that may be decomposed. `affine`: with its BatchNorm as one map; None where it is called several times,
    holds its weight elsewhere, or has too many features for a covariance."""

    layer: Layer
    geometry: Geometry
    affine: Affine | None

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def weight(self) -> Tensor:
        """(O, I, *k) as it stands."""
        weight: Any = self.layer.module.weight
        return weight.detach().cpu().double()  # type: ignore[no-any-return]

    @property
    def scaled(self) -> Tensor:
        """(O, I, *k) with the BatchNorm's factors."""
        if self.affine is None:
            return self.weight
        return self.affine.scaled(surgery.weight_matrix(self.layer.module).cpu())[0].view(self.weight.shape)

    @property
    def bias(self) -> Tensor | None:
        bias: Any = self.layer.module.bias
        return None if bias is None else bias.detach().cpu().double()


@dataclass(frozen=True)
class Study:
    """A layer with the task of giving its own outputs; None without data. `scale`: variance of what they go into."""

    target: Target
    regression: Regression | None = None
    scale: float = 0.0

    def kernel(self, in_outputs: bool) -> Kernel:
        if in_outputs and self.regression is not None:
            return Kernel(self.target.scaled, self.regression.xx[0])
        return Kernel(self.target.weight)


class Decomposition:
    """One application of a decomposition to `model`, which it edits."""

    def __init__(self, options: LowRank, model: CapturedModel, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.method: Method = options.method
        self.place = f"pass {options.name()}"
        self.chooser = Chooser(options, self.method, self.place)
        self.in_outputs = context.has_calibration and options.metric != "weight"
        self.sequential = self.in_outputs if options.sequential is None else options.sequential
        self.before = surgery.snapshot(model)
        self.stopwatch = Stopwatch(self.method)
        self.slower: dict[str, str] = {}
        """Layers that were tried and are no faster, with the reason."""

    def run(self) -> PassReport:
        targets, skips = self._targets()
        notes: tuple[str, ...] = ()
        if self.options.output_error is not None:
            ranks, error = self._least(targets, self.options.output_error)
            notes = (f"error of the outputs on the calibration data: {error:.4g}",)
        elif self.options.decomposed_macs is not None:
            ranks, notes = self._within(targets, "macs", self.options.decomposed_macs, of_decomposed=True)
        elif self.options.budget is not None:
            ranks, notes = self._within(targets, *self.options.budget)
        else:
            ranks, why_not = self._own(targets)
            self.chooser.check_ranks(ranks, why_not)
            skips += [Skip(name, why) for name, why in why_not.items()]
        named = {skip.layer for skip in skips}
        left = [t.name for t in targets if t.name not in ranks and t.name not in named]
        skips += [Skip(name, self.slower.get(name, "the budget leaves it as it is")) for name in left]
        if not targets and not skips:
            notes = (f"no {self.method.types} layer is among those that are selected",)
        edits = self._apply(self.model, targets, ranks)
        return PassReport(tuple(edits), tuple(skips), notes)

    # --- which layers, which ranks ---

    def _targets(self) -> tuple[list[Target], list[Skip]]:
        """Layers that the method can decompose, and why not the others."""
        maps = self._maps(self.before)
        targets, skips = [], []
        for layer in self.options.selected(surgery.layers(self.before)):
            if not layer.type.startswith(self.method.types):
                continue
            why = self._degenerate(layer) or self.method.obstacle(layer.module) or surgery.tied(self.before, layer)
            if why:
                skips.append(Skip(layer.name, why))
            else:
                targets.append(Target(layer, Geometry.of(self.before, layer), maps.get(layer.name)))
        return targets, skips

    def _degenerate(self, layer: Layer) -> str | None:
        return None if bool(self.options.finite_weight(layer).any()) else "its weight is zero"

    def _maps(self, model: CapturedModel) -> dict[str, Affine]:
        """Layers that are fitted with their BatchNorm, towards what a shortcut leaves to them."""
        if not self.in_outputs:
            return {}
        return {a.layer.name: a for a in surgery.affine_maps(model) if self._fits_memory(a.layer)}

    def _fits_memory(self, layer: Layer) -> bool:
        return surgery.gram_bytes(layer) <= self.context.calibration.gram_bytes

    def _own(self, targets: list[Target]) -> tuple[dict[str, Rung], dict[str, str]]:
        """The ranks of every layer by itself, or why it stays."""
        ranks, why_not = {}, {}
        by_outputs = self.in_outputs and self.chooser.needs_metric
        for study in self._studies(targets) if by_outputs else map(Study, targets):
            found = self.chooser.own(study.kernel(by_outputs), study.target.geometry)
            if isinstance(found, Rung) and (slow := self._slow(study.target, found)):
                found = slow
            if isinstance(found, str):
                why_not[study.target.name] = found
            else:
                ranks[study.target.name] = found
        return ranks, why_not

    def _slow(self, target: Target, rung: Rung) -> str | None:
        """Why these ranks are of no use in ONNX Runtime; None where they are, or it was not asked for."""
        if not self.options.only_if_faster:
            return None
        gain = self.stopwatch.gain(target.layer, rung)
        return None if gain > 1 else f"rank {shown(rung.ranks)} is no faster in ONNX Runtime: {gain:.2f} times as fast"

    def _ladders(self, targets: list[Target], measure: str) -> list[Ladder]:
        """What every layer may become; estimating the errors is work for the executor."""
        ladders: list[Ladder] = []
        pending: deque[Future[Ladder]] = deque()
        for number, study in enumerate(self._studies(targets) if self.in_outputs else map(Study, targets)):
            self.context.progress("ranks", number, len(targets))
            kernel, own = study.kernel(self.in_outputs), study.target
            scale = kernel.energy / study.scale if study.scale else 1.0
            pending.append(self.context.submit(self.chooser.ladder, own.name, kernel, own.geometry, scale, measure))
            if len(pending) > (PENDING if self.context.executor else 0):
                ladders.append(pending.popleft().result())
        return [*ladders, *(job.result() for job in pending)]

    def _within(
        self, targets: list[Target], measure: str, share: float, of_decomposed: bool = False
    ) -> tuple[dict[str, Rung], tuple[str, ...]]:
        """The ranks for a budget, and a note where they leave more than a hundredth of it unused. `share`: of the
        model, or of the layers that can be decomposed."""
        whole = surgery.measure(self.before, self.before.inputs)
        cost = {"macs": whole.macs, "parameters": whole.parameters, "bytes": whole.parameter_bytes}[measure]
        unit = whole.parameter_bytes / max(1, whole.parameters) if measure == "bytes" else 1.0
        ladders = self._ladders(targets, measure)

        def left_of_all() -> float:
            able = sum(own.geometry.cost(measure) for own in ladders if own.rungs)
            return 1 - (1 - share) * able / cost if of_decomposed else share

        ranks = self._spread(targets, ladders, cost, measure, left_of_all, unit)
        share = left_of_all()
        saved = unit * sum(t.geometry.cost(measure) - ranks[t.name].cost(measure) for t in targets if t.name in ranks)
        left = 1 - saved / cost
        if left >= share * (1 - TOLERANCE):
            return ranks, ()
        return ranks, (f"{measure}: {left:.3g} of the model is left; no ranks come nearer to {share:g} from below",)

    def _spread(
        self,
        targets: list[Target],
        ladders: list[Ladder],
        whole: int,
        measure: str,
        share: Callable[[], float],
        unit: float = 1.0,
    ) -> dict[str, Rung]:
        """The best ranks for a budget; a choice that is no faster goes off its ladder, with all that cost more, before
        `share` is asked again."""
        known, by_name = {target.name: target for target in targets}, {own.name: own for own in ladders}
        while True:
            ranks = self.chooser.within(ladders, whole, measure, share(), unit)
            slow = {name: why for name, rung in ranks.items() if (why := self._slow(known[name], rung))}
            if not slow:
                return ranks
            self.slower |= slow
            for name in slow:
                by_name[name].keep_below(ranks[name].cost(measure), measure)

    def _least(self, targets: list[Target], limit: float) -> tuple[dict[str, Rung], float]:
        """The ranks of the cheapest model whose outputs keep to the error `limit`, and its error."""
        ladders, whole = self._ladders(targets, "macs"), surgery.measure(self.before, self.before.inputs).macs
        low, high = self.chooser.lowest(ladders, whole), 1.0
        best: tuple[dict[str, Rung], float] = {}, 0.0
        least = math.inf
        share = low
        for _ in range(TRIALS):
            ranks = self._spread(targets, ladders, whole, "macs", partial(float, share))
            trial = surgery.snapshot(self.before)
            self._apply(trial, targets, ranks)
            error = self._error_of(trial)
            least = min(least, error) if ranks else least
            if error <= limit:
                best, high = (ranks, error), share
                if share == low or error >= limit * (1 - CLOSE):
                    break
            else:
                low = share
            share = (low + high) / 2
        if not best[0]:
            raise PassError(
                f"output_error: {limit:g} cannot be met by any ranks, {least:.3g} is as near as it goes",
                at=self.place,
                fix="allow more, or leave the pass out",
            )
        return best

    def _error_of(self, trial: CapturedModel) -> float:
        """‖y - y₀‖ / ‖y₀‖ over all outputs and the calibration data."""
        lost = total = 0.0
        for batch in self.context.data.calibration or ():
            inputs = Inputs.of(trial, batch)
            ours, theirs = (_outputs(model, inputs) for model in (trial, self.before))
            lost += sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, theirs, strict=True))
            total += sum(float(b.double().square().sum()) for b in theirs)
        return (lost / total) ** 0.5 if total else 0.0

    def _studies(self, targets: list[Target]) -> Iterator[Study]:
        """Every target with the task of giving its own outputs, in some order."""
        if not self.context.has_calibration:
            yield from (Study(target) for target in targets)
            return
        calibration = self.context.calibration
        swept = {t.name: t for t in targets if t.affine is not None}
        steps = [t.affine.step() for t in swept.values() if t.affine is not None]
        for task in calibration.sweep(self.before, steps, self.before):
            yield Study(swept[task.layer.name], task.regression, task.spread)
        others = {t.layer: t for t in targets if t.affine is None}
        yield from (Study(t) for t in others.values() if not self._fits_memory(t.layer))
        for layer, statistics in calibration.stream(self.before, filter(self._fits_memory, others), ("gram",)):
            target = others[layer]
            bias = None if target.bias is None else target.bias.unsqueeze(0)
            regression = statistics.unfolded.regression(target.weight.flatten(1).unsqueeze(0), bias)
            yield Study(target, regression, float(regression.y_variance.sum()))

    # --- factors and layers ---

    def _apply(self, model: CapturedModel, targets: list[Target], ranks: Mapping[str, Rung]) -> list[Edit]:
        """Put factors in the place of the layers that have ranks."""
        chosen = [target for target in targets if target.name in ranks]
        if not chosen:
            return []
        turns = [t for t in chosen if t.affine is not None] if self.sequential else []
        found, resolved = self._in_turn(model, turns, ranks) if turns else ({}, [])
        found |= self._at_once(model, [t for t in chosen if t.name not in found], ranks)
        here = {layer.name: layer for layer in surgery.layers(model)}
        edits = [self._replaced(model, here[t.name], t, found[t.name], ranks[t.name]) for t in chosen]
        return [*edits, *resolved]

    def _at_once(self, model: CapturedModel, targets: list[Target], ranks: Mapping[str, Rung]) -> dict[str, Fit]:
        """All layers from the statistics of the model as it was."""
        pending: deque[tuple[Study, Future[Fit]]] = deque()
        maps, found = self._maps(model), {}

        def finish() -> None:
            study, future = pending.popleft()
            with self._naming(study.target):
                fitted = future.result()
            found[study.target.name] = self._judged(study, fitted)
            if study.target.affine is not None and study.regression is not None and fitted.bias is not None:
                maps[study.target.name].put(fitted.matrix, fitted.bias.unsqueeze(0), study.regression)

        for number, study in enumerate(self._studies(targets)):
            self.context.progress(self.options.name(), number, len(targets))
            regression = study.regression if self.in_outputs else None
            weight = study.target.weight if regression is None else study.target.scaled
            job = self.context.submit(fit, self.method, weight, ranks[study.target.name].ranks, regression)
            pending.append((study, job))
            if len(pending) > (PENDING if self.context.executor else 0):
                finish()
        while pending:
            finish()
        return found

    def _judged(self, study: Study, fitted: Fit) -> Fit:
        """A fit to the weight with the error of its outputs, where there are data to tell."""
        if self.in_outputs or study.regression is None:
            return fitted
        return measured(fitted, study.regression, study.target.bias)

    @contextmanager
    def _naming(self, target: Target) -> Iterator[None]:
        """Errors name the layer."""
        try:
            yield
        except PassError as error:
            raise PassError(f"{target.name}: {error.problem}", at=self.place, fix=error.fix) from error

    def _in_turn(
        self, model: CapturedModel, targets: list[Target], ranks: Mapping[str, Rung]
    ) -> tuple[dict[str, Fit], list[Edit]]:
        """Layer by layer, each from the inputs that the layers before it give by now. Layers that keep their form are
        solved anew too, once one before them does not. In the sweep a layer has its factors' product for a weight."""
        maps, known = self._maps(model), {target.name: target for target in targets}
        steps = [a.step() for a in maps.values() if a.layer.name in known or self._may_change(a.layer)]
        found, resolved = {}, []
        for number, task in enumerate(self.context.calibration.sweep(model, steps, self.before)):
            self.context.progress(self.options.name(), number, len(steps))
            name, affine = task.layer.name, maps[task.layer.name]
            if name in known:
                with self._naming(known[name]):
                    found[name] = self._fitted(task, known[name], ranks[name])
                bias = found[name].bias
                assert bias is not None
                affine.put(found[name].matrix, bias.unsqueeze(0), task.regression)
            elif found:
                errors = dict(zip(("error_before", "error_after"), affine.solve(task), strict=True))
                resolved.append(Edit(name, "weights solved anew", errors))
        return found, resolved

    def _may_change(self, layer: Layer) -> bool:
        """Whether the options leave `layer` to this pass, although it keeps its form."""
        select, exclude = self.options.select, self.options.exclude
        wanted = not select or any(surgery.matches(layer, pattern) for pattern in select)
        return wanted and not any(surgery.matches(layer, pattern) for pattern in exclude)

    def _fitted(self, task: Task, target: Target, rung: Rung) -> Fit:
        weight, regression = target.scaled, task.regression
        found = fit(self.method, weight, rung.ranks, regression)
        current = regression
        for _ in range(task.rounds):
            current = task.rectified(found.matrix, current.bias(found.matrix))
            found = fit(self.method, weight, rung.ranks, current)
        return judged(found.factors, weight, regression, current.bias(found.matrix)[0])

    def _replaced(self, model: CapturedModel, layer: Layer, target: Target, found: Fit, rung: Rung) -> Edit:
        module: Any = layer.module
        bias = found.bias if found.bias is not None and target.affine is None else module.bias
        parts = found.factors.parts(module, bias)
        surgery.replace_layer(model, layer, parts)
        named = [name for name, part in parts.items() if not isinstance(part, Operator)]
        near = "outputs" if found.bias is not None else "weights"
        gains = ", which gains a bias" if target.bias is None and bias is not None else ""
        numbers = dict(zip(self.method.names, rung.ranks, strict=True))
        errors = {"weight_error": found.weight_error, "output_error": found.output_error}
        what = f"{', '.join(named)} of rank {shown(rung.ranks)}, fitted to its {near}{gains}"
        return Edit(
            layer.name,
            what,
            {
                **numbers,
                **{name: error for name, error in errors.items() if error is not None},
                "macs_before": target.geometry.macs,
                "macs_after": rung.macs,
                "parameters_before": sum(p.numel() for p in target.layer.module.parameters()),
                "parameters_after": sum(p.numel() for part in parts.values() for p in part.parameters()),
            },
        )


def _outputs(model: CapturedModel, inputs: Inputs) -> list[Tensor]:
    model.recompile()
    for module in model.modules():
        module.training = False
    with torch.no_grad():
        return [t for t in tree_leaves(model(*inputs.args, **inputs.kwargs)) if isinstance(t, Tensor)]
