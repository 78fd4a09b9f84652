"""How far two lists of tensors lie apart, summed up over a stream of batches in constant memory.

With reference values r and candidate values c of one output:

    max error = max |r − c|        relative error = max |r − c| / max |r|        SQNR = 10 log₁₀ (Σ r² / Σ (r − c)²)  dB

Of several outputs the worst counts. A NaN is infinitely far from everything, a NaN included; equal infinities agree.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import ModelError


@dataclass
class _Output:
    signal: float = 0.0
    noise: float = 0.0
    peak: float = 0.0
    error: float = 0.0

    def add(self, reference: Tensor, candidate: Tensor) -> None:
        r, c = reference.detach().to("cpu", torch.float64), candidate.detach().to("cpu", torch.float64)
        difference = torch.where(r == c, 0.0, r - c).nan_to_num(math.inf, math.inf, -math.inf)
        finite = r[r.isfinite()]
        self.signal += float(finite.square().sum())
        self.noise += float(difference.square().sum())
        self.peak = max(self.peak, _largest(finite))
        self.error = max(self.error, _largest(difference))


@dataclass
class Deviation:
    """Distance of a candidate's outputs from the reference's, over all that was added."""

    outputs: list[_Output] = field(default_factory=list)

    def add(self, reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> None:
        """Raises ModelError where the two differ in the number or the shapes of tensors."""
        check_shapes(reference, candidate)
        self.outputs = self.outputs or [_Output() for _ in reference]
        for output, r, c in zip(self.outputs, reference, candidate, strict=True):
            output.add(r, c)

    @property
    def max_error(self) -> float:
        return max((o.error for o in self.outputs), default=0.0)

    @property
    def relative_error(self) -> float:
        """0 = identical; infinite if the reference is all zeros and the candidate is not."""
        return max((o.error / o.peak if o.peak else math.inf if o.error else 0.0 for o in self.outputs), default=0.0)

    @property
    def sqnr_db(self) -> float:
        """Infinite if identical, minus infinity if the candidate has NaN or the reference is all zeros."""
        return min((_decibel(o.signal, o.noise) for o in self.outputs), default=math.inf)


def check_shapes(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> None:
    """Raises ModelError where the two differ in the number or the shapes of tensors."""
    shapes = [[tuple(t.shape) for t in tensors] for tensors in (reference, candidate)]
    if shapes[0] != shapes[1]:
        raise ModelError(
            f"the outputs have shapes {shapes[1]}, the reference's {shapes[0]}",
            fix="compare models that return the same number of tensors in the same shapes",
        )


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
