"""Fold batch normalisation into the layer before it.

    before:  z = γ (y - μ) / √(σ² + ε) + β,   y = W x + b     after:  z = (s W) x + s (b - μ) + β,   s = γ / √(σ² + ε)

μ, σ² (channels,) are the running statistics, so the result is the function the network computes in eval mode; s scales
the output channels of W.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import surgery
from surgery import Edit, Pass, PassReport, Skip, hookimpl

if TYPE_CHECKING:
    from torch import Tensor, fx

    from surgery import CapturedModel, Context, Layer


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Pass):
    """Fold batch normalisation into the convolution or linear layer before it.

    `select` and `exclude` name BatchNorm layers. Not for networks that will be trained further with batch statistics.
    """

    exact: ClassVar[bool] = True
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "values that weights share take no factor for each output channel",
    }

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        edits: list[Edit] = []
        skips: list[Skip] = []
        layers = surgery.layers(model)
        producers = _producers(layers)
        for norm in self.selected(layer for layer in layers if layer.type.startswith("BatchNorm")):
            for node in norm.nodes:
                before = producers.get(node.args[0])
                why = _obstacle(model, norm, node, before) if before else "follows no convolution or linear layer"
                if before is None or why:
                    skips.append(Skip(norm.name, why or ""))
                    continue
                gains = ", which gains a bias" if before.module.bias is None else ""
                _fold(model, before, norm, node)
                edits.append(Edit(norm.name, f"folded into {before.name}{gains}", also=(before.name,)))
                if before.functional:  # it is another node now
                    producers = _producers(surgery.layers(model))
        return PassReport(tuple(edits), tuple(skips))


def _producers(layers: Iterable[Layer]) -> dict[Any, Layer]:
    """Calls of layers that take a scale per output channel."""
    return {node: layer for layer in layers if layer.type.startswith(("Conv", "Linear")) for node in layer.nodes}


def _obstacle(model: CapturedModel, norm: Layer, node: fx.Node, before: Layer) -> str | None:
    """Why `norm` cannot be folded at the call `node`, or None."""
    if norm.module.running_mean is None:
        return "has no running statistics: it normalises by the batch"
    shared = surgery.sharing(model, before, computed=bool(before.computed) and _keeps(model, before, norm.module))
    if shared:
        return f"{before.name} cannot change alone: {shared}"
    users = len(before.nodes[0].users)
    if users > 1:
        return f"{before.name} has {users} users, which all read its output before the normalisation"
    if len(surgery.shape(node)) != _dimensions(before):
        return f"its channels are not the output channels of {before.name}"
    return None


def _keeps(model: CapturedModel, layer: Layer, norm: Any) -> bool:
    """Whether the weight is f(W) with f(s W) = s f(W) for these s: a mask."""
    import torch

    function, tensors = surgery.weight_function(model, layer)
    scaled = scaled_outputs(layer.module, scale_and_shift(norm)[0])
    if len(tensors) != 1 or next(iter(tensors.values())).shape != scaled.shape:
        return False
    return torch.equal(function(scaled), scaled)


def _dimensions(layer: Layer) -> int:
    """Dimensions of the output at which dimension 1 holds the layer's output channels."""
    module: Any = layer.module
    return 2 if layer.type == "Linear" else 2 + len(module.kernel_size)


def _fold(model: CapturedModel, before: Layer, norm: Layer, node: fx.Node) -> None:
    from torch import nn

    function = surgery.weight_function(model, before)[0] if before.computed else None
    module: Any = before.module
    scale, shift = scale_and_shift(norm.module)
    bias = shift if module.bias is None else scale * module.bias.detach().double() + shift
    trainable = module.weight.requires_grad
    module.weight = nn.Parameter(scaled_outputs(module, scale), trainable)
    module.bias = nn.Parameter(bias.to(module.weight.dtype), trainable)
    if before.functional:
        surgery.replace_layer(model, before, {"": module})
    if function is not None:
        layer = next(layer for layer in surgery.layers(model) if node.args[0] in layer.nodes)
        surgery.replace_weight(model, layer, function, {"weight": layer.module.weight})  # type: ignore[dict-item]
    surgery.note_reach(model, norm.name, before.name)
    surgery.bypass(model, node)


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """s = γ / √(σ² + ε) and t = β - s μ of a BatchNorm, (channels,) float64: it computes s y + t."""
    import torch

    root = torch.sqrt(norm.running_var.double() + norm.eps)
    gamma, beta = (1.0, 0.0) if norm.weight is None else (norm.weight.detach().double(), norm.bias.detach().double())
    scale = gamma / root
    return scale, beta - scale * norm.running_mean.double()


def scaled_outputs(module: Any, scale: Tensor) -> Tensor:
    """The layer's weight with every output channel times `scale` (channels,), in the weight's own type."""
    weight: Tensor = module.weight.detach()
    if type(module).__name__.startswith("ConvTranspose"):  # (inputs, outputs / groups, *kernel), inputs by group
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:]).double()
        by_group = scale.view(module.groups, 1, -1, *[1] * (weight.ndim - 2))
        return (grouped * by_group).reshape(weight.shape).to(weight.dtype)
    return (weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))).to(weight.dtype)


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [FoldBatchnorm]
