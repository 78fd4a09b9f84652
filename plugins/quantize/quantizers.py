"""The quantisers of `training` as modes to train weights in, by the names that recipes give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from surgery import WeightQuantizer

if TYPE_CHECKING:
    from torch import Tensor


POINTS = 3
"""Places of the point tried to each side."""


class FixedPoint(WeightQuantizer):
    """The nearest of 2^bits numbers m 2^-F, with the point F of each layer where signal to noise is best.

    Lin, Talathi and Annapureddy 2016 (arXiv:1511.06393, section 3); F is looked for around that of normally distributed
    weights.
    """

    def __init__(self, weight: Tensor, bits: int) -> None:
        from .fixed_point import fraction_bits, sqnr
        from .training import fixed_point

        super().__init__(weight, bits)
        start = fraction_bits(max(float(weight.double().std(correction=0)), 1e-12), bits)
        near = range(start - POINTS, start + POINTS + 1)
        self.fraction_bits = max(near, key=lambda point: sqnr(weight, fixed_point(weight, bits - point, point)))

    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import fixed_point

        return fixed_point(weight, self.bits - self.fraction_bits, self.fraction_bits)


class Stochastic(FixedPoint):
    """Fixed-point numbers between which an updated weight is rounded up or down by chance, right in the mean.

    Gupta, Agrawal, Gopalakrishnan and Narayanan 2015 (arXiv:1502.02551, section 3.1).
    """

    draws_after: ClassVar[bool] = True

    def after_update(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import stochastic

        assert noise is not None
        return stochastic(weight, noise, self.bits - self.fraction_bits, self.fraction_bits)


class BinaryConnect(WeightQuantizer):
    """The sign, ±1; a BatchNorm behind the layer has to scale what comes out.

    Courbariaux, Bengio and David 2015 (arXiv:1511.00363, equation 1, algorithm 1).
    """

    spares_ends: ClassVar[bool] = True

    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import binary_connect

        return binary_connect(weight, noise)

    def after_update(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import clamped

        return clamped(weight)


class BinaryConnectStochastic(BinaryConnect):
    """+1 or -1 by chance, the likelier the nearer; the sign when training ends.

    Courbariaux, Bengio and David 2015 (arXiv:1511.00363, equations 2 and 3).
    """

    draws: ClassVar[bool] = True


class Xnor(WeightQuantizer):
    """The sign times the mean magnitude of each output channel.

    Rastegari, Ordonez, Redmon and Farhadi 2016 (arXiv:1603.05279, section 3.1), where the first and the last layer stay
    float.
    """

    spares_ends: ClassVar[bool] = True

    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import xnor

        return xnor(weight)


class QnnBinary(WeightQuantizer):
    """The sign, ±1, with a gradient between -1 and 1 alone.

    Hubara, Courbariaux, Soudry, El-Yaniv and Bengio 2016 (arXiv:1609.07061).
    """

    spares_ends: ClassVar[bool] = True

    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import qnn_binary

        return qnn_binary(weight)

    def after_update(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import clamped

        return clamped(weight)


class QnnLinear(WeightQuantizer):
    """Multiples of 2^(1 - bits) from -1 to below 1.

    Hubara, Courbariaux, Soudry, El-Yaniv and Bengio 2016 (arXiv:1609.07061, "LinearQuant").
    """

    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import qnn_linear

        return qnn_linear(weight, self.bits)


class QnnLog(WeightQuantizer):
    """Powers of two with a sign, from 1 down to 2^(1 - 2^(bits - 1)).

    Hubara, Courbariaux, Soudry, El-Yaniv and Bengio 2016 (arXiv:1609.07061, "LogQuant").
    """

    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        from .training import qnn_log

        return qnn_log(weight, self.bits)


QUANTIZERS = (FixedPoint, Stochastic, BinaryConnect, BinaryConnectStochastic, Xnor, QnnBinary, QnnLinear, QnnLog)
