"""What the command line names in words: example inputs such as `ids=1x16:int64`, and model factories."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .data import import_object
from .errors import InputError, ModelError
from .inputs import Inputs
from .tracing import user_line

_SPEC = re.compile(r"(?:(?P<name>\w+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<limit>\d+))?")


def inputs_from(specs: Sequence[str]) -> Inputs:
    """Random inputs, the same every time: floats from N(0, 1), integers from 0 to below the limit, or 2 without one.

    Raises:
        InputError: a specification that is not of the form [NAME=]SHAPE[:DTYPE][<LIMIT].
    """
    generator = torch.Generator().manual_seed(0)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for spec in specs:
        match = _SPEC.fullmatch(spec)
        dtype = getattr(torch, match["dtype"] or "float32", None) if match else None
        if match is None or not isinstance(dtype, torch.dtype):
            raise InputError(
                f"input {spec!r} is not of the form [NAME=]SHAPE[:DTYPE][<LIMIT]",
                fix="for example 1x3x32x32 or ids=1x16:int64<1000",
            )
        tensor = _random([int(n) for n in match["shape"].split("x")], dtype, int(match["limit"] or 2), generator)
        if match["name"]:
            kwargs[match["name"]] = tensor
        else:
            args.append(tensor)
    return Inputs(tuple(args), kwargs)


def _random(shape: list[int], dtype: torch.dtype, limit: int, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, limit, shape, generator=generator).to(dtype)


def model_from(name: str) -> tuple[nn.Module, Any]:
    """The model that `module:factory` makes, and its example inputs if it gives them.

    Raises:
        ModelError: the factory fails, or gives something else.
    """
    factory = import_object(name, "--model")
    try:
        made = factory if isinstance(factory, nn.Module) else factory()
    except Exception as error:
        raise ModelError(
            f"{name} fails: {type(error).__name__}: {error}",
            at=user_line(error),
            fix="mend the factory; it is called without arguments",
        ) from error
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{name} gives {type(model).__name__}, not an nn.Module", fix="return the model, or (model, example inputs)"
        )
    return model, inputs
