"""The proof of an operation, two questions never mixed: fidelity to the original, parity of what is shipped."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import torch
from torch import nn

from .captured import CapturedModel
from .divergence import Divergence
from .errors import InputError
from .export.onnx import write_onnx
from .export.runtime import CPU, CUDA, OnnxModel, runtime_session
from .fidelity import Comparison, Fidelity, Metric
from .parity import CUDA_FACTOR, Contest, OnnxContest, Parity, bound_of
from .paths import path_from
from .process import exclusive
from .running import Model, Run, batch_size, batches_of, running

if TYPE_CHECKING:
    from .recipe import Budget


@dataclass(frozen=True)
class Verification:
    """Measured fidelity and parity, and every way in which they miss what they are held to."""

    fidelity: Fidelity
    parity: tuple[Parity, ...] = ()
    """The candidate's ONNX file, on each provider of ONNX Runtime."""
    devices: tuple[Parity, ...] = ()
    """The candidate in PyTorch on other devices."""
    shortfalls: tuple[str, ...] = ()
    """What fails, one sentence each; empty if all is well."""
    unmeasured: tuple[str, ...] = ()
    """Bounds of the budget that nothing was there to measure by."""

    @property
    def passed(self) -> bool:
        return not self.shortfalls

    @property
    def broken(self) -> tuple[str, ...]:
        """Which of the two questions fail: "fidelity", "parity"."""
        failed = sum(not run.passed for run in (*self.parity, *self.devices))
        return ("fidelity",) * (len(self.shortfalls) > failed) + ("parity",) * bool(failed)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; infinities become the strings "inf" and "-inf"."""
        plain: dict[str, Any] = _jsonable(
            {
                "passed": self.passed,
                "broken": list(self.broken),
                "fidelity": asdict(self.fidelity),
                "parity": [asdict(run) | {"passed": run.passed} for run in self.parity],
                "devices": [asdict(run) | {"passed": run.passed} for run in self.devices],
                "shortfalls": list(self.shortfalls),
                "unmeasured": list(self.unmeasured),
            }
        )
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Verification:
        """The inverse of `to_dict`. Raises KeyError, TypeError or ValueError where it is none."""
        return cls(
            Fidelity(**_numbers(plain["fidelity"])),
            tuple(map(_parity_from, plain["parity"])),
            tuple(map(_parity_from, plain["devices"])),
            tuple(plain["shortfalls"]),
            tuple(plain["unmeasured"]),
        )


@exclusive()
def verify(
    reference: Model | str | os.PathLike[str],
    candidate: Model | str | os.PathLike[str],
    inputs: Any,
    *,
    onnx: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
    labelled: bool = False,
    metric: Metric | None = None,
    trust: bool = False,
    parity: bool = True,
) -> Verification:
    """Compares `candidate` with `reference`, and with its own ONNX file on every provider and device there is.

    Models are modules, ONNX files, or what `surgery.load` reads, from the graph, or with `trust` by running `model.py`.
    `inputs`: an iterable of batches (a tensor, a tuple or a dict of arguments; pairs with a target if `labelled`),
    iterated once, or a lone tensor as one batch. Without `onnx`, the candidate is exported for the comparison. A
    candidate that is an ONNX file itself has fidelity alone, and so has every one with `parity=False`. `budget` bounds
    the fidelity; without one, the outputs only have to be finite numbers.

    Raises:
        ModelError: a file is no model, or outputs differ in number or shape.
        InputError: there are no batches, or they do not fit the models.
    """
    reference, candidate = _loaded(reference, trust), _loaded(candidate, trust)
    batches = batches_of(inputs, labelled)
    comparison = Comparison(metric)
    contests: list[tuple[Contest, Run]] = []
    with ExitStack() as stack:
        expected = stack.enter_context(running(reference, signature=candidate))
        actual = stack.enter_context(running(candidate, signature=reference))
        if isinstance(candidate, nn.Module) and parity:
            first = next(batches)
            batches = chain([first], batches)
            file = path_from(onnx, "onnx") if onnx is not None else _exported(candidate, first[0], stack)
            contests = [(c, stack.enter_context(run)) for c, run in _contests(candidate, file, budget)]
        for number, (batch, target) in enumerate(batches):
            outputs = actual(batch)
            try:
                comparison.add(expected(batch), outputs, target, batch_size(batch))
            except InputError as error:
                raise InputError(error.problem, at=error.at or f"batch {number}", fix=error.fix) from error
            for contest, run in contests:
                contest.add(batch, outputs, run(batch))
        results = [contest.conclude() for contest, _ in contests]
    return _verdict(comparison.result(), results, budget)


def _loaded(model: Model | str | os.PathLike[str], trust: bool) -> Model:
    if isinstance(model, nn.Module | OnnxModel):
        return model
    path = path_from(model, "the model's path")
    if path.suffix == ".onnx":
        return runtime_session(path)
    from .loading import load

    return load(path, trust=trust)


def _exported(model: nn.Module, batch: Any, stack: ExitStack) -> Path:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    example = model.inputs if isinstance(model, CapturedModel) else batch
    return write_onnx(model, example, Path(folder) / "model.onnx")


def _contests(
    model: nn.Module, file: Path, budget: Budget | None
) -> Iterator[tuple[Contest, AbstractContextManager[Run]]]:
    """Everything here that can run the model, beside PyTorch on the CPU."""
    bound = budget.parity if budget else None
    for provider in (CPU, CUDA):
        if provider in onnxruntime.get_available_providers():
            yield (
                OnnxContest.of(model, file, provider, bound),
                running(runtime_session(file, [provider]), signature=model),
            )
    if torch.cuda.is_available():
        yield (
            Contest(f"PyTorch cuda ({torch.cuda.get_device_name()})", bound or bound_of(model) * CUDA_FACTOR),
            running(model, device="cuda"),
        )


def _verdict(measured: Fidelity, results: list[Parity], budget: Budget | None) -> Verification:
    on_runtime = tuple(p for p in results if p.runtime.endswith("ExecutionProvider"))
    devices = tuple(p for p in results if p not in on_runtime)
    shortfalls = (*_losses(measured, budget), *(_difference(p) for p in results if not p.passed))
    unmeasured = tuple(f"{bound.what} ({bound.needs})" for bound in _bounds(measured, budget) if bound.value is None)
    return Verification(measured, on_runtime, devices, shortfalls, unmeasured)


def _losses(measured: Fidelity, budget: Budget | None) -> Iterator[str]:
    """Where the fidelity breaks the budget. What was not measured leaves the judgement to the other bounds; where it is
    left to none, the budget is not kept."""
    if math.isinf(measured.max_error):
        yield "the candidate returns NaN, or infinity where the reference does not"
    bounds = _bounds(measured, budget)
    if bounds and all(bound.value is None for bound in bounds):
        yield "; ".join(f"{bound.what} was not measured ({bound.needs})" for bound in bounds)
    for bound in bounds:
        if bound.value is not None and bound.value < bound.least:
            yield f"{bound.what} is {bound.value:.4g}, the budget {bound.least:.4g}"


@dataclass(frozen=True)
class _Bound:
    what: str
    value: float | None
    least: float
    needs: str


def _bounds(measured: Fidelity, budget: Budget | None) -> list[_Bound]:
    """Those that the budget gives."""
    if budget is None:
        return []
    before, after = measured.accuracy_reference, measured.accuracy_candidate
    change = None if before is None or after is None else after - before
    drop = None if budget.accuracy_drop is None else -budget.accuracy_drop
    rows = [
        ("accuracy", after, budget.accuracy, "no labels"),
        ("change of accuracy", change, drop, "no labels"),
        ("top-1 agreement", measured.top1_agreement, budget.top1_agreement, "no class scores"),
        ("SQNR in dB", measured.sqnr_db, budget.sqnr_db, "no outputs"),
    ]
    return [_Bound(what, value, least, needs) for what, value, least, needs in rows if least is not None]


def _difference(run: Parity) -> str:
    place = f", first at {run.first_divergence.node} in {run.first_divergence.module!r}" if run.first_divergence else ""
    return (
        f"{run.runtime} is off by {run.relative_error:.3g} of the largest output, the bound is {run.bound:.3g}{place}"
    )


def _parity_from(plain: Mapping[str, Any]) -> Parity:
    found = plain["first_divergence"]
    values = {key: value for key, value in _numbers(plain).items() if key not in ("passed", "first_divergence")}
    return Parity(**values, first_divergence=Divergence(**_numbers(found)) if found else None)


def _numbers(plain: Mapping[str, Any]) -> dict[str, Any]:
    return {key: float(value) if value in ("inf", "-inf", "nan") else value for key, value in plain.items()}


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
