"""BatchNorm in eval mode as one opaque operator while `torch.export` follows the model.

    export sees   surgery::batch_norm(x, …)   whose result is like x
    it becomes    aten.batch_norm(x, …)       with the same arguments

Export takes aten.batch_norm apart to learn the shape of its result, at every call: a fifth of its time on a ResNet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn

from .torch_private import FakeTensor, check_dimensions, schema_of

NAME = "surgery::batch_norm"

_library = torch.library.Library("surgery", "FRAGMENT")
_library.define("batch_norm" + str(schema_of(torch.ops.aten.batch_norm.default)).removeprefix("aten::batch_norm"))
_library.impl("batch_norm", lambda x, *_: torch.empty_like(x), "Meta")

_LAYERS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@contextmanager
def opaque_norms(model: nn.Module) -> Iterator[None]:
    """In the body, the BatchNorm layers of `model` that use their running statistics call the opaque operator."""
    layers = [m for m in model.modules() if type(m) in _LAYERS and _is_fixed(m) and "forward" not in vars(m)]
    try:
        for layer in layers:
            vars(layer)["forward"] = _opaque(layer)
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def plain_norms(module: fx.GraphModule) -> None:
    """Put aten.batch_norm where the opaque operator stands, in nested graphs as well."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if node.target is torch.ops.surgery.batch_norm.default:
                node.target = torch.ops.aten.batch_norm.default


def _is_fixed(layer: nn.Module) -> bool:
    return not layer.training and layer.running_mean is not None and layer.running_var is not None


def _opaque(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    compute = layer.forward

    def forward(input: Tensor) -> Tensor:
        output: Tensor
        if type(input) is not FakeTensor:  # as inside vmap
            output = compute(input)
            return output
        check_dimensions(layer, input)
        tensors = layer.weight, layer.bias, layer.running_mean, layer.running_var
        momentum = 0.0 if layer.momentum is None else layer.momentum
        output = torch.ops.surgery.batch_norm.default(
            input, *tensors, False, momentum, layer.eps, torch.backends.cudnn.enabled
        )
        return output

    return forward
