"""How many bits each layer gets, and where the point stands, by signal-to-quantisation-noise ratio (SQNR).

    1 / γ = Σ 1 / γ_i       the noise at the network's output, γ_i = signal / noise of one quantised layer
    γ_i in dB ≈ κ β_i       β_i bits, κ about 6 dB a bit
    least Σ ρ_i β_i  for a given γ       ⇒       β_i - β_j = (10 / κ) log₁₀(ρ_j / ρ_i)

Lin, Talathi and Annapureddy 2016 (arXiv:1511.06393, sections 3 and 4): ρ_i is what a bit costs, the layer's number of
weights, so that layers with many weights get fewer bits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery import PluginError

GAUSSIAN_STEPS = (1.596, 0.9957, 0.5860, 0.3352, 0.1881, 0.1041, 0.05687, 0.03076)
"""The best step of 2^β even levels for the standard normal distribution, β = 1 … 8 (Max 1960)."""
DB_PER_BIT = 20 * math.log10(2)
"""κ of an even distribution."""


def fraction_bits(std: float, bits: int) -> int:
    """F of the numbers m 2^-F, m of 1 to 8 `bits`, for normally distributed values of this standard deviation > 0: the
    finest such step that is not below the best one."""
    return -math.ceil(math.log2(std * GAUSSIAN_STEPS[bits - 1]))


def sqnr(x: Tensor, rounded: Tensor) -> float:
    """10 log₁₀ (E x² / E (x - x̂)²) in dB; infinite without error."""
    signal, noise = float(x.double().square().mean()), float((x.double() - rounded.double()).square().mean())
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def modelled_noise(layers: int, bits: int, efficiency: float = DB_PER_BIT) -> Tensor:
    """1 / γ (layers, bits) with 1 … `bits` bits where nothing was measured: κ = `efficiency` dB a bit."""
    return 10 ** (-efficiency / 10 * torch.arange(1, bits + 1, dtype=torch.float64)).repeat(layers, 1)


def bit_widths(noise: Tensor, sizes: Sequence[int], average: float) -> list[int]:
    """Bits per layer, 1 or more each, with the least noise in all for what they take: `average` bits a weight at most.

    `noise`: 1 / γ (layers, bits) of each layer with 1, 2, … bits, measured or modelled; every further bit takes away
    less. `sizes`: ρ. One bit after the other goes where it takes most noise away per weight, until one no longer fits.

    Raises:
        PluginError: `average` is below 1.
    """
    if average < 1:
        raise PluginError(f"{average} bits a weight: every layer takes 1 at least", fix="give an average of 1 or more")
    bits, left = [1] * len(sizes), (average - 1) * sum(sizes)
    gains = (noise[:, :-1] - noise[:, 1:]) / torch.tensor(sizes, dtype=noise.dtype).unsqueeze(1)
    for place in gains.flatten().argsort(descending=True, stable=True).tolist():
        layer = place // gains.shape[1]
        left -= sizes[layer]
        if left < 0:
            break
        bits[layer] += 1
    return bits
