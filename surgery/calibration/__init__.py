"""Statistics of a model's layers over the calibration data: one service for every pass, streamed and cached."""

from __future__ import annotations

from .affine import Affine, affine_maps
from .aims import Aim
from .batches import checked_inputs
from .collect import Statistics, Want, gram_bytes
from .feedback import error_feedback
from .moments import Moments, Regression
from .ranges import Histogram, Range
from .service import Calibration
from .solving import conjugate_gradients
from .sweep import Step, Task
from .unfolding import weight_from_matrix, weight_matrix

__all__ = [
    "Affine",
    "Aim",
    "Calibration",
    "Histogram",
    "Moments",
    "Range",
    "Regression",
    "Statistics",
    "Step",
    "Task",
    "Want",
    "affine_maps",
    "checked_inputs",
    "conjugate_gradients",
    "error_feedback",
    "gram_bytes",
    "weight_from_matrix",
    "weight_matrix",
]
