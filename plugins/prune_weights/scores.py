"""How much each weight of each layer counts: scores (groups, outputs, features).

obd    ½ h w² (LeCun, Denker and Solla 1990, equation 5)
       with labels   h = E[(∂loss/∂w)²] over single samples, the empirical Fisher information
       without       h = s² E[x²]: the squared error of the layer's output, s the factor of a BatchNorm behind it
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

import surgery
from surgery import Affine, CapturedModel, Context, InputError, Inputs, Layer
from surgery.graph import set_parameters, tree_map_only

Scores = dict[str, Tensor]


def magnitudes(layers: Sequence[Layer]) -> Scores:
    return {layer.name: matrix_of(layer).abs() for layer in layers}


def of_outputs(
    model: CapturedModel, layers: Sequence[Layer], context: Context, maps: Mapping[str, Affine], relative: bool
) -> Scores:
    """Rise of the mean square error of each layer's output; `relative` to its variance, times √n.

    Relative errors compare layers. The √n, n the layer's weights, is measured and not derived: a large layer makes up
    for more than its weights one by one let expect.
    """
    found = {}
    for layer, statistics in context.calibration.stream(model, layers, ("mean", "moments")):
        weight = matrix_of(layer).double()
        scale = torch.ones_like(weight[:, :, :1])
        if layer.name in maps:
            scale = maps[layer.name].scaled(scale).cpu()
        power, output = statistics.unfolded.power.unsqueeze(1), statistics.output
        assert output is not None
        whole = float((scale.flatten().square() * output.variance.flatten()).sum()) if relative else 0.0
        factor = weight.numel() ** 0.5 / whole if whole > 0 else 1.0
        found[layer.name] = (scale * weight).square() * power * factor
    return found


def of_loss(model: CapturedModel, layers: Sequence[Layer], context: Context) -> Scores:
    """Rise of the loss on the training data, by the diagonal of the empirical Fisher information.

    Raises:
        InputError: the training data is empty, does not fit the model, or has no loss.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    keys = {layer.name: _parameter(layer, names) for layer in layers}
    values = {key: model.get_parameter(key).detach().requires_grad_() for key in keys.values()}
    squares, count = {key: torch.zeros_like(value) for key, value in values.items()}, 0
    model.recompile()
    for inputs, target in _samples(model, context):
        loss = surgery.loss_of(context.data, functional_call(model, values, inputs.args, inputs.kwargs), target)
        gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True)
        for key, gradient in zip(values, gradients, strict=True):
            if gradient is not None:
                squares[key] += gradient.square()
        count += 1
    if not count:
        raise InputError("the training data has no batches", fix="give at least one batch, in a list or a DataLoader")
    found = {layer.name: as_matrix(layer.module, squares[keys[layer.name]]).cpu() / (2 * count) for layer in layers}
    return {layer.name: found[layer.name] * matrix_of(layer).square() for layer in layers}


def matrix_of(layer: Layer) -> Tensor:
    """The layer's present W (groups, outputs, features)."""
    return surgery.weight_matrix(layer.module).detach().cpu()


def as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A tensor of the weight's shape as (groups, outputs, features)."""
    twin = copy.copy(module)
    set_parameters(twin, {"weight": nn.Parameter(weight.detach(), requires_grad=False)})
    return surgery.weight_matrix(twin)


def _parameter(layer: Layer, names: Mapping[int, str]) -> str:
    return layer.computed[0] if layer.computed else names[id(layer.module.weight)]


def _samples(model: CapturedModel, context: Context) -> Iterator[tuple[Inputs, Any]]:
    """One sample at a time with its target; a batch at a time where the model takes no other size."""
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for number, batch in enumerate(context.data.training or ()):
            context.progress("gradients", number, 0)
            yield from _single(model, batch, f"training batch {number}", context.device)
    finally:
        for module, mode in training.items():
            module.training = mode


def _single(model: CapturedModel, batch: Any, place: str, device: str) -> Iterator[tuple[Inputs, Any]]:
    values, target = surgery.pair_of(batch, place)
    inputs = surgery.checked_inputs(model, values, place)
    size = inputs.batch_size
    whole = ((inputs.args, inputs.kwargs), target)
    for i in range(size) if model.dynamic_batch else [None]:
        (args, kwargs), target = tree_map_only(Tensor, partial(_cut, sample=i, size=size, device=device), whole)
        yield Inputs(args, kwargs, inputs.names), target


def _cut(value: Tensor, sample: int | None, size: int, device: str) -> Tensor:
    whole = sample is None or not value.ndim or len(value) != size
    return (value if whole else value[sample : sample + 1]).to(device)  # type: ignore[operator]
