"""Quantisers to train through: the value is on a grid, the gradient passes as if it were not ("straight through").

    value v(x),  gradient that of a carrier c(x):      v.detach() + (c - c.detach())        exactly v in floating point

                    value                                   carrier, and its gradient
fake_quantised      s (q - z)                               x where q is not clamped, else 0
fixed_point         multiples of 2^-F within its range      x within the range, else 0
stochastic          up or down, by chance                   the same
binary_connect      ±1                                      x
xnor                ± α, α = mean |w| of each channel       w / n + α clamp(w, -1, 1): 1 / n + α 1(|w| ≤ 1)
qnn_binary, _linear, _log                                   clamp(x, -1, 1): 1(|x| ≤ 1)

All are plain operators of torch and can stand in what `surgery.replace_weight` traces. None draws numbers: noise comes
in as a tensor, uniform in [0, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scheme import Scheme


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """Exactly `value`, with the gradient of `carrier`."""
    return value.detach() + (carrier - carrier.detach())


def fake_quantised(x: Tensor, scheme: Scheme) -> Tensor:
    """`scheme.round(x)`; the gradient is 0 where the integer is clamped (Jacob et al. 2018, arXiv:1712.05877, section
    3; Krishnamoorthi 2018, arXiv:1806.08342, section 2.4)."""
    integers = x.detach() / scheme.along(scheme.scale, x)
    integers = integers.round() + scheme.along(scheme.zero_point, x)
    kept = (integers >= scheme.grid.low) & (integers <= scheme.grid.high)
    return straight_through(scheme.round(x), torch.where(kept, x, 0.0))


def fixed_point(x: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
    """The nearest of ⟨IL, FL⟩: multiples of 2^-FL from -2^(IL - 1) to 2^(IL - 1) - 2^-FL. `fraction_bits` may be below
    zero."""
    return _fixed(x, (x * 2.0**fraction_bits).round(), integer_bits, fraction_bits)


def stochastic(x: Tensor, noise: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
    """⌊x⌋ or ⌊x⌋ + ε, ε = 2^-FL, the latter with probability (x - ⌊x⌋) / ε: right in the mean where nothing saturates
    (Gupta et al. 2015, arXiv:1502.02551, section 3.1, which rounds updated weights so)."""
    return _fixed(x, (x * 2.0**fraction_bits + noise).floor(), integer_bits, fraction_bits)


def _fixed(x: Tensor, integers: Tensor, integer_bits: int, fraction_bits: int) -> Tensor:
    limit, step = 2.0 ** (integer_bits - 1), 2.0**-fraction_bits
    most = limit - step
    return straight_through((integers * step).clamp(-limit, most), x.clamp(-limit, most))


def binary_connect(w: Tensor, noise: Tensor | None = None) -> Tensor:
    """±1: the sign of w, +1 at 0; with `noise` +1 with probability clamp((w + 1) / 2, 0, 1). The gradient passes
    unchanged; clamp w to -1 … 1 after every update of it, `clamped`. Courbariaux et al. 2015 (arXiv:1511.00363,
    equations 1 to 3, algorithm 1)."""
    return straight_through(_signs(w) if noise is None else _signs((w + 1) / 2 - noise, strictly=True), w)


def clamped(w: Tensor) -> Tensor:
    """w to go on with after an update (Courbariaux et al. 2015, section 2.4)."""
    return w.clamp(-1, 1)


def xnor(w: Tensor) -> Tensor:
    """α sign(w) with α = mean |w| for each output channel (dimension 0), the nearest of that form; the
    gradient is 1 / n + α 1(|w| ≤ 1), n weights a channel. Rastegari et al. 2016 (arXiv:1603.05279, section 3.1)."""
    scale = w.detach().abs().mean(tuple(range(1, w.ndim)), keepdim=True)
    return straight_through(scale * _signs(w), w / w[0].numel() + scale * clamped(w))


def qnn_binary(x: Tensor) -> Tensor:
    """±1, for activations and weights (Hubara et al. 2016, arXiv:1609.07061)."""
    return straight_through(_signs(x), clamped(x))


def qnn_linear(x: Tensor, bits: int) -> Tensor:
    """Multiples of 2^(1 - bits) from -1 to 1 - 2^(1 - bits) (Hubara et al. 2016, "LinearQuant")."""
    step = 2.0 ** (1 - bits)
    return straight_through(((x / step).round() * step).clamp(-1.0, 1 - step), clamped(x))


def qnn_log(x: Tensor, bits: int) -> Tensor:
    """± powers of two, 2^0 and the 2^(bits - 1) - 1 below it (Hubara et al. 2016, "LogQuant"): the exponent is the
    nearest to log₂ |x|; zero stays zero."""
    exponent = x.detach().abs().log2().round().clamp(1 - 2 ** (bits - 1), 0)
    return straight_through(exponent.exp2() * x.detach().sign(), clamped(x))


def _signs(x: Tensor, strictly: bool = False) -> Tensor:
    """±1; 0 counts as positive unless `strictly`."""
    return torch.where(x > 0 if strictly else x >= 0, 1.0, -1.0).to(x.dtype)
