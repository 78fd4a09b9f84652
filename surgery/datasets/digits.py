"""The handwritten digits that ship inside scikit-learn: E. Alpaydin and C. Kaynak, 8×8 pixels, 17 levels of grey."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data import Data
from ..errors import InputError
from .options import Options
from .pictures import Pixels, data_of, dtype_for

TEST_SAMPLES = 360
WHITE = 16


class Digits:
    """1,797 images (1, 8, 8), values 0 to 16, and their labels, in a fixed random order.

    Raises:
        InputError: scikit-learn is not installed.
    """

    def __init__(self, start: int = 0, end: int | None = None) -> None:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise InputError(
                "the digits come with scikit-learn, which is not installed",
                fix='install it: pip install "model-surgery[demo]"',
            ) from error
        images, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[start:end]
        self.images = torch.from_numpy(images).to(torch.uint8).view(-1, 1, 8, 8)[order]
        self.labels = torch.from_numpy(labels).long()[order]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        return self.images[list(indices)]


def read(path: Path, options: Options, example_inputs: Any) -> Data:
    """The first 360 evaluate, the others calibrate."""
    form = Pixels(white=WHITE, dtype=dtype_for(example_inputs, (1, 8, 8), "digits"))
    return data_of({"test": Digits(0, TEST_SAMPLES), "train": Digits(TEST_SAMPLES)}, options, form)
