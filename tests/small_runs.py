"""A network and passes to run through the pipeline in a tenth of a second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

import surgery
from surgery import (
    Edit,
    Pass,
    PassError,
    PassReport,
    hookimpl,
)


@dataclass(frozen=True, kw_only=True)
class Damp(Pass):
    """Multiply every convolution by a factor."""

    factor: Annotated[float, Field(gt=0, description="factor")] = 0.5
    idempotent = False
    strength = {"factor": 1.0}  # noqa: RUF012

    def apply(self, model, context):
        edits = []
        for layer in self.selected(surgery.layers(model)):
            if isinstance(layer.module, nn.Conv2d):
                layer.module.weight = nn.Parameter(layer.module.weight.detach() * self.factor)
                edits.append(Edit(layer.name, f"times {self.factor}"))
        return PassReport(tuple(edits))


@dataclass(frozen=True, kw_only=True)
class Jitter(Pass):
    """Add seeded noise to every convolution."""

    idempotent = False

    def apply(self, model, context):
        generator = context.generator()
        edits = []
        for layer in self.selected(surgery.layers(model)):
            if isinstance(layer.module, nn.Conv2d):
                noise = torch.randn(layer.module.weight.shape, generator=generator) * 1e-3
                layer.module.weight = nn.Parameter(layer.module.weight.detach() + noise)
                edits.append(Edit(layer.name, "noise"))
        return PassReport(tuple(edits))


@dataclass(frozen=True, kw_only=True)
class Demand(Damp):
    """Damp, which cannot be done below 0.8."""

    def apply(self, model, context):
        if self.factor < 0.8:
            raise PassError(
                f"factor: {self.factor} cannot be met, 0.8 is as far as it goes", at="pass demand", fix="less"
            )
        return super().apply(model, context)


@dataclass(frozen=True, kw_only=True)
class Explode(Pass):
    """Fails."""

    def apply(self, model, context):
        raise ZeroDivisionError("by design")


class Plugin:
    @hookimpl
    def surgery_passes(self):
        return [Damp, Demand, Jitter, Explode]


REGISTRY = surgery.Registry([Plugin()])


class Net(nn.Module):
    """Functional forward, two inputs, a dict of outputs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, image, scale):
        x = F.relu(self.norm(self.stem(image))) * scale[:, None, None, None]
        return {"logits": self.head(x.mean((2, 3))), "features": x}


def operate(model, inputs, *passes, budget=None, **options):
    recipe = {"name": "test", "passes": list(passes), "budget": budget or {}}
    return surgery.operate(model, inputs, recipe, registry=REGISTRY, latency_rounds=0, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def small_inputs():
    torch.manual_seed(1)
    return {"image": torch.rand(1, 3, 8, 8), "scale": torch.rand(1)}
