"""A small model with the inputs it takes: what a pass is tested on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..captured import CapturedModel, capture
from ..inputs import Inputs
from .seeding import randomise

Draw = Callable[[int, torch.Generator], Any]
"""From a batch size and a seeded generator to the model's arguments: a tensor, a tuple, or a dict by name."""


@dataclass(frozen=True)
class Network:
    """A model that is built anew by every call, always with the same weights, and random inputs for it.

    Network("mine", MyModel, lambda batch, generator: torch.rand(batch, 3, 16, 16, generator=generator))
    """

    name: str
    build: Callable[[], nn.Module]
    draw: Draw

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        """In eval mode; the global random state stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return randomise(self.build())

    def inputs(self, batch: int = 2, seed: int = 0) -> Any:
        """Arguments for one call with `batch` samples."""
        return self.draw(batch, torch.Generator().manual_seed(seed))

    def calibration(self, batches: int = 2, batch: int = 8) -> list[Any]:
        """Batches without labels, none of them the example."""
        return [self.inputs(batch, seed) for seed in range(1, batches + 1)]

    def captured(self) -> CapturedModel:
        return capture(self.model(), self.inputs())

    def call(self, model: nn.Module, value: Any) -> Any:
        """What `model` returns for `value` without gradients; `value` stays as it is."""
        inputs = Inputs.of(model, value).clone()
        with torch.no_grad():
            return model(*inputs.args, **inputs.kwargs)
