"""The whole way of a model: capture → passes, each proven → files → report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from . import __version__
from .captured import CapturedModel, capture, nested_as
from .context import Context, Progress, silent
from .contract import snapshot
from .data import Data
from .errors import CrashError, ModelError, PassError, RecipeError, SurgeryError
from .export.source import export_source
from .inputs import Inputs
from .judging import Judge
from .measurement import Latency, Measurement
from .memory import give_back
from .packing.writing import pack
from .passes import Pass, PassReport
from .paths import path_from
from .precision import full_precision
from .preparing import unwrapped
from .process import exclusive
from .recipe import OnBreak, Plan, plain, resolve
from .registry import Registry
from .running import check_device
from .runs import RunFolder, run_key, writing
from .soundness import check_outputs
from .state import Known, containers_of, load_state, save_state
from .steps import Outcome, Standing, StepResult
from .verification import Verification

SOFTENINGS = 4
"""How often a step is softened before it is undone; each time it does half as much."""


@dataclass(frozen=True)
class Operation:
    """What a run gives back. `folder` is None where no `out` was given."""

    model: CapturedModel
    plan: Plan
    steps: tuple[StepResult, ...]
    """`capture`, then one per pass that was run, in order."""
    sizes: dict[str, int]
    """Bytes of every file written, the original's ONNX file included."""
    original: CapturedModel
    folder: Path | None

    @property
    def passed(self) -> bool:
        """Whether parity holds and the recipe's budget is kept."""
        return self.verification.passed

    @property
    def reports(self) -> tuple[PassReport, ...]:
        """One per pass that was run, in order."""
        return tuple(step.report for step in self.steps[1:])

    @property
    def before(self) -> Measurement:
        return self.steps[0].standing.measurement

    @property
    def after(self) -> Measurement:
        return self.steps[-1].standing.measurement

    @property
    def verification(self) -> Verification:
        """Of the result."""
        return self.steps[-1].standing.verification

    @property
    def latency(self) -> dict[str, Latency]:
        """ONNX Runtime on the example inputs, `original` and `result`, paired; empty where it was not measured."""
        found = self.steps[-1].standing.latency
        return {"original": found.original, "result": found.result} if found else {}


def operate(
    model: nn.Module,
    example_inputs: Any,
    recipe: str | Path | dict[str, Any],
    *,
    overrides: Mapping[str, Any] | None = None,
    data: Any = None,
    out: str | Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    latency_rounds: int = 30,
    registry: Registry | None = None,
    progress: Progress = silent,
    executor: Executor | None = None,
) -> Operation:
    """Apply a recipe to a model and prove the result. The caller's model is not changed.

    `example_inputs`: a tensor, a tuple or a dict of the model's arguments, batch in dimension 0. `recipe`: a name, a
    path or a dict; `overrides` change it by path, `{"passes.1.ratio": 0.3}`. `data`: an iterable of batches without
    labels, or `surgery.Data`. `out`: the folder for files and report; with `resume` its finished steps are taken over.
    `latency_rounds`: 0 leaves latency unmeasured. `executor`: any `concurrent.futures.Executor`, for work that is
    independent per layer.

    Raises:
        SurgeryError: one of its children, for a wrong recipe, plugin, model, input, data or folder, or a budget that
            the unmodified model breaks. That the result breaks it is no error here; see `Operation.passed`.
    """
    plugins = registry or Registry.load()
    plan = resolve(recipe, plugins, overrides)
    check_device(device)
    model = unwrapped(model)
    inputs, given = Inputs.of(model, example_inputs), Data.of(data)
    for step in plan.steps:
        step.check_data(given, plugins)
    with ExitStack() as stack:
        folder = stack.enter_context(_folder(out))
        run = stack.enter_context(RunFolder.claimed(folder, run_key(plan, model, inputs), resume=resume))
        stack.enter_context(exclusive())  # later than the folder: who finds that taken does not wait
        stack.enter_context(full_precision())
        surgeon = _Run(run, plan, given, plugins, device, latency_rounds, progress, executor)
        operation = surgeon.operate(model, inputs)
        operation = replace(operation, folder=None if out is None else folder)
        _write_report(run, operation)
    return operation


