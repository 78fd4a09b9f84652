"""A run folder: finished steps survive a kill, artifacts appear whole or not at all, what is not ours is not touched.

run.json                     marks the folder as ours and says what of: hashes of recipe, passes' code, model, inputs
steps/0-capture/             state, report and latency of each finished step; older states are dropped, reports stay
model.onnx model.py model.safetensors model.surgery recipe.lock.yaml report.json report.md report.html timings.json
.surgery-work/ .surgery-lock only while a run is at work: what is not finished, and who it is

Nothing is deleted by pattern, and nothing in a folder without our marker. All that is unfinished lies in the work
folder, so that a killed run leaves one folder, of a name that only we give.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from .captured import CapturedModel
from .errors import RunError
from .folder_lock import locked
from .inputs import Inputs
from .names import bytes_of, tensors
from .passes import Pass
from .recipe import Plan
from .state import Containers, Known, digest, load_state, save_state
from .state.form import GRAPH, INPUTS, WEIGHTS
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


_MARKER, _LOCK, _PARTIAL, _WORK = "run.json", ".surgery-lock", ".surgery-run.partial", ".surgery-work"
_FORM = {"format": "surgery-run", "version": 1}
_REPORT, _TIMES = "report.json", "timings.json"
_STATE = (GRAPH, WEIGHTS, INPUTS)
_MODELS = tuple(f"{stem}.onnx{more}" for stem in ("model", "original") for more in ("", ".data"))
_ARTIFACTS = (
    *_MODELS,
    *("model.py", "model.graph.json", "model.safetensors", "model.surgery", "recipe.lock.yaml"),
    *(_REPORT, "report.md", "report.html", _TIMES),
)
_STEP = re.compile(r"\d+-\w+")


class RunFolder:
    """Steps and artifacts of one run below `path`, which is locked for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.work = path / _WORK
        """For what is not finished; gone when the run ends."""
        self._steps = path / "steps"
        self._marker: dict[str, Any] = {}

    @classmethod
    @contextmanager
    def claimed(cls, path: Path, key: Mapping[str, Any], *, resume: bool) -> Iterator[RunFolder]:
        """The folder at `path` for one run, made where it is missing. An unfinished run with another recipe is resumed
        if the recipes are the same as far as it came.

        Raises:
            RunError: the folder holds another run, or files that are no run, or another process is at work in it.
        """
        folder = cls(path)
        with ExitStack() as stack:
            with writing(path):
                folder._check_ours()
                path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(path / _LOCK))
                folder._claim(dict(key), resume)
                folder.work.mkdir()
            stack.callback(shutil.rmtree, folder.work, ignore_errors=True)
            yield folder

    @classmethod
    def clear(cls, path: Path) -> None:
        """Delete the run at `path`, if there is one: what runs write, by name. Other files stay.

        Raises:
            RunError: the folder is not that of a run, holds foreign files among the steps, or a run is at work there.
        """
        folder = cls(path)
        with writing(path), ExitStack() as stack:
            if not folder._check_ours():
                return
            stack.enter_context(locked(path / _LOCK))
            folder._sweep()
            folder._drop_steps()
            for name in (*_ARTIFACTS, _MARKER):
                (path / name).unlink(missing_ok=True)

    def _check_ours(self) -> bool:
        """Whether a run is here; False where there is nothing."""
        if not os.path.lexists(self.path):
            return False
        if not self.path.is_dir():
            raise RunError("the folder for a run is a file", at=str(self.path), fix="choose another place")
        if self._held() is not None:
            self._check_steps()
            return True
        if foreign := sorted({path.name for path in self.path.iterdir()} - {_LOCK, _PARTIAL}):
            raise RunError(
                f"the folder is not empty and holds no run: {foreign[0]!r} is not ours",
                at=str(self.path),
                fix="choose an empty or new folder",
            )
        return False

    def _held(self) -> dict[str, Any] | None:
        """What the marker says; None where there is none of ours."""
        try:
            held = json.loads((self.path / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return None
        return held if isinstance(held, dict) and _FORM.items() <= held.items() else None

    def _check_steps(self) -> None:
        """Raises RunError where there is what no run has put there, and we would have to delete it or write into it."""
        links = [
            path for path in (self._steps, self.work) if path.is_symlink() or (path.exists() and not path.is_dir())
        ]
        known = {*_STATE, _REPORT, _TIMES}
        foreign = [
            *links,
            *(file for step in self._step_folders() for file in step.iterdir() if file.name not in known),
        ]
        if foreign:
            raise RunError(
                f"{foreign[0].relative_to(self.path)} is not of a run",
                at=str(self.path),
                fix="move it elsewhere, or choose another folder",
            )

    def _step_folders(self) -> list[Path]:
        if self._steps.is_symlink() or not self._steps.is_dir():
            return []
        found = (path for path in self._steps.iterdir() if _STEP.fullmatch(path.name) and not path.is_symlink())
        return sorted(path for path in found if path.is_dir())

    def _claim(self, key: dict[str, Any], resume: bool) -> None:
        keep_steps, held = resume, self._held() or {}
        if self._check_ours():
            differing = [part for part in key if part != "steps" and held.get(part) != key[part]]
            same_so_far = {*differing} <= {"recipe", "plugins"} and self._begins_alike(held.get("steps"), key["steps"])
            if differing and self._worth_keeping() and not (same_so_far and resume):
                raise self._of_another_run(differing, same_so_far, resume)
            self._sweep()
            keep_steps = resume and (same_so_far or not differing)
        if not keep_steps:
            self._drop_steps()
        states = held.get("states")
        self._marker = key | {"states": states if keep_steps and isinstance(states, dict) else {}}
        self._write_marker()
        self._steps.mkdir(exist_ok=True)

    def _worth_keeping(self) -> bool:
        return bool(self._finished_passes()) or any((self.path / name).exists() for name in _ARTIFACTS)

    def _of_another_run(self, differing: Sequence[str], same_so_far: bool, resume: bool) -> RunError:
        way_on = "; or resume: the recipes are the same as far as it came" if same_so_far else ""
        if resume and "recipe" in differing:
            way_on = "; only passes behind those that are finished may change, not name, seed, budget or files"
        what = " and with other ".join(differing)
        return RunError(
            f"the folder holds a run with other {what}",
            at=str(self.path),
            fix=f"choose another folder, or delete this one{way_on}",
        )

    def _begins_alike(self, held: Any, wanted: Sequence[str]) -> bool:
        """Whether the steps that an unfinished run has finished are those of the recipe that is wanted."""
        finished = len(self._finished_passes())
        ended = any((self.path / name).exists() for name in _ARTIFACTS if name.startswith("report."))
        return not ended and isinstance(held, list) and held[: finished + 1] == wanted[: finished + 1]

    def _finished_passes(self) -> list[Path]:
        return [folder for folder in self._step_folders() if not folder.name.startswith("0-")]

    def _sweep(self) -> None:
        """Remove what a killed run left half-written. Only where the marker is ours."""
        if self.work.exists():
            shutil.rmtree(self.work)

    def _drop_steps(self) -> None:
        for folder in self._step_folders():
            _drop_step(folder)

    def _write_marker(self) -> None:
        text = json.dumps(_FORM | self._marker, indent=2, sort_keys=True) + "\n"
        partial = self.path / _PARTIAL
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, self.path / _MARKER)

    def write(self, name: str, text: str) -> Path:
        """Write a text artifact, whole or not at all."""
        with writing(self.path / name):
            (self.work / name).write_text(text, encoding="utf-8")
        return self.adopt(self.work / name)[0]

    def finished(self, names: Sequence[str]) -> list[StepResult]:
        """The finished steps, the first of `names` onwards; states that nothing needs any more are dropped, and steps
        whose state, from which the run would go on, is not as it was written."""
        folders = [self._folder(index, name) for index, name in enumerate(names)]
        folders = [*takewhile(Path.exists, folders)]
        intact = [self._is_intact(folder) for folder in (*folders[:1], *folders[-1:])]
        whole = len(folders) if all(intact) else sum(intact[:1])
        for folder in reversed(folders[whole:]):
            _drop_step(folder)
        results = [_result_from(folder) for folder in folders[:whole]]
        for index, name in enumerate(names[1 : max(1, len(results) - 1)], start=1):
            _drop_state(self._folder(index, name))
        return results

    def _is_intact(self, folder: Path) -> bool:
        return bool(digest(folder) == self._marker["states"].get(folder.name, ""))

    def state(self, index: int, name: str, known: Known, containers: Containers) -> CapturedModel:
        """The model as the finished step left it; see `load_state`."""
        return load_state(self._folder(index, name), known, containers)

    def keep(self, index: int, model: CapturedModel, result: StepResult) -> None:
        """Store a finished step; the state of the step before it is dropped, but never the captured original's."""
        folder = self._folder(index, result.name)
        partial = self.work / folder.name
        with writing(folder):
            partial.mkdir()
            self._marker["states"][folder.name] = save_state(model, partial)
            _write_json(partial / _REPORT, result.to_dict())
            if times := result.times():
                _write_json(partial / _TIMES, times)
            self._write_marker()
            os.replace(partial, folder)
        if index > 1:
            for previous in self._step_folders():
                if previous.name.startswith(f"{index - 1}-"):
                    _drop_state(previous)

    def adopt(self, file: Path) -> list[Path]:
        """Move a finished file, and the second one beside it that large weights need, here under their own names."""
        parts = [part for part in (file.with_name(f"{file.name}.data"), file) if part.exists()]  # the second file first
        for part in parts:
            with writing(self.path / part.name):
                os.replace(part, self.path / part.name)
        return [self.path / part.name for part in parts]

    def _folder(self, index: int, name: str) -> Path:
        return self._steps / f"{index}-{name}"


def _drop_step(folder: Path) -> None:
    _drop_state(folder)
    for name in (_REPORT, _TIMES):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def _drop_state(folder: Path) -> None:
    for name in _STATE:
        (folder / name).unlink(missing_ok=True)


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
