"""How far an operated model is from the original. It may lose something, within the recipe's budget.

Outputs of integers and truth values, such as indices and masks, are names and no amounts: they agree or they do not,
and have no part in errors and SQNR where there are other outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .deviation import Deviation, check_shapes
from .errors import InputError
from .running import Model, batch_size, batches_of, running

Metric = Callable[[Any, Any], float]
"""`metric(output, target)` of a batch, higher is better. `output` is the first tensor that the model returns."""


@dataclass(frozen=True)
class Fidelity:
    """How far a candidate is from its reference, over all samples seen. `surgery.deviation` holds the formulas.

    Errors and SQNR are those of the floating-point outputs, or of all where there are none.
    """

    samples: int
    max_error: float
    """0 = identical; infinite where the candidate is NaN, or either is infinite alone."""
    relative_error: float
    """Largest error relative to the largest magnitude of the reference, of the worst output."""
    sqnr_db: float
    """Signal-to-noise ratio of the worst output in dB; infinite if identical."""
    top1_agreement: float | None = None
    """Share of samples with the same largest logit, 0 to 1; None if the first output is not (samples, classes)."""
    accuracy_reference: float | None = None
    """Share of samples whose largest logit is the right one, 0 to 1, or the mean metric; None without labels."""
    accuracy_candidate: float | None = None
    integer_agreement: float | None = None
    """Share of equal values, 0 to 1, in the worst output of integers or truth values; None without such an output."""


def fidelity(
    reference: Model, candidate: Model, batches: Any, *, labelled: bool = False, metric: Metric | None = None
) -> Fidelity:
    """Runs both models, in eval mode on the CPU, on every batch and compares what they return.

    `batches`: an iterable of batches (a tensor, a tuple or a dict of arguments), or a lone tensor as one batch. With
    `labelled`, each is `(inputs, target)`. `metric` takes the place of top-1 accuracy.

    Raises:
        ModelError: they return tensors of different number or shape.
        InputError: there are no batches.
    """
    comparison = Comparison(metric)
    with (
        running(reference, signature=candidate) as run_reference,
        running(candidate, signature=reference) as run_candidate,
    ):
        for inputs, target in batches_of(batches, labelled):
            comparison.add(run_reference(inputs), run_candidate(inputs), target, batch_size(inputs))
    return comparison.result()


@dataclass
class Comparison:
    """Sums for a `Fidelity`, batch by batch."""

    metric: Metric | None = None
    deviation: Deviation = field(default_factory=Deviation)
    samples: int = 0
    agreeing: float | None = 0.0
    scores: tuple[float, float] | None = None
    equal: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Of the outputs of integers, by position: how many values are equal, of how many."""

    def add(self, reference: Sequence[Tensor], candidate: Sequence[Tensor], target: Any, samples: int) -> None:
        check_shapes(reference, candidate)
        self._add_integers(reference, candidate)
        amounts = [i for i in range(len(reference)) if i not in self.equal] or range(len(reference))
        self.deviation.add([reference[i] for i in amounts], [candidate[i] for i in amounts])
        self.samples += samples
        agreeing = _same_class(reference[0], candidate[0]) if _are_logits(reference) else None
        self.agreeing = None if agreeing is None or self.agreeing is None else self.agreeing + agreeing
        if target is not None:
            before = self.scores or (0.0, 0.0)
            first, second = (self._score(outputs[0], target) * samples for outputs in (reference, candidate))
            self.scores = before[0] + first, before[1] + second

    def result(self) -> Fidelity:
        return Fidelity(
            samples=self.samples,
            max_error=self.deviation.max_error,
            relative_error=self.deviation.relative_error,
            sqnr_db=self.deviation.sqnr_db,
            top1_agreement=None if self.agreeing is None else self.agreeing / self.samples,
            accuracy_reference=self.scores and self.scores[0] / self.samples,
            accuracy_candidate=self.scores and self.scores[1] / self.samples,
            integer_agreement=min((equal / max(1, count) for equal, count in self.equal.values()), default=None),
        )

    def _add_integers(self, reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> None:
        for position, (one, other) in enumerate(zip(reference, candidate, strict=True)):
            if not (one.is_floating_point() or one.is_complex()):
                equal, count = self.equal.get(position, (0, 0))
                now = int((one.cpu() == other.cpu()).sum())
                self.equal[position] = equal + now, count + one.numel()

    def _score(self, output: Tensor, target: Any) -> float:
        if self.metric is not None:
            return float(self.metric(output, target))
        _check_classes(output, target)
        right = (output.argmax(1) == target.to(output.device)) & ~output.isnan().any(1)
        return float(right.double().mean())


def _are_logits(outputs: Sequence[Tensor]) -> bool:
    return bool(outputs) and outputs[0].ndim == 2 and outputs[0].is_floating_point() and outputs[0].shape[1] > 1


def _check_classes(output: Tensor, target: Any) -> None:
    """Raises InputError unless there is one class number in range for every sample."""
    fix = "give logits (samples, classes) with class numbers (samples,), or a metric"
    if not isinstance(target, Tensor) or not _are_logits([output]) or target.ndim != 1:
        raise InputError(
            f"no top-1 accuracy of an output {tuple(output.shape)} with a target {_shape(target)}", fix=fix
        )
    samples, classes = output.shape
    if len(target) != samples:
        raise InputError(f"{samples} outputs and {len(target)} labels in one evaluation batch", fix=fix)
    numbers = target.double()
    wrong = target[(numbers < 0) | (numbers >= classes) | (numbers != numbers.floor())]
    if len(wrong):
        raise InputError(
            f"label {wrong[0].item()} in the evaluation data, the model's output has the classes 0 to {classes - 1}",
            fix="number the classes as the model was trained; is this the data of this model?",
        )


def _same_class(reference: Tensor, candidate: Tensor) -> float:
    """Number of samples with the same top-1 class; a sample with NaN has none."""
    finite = ~(reference.isnan() | candidate.isnan()).any(1)
    return float((finite & (reference.argmax(1) == candidate.argmax(1))).sum())


def _shape(target: Any) -> str:
    return str(tuple(target.shape)) if isinstance(target, Tensor) else type(target).__name__
