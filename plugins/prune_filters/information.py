"""Mutual information of a number and a class, from samples. Imports torch: import it late."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_LEVELS = 32


def mutual_information(values: Tensor, classes: Tensor) -> Tensor:
    """I(q(x); y) = Σ p(q, y) log(p(q, y) / (p(q) p(y))) in nats, 0 = independent; both (samples,), the result ().

    q gives each value its level; all levels hold about equally many samples, and equal values have the same level.
    """
    levels = quantised(values)
    _, labels = classes.unique(return_inverse=True)
    width = int(labels.max()) + 1
    counts = torch.bincount(levels * width + labels, minlength=width * (int(levels.max()) + 1)).view(-1, width)
    joint = counts.double() / len(values)
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    information: Tensor = torch.special.xlogy(joint, joint / independent.clamp_min(1e-300)).sum()
    return information.clamp_min(0)


def quantised(values: Tensor) -> Tensor:
    """(samples,) the level of each, √samples of them but at most 32."""
    count = max(2, min(MOST_LEVELS, math.isqrt(len(values))))
    values = values.double().contiguous()
    edges = torch.quantile(values, torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:-1])
    return torch.bucketize(values, edges)
