"""Integers for the weights of a model whose activations are rounded already, layer after layer.

Each layer sees its inputs as the layers before it, in integers, deliver them; its bias makes up for the mean error of
all of them. Layers that are called several times are rounded to the nearest by their weight alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import surgery
from surgery import Aim, CapturedModel, Context, Layer, Step, Task

from .adaround import adaround
from .gptq import gptq
from .insertion import BIAS_STEPS, input_scale, output_scale
from .scheme import Grid, Scheme
from .shared import Lookup, Rounded
from .ties import untied
from .weights import WeightObserver, weight_scheme

if TYPE_CHECKING:
    from . import Quantize

FEW_BITS = 6
"""Of a weight, from which on clipping the largest ones pays."""
SHARED_ERROR = 5.0
"""In steps of the grid, of outputs that share a scale, up to which shared values stay: little beside what sharing cost,
but much where single values are far larger than all others."""
_ROUNDED: dict[str, Callable[..., Tensor]] = {"gptq": gptq, "adaround": adaround}


@dataclass(frozen=True)
class Fitted:
    """What a layer computes with: `integers` in the shape of its weight, by `scheme` per output, and a float bias."""

    integers: Tensor
    scheme: Scheme
    bias: Tensor | None
    error: float
    """‖W - Ŵ‖ / ‖W‖"""
    shared: Rounded | None = None
    """What the integers are looked up in, where the weight was made of few values."""

    @property
    def weight(self) -> Tensor:
        """Ŵ"""
        return self.scheme.dequantise(self.integers).float()


def fit(
    step: Quantize,
    bits: int,
    model: CapturedModel,
    reference: CapturedModel,
    chosen: list[Layer],
    lookups: Mapping[str, Lookup],
    context: Context,
) -> dict[str, Fitted]:
    """The integers of every layer by name. `reference`: the same nodes, in float; `lookups`: what weights of few values
    are looked up in."""
    grid = Grid.signed(bits)
    shared = {layer.name: _shared(layer, grid, lookups.get(layer.name)) for layer in chosen}
    swept = [layer for layer in chosen if len(layer.nodes) == 1 and not layer.functional]
    if step.rounding == "nearest" and not step.bias_correction:
        swept = []
    names = {layer.name for layer in swept}
    found = {layer.name: _nearest(step, layer, grid, shared[layer.name]) for layer in chosen if layer.name not in names}
    steps = [Step(layer, Aim(layer.nodes[0].name)) for layer in swept]
    before = None
    for task in context.calibration.sweep(model, steps, reference):
        if before is not None:  # has been called for the last time
            _empty(before)
        fitted = _fitted(step, task, grid, shared[task.layer.name])
        found[task.layer.name] = fitted
        _simulate(task.layer.module, fitted)
        before = task.layer.module
    return found


def _shared(layer: Layer, grid: Grid, lookup: Lookup | None) -> Rounded | None:
    """The values that the weight is looked up in, as integers; None where one scale does not do them justice."""
    found = lookup.rounded(surgery.weight_of(layer), grid, _observer(grid)) if lookup else None
    if found is None or found.error * grid.high > SHARED_ERROR or bool((_least_scale(layer) > found.scale).any()):
        return None
    return found


def _nearest(step: Quantize, layer: Layer, grid: Grid, shared: Rounded | None) -> Fitted:
    weight, bias = surgery.weight_of(layer), _bias(layer)
    if shared:
        return _made(weight, shared.integers, _per_output(shared.scale, grid), bias, shared)
    scheme = _scheme(step, layer, grid, weight, None)
    return _made(weight, scheme.quantise(weight.double()), scheme, bias)


def _fitted(step: Quantize, task: Task, grid: Grid, shared: Rounded | None) -> Fitted:
    module: Any = task.layer.module
    weight = module.weight.detach()
    inputs = task.inputs()
    if shared:
        scheme, integers = _per_output(shared.scale, grid), shared.integers
    else:
        power = task.weight(inputs.power.unsqueeze(1).expand_as(task.matrix))
        scheme = _scheme(step, task.layer, grid, weight, power)
        integers = _integers(step, task, scheme)
    bias = _bias(task.layer)
    if step.bias_correction:
        rounded = scheme.dequantise(integers).reshape(task.matrix.shape)
        bias = (task.targets().mean - (rounded @ inputs.mean.unsqueeze(2)).squeeze(2)).flatten()
    return _made(weight, integers, scheme, bias, shared)


def _integers(step: Quantize, task: Task, scheme: Scheme) -> Tensor:
    if step.rounding == "nearest":
        return scheme.quantise(surgery.weight_of(task.layer).double())
    matrix = task.matrix
    solved = _ROUNDED[step.rounding](matrix, task.regression.xx, scheme, zeros=matrix == 0)
    return task.weight(solved).double()


def _made(
    weight: Tensor, integers: Tensor, scheme: Scheme, bias: Tensor | None, shared: Rounded | None = None
) -> Fitted:
    error = (scheme.dequantise(integers) - weight).norm() / weight.norm().clamp_min(1e-30)
    return Fitted(integers.to(torch.int8), scheme, bias, float(error), shared)


def _simulate(module: Any, fitted: Fitted) -> None:
    """Let the layers after this one see what it will give."""
    trained = module.weight.requires_grad
    module.weight = nn.Parameter(fitted.weight, trained)
    if fitted.bias is not None:
        module.bias = nn.Parameter(fitted.bias.float(), trained)


def _empty(module: Any) -> None:
    """A weight of the same shape that takes no memory; integers will stand in its place."""
    weight = module.weight
    module.weight = nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape), weight.requires_grad)


def _scheme(step: Quantize, layer: Layer, grid: Grid, weight: Tensor, importance: Tensor | None) -> Scheme:
    """One scale per output, so large that the bias fits in 32 bits too."""
    found = weight_scheme(weight, **weight_options(step, grid), importance=importance)
    scale = found.scale.expand(len(weight))
    scale = torch.where(scale > TINY, scale, scale.max().clamp_min(TINY))
    scale = torch.maximum(scale, _least_scale(layer))
    given = output_scale(layer.nodes[0])
    return _per_output(scale if given is None else untied(scale, input_scale(layer.nodes[0]) / given), grid)


def _per_output(scale: Tensor, grid: Grid) -> Scheme:
    return Scheme(scale, torch.zeros_like(scale, dtype=torch.int64), grid, 0)


def weight_options(step: Quantize, grid: Grid) -> dict[str, Any]:
    """Of `weight_scheme`."""
    return {"grid": grid, "per_channel": step.per_channel, "observer": _observer(grid)}


def _observer(grid: Grid) -> WeightObserver:
    return "mse" if grid.steps < 2**FEW_BITS else "minmax"


def _least_scale(layer: Layer) -> Tensor:
    """Of every output, so that its bias fits in 32 bits."""
    bias = _bias(layer)
    if bias is None:
        return torch.zeros(())
    return bias.double().abs() / (min(input_scale(node) for node in layer.nodes) * BIAS_STEPS)


def _bias(layer: Layer) -> Tensor | None:
    bias: Any = layer.module.bias
    return None if bias is None else bias.detach()


TINY = 2.0**-60
"""Smaller scales belong to channels without weights; they take the largest of their layer."""
