"""CIFAR-10 (Krizhevsky 2009): the binary version, .npz files, or a folder of images. Nothing is ever unpickled.

The binary version has records of 3,073 bytes: a label, then 32×32 pixels of red, of green and of blue. An .npz file
holds `labels` (n,) with `images` (n, 32, 32, 3) or (n, 3, 32, 32), uint8, or with encoded files one after the other in
`blob` and their `ends`. One file has both splits under `train_images`, `test_images` …, or two are named `*_train` and
`*_test`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data
from ..errors import InputError
from . import imagefolder
from .decoding import decoded
from .options import Colours
from .pictures import Pictures, Pixels, check_labels, data_of, dtype_for

CLASSES, SIZE, RECORD = 10, 32, 3073
_FIX = "give the folder of the binary version (data_batch_*.bin, test_batch.bin), an .npz, or a folder of images"


@dataclass(frozen=True, kw_only=True)
class Cifar10(Colours):
    """Options of `cifar10:PATH`."""


@dataclass(frozen=True)
class Stored:
    """Images (n, 3, 32, 32), uint8, in memory."""

    images: np.ndarray[Any, Any]
    labels: Tensor

    def pixels(self, indices: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self.images[list(indices)]))


@dataclass(frozen=True)
class Encoded:
    """PNG or JPEG files one after the other."""

    files: tuple[bytes, ...]
    labels: Tensor
    place: str

    def pixels(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self._one(index) for index in indices])

    def _one(self, index: int) -> Tensor:
        place = f"{self.place}, image {index}"
        pixels = decoded(self.files[index], 3, place)
        if pixels.shape != (3, SIZE, SIZE):
            raise InputError(f"an image of {tuple(pixels.shape)}, not (3, 32, 32)", at=place, fix=_FIX)
        return pixels


def read(path: Path, options: Colours, example_inputs: Any) -> Data:
    """Calibration from the training images, evaluation on the test images.

    Raises:
        InputError: there are none at `path`, several versions, a pickled one, or a file that is damaged.
    """
    place = f"cifar10:{path}"
    dtype = dtype_for(example_inputs, (3, SIZE, SIZE), place)
    return data_of(_splits(path, place), options, Pixels.of(options, 3, dtype))


def _splits(path: Path, place: str) -> dict[str, Pictures]:
    if path.is_dir():
        return _in_folder(path, place)
    stem = path.with_suffix("") if path.suffix == ".npz" else path
    found = _archives(path.parent)
    if stem.name in found:
        return _from_archives(found[stem.name])
    if not path.exists():
        raise InputError("there is nothing of this name", at=place, fix=_FIX)
    raise InputError(f"{path.name} is neither a folder nor an .npz file", at=place, fix=_FIX)


def _in_folder(path: Path, place: str) -> dict[str, Pictures]:
    if any(path.glob("*.bin")):
        return _from_binary(path)
    if found := _archives(path):
        if len(found) > 1:
            names = ", ".join(sorted(found))
            raise InputError(f"several versions: {names}", at=place, fix=f"name one: {place}/{sorted(found)[0]}")
        return _from_archives(next(iter(found.values())))
    if (inner := path / "cifar-10-batches-bin").is_dir():
        return _from_binary(inner)
    if any((path / name).is_dir() for name in ("train", "test")):
        return _from_folders(path, place)
    if any(path.glob("data_batch_?")) or any(path.glob("*/data_batch_?")):
        raise InputError(
            "this is the Python version, which is pickled; pickles can run code and are not opened",
            at=place,
            fix="download the binary version (cifar-10-binary.tar.gz) and unpack it",
        )
    raise InputError("no CIFAR-10 in this folder", at=place, fix=_FIX)


def _from_folders(path: Path, place: str) -> dict[str, Pictures]:
    splits = imagefolder.splits(path, imagefolder.Form(3, SIZE, SIZE), None, place)
    for name, pictures in splits.items():
        check_labels(pictures.labels, len(pictures.labels), CLASSES, f"{place}, {name}")
    return splits


def _from_binary(folder: Path) -> dict[str, Pictures]:
    files = {"train": sorted(folder.glob("data_batch_*.bin")), "test": [*folder.glob("test_batch.bin")]}
    missing = [name for name, own in files.items() if not own]
    if missing:
        raise InputError(f"no {missing[0]} images among the .bin files", at=str(folder), fix=_FIX)
    return {split: _joined([_records(file) for file in own]) for split, own in files.items()}


def _records(file: Path) -> Stored:
    size = file.stat().st_size
    if size % RECORD or not size:
        raise InputError(
            f"{size:,} bytes, no multiple of {RECORD:,}", at=str(file), fix="the file is truncated; fetch it again"
        )
    records = np.fromfile(file, np.uint8).reshape(-1, RECORD)
    labels = torch.from_numpy(records[:, 0].astype(np.int64))
    check_labels(labels, len(records), CLASSES, str(file))
    return Stored(records[:, 1:].reshape(-1, 3, SIZE, SIZE), labels)


def _joined(parts: Sequence[Stored]) -> Stored:
    return Stored(np.concatenate([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def _archives(folder: Path) -> dict[str, list[Path]]:
    """The .npz files of each version, by the name of the version."""
    found: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.npz")):
        found.setdefault(file.stem.removesuffix("_train").removesuffix("_test"), []).append(file)
    return found


def _from_archives(files: Sequence[Path]) -> dict[str, Pictures]:
    splits: dict[str, Pictures] = {}
    for file in files:
        arrays = _arrays(file)
        for split in ("train", "test"):
            own = {k.removeprefix(f"{split}_"): v for k, v in arrays.items() if k.startswith(f"{split}_")}
            if own:
                splits[split] = _pictures(own, f"{file}, {split}")
            elif file.stem.endswith(split):
                splits[split] = _pictures(arrays, str(file))
    if not splits:
        raise InputError(
            f"it holds {', '.join(arrays) or 'nothing'}",
            at=str(files[0]),
            fix="name arrays train_images, train_labels, test_images, test_labels, or the file *_train.npz, *_test.npz",
        )
    return splits


def _arrays(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"the file cannot be read: {error}",
            at=str(file),
            fix="it is damaged, or holds pickled objects, which are not opened; store plain arrays",
        ) from error


def _pictures(arrays: dict[str, np.ndarray[Any, Any]], place: str) -> Pictures:
    labels, images = arrays.get("labels"), arrays.get("images")
    if labels is None or labels.dtype.kind not in "iu":
        raise InputError("no array `labels` of integers", at=place, fix="store labels (n,), 0 to 9")
    labelled = torch.from_numpy(labels.astype(np.int64))
    if images is None:
        files = _files(arrays, place)
        check_labels(labelled, len(files), CLASSES, place)
        return Encoded(files, labelled, place)
    if images.ndim == 4 and images.shape[3] == 3:
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.shape[1:] != (3, SIZE, SIZE):
        raise InputError(
            f"images are {images.dtype} {images.shape}", at=place, fix="store uint8 (n, 32, 32, 3) or (n, 3, 32, 32)"
        )
    check_labels(labelled, len(images), CLASSES, place)
    return Stored(images, labelled)


def _files(arrays: dict[str, np.ndarray[Any, Any]], place: str) -> tuple[bytes, ...]:
    if not {"blob", "ends"} <= arrays.keys():
        raise InputError(
            f"neither images nor blob and ends among {', '.join(arrays)}", at=place, fix="store images (n, 32, 32, 3)"
        )
    blob, ends = arrays["blob"].tobytes(), [0, *arrays["ends"].astype(np.int64).tolist()]
    if ends != sorted(ends) or ends[-1] != len(blob):
        raise InputError(
            f"the ends of {len(ends) - 1} images do not divide {len(blob):,} bytes", at=place, fix="the file is damaged"
        )
    return tuple(blob[start:end] for start, end in pairwise(ends))
