"""Data sets by name: `digits`, `cifar10:PATH`, `imagefolder:PATH`, or `module:function`, as `surgery.Data`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..data import Data, import_object
from ..errors import InputError
from ..paths import path_from
from ..tracing import user_line
from . import cifar10, digits, imagefolder
from .options import Options, parse

Reader = Callable[[Path, Any, Any], Data]
"""Path, options and example inputs (None if unknown) → data."""

_READERS: dict[str, tuple[Reader, type[Options]]] = {
    "cifar10": (cifar10.read, cifar10.Cifar10),
    "digits": (digits.read, Options),
    "imagefolder": (imagefolder.read, imagefolder.ImageFolder),
}


def data_from(name: str, example_inputs: Any = None) -> Data:
    """The data that `name` stands for: calibration (no labels), training and evaluation. Evaluation shares no picture
    with the others.

    `digits`: the scanned 8×8 digits of scikit-learn. `cifar10:PATH`: the binary version of CIFAR-10, .npz files or a
    folder of images. `imagefolder:PATH`: a folder of images per class. These take options behind a question mark:
    `imagefolder:photos?size=224&batch=32&calibration=512&limit=5000`. `module:function` is called without arguments and
    gives batches, or `Data`. `example_inputs`: those of the model; images are read in their size and type.

    Raises:
        InputError: an unknown name or option; files that are missing or broken; images that the model does not take.
    """
    place, _, query = name.partition("?")
    source, _, path = place.partition(":")
    if source not in _READERS:
        return _called(name)
    if (source == "digits") == bool(path):
        raise InputError(f"data {name!r} has {'a' if path else 'no'} path", fix=f"say {_form(source)}")
    reader, form = _READERS[source]
    return reader(
        path_from(path, f"the path of {source}") if path else Path(), parse(form, query, place), example_inputs
    )


def _form(source: str) -> str:
    return source if source == "digits" else f"{source}:PATH"


def _called(name: str) -> Data:
    if ":" not in name:
        raise InputError(
            f"no data {name!r}", fix=f"one of {', '.join(map(_form, _READERS))}, or module:function of your own"
        )
    function = import_object(name, "--data")
    if not callable(function):
        raise InputError(
            f"{name} is {type(function).__name__}, no function", fix="name a function that gives batches, or Data"
        )
    try:
        return Data.of(function())
    except InputError:
        raise
    except Exception as error:  # whatever the user's function raises
        raise InputError(
            f"{name} fails: {type(error).__name__}: {error}",
            at=user_line(error),
            fix="mend the function; it is called without arguments",
        ) from error
