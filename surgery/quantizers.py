"""What a quantiser of weights is that training goes through: the forward sees few values, an update moves a float."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from .named import Named

if TYPE_CHECKING:
    from torch import Tensor


class WeightQuantizer(Named, ABC):
    """Few values for the weight of one layer, and the gradient that passes them. The first line of the class docstring
    is the quantiser's summary; the docstring names the paper it follows.

    One is made for each layer, from its weight (outputs first) before training and the `bits` asked for.
    """

    draws: ClassVar[bool] = False
    """`value` takes noise, uniform in [0, 1) and drawn anew at every forward; otherwise None."""
    draws_after: ClassVar[bool] = False
    """`after_update` takes noise."""
    spares_ends: ClassVar[bool] = False
    """The first and the last layer of a network stay float, as they do in the papers on single bits."""

    def __init__(self, weight: Tensor, bits: int) -> None:
        self.bits = bits

    @abstractmethod
    def value(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        """What the layer computes with; plain torch that `surgery.replace_weight` can trace, without in-place writes or
        tensors of its own. Its gradient is the one that `weight` is trained by."""

    def after_update(self, weight: Tensor, noise: Tensor | None = None) -> Tensor:
        """The float weight to go on with after an optimiser's step."""
        return weight

    def final(self, weight: Tensor) -> Tensor:
        """The weight that is left when training ends."""
        return self.value(weight, None).detach()