@dataclass(frozen=True)
class _Run:
    """What stays the same from step to step."""

    folder: RunFolder
    plan: Plan
    data: Data
    registry: Registry
    device: str
    rounds: int
    progress: Progress
    executor: Executor | None

    def operate(self, model: nn.Module, inputs: Inputs) -> Operation:
        names = ["capture", *(step.name() for step in self.plan.steps)]
        results = self.folder.finished(names)
        self.progress("capture", 0, len(names))
        original, judge = self._original(model, inputs, results)
        last = len(results) - 1
        nested = partial(containers_of, original)
        current = original if last == 0 else self.folder.state(last, names[last], Known(self.registry), nested)
        while len(results) < len(names) and results[-1].outcome != "stopped":
            self.progress(names[len(results)], len(results), len(names))
            current, result = self._step(len(results), current, results[-1].standing, judge)
            judge.forget_all_but(current)
            self.folder.keep(len(results), current, result)
            results.append(result)
        files = self._write_files(original, current, judge)
        sizes = {name: path.stat().st_size for name, path in sorted(files.items())}
        return Operation(current, self.plan, tuple(results), sizes, original, None)

    def _original(self, model: nn.Module, inputs: Inputs, results: list[StepResult]) -> tuple[CapturedModel, Judge]:
        """The original as its stored state has it, so that a resumed run goes on from the same bits, and who judges by
        it. A first run adds the step to `results`."""
        if results:
            nested = partial(nested_as, model, inputs)
            original = self.folder.state(0, "capture", Known(self.registry), nested)
            return original, self._judge(original)
        captured = capture(model, inputs)
        self._check_early(captured)
        with writing(self.folder.work):
            save_state(captured, self.folder.work / "captured")
        notes, specs, known = captured.notes, containers_of(captured), Known(self.registry, captured)
        del captured  # its weights need not be there twice
        give_back(model)
        original = load_state(self.folder.work / "captured", known, lambda: specs)
        judge = self._judge(original)
        standing = judge.check_budget()
        notes += (judge.without_file,) if judge.without_file else ()
        report = PassReport(notes=notes).with_restored(judge.restored(), "the evaluation")
        results.append(StepResult("capture", report, standing))
        self.folder.keep(0, original, results[0])
        return original, judge

    def _check_early(self, captured: CapturedModel) -> None:
        """Raises what would otherwise come up after passes have run."""
        check_outputs(captured)
        for index, step in enumerate(self.plan.steps, start=1):
            try:
                step.check_patterns(step.nameable(captured), *step.patterns, earlier=index > 1)
            except RecipeError as error:
                raise _placed(error, index, len(self.plan.steps), step) from error

    def _judge(self, original: CapturedModel) -> Judge:
        return Judge(
            original,
            self.plan.recipe,
            self.data,
            self.folder.work,
            rounds=self.rounds,
            metadata=self._provenance,
            progress=self.progress,
        )

    def _step(
        self, index: int, model: CapturedModel, standing: Standing, judge: Judge
    ) -> tuple[CapturedModel, StepResult]:
        """The model after the step, and what was done; the step's pass is tried milder where the plan says so.

        A pass that cannot do what it is asked for is treated as one that breaks the budget, if the plan says how; one
        that crashes ends the run.
        """
        step: Pass | None = self.plan.steps[index - 1]
        how: OnBreak = self.plan.on_break[index - 1]
        attempts: list[str] = []
        while step is not None:
            report, result = PassReport(), partial(StepResult, step.name(), options=plain(step.options))
            try:
                current, report, reached = self._attempt(index, step, model, standing, judge)
                problems = reached.verification.shortfalls if report.modified else ()
            except (ModelError, PassError) as error:
                if how == "continue" or isinstance(error, CrashError):
                    raise _placed(error, index, len(self.plan.steps), step) from error.__cause__ or error
                problems = (error.problem,)
            except SurgeryError as error:
                raise _placed(error, index, len(self.plan.steps), step) from error.__cause__ or error
            if how == "continue" or not problems:
                outcome: Outcome = "softened" if attempts else "kept"
                return current, result(report, reached, outcome, attempts=tuple(attempts))
            attempts.append(_broken(step, problems))
            step = step.softened() if how == "soften" and len(attempts) <= SOFTENINGS else None
        return model, result(
            PassReport((), report.skips, report.notes),
            judge.unchanged(model, standing),
            "stopped" if how == "stop" else "undone",
            attempts=tuple(attempts),
        )

    def _attempt(
        self, index: int, step: Pass, model: CapturedModel, standing: Standing, judge: Judge
    ) -> tuple[CapturedModel, PassReport, Standing]:
        context = Context(
            judge.original,
            self.data,
            self.plan.recipe.seed + index,
            self.device,
            self.progress,
            self.registry,
            self.executor,
        )
        result, report = step(model, context)
        give_back(model)
        if not report.modified:
            return model, report, judge.unchanged(model, standing)
        reached = judge.operated(result, before=model)
        return result, report.with_restored(judge.restored(), "the evaluation"), reached

    def _write_files(self, original: CapturedModel, result: CapturedModel, judge: Judge) -> dict[str, Path]:
        lock = yaml.safe_dump(self.plan.lock, sort_keys=False, allow_unicode=True)
        self.folder.write("recipe.lock.yaml", f"# sha256 of what it does: {self.plan.hash}\n{lock}")
        files: dict[str, Path] = {}
        if "onnx" in self.plan.recipe.export:
            shipped = result if result is not original else snapshot(result)
            for model in (original, shipped):
                files |= {path.name: path for path in self.folder.adopt(judge.file(model))}
        if {"source", "pack"} & {*self.plan.recipe.export}:
            files |= {path.name: path for path in self._write_source(result)}
        return files

    def _write_source(self, result: CapturedModel) -> Iterator[Path]:
        """Source and weights, or the pack of both, or all; made in the work folder."""
        self.progress("model.py", 0, 1)
        asked, made = self.plan.recipe.export, self.folder.work / "source"
        with writing(self.folder.path):
            source, weights, graph = export_source(result, made, header=self._provenance)
            shutil.copy(self.folder.path / "recipe.lock.yaml", made)
            if "pack" in asked:
                self.progress("model.surgery", 0, 1)
                pack(made, registry=self.registry)
        kept = [weights, graph, source] if "source" in asked else []
        for file in [*kept, *made.glob("*.surgery")]:
            yield from self.folder.adopt(file)

    @property
    def _provenance(self) -> dict[str, str]:
        return {"recipe": self.plan.recipe.name, "recipe_sha256": self.plan.hash, "surgery": __version__}


