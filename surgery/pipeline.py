"""The whole way of a model: capture → passes → files → proof → report."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from . import __version__
from .captured import CapturedModel, capture
from .context import Context, Progress, silent
from .data import Data
from .export.onnx import OPSET, export_onnx
from .export.runtime import runtime_session
from .export.source import export_source
from .inputs import Inputs
from .measurement import Latency, Measurement, latency, measure
from .packing.writing import pack
from .passes import PassReport
from .recipe import Plan, resolve
from .registry import Registry
from .runs import RunFolder, run_key, writing
from .verification import Verification, verify


@dataclass(frozen=True)
class Operation:
    """What a run gives back. `folder` is None where no `out` was given."""

    model: CapturedModel
    plan: Plan
    reports: tuple[PassReport, ...]
    """One per pass, in order."""
    before: Measurement
    after: Measurement
    verification: Verification
    latency: dict[str, Latency]
    """ONNX Runtime on the example inputs, `original` and `result`, paired; empty where it was not measured."""
    sizes: dict[str, int]
    """Bytes of every file written, the original's ONNX file included."""
    original: CapturedModel
    folder: Path | None

    @property
    def passed(self) -> bool:
        """Whether parity holds and the recipe's budget is kept."""
        return self.verification.passed


def operate(
    model: nn.Module,
    example_inputs: Any,
    recipe: str | Path | dict[str, Any],
    *,
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
    path or a dict. `data`: an iterable of batches without labels, or `surgery.Data`. `out`: the folder for files and
    report; with `resume` its finished steps are taken over. `latency_rounds`: 0 leaves latency unmeasured.
    `executor`: any `concurrent.futures.Executor`, for work that is independent per layer.

    Raises:
        SurgeryError: one of its children, for a wrong recipe, plugin, model, input, data or folder. A broken budget is
            no error here; see `Operation.passed`.
    """
    plugins = registry or Registry.load()
    plan = resolve(recipe, plugins)
    given = Data.of(data)
    inputs = Inputs.of(model, example_inputs)
    with _folder(out) as folder:
        run = RunFolder(folder, run_key(plan, model, inputs), resume=resume)
        original, result, reports = _run_steps(run, plan, model, inputs, given, device, progress, plugins, executor)
        files = _write_files(run, plan, original, result, progress, plugins)
        progress("verify", 0, 1)
        verification = _verify(plan, original, result, given, files.get("model.onnx"))
        operation = Operation(
            model=result,
            plan=plan,
            reports=tuple(reports[1:]),
            before=measure(original, original.inputs),
            after=measure(result, result.inputs),
            verification=verification,
            latency=_latency(files, result.inputs, latency_rounds, progress),
            sizes={name: path.stat().st_size for name, path in sorted(files.items())},
            original=original,
            folder=Path(out) if out is not None else None,
        )
        _write_report(run, operation)
    return operation


def _run_steps(
    run: RunFolder,
    plan: Plan,
    model: nn.Module,
    inputs: Inputs,
    data: Data,
    device: str,
    progress: Progress,
    registry: Registry,
    executor: Executor | None,
) -> tuple[CapturedModel, CapturedModel, list[PassReport]]:
    names = ["capture", *(step.name() for step in plan.steps)]
    reports = run.finished(names)
    progress("capture", 0, len(names))
    if not reports:
        reports = [PassReport(notes=(captured := capture(model, inputs)).notes)]
        run.keep(0, names[0], captured, reports[0])
    original = run.state(0, names[0])
    current = original if len(reports) == 1 else run.state(len(reports) - 1, names[len(reports) - 1])
    for index in range(len(reports), len(names)):
        progress(names[index], index, len(names))
        context = Context(original, data, plan.recipe.seed + index, device, progress, registry, executor)
        current, report = plan.steps[index - 1](current, context)
        run.keep(index, names[index], current, report)
        reports.append(report)
    return original, current, reports


def _write_files(
    run: RunFolder,
    plan: Plan,
    original: CapturedModel,
    result: CapturedModel,
    progress: Progress,
    registry: Registry,
) -> dict[str, Path]:
    provenance = {"recipe": plan.recipe.name, "recipe_sha256": plan.hash, "surgery": __version__}
    run.write(
        "recipe.lock.yaml", yaml.safe_dump({**plan.lock, "sha256": plan.hash}, sort_keys=False, allow_unicode=True)
    )
    files: dict[str, Path] = {}
    if "onnx" in plan.recipe.export:
        opset = plan.recipe.opset or OPSET
        for name, model in (("original.onnx", original), ("model.onnx", result)):
            progress(name, 0, 1)
            metadata = provenance if model is result else {}
            files[name] = export_onnx(model, model.inputs, run.path / name, opset=opset, metadata=metadata)
    if "source" in plan.recipe.export:
        progress("model.py", 0, 1)
        for path in export_source(result, run.path, header=provenance):
            files[path.name] = path
    if "pack" in plan.recipe.export:
        progress("model.surgery", 0, 1)
        files["model.surgery"] = _write_pack(run.path, result, provenance, registry)
    return files


def _write_pack(folder: Path, result: CapturedModel, provenance: dict[str, str], registry: Registry) -> Path:
    """From the source of this very model, whether the recipe asks for that too or not."""
    with writing(folder), tempfile.TemporaryDirectory(prefix=".model-", dir=folder) as scratch:
        export_source(result, scratch, header=provenance)
        shutil.copy(folder / "recipe.lock.yaml", scratch)
        return pack(scratch, folder / "model.surgery", registry=registry)


def _verify(plan: Plan, original: CapturedModel, result: CapturedModel, data: Data, onnx: Path | None) -> Verification:
    """On the evaluation data, else the calibration data, else the example inputs."""
    batches = next((b for b in (data.evaluation, data.calibration) if b is not None), [original.inputs])
    labelled = data.evaluation is not None
    budget = plan.recipe.budget
    return verify(original, result, batches, onnx=onnx, budget=budget, labelled=labelled, metric=data.metric)


def _latency(files: dict[str, Path], inputs: Inputs, rounds: int, progress: Progress) -> dict[str, Latency]:
    if not rounds or "model.onnx" not in files:
        return {}
    progress("latency", 0, 1)
    sessions = {"original": runtime_session(files["original.onnx"]), "result": runtime_session(files["model.onnx"])}
    return latency({name: partial(session, inputs) for name, session in sessions.items()}, rounds=rounds)


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
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="surgery-") as temporary:
        yield Path(temporary)
