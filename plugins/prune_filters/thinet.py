"""ThiNet: the units without which the next layers' outputs change least, together."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from surgery import Criterion

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Channels, Context


class Thinet(Criterion):
    """Squared change of the next layers' outputs once the unit and all that go before it are gone, chosen greedily.

    Luo et al. 2017, ThiNet (arXiv:1707.06342), algorithm 1: next goes the unit whose contribution, added to that of
    those which are gone, has the least square. Here it is meaned over all output positions and summed over all output
    channels and readers, from the second moments of what they read. A group that no convolution or linear layer
    reads is judged by the mean square of its values.
    """

    needs_calibration: ClassVar[bool] = True

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from .contributions import contributions, greedy

        return [greedy(matrix) for matrix in contributions(found, context)]
