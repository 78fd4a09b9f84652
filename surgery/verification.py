"""The proof of an operation, two questions never mixed: fidelity to the original, parity of what is shipped."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime
import torch
from torch import nn

from .captured import CapturedModel
from .export.onnx import export_onnx
from .export.runtime import CPU, CUDA, OnnxModel, runtime_session
from .fidelity import Comparison, Fidelity, Metric
from .parity import CUDA_FACTOR, Contest, OnnxContest, Parity, bound_of
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
            }
        )
        return plain


def verify(
    reference: Model | str | os.PathLike[str],
    candidate: Model | str | os.PathLike[str],
    inputs: Any,
    *,
    onnx: str | os.PathLike[str] | None = None,
    budget: Budget | None = None,
    labelled: bool = False,
    metric: Metric | None = None,
) -> Verification:
    """Compares `candidate` with `reference`, and with its own ONNX file on every provider and device there is.

    Models are modules, ONNX files, or folders that `surgery.load` reads. `inputs`: an iterable of batches (a tensor, a
    tuple or a dict of arguments; pairs with a target if `labelled`), iterated once, or a lone tensor as one batch.
    Without `onnx`, the candidate is exported for the comparison. A candidate that is an ONNX file itself has fidelity
    alone. `budget` bounds the fidelity; without one, the outputs only have to be finite numbers.

    Raises:
        ModelError: a file is no model, or outputs differ in number or shape.
        InputError: there are no batches, or they do not fit the models.
    """
    reference, candidate = _loaded(reference), _loaded(candidate)
    batches = batches_of(inputs, labelled)
    comparison = Comparison(metric)
    contests: list[tuple[Contest, Run]] = []
    with ExitStack() as stack:
        expected = stack.enter_context(running(reference, signature=candidate))
        actual = stack.enter_context(running(candidate, signature=reference))
        if isinstance(candidate, nn.Module):
            first = next(batches)
            batches = chain([first], batches)
            file = Path(onnx) if onnx else _exported(candidate, first[0], stack)
            contests = [(c, stack.enter_context(run)) for c, run in _contests(candidate, file, budget)]
        for batch, target in batches:
            outputs = actual(batch)
            comparison.add(expected(batch), outputs, target, batch_size(batch))
            for contest, run in contests:
                contest.add(batch, outputs, run(batch))
        results = [contest.conclude() for contest, _ in contests]
    return _verdict(comparison.result(), results, budget)


def _loaded(model: Model | str | os.PathLike[str]) -> Model:
    if isinstance(model, nn.Module | OnnxModel):
        return model
    if Path(model).suffix == ".onnx":
        return runtime_session(model)
    from .loading import load

    return load(Path(model))


def _exported(model: nn.Module, batch: Any, stack: ExitStack) -> Path:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    example = model.inputs if isinstance(model, CapturedModel) else batch
    return export_onnx(model, example, Path(folder) / "model.onnx")


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
        yield Contest("PyTorch cuda", bound or bound_of(model) * CUDA_FACTOR), running(model, device="cuda")


def _verdict(measured: Fidelity, results: list[Parity], budget: Budget | None) -> Verification:
    on_runtime = tuple(p for p in results if p.runtime.endswith("ExecutionProvider"))
    devices = tuple(p for p in results if p not in on_runtime)
    shortfalls = (*_losses(measured, budget), *(_difference(p) for p in results if not p.passed))
    return Verification(measured, on_runtime, devices, shortfalls)


def _losses(measured: Fidelity, budget: Budget | None) -> Iterator[str]:
    """Where the fidelity breaks the budget. What was not measured is not kept either."""
    if math.isinf(measured.max_error):
        yield "the candidate returns NaN, or infinity where the reference does not"
    if budget is None:
        return
    before, after = measured.accuracy_reference, measured.accuracy_candidate
    drop = None if before is None or after is None else before - after
    if budget.accuracy_drop is not None and (drop is None or drop > budget.accuracy_drop):
        fall = f"falls by {drop:.4g}" if drop is not None else "was not measured (no labels)"
        yield f"accuracy {fall}, the budget is a fall of {budget.accuracy_drop}"
    agreement = measured.top1_agreement
    if budget.top1_agreement is not None and (agreement is None or agreement < budget.top1_agreement):
        found = f"is {agreement:.4g}" if agreement is not None else "was not measured (no class scores)"
        yield f"top-1 agreement {found}, the budget is {budget.top1_agreement}"
    if budget.sqnr_db is not None and measured.sqnr_db < budget.sqnr_db:
        yield f"the SQNR is {measured.sqnr_db:.4g} dB, the budget {budget.sqnr_db}"


def _difference(run: Parity) -> str:
    place = f", first at {run.first_divergence.node} in {run.first_divergence.module!r}" if run.first_divergence else ""
    return (
        f"{run.runtime} is off by {run.relative_error:.3g} of the largest output, the bound is {run.bound:.3g}{place}"
    )


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