def _placed(error: SurgeryError, index: int, steps: int, step: Pass) -> SurgeryError:
    name = "" if f"pass {step.name()}" in error.at else f"pass {step.name()}"
    place = ", ".join(filter(None, [f"step {index} of {steps}", name, error.at]))
    can_go_on = isinstance(error, ModelError | PassError) and not isinstance(error, CrashError)
    way_on = "go on without it: `on_break: soften`, `undo` or `stop`" if can_go_on else ""
    fix = "; or ".join(filter(None, [error.fix, way_on]))
    return type(error)(error.problem, at=place, fix=fix)


def _broken(step: Pass, shortfalls: Sequence[str]) -> str:
    strengths = [f"{name} {getattr(step, name)}" for name in step.strength if getattr(step, name) is not None]
    return f"{', '.join(strengths) or 'as given'}: {'; '.join(shortfalls)}"


def _write_report(run: RunFolder, operation: Operation) -> None:
    from . import report

    summary, timings = report.summary(operation), report.timings(operation)
    run.write("report.json", report.to_json(summary))
    run.write("timings.json", report.to_json(timings))
    run.write("report.md", report.to_markdown(summary, timings))
    run.write("report.html", report.to_html(summary, timings))


@contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    if out is not None:
        yield path_from(out, "out")
        return
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        yield Path(temporary)
