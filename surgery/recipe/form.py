"""What a recipe may hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import RecipeError, did_you_mean

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

Format = Literal["onnx", "source", "pack"]
OnBreak = Literal["continue", "undo", "soften", "stop"]


class Budget(BaseModel):
    """What the result may lose against the original, measured on the evaluation data, else on the calibration data.

    A bound that cannot be measured (accuracy without labels) leaves the judgement to the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    accuracy: float | None = Field(None, ge=0, le=1, description="smallest accuracy; needs labelled evaluation data")
    accuracy_drop: float | None = Field(
        None, ge=0, le=1, description="largest loss of accuracy (0.01 = one point of 100); needs evaluation data"
    )
    top1_agreement: float | None = Field(
        None, ge=0, le=1, description="smallest share of samples with the original's top-1 class"
    )
    sqnr_db: float | None = Field(None, description="smallest signal-to-quantisation-noise ratio of the outputs, in dB")
    parity: float | None = Field(
        None, gt=0, description="largest deviation of ONNX Runtime from PyTorch, relative to the largest output"
    )


class Recipe(BaseModel):
    """Passes in order, and what the result is held to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(min_length=1, description="shown in reports and written into artifacts")]
    description: str = Field("", description="when to use the recipe, and what it did on what")
    seed: int = Field(0, ge=0, le=2**62, description="decides every random choice")
    passes: Annotated[list[dict[str, Any]], Field(min_length=1)]
    budget: Budget = Field(default_factory=Budget)
    on_break: OnBreak = Field(
        "continue",
        description="a step that breaks the budget, or cannot do what it is asked for: `undo` it, `soften` it (try it "
        "milder, at last undo it), undo it and `stop`, or `continue` (keep the one, fail with the other); also beside "
        "a single pass",
    )
    export: list[Format] = Field(default=["onnx", "source"], description="files to write")
    opset: int | None = Field(None, ge=18, le=25, description="ONNX opset; by default the exporter's own")


def validated(raw: Any, place: str) -> Recipe:
    """`raw` as a recipe; the options of its passes are not looked at.

    Raises:
        RecipeError: keys are missing, unknown, or have values of the wrong type or range.
    """
    if not isinstance(raw, dict) or not raw:
        raise RecipeError("the recipe is empty or no mapping", at=place, fix="it needs at least `name:` and `passes:`")
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(
            describe(error.errors(), Recipe.model_fields), at=place, fix="`surgery schema` prints the schema"
        ) from error


def describe(errors: Sequence[ErrorDetails], known: Any) -> str:
    """pydantic's first complaint in a sentence: where, what was given, what is expected. Where a value may be of
    several kinds it complains once for each, and all are named."""
    error = errors[0]
    alike = [e for e in errors if e["loc"][:-1] == error["loc"][:-1] and e["input"] == error["input"]]
    if len(alike) > 1 and len(error["loc"]) > 1:
        expected = " or ".join(e["msg"].removeprefix("Input should be ") for e in alike)
        return f"{'.'.join(map(str, error['loc'][:-1]))}: should be {expected}, got {error['input']!r}"
    where = ".".join(str(part) for part in error["loc"] if part != "[key]") or "value"
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        inner = Budget.model_fields if error["loc"][0] == "budget" and len(error["loc"]) > 1 else known
        return f"unknown key {where!r}{did_you_mean(str(error['loc'][-1]), inner)}"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
