"""The main job on real input: a small CNN trained on the scanned digits that ship inside scikit-learn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .datasets import data_from
from .datasets.digits import TEST_SAMPLES, WHITE, Digits
from .pipeline import Operation, operate
from .runs import RunFolder

if TYPE_CHECKING:
    from .context import Progress


def digits_cnn() -> nn.Module:
    """Four convolutions with BatchNorm and ReLU and one linear layer, for 1×8×8 images."""

    def block(channels_in: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        *block(128, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def digits() -> tuple[Tensor, Tensor]:
    """1,797 images (n, 1, 8, 8) in 0..1 and their labels, in a fixed random order.

    Raises:
        InputError: scikit-learn is not installed.
    """
    pictures = Digits()
    return pictures.images.float() / WHITE, pictures.labels


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int, progress: Progress) -> nn.Module:
    """Train `model` in place with Adam and a one-cycle schedule; batches of 64."""
    batches = -(-len(labels) // 64)
    optimiser = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.01, total_steps=epochs * batches)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for epoch in range(epochs):
        progress("training", epoch, epochs)
        for indices in torch.randperm(len(labels), generator=generator).split(64):
            optimiser.zero_grad()
            F.cross_entropy(model(images[indices]), labels[indices]).backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def run_demo(out: Path, progress: Progress, epochs: int = 12) -> Operation:
    """Train, operate with the recipe `digits_edge`, and leave a run folder at `out`; a run already there is replaced.

    Raises:
        RunError: `out` is a folder that holds no run.
    """
    RunFolder.clear(out)
    torch.manual_seed(0)
    images, labels = digits()
    model = train(digits_cnn(), images[TEST_SAMPLES:], labels[TEST_SAMPLES:], epochs, progress)
    return operate(model, images[:1], "digits_edge", data=data_from("digits"), out=out, progress=progress)
