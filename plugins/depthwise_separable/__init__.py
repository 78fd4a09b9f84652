"""Rewrite convolutions as a depthwise and a pointwise one.

    before:  conv       (O, C, k)                    O C k parameters
    after:   copies     m times the input            0
             depthwise  (m C, 1, k), m C groups      + m C k
             pointwise  (O, m C, 1)                  + O m C        k = product of the kernel, m = multiplier

One depthwise convolution with m filters a channel would need no copies, but runtimes have fast kernels for one filter
alone: ONNX Runtime on a processor takes up to twice as long in float and sixteen times as long in integers
(`make grouped-bench`). Stride, padding and dilation go to the depthwise convolution; each of the two has a bias where
the original had one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

import surgery
from surgery import Edit, Pass, PassReport, RecipeError, Skip, hookimpl

if TYPE_CHECKING:
    from torch import nn

    from surgery import CapturedModel, Context, Data, Layer, Registry, Regression, Statistics


@dataclass(frozen=True, kw_only=True)
class DepthwiseSeparable(Pass):
    """Rewrite convolutions as a depthwise and a pointwise one.

    MobileNets (Howard et al. 2017, arXiv:1704.04861, section 3.1). With calibration data the new weights minimise the
    error of the layer's outputs, otherwise that of its weights; with `sequential` they also make up for the layers
    before. The network usually wants training afterwards, and with `norm_activation` it needs it.
    """

    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "the weights are integers by then",
        "shared": "the two kernels would be ordinary weights, which share no values",
        "masked": "the two kernels would be ordinary weights, without the zeros",
    }

    multiplier: Annotated[int, Field(ge=1, description="depthwise kernels per input channel")] = 1
    norm_activation: Annotated[bool, Field(description="BatchNorm and ReLU between the two, as in MobileNet")] = False
    include_first: Annotated[bool, Field(description="rewrite the network's first convolution too")] = False
    calibrate: Annotated[bool | None, Field(description="fit the outputs on data; null = when there is some")] = None
    sequential: Annotated[
        bool, Field(description="fit layer by layer, each to its outputs before the pass on its inputs by then")
    ] = False
    iterations: Annotated[int, Field(ge=0, description="most rounds of the fit to the outputs")] = 50

    def __post_init__(self) -> None:
        if self.sequential and self.calibrate is False:
            problem = "sequential: true fits the outputs, which calibrate: false forbids"
            raise RecipeError(problem, at=f"pass {self.name()}", fix="drop one of the two")

    def check_data(self, data: Data, registry: Registry) -> None:
        if self.calibrate or self.sequential:
            data.require_calibration(f"pass {self.name()}")

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        layers = surgery.layers(model)
        convolutions = [layer for layer in layers if layer.type.startswith("Conv")]
        chosen, skips = [], []
        for layer in self.selected(layers):
            if layer not in convolutions:
                continue
            why = self._obstacle(model, layer, is_first=layer is convolutions[0])
            if why:
                skips.append(Skip(layer.name, why))
            else:
                chosen.append(layer)
        rewrite = self._rewrite_in_turn if self.sequential else self._rewrite_at_once
        return PassReport(tuple(rewrite(model, chosen, context)), tuple(skips))

    def _obstacle(self, model: CapturedModel, layer: Layer, is_first: bool) -> str | None:
        """Why `layer` is left as it is, or None."""
        from .modules import parameters_after

        module: Any = layer.module
        if layer.type.startswith("ConvTranspose"):
            return "transposed convolutions have no depthwise form here"
        if module.groups > 1:
            return f"already grouped ({module.groups} groups)"
        if set(module.kernel_size) == {1}:
            return "already pointwise: its kernel is 1"
        if is_first and not self.include_first:
            return "first convolution of the network (include_first: true rewrites it)"
        before = sum(p.numel() for p in module.parameters())
        after = parameters_after(module, self.multiplier, self.norm_activation)
        if after >= before:
            return f"would not shrink: {before} parameters, {after} afterwards"
        return surgery.tied(model, layer)

    def _rewrite_at_once(self, model: CapturedModel, chosen: list[Layer], context: Context) -> list[Edit]:
        """All layers from the statistics of the model as it was."""
        if context.has_calibration:
            near = "weights" if self.calibrate is False else "outputs"
            found = context.calibration.stream(model, chosen, ("gram",))
            made = [self._made(layer, near, _own_outputs(layer, statistics)) for layer, statistics in found]
        else:
            made = [self._made(layer, "weights", None) for layer in chosen]
        for layer, (parts, _) in zip(chosen, made, strict=True):
            surgery.replace_layer(model, layer, parts)
        return [edit for _, edit in made]

    def _rewrite_in_turn(self, model: CapturedModel, chosen: list[Layer], context: Context) -> list[Edit]:
        """Each layer on the inputs which the layers rewritten before it give, towards its outputs before the pass;
        first those that are called several times, towards their outputs on the inputs they have."""
        from torch import nn

        edits = self._rewrite_at_once(model, [layer for layer in chosen if len(layer.nodes) > 1], context)
        names = _as_modules(model, [layer for layer in chosen if len(layer.nodes) == 1])
        steps = [surgery.Affine(layer, None, layer.nodes[0]).step() for layer in names]
        made = {}
        for number, task in enumerate(context.calibration.sweep(model, steps, surgery.snapshot(model))):
            context.progress(self.name(), number, len(steps))
            made[task.layer] = self._made(task.layer, "outputs before the pass", task.regression)
            parts = made[task.layer][0].values()
            surgery.set_module(model, str(task.layer.nodes[0].target), nn.Sequential(*parts))
        for layer, (found, edit) in made.items():
            surgery.replace_layer(model, layer, found)
            edits.append(replace(edit, layer=names[layer]))
        return edits

    def _made(self, layer: Layer, near: str, task: Regression | None) -> tuple[dict[str, nn.Module], Edit]:
        """The parts that take the layer's place, near to its weights or to the outputs in `task`, and the report."""
        from torch import nn

        from .modules import factored, norm_between

        fits = near != "weights"
        parts, errors = factored(layer.module, self.multiplier, task, self.iterations if fits else None)
        if self.norm_activation:
            errors.pop("output_error", None)  # ReLU changes it
            pointwise = parts.pop("pointwise")
            norm = norm_between(parts["depthwise"], pointwise, task if fits else None)
            parts |= {"norm": norm, "activation": nn.ReLU(), "pointwise": pointwise}
        gains = ", which gains a bias" if layer.module.bias is None and parts["pointwise"].bias is not None else ""
        what = f"{', '.join(parts)} with {_kernel(layer)} kernels, fitted to its {near}{gains}"
        return parts, Edit(layer.name, what, {**errors, **_counts(layer, parts)})


