"""Modules that take a convolution's place, made from its weights or, with data, from the outputs it should give."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery import Operator

from .factors import Factors, fit, nearest, weight_error

if TYPE_CHECKING:
    from surgery import Regression

MARGIN = 3.0
"""Standard deviations by which a calibrated BatchNorm lifts its output, so that at first ReLU hardly cuts anything."""


def parameters_after(module: Any, multiplier: int, norm_activation: bool) -> int:
    """Parameters of what takes the place of the convolution `module`."""
    inner, biased = module.in_channels * multiplier, module.bias is not None
    depthwise = inner * (prod(module.kernel_size) + biased)
    pointwise = module.out_channels * (inner + biased)
    return int(depthwise + 2 * inner * norm_activation + pointwise)


def dense_weight(module: Any) -> Tensor:
    """W (O, C, k) float64 on the CPU."""
    weight: Tensor = module.weight.detach()
    return weight.flatten(2).double().cpu()


def factored(
    module: Any, multiplier: int, task: Regression | None, rounds: int | None
) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """What takes the place of the dense `module`, `copies` (above one kernel a channel), `depthwise` and `pointwise`,
    and its errors by name.

    `task` is to give the outputs wanted on data. In at most `rounds` rounds the two are fitted to it and the bias makes
    the mean output right; with `rounds` None they are near to the weights, and `task` only measures.
    """
    weight = dense_weight(module)
    fitted = task if rounds is not None else None
    if fitted and rounds is not None:
        target = fitted.solve(_matrix(weight))[0].view_as(weight)
        factors = fit(target, fitted.xx[0], nearest(target, multiplier), rounds)
    else:
        factors = nearest(weight, multiplier)
    depthwise, pointwise = _convolutions(module, factors)
    product = factors_of(depthwise, pointwise, module.in_channels).product
    errors = {"weight_error": weight_error(weight, product)}
    if fitted:
        _set_bias(pointwise, fitted.bias(_matrix(product))[0])
    if task:
        bias: Any = pointwise.bias
        errors["output_error"] = task.error(_matrix(product), None if bias is None else bias.unsqueeze(0))
    return {**_copies(multiplier), "depthwise": depthwise, "pointwise": pointwise}, errors


def _copies(multiplier: int) -> dict[str, nn.Module]:
    """The input, `multiplier` times along the channels: runtimes have fast kernels for one filter a channel."""
    every = [Operator.VALUE] * multiplier
    return {"copies": Operator(torch.ops.aten.cat.default, (every, 1))} if multiplier > 1 else {}


def factors_of(depthwise: Any, pointwise: Any, channels: int) -> Factors:
    """The weights as they stand in the modules, rounded to the layer's type; `channels` is C."""
    p, d = dense_weight(pointwise), dense_weight(depthwise)
    return Factors(p.view(len(p), -1, channels).transpose(1, 2), d.view(-1, channels, d.shape[2]).transpose(0, 1))


def norm_between(depthwise: Any, pointwise: Any, task: Regression | None) -> Any:
    """BatchNorm to stand with a ReLU between the two convolutions.

    With `task` its statistics are those of the depthwise outputs z, ẑ = (z - mean) / σ, and the pointwise convolution
    takes scale, mean and the lift by `MARGIN` back, so that the layer starts as it was but for what ReLU cuts:
    P z + b = (P σ) (ẑ + margin) + b + P (mean - margin σ).
    """
    weight = depthwise.weight
    norm: Any = getattr(nn, f"BatchNorm{weight.ndim - 2}d")(len(weight), dtype=weight.dtype, device=weight.device)
    if task is None:
        return norm
    channels = len(task.x_mean[0]) // weight[0].numel()
    mean, variance = _output_moments(factors_of(depthwise, pointwise, channels).depthwise, task)
    scale = (variance + norm.eps).sqrt()
    p = dense_weight(pointwise).squeeze(2)
    norm.running_mean, norm.running_var = mean.to(weight), variance.to(weight)
    nn.init.constant_(norm.bias, MARGIN)
    _set_bias(pointwise, pointwise.bias.detach().double().cpu() + p @ (mean - MARGIN * scale))
    pointwise.weight = nn.Parameter((p * scale).to(weight).view_as(pointwise.weight), weight.requires_grad)
    return norm


def _output_moments(depthwise: Tensor, task: Regression) -> tuple[Tensor, Tensor]:
    """Mean and variance (m·C,) of the depthwise outputs, from D (C, m, k)."""
    channels, _, kernel = depthwise.shape
    own = torch.arange(channels)
    covariance = task.xx.view(channels, kernel, channels, kernel)[own, :, own]  # (C, k, k)
    mean = torch.einsum("cjk,ck->jc", depthwise, task.x_mean.view(channels, kernel))
    variance = torch.einsum("cjk,ckl,cjl->jc", depthwise, covariance, depthwise)
    return mean.flatten(), variance.flatten().clamp_min(0)


def _convolutions(module: Any, factors: Factors) -> tuple[nn.Module, nn.Module]:
    """The two with the factors as weights; the pointwise one has the bias of `module`, the depthwise one zeros."""
    channels, multiplier, _ = factors.depthwise.shape
    inner = channels * multiplier
    depthwise = _convolution(
        module,
        factors.depthwise.transpose(0, 1).reshape(inner, 1, *module.kernel_size),
        None if module.bias is None else torch.zeros(inner),
        stride=module.stride,
        padding=module.padding,
        dilation=module.dilation,
        groups=inner,
    )
    shape = (module.out_channels, inner, *[1] * len(module.kernel_size))
    return depthwise, _convolution(module, factors.pointwise.transpose(1, 2).reshape(shape), module.bias)


def _convolution(like: Any, weight: Tensor, bias: Tensor | None, **options: Any) -> nn.Module:
    """A convolution of `like`'s rank, type, device and trainability."""
    outputs, inputs, *kernel = weight.shape
    inputs *= options.get("groups", 1)
    module: nn.Module = type(like)(inputs, outputs, kernel, bias=False, device="meta", **options)
    module.weight = nn.Parameter(weight.to(like.weight).contiguous(), like.weight.requires_grad)
    if bias is not None:
        _set_bias(module, bias)
    return module


def _set_bias(module: Any, bias: Tensor) -> None:
    weight = module.weight
    module.bias = nn.Parameter(bias.detach().to(weight, copy=True), weight.requires_grad)


def _matrix(weight: Tensor) -> Tensor:
    """(O, C, k) as (1, O, C·k)."""
    return weight.flatten(1).unsqueeze(0)
