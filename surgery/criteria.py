"""What a criterion of importance is: how much each unit of channels matters, judged by whoever wants to remove some."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from .errors import InputError
from .named import Named

if TYPE_CHECKING:
    from torch import Tensor

    from .channels import Channels
    from .context import Context
    from .data import Data


class Criterion(Named, ABC):
    """Importance of the units of every group. The first line of the class docstring is the criterion's summary; the
    docstring names the paper it follows."""

    needs_calibration: ClassVar[bool] = False
    """It cannot judge without calibration data."""
    needs_training: ClassVar[bool] = False
    """It cannot judge without training data, `(inputs, target)` in batches, for the loss."""
    comparable: ClassVar[bool] = False
    """Scores of different groups measure the same thing, such as a rise of the loss; else only the order within a
    group has a meaning, and scores are divided by their mean over the group before groups are compared."""

    @classmethod
    def check_data(cls, data: Data) -> None:
        """Raises InputError where `data` lacks what the criterion needs."""
        if cls.needs_calibration:
            data.require_calibration(f"criterion {cls.name()}")
        if cls.needs_training and data.training is None:
            raise InputError(
                f"criterion {cls.name()} needs training data with labels and there is none",
                fix="give surgery.Data(training=…), batches of (inputs, target); or choose another criterion",
            )

    @abstractmethod
    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        """One tensor (size,) per group of `found.groups`, about the model `found.model`; the lowest go first. Neither
        the model nor the data is changed."""
