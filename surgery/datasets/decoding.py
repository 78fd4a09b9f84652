"""Image files as pixels, by Pillow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}


def decoded(
    file: Path | bytes, channels: int, place: str, size: tuple[int, int] | None = None, crop: float = 1.0
) -> Tensor:
    """(channels, height, width), uint8: grey for one channel, red, green and blue for three.

    `size` (height, width): the image is scaled, bilinearly, until its centre of this size spans the share `crop` of its
    shorter side; one that has the size already is left alone.

    Raises:
        InputError: the file is no image or damaged; Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError(
            "image files are read with Pillow, which is not installed",
            at=place,
            fix='install it: pip install "model-surgery[images]"',
        ) from error
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
            picture = image.convert(MODES[channels])
            picture = picture if size is None else _fitted(picture, size, crop)
            pixels = np.array(picture).reshape(picture.height, picture.width, channels)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"no image that can be read: {error}", at=place, fix="remove or replace it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _fitted(image: Image, size: tuple[int, int], crop: float) -> Image:
    height, width = size
    if (image.height, image.width) == (height, width):
        return image
    scale = max(height / image.height, width / image.width) / crop
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    from PIL.Image import Resampling

    return image.resize(scaled, Resampling.BILINEAR).crop((left, top, left + width, top + height))
