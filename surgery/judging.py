"""Every model of a run against the original and the one before it: files, proof, weight and speed.

model ─export→ model.onnx ─┬ verify (fidelity to the original, parity of the file)
                           ├ measure
                           └ time (original, before the step, after it: in turn)
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from .calibration import checked_inputs
from .captured import CapturedModel
from .context import Progress
from .data import Data, pair_of
from .errors import ExportError, RecipeError
from .export.checked import export_onnx
from .export.onnx import OPSET
from .export.runtime import runtime_session
from .export.session_process import LARGE_FILE, file_bytes
from .inputs import Inputs
from .measurement import Latency, measure, seconds
from .parity import bound_of
from .process import RANDOM, ProcessState
from .recipe import Recipe
from .steps import Standing, StepLatency
from .verification import Verification, verify


class Judge:
    """Judges the models of one run. `rounds`: of timing, 0 leaves latency unmeasured."""

    def __init__(
        self,
        original: CapturedModel,
        recipe: Recipe,
        data: Data,
        scratch: Path,
        *,
        rounds: int,
        metadata: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.original, self._recipe, self._data, self._scratch = original, recipe, data, scratch
        self._rounds, self._metadata, self._progress = rounds, metadata, progress
        self._files: list[tuple[CapturedModel, Path]] = []
        self._written = 0
        self._restored: dict[str, None] = {}

    def file(self, model: CapturedModel) -> Path:
        """The model's ONNX file, written when it is first asked for; `original.onnx` or `model.onnx` by name."""
        for known, path in self._files:
            if known is model:
                return path
        name = "original.onnx" if model is self.original else "model.onnx"
        self._progress(name, 0, 1)
        folder = self._scratch / str(self._written)
        folder.mkdir()
        self._written += 1
        metadata = {} if model is self.original else self._metadata
        opset, check = self._recipe.opset or OPSET, model is self.original  # of others `verify` compares the outputs
        path = export_onnx(model, model.inputs, folder / name, opset=opset, metadata=metadata, check=check)
        self._files.append((model, path))
        return path

    @cached_property
    def without_file(self) -> str:
        """Why models have no ONNX file here, which the recipe does not ask for then; empty where they have.

        Raises:
            ExportError: the recipe asks for one and the original has none that is right.
        """
        try:
            self.file(self.original)
        except ExportError as error:
            if "onnx" in self._recipe.export:
                raise
            return f"neither parity nor latency was measured, for want of an ONNX file: {error.problem}"
        return ""

    def forget_all_but(self, model: CapturedModel) -> None:
        """Drop the files of other models, the original's excepted."""
        for known, path in self._files:
            if known is not model and known is not self.original:
                shutil.rmtree(path.parent)
        self._files = [(m, path) for m, path in self._files if m is model or m is self.original]

    def check_budget(self) -> Standing:
        """Where the original stands, by all the data.

        Raises:
            ExportError: it has no right ONNX file.
            RecipeError: it breaks the budget itself, or nothing is there to measure the budget by.
        """
        budget = self._recipe.budget
        verification = self._verify(self.original)
        bounds = [name for name, bound in budget.model_dump().items() if bound is not None]
        place, problems = f"recipe {self._recipe.name}, budget", "; ".join(verification.shortfalls)
        if verification.unmeasured and len(verification.unmeasured) == len({*bounds} - {"parity"}):
            raise RecipeError(
                f"the budget cannot be measured: {'; '.join(verification.unmeasured)}",
                at=place,
                fix="give evaluation data with labels for accuracy, or bound the outputs themselves:"
                + "".join(f" --set budget.{name}=null" for name in bounds if name != "parity")
                + " --set budget.sqnr_db=20",
            )
        if problems and bounds:
            raise RecipeError(
                f"the unmodified model breaks the budget already: {problems}",
                at=place,
                fix="ask for less than the model has; or are its weights, or the data, not what they should be?"
                + self._rounding(verification),
            )
        return self._standing(self.original, verification)

    def _rounding(self, verification: Verification) -> str:
        """How to let parity be what the number type of the weights rounds to, where that is what fails."""
        asked, possible = self._recipe.budget.parity, bound_of(self.original)
        if asked is None or "parity" not in verification.broken or possible <= asked:
            return ""
        return f" The weights' number type rounds to more than that: --set budget.parity={possible:g}"

    def operated(self, model: CapturedModel, before: CapturedModel) -> Standing:
        """Where a model stands after a step that was handed `before`."""
        return self._standing(model, self._verify(model), self._latency(model, before))

    def unchanged(self, model: CapturedModel, standing: Standing) -> Standing:
        """Where a model stands after a step that left it as it was, `standing` being where it stood before."""
        if model is self.original:
            return self._of_original
        latency = standing.latency
        same = latency and replace(latency, step=replace(latency.result, ratio=1.0, quartiles=(1.0, 1.0)))
        return replace(standing, latency=same)

    @cached_property
    def _of_original(self) -> Standing:
        return self.operated(self.original, before=self.original)

    def _standing(
        self, model: CapturedModel, verification: Verification, latency: StepLatency | None = None
    ) -> Standing:
        size = 0 if self.without_file else file_bytes(self.file(model))
        return Standing(measure(model, model.inputs), size, verification, latency)

    def _verify(self, model: CapturedModel) -> Verification:
        """On the evaluation data, else the calibration data, else the example inputs."""
        self._progress("verify", 0, 1)
        data = self._data
        labelled = data.evaluation is not None
        batches = self._batches()
        file = None if self.without_file else self.file(model)
        state = ProcessState()
        try:
            return verify(
                self.original,
                model,
                batches,
                onnx=file,
                budget=self._recipe.budget,
                labelled=labelled,
                metric=data.metric,
                parity=file is not None,
            )
        finally:
            changed = state.restore()
            self._restored |= dict.fromkeys(name for name in changed if not name.startswith(RANDOM))

    def restored(self) -> tuple[str, ...]:
        """What the user's data and metric have changed of the process since this was last asked, and was put back.
        Random numbers aside, which loaders draw."""
        found, self._restored = tuple(self._restored), {}
        return found

    def _batches(self) -> Iterator[Any]:
        """What models are judged on, each batch checked against the example inputs; with labels where there are any."""
        if self._data.evaluation is not None:
            for number, batch in enumerate(self._data.evaluation):
                place = f"evaluation batch {number}"
                inputs, target = pair_of(batch, place)
                yield checked_inputs(self.original, inputs, place), target
        elif self._data.calibration is not None:
            for number, batch in enumerate(self._data.calibration):
                yield checked_inputs(self.original, batch, f"calibration batch {number}")
        else:
            yield self.original.inputs

    def _latency(self, model: CapturedModel, before: CapturedModel) -> StepLatency | None:
        if not self._rounds or self.without_file:
            return None
        self._progress("latency", 0, 1)
        files = {str(id(m)): self.file(m) for m in (self.original, before, model)}
        times = self._times(files, model.inputs)
        original, previous, own = (times[str(id(m))] for m in (self.original, before, model))
        return StepLatency(Latency.of(original, original), Latency.of(original, own), Latency.of(previous, own))

    def _times(self, files: Mapping[str, Path], inputs: Inputs) -> dict[str, list[float]]:
        """In turn, round by round; files too large to be loaded together one after another."""
        together = sum(map(file_bytes, files.values())) < LARGE_FILE
        groups = [files] if together else [{key: file} for key, file in files.items()]
        times: dict[str, list[float]] = {}
        for group in groups:
            calls = {key: partial(runtime_session(file), inputs) for key, file in group.items()}
            times |= seconds(calls, rounds=self._rounds)
            del calls  # its sessions, before the next ones are made
        return times
