"""A run folder: finished steps survive a kill, artifacts appear whole or not at all, other runs are not touched.

run.json                     what the folder belongs to: hashes of recipe, passes' code, model and inputs
steps/0-capture/             state, report and latency of each finished step; older states are dropped, reports stay
model.onnx model.py model.safetensors model.surgery recipe.lock.yaml report.json report.md report.html timings.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .captured import CapturedModel
from .errors import RunError
from .inputs import Inputs
from .names import bytes_of, tensors
from .passes import Pass
from .recipe import Plan
from .state import load_state, save_state
from .steps import StepResult


def run_key(plan: Plan, model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """What a run folder belongs to. Data is not part of it: calibrate with the same data when you resume.

    `steps`: what each step depends on, the recipe up to it.
    """
    shapes = {name: f"{tuple(t.shape)} {t.dtype}" for name, t in inputs.named_tensors.items()}
    code = [_code(type(step)) for step in plan.steps]
    return {
        "recipe": plan.hash,
        "plugins": _digest("".join(code).encode()),
        "model": fingerprint(model),
        "inputs": _digest(json.dumps(shapes, sort_keys=True).encode()),
        "steps": [_digest("".join([plan.hash_of(n), *code[:n]]).encode()) for n in range(len(code) + 1)],
    }


def _code(cls: type[Pass]) -> str:
    """SHA-256 over the source of the package that the pass comes from, or of its module where that is in none."""
    module = sys.modules.get(cls.__module__)
    hasher = hashlib.sha256(f"{cls.__module__}.{cls.__qualname__}".encode())
    if module is not None and (name := getattr(module, "__file__", None)):
        file = Path(name)
        for source in sorted(file.parent.rglob("*.py")) if module.__package__ else [file]:
            hasher.update(source.read_bytes())
    return hasher.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the class and every parameter and buffer."""
    hasher = hashlib.sha256(f"{type(model).__module__}.{type(model).__qualname__}".encode())
    for name, tensor in sorted(tensors(model).items()):
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        hasher.update(bytes_of(tensor))
    return hasher.hexdigest()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_REPORT, _TIMES = "report.json", "timings.json"
_STEMS = ("model", "original", "recipe", "report", "run", "timings")


class RunFolder:
    """Steps and artifacts of one run below `path`."""

    def __init__(self, path: Path, key: Mapping[str, Any], *, resume: bool) -> None:
        """Raises RunError where the folder holds another run, or files that are no run. An unfinished run with another
        recipe is resumed if the recipes are the same as far as it came."""
        if path.is_file():
            raise RunError("the folder for a run is a file", at=str(path), fix="choose another place")
        self.path = path
        self._steps = path / "steps"
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            self._sweep()
            self._claim(dict(key), resume)
            if not resume:
                shutil.rmtree(self._steps, ignore_errors=True)
            self._steps.mkdir(exist_ok=True)

    def _claim(self, key: dict[str, Any], resume: bool) -> None:
        marker = self.path / "run.json"
        if marker.exists():
            held = _read_json(marker)
            held = held if isinstance(held, dict) else {}
            differing = [part for part in key if part != "steps" and held.get(part) != key[part]]
            same_so_far = {*differing} <= {"recipe", "plugins"} and self._begins_alike(held.get("steps"), key["steps"])
            worth_keeping = [*self._steps.glob("[1-9]*"), *self.path.glob("model.*"), *self.path.glob("report.*")]
            if differing and worth_keeping and not (same_so_far and resume):
                way_on = "; or resume: the recipes are the same as far as it came" if same_so_far else ""
                if resume and "recipe" in differing:
                    way_on = "; only passes behind those that are finished may change, not name, seed, budget or files"
                what = " and with other ".join(differing)
                raise RunError(
                    f"the folder holds a run with other {what}",
                    at=str(self.path),
                    fix=f"choose another folder, or delete this one{way_on}",
                )
            if differing and not same_so_far:
                shutil.rmtree(self._steps, ignore_errors=True)
        elif any(self.path.iterdir()):
            raise RunError(
                "the folder is not empty and holds no run", at=str(self.path), fix="choose an empty or new folder"
            )
        self.write("run.json", json.dumps(key, indent=2, sort_keys=True) + "\n")

    def _begins_alike(self, held: Any, wanted: Sequence[str]) -> bool:
        """Whether the steps that an unfinished run has finished are those of the recipe that is wanted."""
        finished = sum(1 for _ in self._steps.glob("[1-9]*"))
        ended = any(self.path.glob("report.*"))
        return not ended and isinstance(held, list) and held[: finished + 1] == wanted[: finished + 1]

    def _sweep(self) -> None:
        """Remove what a killed run left half-written."""
        partial = [f for stem in _STEMS for f in self.path.glob(f".{stem}*")]
        for leftover in [*self._steps.glob(".*"), *partial]:
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def write(self, name: str, text: str) -> Path:
        """Write a text artifact, whole or not at all."""
        target, partial = self.path / name, self.path / f".{name}.partial"
        with writing(target):
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, target)
        return target

    def finished(self, names: Sequence[str]) -> list[StepResult]:
        """The finished steps, the first of `names` onwards; states that nothing needs any more are dropped."""
        results = []
        for index, name in enumerate(names):
            folder = self._folder(index, name)
            if not folder.exists():
                break
            results.append(_result_from(folder))
        for index, name in enumerate(names[1 : max(1, len(results) - 1)], start=1):
            _drop_state(self._folder(index, name))
        return results

    def state(self, index: int, name: str) -> CapturedModel:
        """The model as the finished step left it."""
        return load_state(self._folder(index, name))

    def keep(self, index: int, model: CapturedModel, result: StepResult) -> None:
        """Store a finished step; the state of the step before it is dropped, but never the captured original's."""
        folder = self._folder(index, result.name)
        partial = self._steps / f".{folder.name}"
        with writing(folder):
            partial.mkdir()
            save_state(model, partial)
            _write_json(partial / _REPORT, result.to_dict())
            if times := result.times():
                _write_json(partial / _TIMES, times)
            os.replace(partial, folder)
        if index > 1:
            for previous in self._steps.glob(f"{index - 1}-*"):
                _drop_state(previous)

    def adopt(self, file: Path) -> list[Path]:
        """Move a finished file, and the second one beside it that large weights need, here under their own names."""
        parts = sorted(file.parent.glob(f"{file.name}*"), reverse=True)  # the second file first
        for part in parts:
            with writing(self.path / part.name):
                os.replace(part, self.path / part.name)
        return [self.path / part.name for part in parts]

    def _folder(self, index: int, name: str) -> Path:
        return self._steps / f"{index}-{name}"


def _drop_state(folder: Path) -> None:
    for file in folder.iterdir():
        if file.name not in (_REPORT, _TIMES):
            file.unlink()


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path.name} is damaged: {error}", at=str(path.parent), fix="delete the folder and run again"
        ) from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n", encoding="utf-8")


def _result_from(folder: Path) -> StepResult:
    try:
        times = folder / _TIMES
        return StepResult.from_dict(_read_json(folder / _REPORT), _read_json(times) if times.exists() else {})
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"a step's report is damaged: {error}", at=str(folder), fix="delete the run folder and run again"
        ) from error


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turns a failing write (no room, no permission) into a RunError that says what is kept."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{target} cannot be written: {getattr(error, 'strerror', None) or error}",
            fix="make room or choose another folder, then resume; finished steps and earlier artifacts are kept",
        ) from error