def _as_modules(model: CapturedModel, wanted: list[Layer]) -> dict[Layer, str]:
    """The layers `wanted` of the model, those that are functions as modules now; each with the name that it had."""
    names = {layer.name for layer in wanted}
    before = [layer for layer in surgery.layers(model) if layer.type.startswith("Conv")]
    for layer in before:
        if layer.name in names and layer.functional:
            surgery.replace_layer(model, layer, {"": layer.module})
    after = [layer for layer in surgery.layers(model) if layer.type.startswith("Conv")]
    return {now: old.name for old, now in zip(before, after, strict=True) if old.name in names}


def _kernel(layer: Layer) -> str:
    module: Any = layer.module
    return "x".join(map(str, module.kernel_size))


def _own_outputs(layer: Layer, statistics: Statistics) -> Regression:
    """The task of giving the layer's own outputs on its own inputs."""
    module: Any = layer.module
    bias = None if module.bias is None else module.bias.unsqueeze(0)
    return statistics.unfolded.regression(module.weight.flatten(1).unsqueeze(0), bias)


def _counts(layer: Layer, parts: dict[str, nn.Module]) -> dict[str, int]:
    return {
        "parameters_before": sum(p.numel() for p in layer.module.parameters()),
        "parameters_after": sum(p.numel() for part in parts.values() for p in part.parameters()),
    }


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [DepthwiseSeparable]
