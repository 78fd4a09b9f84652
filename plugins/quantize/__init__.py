"""Compute in 8-bit integers.

    before:  y = relu(conv(x, W, b))
    after:   y₈ = relu(conv(x₈, W₈, b₃₂))        x = s_x (x₈ - z_x),   W = s_w W₈ for each output,   b = s_x s_w b₃₂

targets      what a runtime computes in integers
placement    which values become integers, so that it does
scheme, observers, weights    their scales and zero points
gptq, adaround, equalisation    rounding that the outputs feel least
shared       weights made of few values
ties         scales at which PyTorch and a runtime round alike
sensitivity  layers that stay float
insertion    the nodes in the graph
aware        training that sees the integers
quantising   the way through a model
training, quantizers     quantisers to train through
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError

from surgery import Pass, PassReport, RecipeError, Target, WeightQuantizer, hookimpl

from .quantizers import QUANTIZERS
from .targets import ONNXRUNTIME_CPU

if TYPE_CHECKING:
    from collections.abc import Mapping

    from surgery import CapturedModel, Context, Registry

Bits = Annotated[int, Field(ge=2, le=8)]


@dataclass(frozen=True, kw_only=True)
class Quantize(Pass):
    """Compute convolutions, linear layers and what stands between them in 8-bit integers.

    Static quantisation (Jacob et al. 2018, arXiv:1712.05877): activations affine in unsigned integers with the ranges
    of the calibration data, weights symmetric in signed ones per output channel, biases in 32 bits. BatchNorm is folded
    first. The graph computes what the runtime computes in integers, rounded alike.
    """

    needs_calibration: ClassVar[bool] = True
    gives: ClassVar[frozenset[str]] = frozenset({"int8"})
    refuses: ClassVar[Mapping[str, str]] = {"int8": "the model is quantised already"}
    strength: ClassVar[Mapping[str, float]] = {"weight_bits": 8, "activation_bits": 8}

    weight_bits: Annotated[
        Bits, Field(description="bits of a weight; up to 4 are stored in 4 from ONNX opset 21 on, all others in 8")
    ] = 8
    activation_bits: Annotated[Bits, Field(description="bits of an activation; below 8 simulated in float")] = 8
    runtime: Annotated[str, Field(description="where the file will run; plugins may offer more")] = "onnxruntime-cpu"
    vnni: Annotated[
        Literal["auto"] | bool,
        Field(
            description="whether the processor there adds products of 8 bits without saturation (VNNI); without it"
            " weights keep to 7 bits. auto = as on this machine"
        ),
    ] = "auto"
    observer: Annotated[
        Literal["minmax", "percentile", "entropy", "mse"],
        Field(description="what part of the values seen an activation's integers span"),
    ] = "minmax"
    per_channel: Annotated[bool, Field(description="a scale for every output channel of a weight")] = True

    rounding: Annotated[
        Literal["nearest", "gptq", "adaround"],
        Field(
            description="how weights become integers: each to the nearest, one after the other with the rest making up"
            " for it (Frantar et al. 2023), or up and down as gradient descent finds best (Nagel et al. 2020)"
        ),
    ] = "nearest"
    bias_correction: Annotated[
        bool, Field(description="biases make up for the mean error on the calibration data (Nagel et al. 2019)")
    ] = True
    equalise: Annotated[
        bool, Field(description="scale channels between layers so that their weights have equal ranges first")
    ] = False

    sqnr_db: Annotated[
        float | None,
        Field(
            description="signal to quantisation noise that the outputs keep on the calibration data, in dB: the fewest"
            " layers that this takes stay float; null = none does"
        ),
    ] = None

    training: Annotated[
        dict[str, Any] | None,
        Field(
            description="train through the integers before they are written (Jacob et al. 2018, section 3), with these"
            " options of `finetune`; {} = its defaults"
        ),
    ] = None

    def check(self, registry: Registry) -> None:
        registry.find_target(self.runtime)
        if self.training is not None:
            _check_training(registry, self.training)

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .quantising import Quantisation

        return Quantisation(self, model, context).run()


def _check_training(registry: Registry, options: dict[str, Any]) -> None:
    """Raises RecipeError where they are no options of the pass that trains."""
    cls = registry.find_pass("finetune")
    if "quantizer" in options:
        raise RecipeError("training: quantizer", fix="the weights are trained through the integers; leave it out")
    try:
        TypeAdapter(cls).validate_json(json.dumps(options), strict=True)
    except (TypeError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        place = ".".join(("training", *map(str, first["loc"])))
        raise RecipeError(f"{place}: {first['msg']}", fix="`surgery show finetune` explains the options") from error


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [Quantize]


@hookimpl
def surgery_weight_quantizers() -> list[type[WeightQuantizer]]:
    return list(QUANTIZERS)


@hookimpl
def surgery_targets() -> list[Target]:
    return [ONNXRUNTIME_CPU]
