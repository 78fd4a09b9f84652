"""Weights that are seen in few values while they are trained.

conv(x, W)   →   conv(x, value(W)) in the twin that is trained   →   conv(x, final(W))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Context, WeightQuantizer

from .parts import Part

if TYPE_CHECKING:
    from . import Finetune

TYPES = ("Linear", *(f"Conv{kind}{rank}d" for kind in ("", "Transpose") for rank in (1, 2, 3)))


@dataclass
class Quantisers:
    """One for each weight, by the weight's name in the model."""

    found: dict[str, WeightQuantizer] = field(default_factory=dict)
    ways: dict[str, str] = field(default_factory=dict)
    """How each layer is trained, by its name."""

    @classmethod
    def of(cls, step: Finetune, model: CapturedModel, chosen: Iterable[Part], context: Context) -> Quantisers:
        """Have the weights of `chosen` in `model` seen through `step.quantizer`, as far as that can be."""
        made = cls()
        if step.quantizer is not None:
            kind = context.weight_quantizer(step.quantizer)
            names = {part.name for part in chosen}
            layers = [layer for layer in surgery.layers(model) if layer.type.startswith(("Conv", "Linear"))]
            ends = {layers[0].name, layers[-1].name} if layers and kind.spares_ends else set()
            for layer in [layer for layer in layers if layer.name in names]:
                why = f"{step.quantizer} leaves the first and the last layer float" if layer.name in ends else None
                made._add(model, layer, why, kind, step.bits)
            model.recompile()
        return made

    def _add(
        self, model: CapturedModel, layer: surgery.Layer, why: str | None, kind: type[WeightQuantizer], bits: int
    ) -> None:
        if why := why or _obstacle(model, layer):
            self.ways[layer.name] = f"trained in float: {why}"
            return
        old = layer.module.weight
        name = next(name for name, parameter in model.named_parameters() if parameter is old)
        quantiser = kind(surgery.weight_of(layer), bits)

        def function(weight: Tensor) -> Tensor:
            return quantiser.value(weight, torch.rand_like(weight) if kind.draws else None)

        weight = nn.Parameter(surgery.weight_of(layer).clone())
        surgery.replace_weight(model, layer, function, {"weight": weight})
        self.found[name] = quantiser
        self.ways[layer.name] = f"trained through {kind.name()}"

    def update(self, named: dict[str, nn.Parameter]) -> None:
        """After a step of the optimiser on the parameters `named`."""
        with torch.no_grad():
            for name, quantiser in self.found.items():
                weight = named[name]
                noise = torch.rand_like(weight) if quantiser.draws_after else None
                weight.copy_(quantiser.after_update(weight.detach(), noise))

    def final(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """`values` by name with what is left of the weights."""
        with torch.no_grad():
            return values | {name: quantiser.final(values[name]) for name, quantiser in self.found.items()}


def _obstacle(model: CapturedModel, layer: surgery.Layer) -> str | None:
    if layer.computed:
        return f"its weight is computed from {', '.join(layer.computed)}"
    if layer.type not in TYPES or getattr(layer.module, "padding_mode", "zeros") != "zeros":
        return "its weight cannot be computed in the graph"
    if not layer.module.weight.requires_grad:
        return "its weight is frozen"
    return surgery.tied(model, layer)
