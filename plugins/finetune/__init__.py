"""Train what passes have left.

batches         inputs, and labels where there are any
losses          what the model is to come near to: the original's outputs, the labels
parts           what is trained, and what became of it
quantising      weights that are seen in few values while they are trained
accelerating    an accelerator of one's own
training        the loop, and the way of the pass
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from surgery import InputError, Pass, PassReport, hookimpl

if TYPE_CHECKING:
    from surgery import CapturedModel, Context, Data, Layer, Registry


@dataclass(frozen=True, kw_only=True)
class Finetune(Pass):
    """Train all parameters, computed weights as they stand, towards the original's outputs or labels.

    Distillation (Hinton, Vinyals and Dean 2015, arXiv:1503.02531, section 2) needs no labels: the model before the
    first pass is the teacher. Masks, codebook indices and hashes stay what they are, their values are trained. With
    `select` or `exclude` other layers stay, BatchNorm statistics included.
    """

    idempotent: ClassVar[bool] = False
    refuses: ClassVar[Mapping[str, str]] = {
        "int8": "integers are not trained: train first, or through the integers by `quantize: {training: …}`"
    }

    epochs: Annotated[int, Field(ge=1, description="times that the data is gone through")] = 3
    learning_rate: Annotated[float, Field(gt=0, description="at the start; falls to 0 as a cosine does")] = 1e-3
    optimizer: Annotated[
        Literal["adamw", "sgd"],
        Field(description="adamw has steps of one size whatever the gradient's, which many weights may add up to"),
    ] = "adamw"
    weight_decay: Annotated[float, Field(ge=0, description="of all that is trained, per unit of the rate")] = 0.0
    momentum: Annotated[float, Field(ge=0, lt=1, description="of sgd")] = 0.9
    loss: Annotated[
        Literal["distillation", "labels", "both"] | None,
        Field(description="towards the original's outputs, the labels, or both; null = both where there are labels"),
    ] = None
    temperature: Annotated[float, Field(gt=0, description="the logits are divided by to be compared")] = 4.0
    freeze_batchnorm: Annotated[bool, Field(description="BatchNorm normalises by the statistics that it has")] = False
    quantizer: Annotated[
        str | None,
        Field(description="train through the few values that this quantiser gives the weights, and leave them these"),
    ] = None
    bits: Annotated[int, Field(ge=2, le=8, description="of a weight, for a quantizer that can have several")] = 8

    def check(self, registry: Registry) -> None:
        if self.quantizer is not None:
            registry.find_weight_quantizer(self.quantizer)

    def check_data(self, data: Data, registry: Registry) -> None:
        from .batches import FIX

        if data.training is None and self.loss in ("labels", "both"):
            raise InputError(f"pass {self.name()} with loss: {self.loss} needs labels and there are none", fix=FIX)
        if data.training is None and data.calibration is None:
            raise InputError(f"pass {self.name()} has no data to train on", fix=FIX)

    def nameable(self, model: CapturedModel) -> list[Layer]:
        from .parts import parts

        return [part.layer for part in parts(model)]

    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        from .training import Finetuning

        return Finetuning(self, model, context).run()


@hookimpl
def surgery_passes() -> list[type[Pass]]:
    return [Finetune]
