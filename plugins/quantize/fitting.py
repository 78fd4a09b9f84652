"""Integers for the weights of a model whose activations are rounded already, layer after layer.

Each layer sees its inputs as the layers before it, in integers, deliver them; its bias makes up for the mean error of
all of them. Layers that are called several times are rounded to the nearest by their weight alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import surgery
from surgery import Aim, CapturedModel, Context, Layer, Step, Task

from .adaround import adaround
from .gptq import gptq
from .insertion import BIAS_STEPS, input_scale
from .observers import weight_scheme
from .scheme import Grid, Scheme

if TYPE_CHECKING:
    from . import Quantize

FEW_BITS = 6
"""Of a weight, from which on clipping the largest ones pays."""
_ROUNDED: dict[str, Callable[..., Tensor]] = {"gptq": gptq, "adaround": adaround}


@dataclass(frozen=True)
class Fitted:
    """What a layer computes with: `integers` in the shape of its weight, by `scheme` per output, and a float bias."""

    integers: Tensor
    scheme: Scheme
    bias: Tensor | None
    error: float
    """‖W - Ŵ‖ / ‖W‖"""

    @property
    def weight(self) -> Tensor:
        """Ŵ"""
        return self.scheme.dequantise(self.integers).float()


def fit(
    step: Quantize, bits: int, model: CapturedModel, reference: CapturedModel, chosen: list[Layer], context: Context
) -> dict[str, Fitted]:
    """The integers of every layer by name. `reference`: the same nodes, in float."""
    grid = Grid.signed(bits)
    found = {layer.name: _nearest(step, layer, grid, surgery.weight_of(layer)) for layer in chosen}
    if step.rounding == "nearest" and not step.bias_correction:
        return found
    single = [layer for layer in chosen if len(layer.nodes) == 1 and not layer.functional]
    steps = [Step(layer, Aim(layer.nodes[0].name)) for layer in single]
    for task in context.calibration.sweep(model, steps, reference):
        fitted = _fitted(step, task, grid)
        found[task.layer.name] = fitted
        _simulate(task.layer.module, fitted)
    return found


def _nearest(step: Quantize, layer: Layer, grid: Grid, weight: Tensor) -> Fitted:
    scheme = _scheme(step, layer, grid, weight, None)
    bias: Any = layer.module.bias
    return _made(weight, scheme.quantise(weight.double()), scheme, None if bias is None else bias.detach())


def _fitted(step: Quantize, task: Task, grid: Grid) -> Fitted:
    module: Any = task.layer.module
    weight = module.weight.detach()
    inputs = task.inputs()
    scheme = _scheme(step, task.layer, grid, weight, task.weight(inputs.power.unsqueeze(1).expand_as(task.matrix)))
    if step.rounding == "nearest":
        integers = scheme.quantise(weight.double())
    else:
        matrix = task.matrix
        solved = _ROUNDED[step.rounding](matrix, task.regression.xx, scheme, zeros=matrix == 0)
        integers = task.weight(solved).double()
    bias = None if module.bias is None else module.bias.detach()
    if step.bias_correction:
        rounded = scheme.dequantise(integers).reshape(task.matrix.shape)
        bias = (task.targets().mean - (rounded @ inputs.mean.unsqueeze(2)).squeeze(2)).flatten()
    return _made(weight, integers, scheme, bias)


def _made(weight: Tensor, integers: Tensor, scheme: Scheme, bias: Tensor | None) -> Fitted:
    error = (scheme.dequantise(integers) - weight).norm() / weight.norm().clamp_min(1e-30)
    return Fitted(integers, scheme, bias, float(error))


def _simulate(module: Any, fitted: Fitted) -> None:
    """Let the layers after this one see what it will give."""
    trained = module.weight.requires_grad
    module.weight = nn.Parameter(fitted.weight, trained)
    if fitted.bias is not None:
        module.bias = nn.Parameter(fitted.bias.float(), trained)


def _scheme(step: Quantize, layer: Layer, grid: Grid, weight: Tensor, importance: Tensor | None) -> Scheme:
    """One scale per output, so large that the bias fits in 32 bits too."""
    observer: Any = "mse" if grid.steps < 2**FEW_BITS else "minmax"
    found = weight_scheme(weight, grid, step.per_channel, observer, importance=importance)
    scale = found.scale.expand(len(weight))
    scale = torch.where(scale > TINY, scale, scale.max().clamp_min(TINY))
    bias: Any = layer.module.bias
    if bias is not None:
        least = min(input_scale(node) for node in layer.nodes)
        scale = torch.maximum(scale, bias.detach().double().abs() / (least * BIAS_STEPS))
    return Scheme(scale, torch.zeros_like(scale, dtype=torch.int64), grid, 0)


TINY = 2.0**-60
"""Smaller scales belong to channels without weights; they take the largest of their layer."""
