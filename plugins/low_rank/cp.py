"""Sums of separable filters: two pointwise convolutions, and between them a depthwise one along every kernel axis.

    W[o, i, κ₁, κ₂] ≈ Σ_r A[o, r] B[i, r] C₁[κ₁, r] C₂[κ₂, r]

    reduce Bᵀ (r, I, 1, 1)    depthwise C₁ᵀ (r, 1, k₁, 1), C₂ᵀ (r, 1, 1, k₂)    expand A (O, r, 1, 1)

Without bounds such sums grow components that cancel; see `als` for what is made least instead. The first start are the
orthogonal components of `sliced`, which already bound the error.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import isfinite, log, prod, sqrt

import torch
from torch import Tensor, nn

from surgery import PassError

from .als import als, assembled, balanced, penalty, random_start, sliced, solved, strengths
from .chain import Chain, Stage
from .descent import Form, fitted
from .engine import Engine
from .kernel import Kernel
from .method import Method, Ranks, Shape
from .steps import multiples, raised

BOUND = 10.0
"""Most that Σ ‖component‖² may be, in parts of the squared norm of what is decomposed; 1 = orthogonal components."""
PROBES, PROBE_ROUNDS = (1 / 8, 1 / 2), 4
"""Ranks that estimates try, in parts of the rank with as many weights as the layer, and rounds of least squares."""
LARGE = 2**19
"""Entries of a tensor from which on least squares are in float32."""
STEPS = 4
"""Of the descent in the metric of the outputs, for one factor in one round."""


@dataclass(frozen=True)
class CpSum(Method):
    """Lebedev et al. 2015 (arXiv:1412.6553), section 3."""

    iterations: int = 50
    restarts: int = 2
    regularisation: float = 1e-3
    tolerance: float = 1e-4
    engine: Engine = "own"

    def obstacle(self, module: nn.Module) -> str | None:
        pointwise = prod(getattr(module, "kernel_size", ())) == 1
        return super().obstacle(module) or ("pointwise: channel_svd is its form" if pointwise else None)

    def limits(self, shape: Shape) -> Ranks:
        return (prod(shape) // max(shape),)

    def shapes(self, shape: Shape, ranks: Ranks) -> list[Shape]:
        (rank,), ones = ranks, [1] * len(shape[2:])
        axes = [axis for axis, size in enumerate(shape[2:]) if size > 1]
        kernels = [[shape[2:][axis] if axis == own else 1 for axis in range(len(ones))] for own in axes]
        return [(rank, shape[1], *ones), *((rank, 1, *kernel) for kernel in kernels), (shape[0], rank, *ones)]

    def choices(self, shape: Shape, step: int, most: int = 32) -> list[Ranks]:
        """Multiples of `step` up to the rank with as many weights as the layer."""
        return [(rank,) for rank in multiples(_even(shape), step, most)]

    def decompose(self, kernel: Kernel, ranks: Ranks) -> Chain:
        if kernel.covariance is None or ranks >= self.limits(tuple(kernel.weight.shape)):
            return _chain(self._factors(kernel.weight, ranks[0]))
        return _chain(fitted(kernel, Form(assembled, _undoing, _each, STEPS), lambda w: self._factors(w, ranks[0])))

    def _factors(self, weight: Tensor, rank: int) -> list[Tensor]:
        """One factor (size, rank) for every dimension, ones for kernel axes of size 1.

        Raises:
            PassError: no start leads to a sum that may be used.
        """
        found = iter(self._sum(_tensor(weight), rank))
        sizes = enumerate(weight.shape)
        return [next(found) if dim < 2 or size > 1 else weight.new_ones(1, rank) for dim, size in sizes]

    def _sum(self, tensor: Tensor, rank: int) -> list[Tensor]:
        total = float(tensor.square().sum())
        if not isfinite(total):
            raise PassError("the weight is not finite", fix="exclude the layer")
        start, energies = sliced(tensor)
        start = [factor[:, :rank].contiguous() for factor in start]
        if total == 0 or rank >= len(energies):
            return balanced(start)
        worst, damping = float(energies[rank // 2 :].sum()) / total, penalty(tensor, rank, self.regularisation)
        tried = []
        for seed in range(self.restarts + 1):
            found = self._lowered(tensor, start, damping)
            lost = float((tensor - assembled(found)).square().sum()) / total
            size = float(strengths(found).square().sum()) / total
            if lost <= worst and size <= BOUND:
                return balanced(found)
            tried.append(f"{sqrt(abs(lost)):.3g} with components of {size:.3g}")
            start = random_start(tensor, rank, seed)
        raise PassError(
            f"the decomposition of a weight {tuple(tensor.shape)} into {rank} components does not converge: error"
            f" {'; '.join(tried)} times its square; {sqrt(worst):.3g} and {BOUND:g} are the most",
            fix="another rank, more regularisation where components are large and less where the error is, or exclude"
            " the layer",
        )

    def _lowered(self, tensor: Tensor, start: Sequence[Tensor], damping: float) -> list[Tensor]:
        """Large tensors in float32, which takes half the time; the penalty keeps the equations well conditioned."""
        kind = torch.float32 if damping and tensor.numel() >= LARGE else torch.float64
        first = [factor.to(kind) for factor in start]
        found = als(tensor.to(kind), first, damping, self.iterations, self.tolerance, self.engine)
        return [factor.double() for factor in found]

    # --- choosing ranks ---

    def spectra(self, kernel: Kernel) -> list[Tensor]:
        """Squared norms of the orthogonal components: an upper bound."""
        return [sliced(_tensor(kernel.whitened))[1]]

    def estimates(self, kernel: Kernel, choices: Sequence[Ranks]) -> list[float]:
        """From what the orthogonal components lose, and the part of it that is left after a few rounds of least squares
        at two ranks; in the separable part of the metric."""
        if not choices:
            return []
        curve = self._curve(kernel)
        return [curve[min(rank, len(curve) - 1)] for (rank,) in choices]

    def ranks_by_energy(self, kernel: Kernel, energy: float, step: int) -> Ranks:
        curve = self._curve(kernel)
        rank = bisect_left(curve, energy - 1 - 1e-12, key=lambda lost: -lost)
        return (raised(rank, step, len(curve) - 1),)

    def _curve(self, kernel: Kernel) -> list[float]:
        """f / f(0) by rank, 0 to the limit, falling."""
        tensor = _tensor(kernel.whitened)
        start, energies = sliced(tensor)
        total = float(energies.sum())
        if not total > 0:
            return [0.0] * (len(energies) + 1)
        tails = torch.cat([energies.flip(0).cumsum(0).flip(0), energies.new_zeros(1)]) / total
        known = []
        for rank in sorted({max(1, round(part * _even(tuple(kernel.weight.shape)))) for part in PROBES}):
            first = [factor[:, :rank].contiguous() for factor in start]
            probe = replace(self, iterations=PROBE_ROUNDS, tolerance=0.0)
            found = probe._lowered(tensor, first, penalty(tensor, rank, self.regularisation))
            lost = float((tensor - assembled(found)).square().sum()) / total
            known.append((log(rank), min(1.0, lost / max(float(tails[rank]), 1e-300))))
        parts = [_between(known, log(max(1, rank))) for rank in range(len(tails))]
        curve = (tails * torch.tensor(parts, dtype=tails.dtype)).clamp(0, 1)
        curve[0] = 1.0
        return curve.cummin(0).values.tolist()

    def unfoldings(self, weight: Tensor) -> list[list[Tensor]]:
        """By outputs and by inputs: a sum needs as many components as either has ranks, at least."""
        return [[weight.flatten(1), weight.transpose(0, 1).flatten(1)]]


def _each(change: Callable[[Tensor, int], Tensor], factors: Sequence[Tensor]) -> list[Tensor]:
    """All factors but the outputs' changed, which take their dimension of the weight."""
    return [change(factor, dim) if dim else factor for dim, factor in enumerate(factors)]


