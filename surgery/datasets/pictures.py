"""Pictures with labels as batches of a model's input, read as they are needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from ..data import Data
from ..errors import InputError
from ..inputs import Inputs
from ..torch_private import tree_leaves
from .options import PRESETS, Colours, Options

KEPT_BYTES = 256 * 2**20
"""What one role keeps of the pictures it has read; the rest is read again."""


class Pictures(Protocol):
    """Pictures of one size."""

    @property
    def labels(self) -> Tensor:
        """(n,), int64"""

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """(len(indices), channels, height, width), uint8"""


@dataclass(frozen=True)
class Pixels:
    """Pixels as the model takes them: (pixel / `white` - mean) / std, of `dtype`."""

    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    dtype: torch.dtype = torch.float32
    white: int = 255

    @classmethod
    def of(cls, options: Colours, channels: int, dtype: torch.dtype) -> Pixels:
        """Raises InputError where the options give numbers for another count of channels."""
        mean, std = PRESETS[options.normalise]
        return cls(
            mean=_per_channel(options.mean or mean, channels),
            std=_per_channel(options.std or std, channels),
            dtype=dtype,
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return ((pixels.float() / self.white - mean) / std).to(self.dtype)


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) in (1, channels):
        return values
    if channels == 1:
        return (sum(values) / len(values),)
    raise InputError(
        f"{len(values)} numbers to normalise {channels} channels with", fix="give mean and std per channel, or one"
    )


class Batches(Sequence[Any]):
    """Batches of `pictures[indices]`, in that order; with labels, pairs. Read when they are asked for."""

    def __init__(
        self, pictures: Pictures, indices: Sequence[int], form: Pixels, batch: int, *, labelled: bool = False
    ) -> None:
        self._pictures, self._form, self._labelled = pictures, form, labelled
        self._parts = [list(indices[start : start + batch]) for start in range(0, len(indices), batch)]
        self._kept: dict[int, Tensor] = {}
        self._room = KEPT_BYTES

    def __len__(self) -> int:
        return len(self._parts)

    @overload
    def __getitem__(self, number: int) -> Any: ...
    @overload
    def __getitem__(self, number: slice) -> list[Any]: ...
    def __getitem__(self, number: int | slice) -> Any:
        if isinstance(number, slice):
            return [self[place] for place in range(len(self))[number]]
        place = range(len(self))[number]
        inputs = self._form(self._read(place))
        return (inputs, self._pictures.labels[self._parts[place]]) if self._labelled else inputs

    def _read(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        pixels = self._pictures.pixels(self._parts[number])
        if pixels.nbytes <= self._room:
            self._kept[number] = pixels
            self._room -= pixels.nbytes
        return pixels


def data_of(splits: Mapping[str, Pictures], options: Options, form: Pixels) -> Data:
    """Calibration from the split `train` and evaluation from `test`.

    Where one is missing, both come from the other and share no picture; evaluation keeps half of it at least.
    `training` has labels: `options.training` pictures, the calibration sample among them, or else that sample.
    """
    learn, test = (splits.get(name, next(iter(splits.values()))) for name in ("train", "test"))
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(learn.labels), generator=generator).tolist()
    rest = list(range(len(test.labels)))
    trained = options.calibration if options.training is None else options.training
    sample = order[: max(options.calibration, trained)]
    if learn is test:
        sample = sample[: len(order) // 2] or order
        rest = sorted(set(order) - set(sample)) or order
    if options.limit is not None and options.limit < len(rest):
        chosen = torch.randperm(len(rest), generator=generator)[: options.limit].sort().values
        rest = [rest[i] for i in chosen.tolist()]
    return Data(
        calibration=Batches(learn, sample[: options.calibration], form, options.batch),
        evaluation=Batches(test, rest, form, options.batch, labelled=True),
        training=Batches(learn, sample[:trained], form, options.batch, labelled=True),
    )


def image_like(example_inputs: Any, place: str) -> Tensor | None:
    """The one image batch (n, channels, height, width) among a model's example inputs; None where there are none.

    Raises:
        InputError: the model takes something else.
    """
    if example_inputs is None:
        return None
    values = example_inputs.tensors if isinstance(example_inputs, Inputs) else tree_leaves(example_inputs)
    shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
    if len(shapes) != 1 or len(shapes[0]) != 4 or not values[0].is_floating_point():
        raise InputError(
            f"the model takes {' and '.join(map(str, shapes)) or 'no tensor'}, not one batch of images",
            at=place,
            fix="write a function that gives its batches: module:function",
        )
    image: Tensor = values[0]
    return image


def dtype_for(example_inputs: Any, shape: tuple[int, int, int], place: str) -> torch.dtype:
    """The type that a model takes pictures of `shape` (channels, height, width) in; float32 where it is unknown.

    Raises:
        InputError: it takes pictures of another shape.
    """
    like = image_like(example_inputs, place)
    if like is None:
        return torch.float32
    if tuple(like.shape[1:]) != shape:
        raise InputError(
            f"the images are {_times(shape)}, the model takes {_times(tuple(like.shape[1:]))}",
            at=place,
            fix="give the model example inputs of that size, or other data",
        )
    return like.dtype


def _times(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def check_labels(labels: Tensor, images: int, classes: int, place: str) -> None:
    """Raises InputError unless there is one label from 0 to `classes` - 1 for each of `images`, at least one."""
    if not images:
        raise InputError("no images", at=place, fix="is this the right place?")
    if tuple(labels.shape) != (images,):
        raise InputError(f"{images} images and {labels.numel()} labels", at=place, fix="there is one label per image")
    wrong = ((labels < 0) | (labels >= classes)).nonzero().flatten().tolist()
    if wrong:
        raise InputError(
            f"label {int(labels[wrong[0]])} of image {wrong[0]}, there are {classes} classes, 0 to {classes - 1}",
            at=place,
            fix="the file is damaged, or other data than its name says",
        )
