"""A folder of images per class: `cat/1.jpg`, `dog/2.png`, or below `train/` and `val/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from ..data import Data
from ..errors import InputError, did_you_mean
from .decoding import MODES, decoded
from .options import Colours, Natural, Share
from .pictures import Pictures, Pixels, data_of, image_like

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"})
SPLITS = {"train": ("train", "training"), "test": ("val", "valid", "validation", "test")}


@dataclass(frozen=True, kw_only=True)
class ImageFolder(Colours):
    """Options of `imagefolder:PATH`."""

    size: Natural | None = None
    """Height and width; by default those of the model's example input."""
    crop: Share = 0.875
    """Share of the shorter side that stays when the centre is cut out. An image of the size already stays whole."""
    classes: Annotated[str | None, Field(min_length=1)] = None
    """A text file with the names of the class folders, one a line, in the order of the model's outputs; by default they
    are sorted."""


@dataclass(frozen=True)
class Form:
    """What every image is made into."""

    channels: int
    height: int
    width: int
    crop: float = 1.0


@dataclass(frozen=True)
class Files:
    """Image files, decoded when they are asked for."""

    files: tuple[Path, ...]
    labels: Tensor
    form: Form

    def pixels(self, indices: Sequence[int]) -> Tensor:
        form = self.form
        size = form.height, form.width
        return torch.stack(
            [decoded(f, form.channels, str(f), size, form.crop) for f in map(self.files.__getitem__, indices)]
        )


def read(path: Path, options: ImageFolder, example_inputs: Any) -> Data:
    """Calibration from `train/`, evaluation on `val/` or `test/`, where there are such folders; else both from one.

    Raises:
        InputError: there is no folder, class or image; the images' size is unknown.
    """
    place = f"imagefolder:{path}"
    like = image_like(example_inputs, place)
    form = _form(options, like, place)
    dtype = torch.float32 if like is None else like.dtype
    names = _listed(options.classes) if options.classes else None
    return data_of(splits(path, form, names, place), options, Pixels.of(options, form.channels, dtype))


def _form(options: ImageFolder, like: Tensor | None, place: str) -> Form:
    if like is None:
        if options.size is None:
            raise InputError("the size of the images is unknown", at=place, fix="add ?size=224, or give --input")
        return Form(3, options.size, options.size, options.crop)
    channels, height, width = like.shape[1:]
    if channels not in MODES:
        raise InputError(f"the model takes {channels} channels", at=place, fix="image files give 1 or 3")
    if options.size is not None and (height, width) != (options.size, options.size):
        raise InputError(f"size {options.size}, the model takes {height}×{width}", at=place, fix="leave the option out")
    return Form(channels, height, width, options.crop)


def splits(path: Path, form: Form, names: Sequence[str] | None, place: str) -> dict[str, Pictures]:
    """The splits there are, `train` or `test` or both. `names`: the classes in order; None = sorted folder names.

    Raises:
        InputError: no folder, no classes, no images, or a class that is not among `names` or the training classes.
    """
    if not path.is_dir():
        raise InputError(
            "this is no folder" if path.exists() else "there is no such folder", at=place, fix="check the path"
        )
    found = {split: next((path / n for n in own if (path / n).is_dir()), None) for split, own in SPLITS.items()}
    folders = {split: folder for split, folder in found.items() if folder} or {"train": path}
    result: dict[str, Pictures] = {}
    for split, folder in folders.items():
        names = names or _folders(folder, place)
        result[split] = _files(folder, names, form, place)
    return result


def _folders(folder: Path, place: str) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise InputError(
            f"no folder per class in {folder}", at=place, fix="put the images of each class in a folder of its own"
        )
    return names


def _files(folder: Path, names: Sequence[str], form: Form, place: str) -> Files:
    labels = {name: index for index, name in enumerate(names)}
    found: list[tuple[Path, int]] = []
    for name in _folders(folder, place):
        if name not in labels:
            raise InputError(
                f"folder {name!r} in {folder} is no known class{did_you_mean(name, names)}",
                at=place,
                fix="every split has the classes of the training images; `classes=FILE` gives their order",
            )
        files = sorted(f for f in (folder / name).rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        found += [(file, labels[name]) for file in files]
    if not found:
        raise InputError(f"no images in {folder}", at=place, fix=f"read are {', '.join(sorted(SUFFIXES))}")
    return Files(tuple(file for file, _ in found), torch.tensor([label for _, label in found]), form)


def _listed(file: str) -> list[str]:
    try:
        names = Path(file).expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"classes: {file!r} cannot be read: {error}", fix="a text file, one class a line") from error
    names = [name.strip() for name in names if name.strip()]
    if not names or len(set(names)) < len(names):
        raise InputError(f"{len(names)} class names, {len(set(names))} different", at=file, fix="one line per class")
    return names