def _even(shape: Shape) -> int:
    """The highest rank with fewer weights than the layer, at least 1."""
    return max(1, (prod(shape) - 1) // sum(size for dim, size in enumerate(shape) if dim < 2 or size > 1))


def _tensor(weight: Tensor) -> Tensor:
    """Without kernel axes of size 1."""
    return weight.reshape(*weight.shape[:2], *(size for size in weight.shape[2:] if size > 1))


def _between(known: Sequence[tuple[float, float]], at: float) -> float:
    """Linear between known points, constant outside."""
    for (left, low), (right, high) in pairwise(known):
        if left <= at <= right:
            return low + (high - low) * (at - left) / (right - left)
    return known[0][1] if at < known[0][0] else known[-1][1]


def _undoing(factors: Sequence[Tensor], dim: int) -> Callable[[Tensor], Tensor]:
    """Of least squares for the factor of `dim` in the weight's metric."""
    return lambda moment: solved(moment, factors, dim, 0.0)


def _chain(factors: Sequence[Tensor]) -> Chain:
    outputs, inputs, *axes = balanced(factors)
    ones = (1,) * len(axes)
    stages = [Stage("reduce", inputs.T.reshape(-1, len(inputs), *ones))]
    spatial = [axis for axis, factor in enumerate(axes) if len(factor) > 1]
    for number, axis in enumerate(spatial, start=1):
        sizes = [len(axes[axis]) if other == axis else 1 for other in range(len(axes))]
        name = "depthwise" if len(spatial) == 1 else f"depthwise_{number}"
        stages.append(Stage(name, axes[axis].T.reshape(-1, 1, *sizes), outputs.shape[1]))
    for axis, factor in enumerate(axes):
        outputs = outputs * factor[0] if axis not in spatial else outputs
    return Chain((*stages, Stage("expand", outputs.reshape(*outputs.shape, *ones))))
