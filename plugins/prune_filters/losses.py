"""Criteria that ask the loss: how much it rises when a unit goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from surgery import Criterion, PassError

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Channels, Context


class Taylor(Criterion):
    """First-order estimate of how much the loss changes without the unit: |activation · gradient|.

    Molchanov et al. 2017 (arXiv:1611.06440), equation 7: |sum over positions of ∂C/∂z · z|, averaged over samples, for
    the values z that layers read; added up over all places where the unit is read. (Their equation 8 divides by the
    number of positions, after which layers of different sizes do not compare.) The loss is
    `surgery.Data.loss(output, target)`, a mean over the batch, on what the model returns; without one, the
    cross-entropy of the first tensor that it returns.
    """

    needs_training: ClassVar[bool] = True
    comparable: ClassVar[bool] = True

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from .evaluation import taylor

        return taylor(found, context)


class Oracle(Criterion):
    """Rise of the loss when the unit is masked, measured for one unit after the other; for small models.

    Molchanov et al. 2017 (arXiv:1611.06440), section 2.2, "Oracle pruning": the signed change, negative where the loss
    falls. A unit is masked by setting every position of every parameter that belongs to it to zero; layers that
    normalise over channels go on counting it. The loss is that of `taylor`.
    """

    needs_training: ClassVar[bool] = True
    comparable: ClassVar[bool] = True
    most_units: ClassVar[int] = 5000
    """All the data goes through the model once per unit."""

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from .evaluation import rises

        count = sum(group.size for group in found.groups)
        if count > self.most_units:
            raise PassError(
                f"criterion oracle would evaluate the model {count} times, once per unit; at most {self.most_units}",
                at="pass prune_filters",
                fix="choose criterion taylor, its first-order estimate",
            )
        return rises(found, context)
