"""Options of a data set, as written behind its name: `?batch=32&limit=1000`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError

from ..errors import InputError, did_you_mean


def _numbers(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


Share = Annotated[float, Field(gt=0, le=1)]
PerChannel = Annotated[tuple[float, ...], BeforeValidator(_numbers)]
Natural = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every data set takes."""

    batch: Natural = 64
    """Images of a batch."""
    calibration: Natural = 256
    """Images to calibrate on, at most: a random sample of the training images that does not look at classes."""
    training: Natural | None = None
    """Images to train on, with labels, at most: a random sample as well; None = those to calibrate on."""
    limit: Natural | None = None
    """Images to evaluate on, at most: a random sample, in order; None = all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides the samples."""


PRESETS = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "none": ((0.0,), (1.0,)),
}


@dataclass(frozen=True, kw_only=True)
class Colours(Options):
    """How pixels from 0 to 1 become what the model was trained on: (pixel - mean) / std, per channel."""

    normalise: Annotated[str, Field(pattern=f"^({'|'.join(PRESETS)})$")] = "imagenet"
    mean: PerChannel = ()
    """In place of that of `normalise`: one number per channel, or one for all."""
    std: PerChannel = ()

    def __post_init__(self) -> None:
        if any(value == 0 for value in self.std):
            raise ValueError("std: no channel has a standard deviation of 0")


O = TypeVar("O", bound=Options)  # noqa: E741


def parse(form: type[O], query: str, place: str) -> O:
    """The options that `query`, such as `batch=32&limit=1000`, sets.

    Raises:
        InputError: an option that is unknown or given twice, or a value of the wrong type or range.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise InputError(f"options {query!r}: {error}", at=place, fix="write them as ?batch=32&limit=1000") from error
    known = [option.name for option in fields(form)]
    given = dict(pairs)
    for key in given:
        if key not in known:
            raise InputError(
                f"unknown option {key!r}{did_you_mean(key, known)}", at=place, fix=f"options: {', '.join(known)}"
            )
    if len(given) < len(pairs):
        raise InputError(f"options {query!r} set one twice", at=place, fix="set each once")
    return _validated(form, given, place)


def _validated(form: type[O], given: Mapping[str, str], place: str) -> O:
    try:
        return TypeAdapter(form).validate_python(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][:1])
        raise InputError(
            f"option {where}: {first['msg']}, got {first['input']!r}" if where else first["msg"],
            at=place,
            fix="write options as ?batch=32&limit=1000&mean=0.5,0.5,0.5",
        ) from error
