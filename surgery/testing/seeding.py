"""Weights on which no check is vacuous: nothing starts at zero or one, and BatchNorm has statistics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` with every constant parameter and BatchNorm statistic drawn anew, in place; in eval mode.

    Scales come from U(0.5, 1.5), shifts and running means from N(0, 0.1), running variances from U(0.5, 1.5). A
    residual branch that ends in a zero, or a BatchNorm that does nothing, would hide what a pass does to it.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.is_floating_point() and _is_constant(parameter):
            _draw(parameter, generator)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1, generator=generator)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def _is_constant(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


def _draw(parameter: Tensor, generator: torch.Generator) -> None:
    with torch.no_grad():
        if parameter.flatten()[0] == 0:
            parameter.normal_(0, 0.1, generator=generator)
        else:
            parameter.uniform_(0.5, 1.5, generator=generator)
