"""Whether another runtime computes what a model computes in PyTorch on the CPU. It must, up to rounding."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .deviation import Deviation
from .divergence import Divergence, first_divergence
from .errors import SurgeryError
from .export.runtime import CPU, CUDA, runtime_session
from .export.streaming import operators
from .running import batches_of, running

BOUNDS = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest deviation relative to the largest output, by the least precise type of the weights. Measured in float32 on
ONNX Runtime's CPU provider with 15 architectures: 1.7e-7 (DeiT-3) to 1.2e-6 (ViT-B), most at 5e-7. Eight times the
worst is left to deeper models and other processors."""
QUANTISED_BOUND = 5e-2
"""With quantised activations a value on the edge of two steps may round either way, and later layers carry it on.
Measured with uint8 activations: ResNet-20 0.7e-2, ResNet-56 1.3e-2."""
CUDA_FACTOR = 10
"""CUDA kernels sum in another order and may choose Winograd's algorithm, which costs a decimal."""


@dataclass(frozen=True)
class Parity:
    """How far a runtime is from PyTorch on the CPU, with the same model on the same batches."""

    runtime: str
    """Execution provider of ONNX Runtime, or PyTorch's device."""
    max_error: float
    relative_error: float
    """Largest error relative to the largest magnitude that PyTorch returns on the CPU, of the worst output."""
    sqnr_db: float
    bound: float
    """What `relative_error` is held to."""
    first_divergence: Divergence | None = None
    """Where the two part, if they do and it could be found."""

    @property
    def passed(self) -> bool:
        return self.relative_error <= self.bound


def parity(
    model: nn.Module,
    path: str | os.PathLike[str],
    batches: Any,
    *,
    provider: str = CPU,
    bound: float | None = None,
) -> Parity:
    """Runs `model` in PyTorch and its ONNX file in ONNX Runtime, and compares what they return.

    Without `bound`, rounding sets it: see `BOUNDS`. A file that misses it is searched for the first value that differs.

    Raises:
        ModelError: the file is no ONNX model, or returns tensors of another number or shape.
    """
    contest = OnnxContest.of(model, Path(path), provider, bound)
    with running(model) as expected, running(runtime_session(path, [provider]), signature=model) as actual:
        for inputs, _ in batches_of(batches, labelled=False):
            contest.add(inputs, expected(inputs), actual(inputs))
    return contest.conclude()


@dataclass
class Contest:
    """Sums for a `Parity`, batch by batch."""

    runtime: str
    bound: float
    deviation: Deviation = field(default_factory=Deviation)
    worst: Any = None
    """The batch with the largest error."""

    def add(self, inputs: Any, expected: Sequence[Tensor], actual: Sequence[Tensor]) -> None:
        before = self.deviation.max_error
        self.deviation.add(expected, actual)
        if self.deviation.max_error > before:
            self.worst = inputs

    def conclude(self) -> Parity:
        d = self.deviation
        return Parity(self.runtime, d.max_error, d.relative_error, d.sqnr_db, self.bound)


@dataclass
class OnnxContest(Contest):
    """A contest against an ONNX file, which can be searched for the place where it parts from the model."""

    model: nn.Module = field(kw_only=True)
    path: Path = field(kw_only=True)

    @classmethod
    def of(cls, model: nn.Module, path: Path, provider: str, bound: float | None) -> OnnxContest:
        return cls(provider, onnx_bound(model, path, provider) if bound is None else bound, model=model, path=path)

    def conclude(self) -> Parity:
        result = super().conclude()
        if result.passed:
            return result
        try:
            place = first_divergence(self.model, self.path, self.worst, self.bound, provider=self.runtime)
        except SurgeryError:  # a file that is not ours to search; the measured failure stands
            return result
        return replace(result, first_divergence=place)


def bound_of(model: nn.Module) -> float:
    """The entry of `BOUNDS` for the least precise floating-point type among the weights; float32's without weights."""
    types = {t.dtype for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    return max((BOUNDS.get(dtype, BOUNDS[torch.bfloat16]) for dtype in types), default=BOUNDS[torch.float32])


def onnx_bound(model: nn.Module, path: Path, provider: str) -> float:
    """`bound_of` the model, wider for a file with quantised activations and on CUDA."""
    quantised = "QuantizeLinear" in operators(path)
    return max(bound_of(model), quantised * QUANTISED_BOUND) * (CUDA_FACTOR if provider == CUDA else 1)
