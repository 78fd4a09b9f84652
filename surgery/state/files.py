"""The files of a state: tensors to safetensors and back, and one checksum over all."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import ExportError
from ..torch_private import buffers_of, parameters_of
from .form import DEEPEST, FILES, LONGEST_NAME, VERSION

_READ = 1 << 20
MAPPED = 64 * 2**20
"""Bytes of a file that are mapped at a time; pages that were read count as memory until the file is closed."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """As safetensors, on the disk when this returns.

    Raises:
        ExportError: a name that the file cannot hold; nothing is written.
        OSError, SafetensorError: the file cannot be written.
    """
    check_names(tensors)
    seen: set[int] = set()
    save_file({name: _alone(tensor.detach().to("cpu"), seen) for name, tensor in tensors.items()}, str(path))
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in memory of their own: in the mapped file they lie at odd addresses.

    Raises:
        FileNotFoundError, SafetensorError, ValueError, RuntimeError, OSError: there is no such file, or it is damaged.
    """
    found: dict[str, Tensor] = {}
    for names in _groups(path):
        with safe_open(str(path), framework="pt") as file:
            found |= {name: file.get_tensor(name).clone() for name in names}
    return found


def _alone(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor itself, or a copy where it has gaps or shares its memory with one before it: neither can be saved."""
    place = tensor.untyped_storage().data_ptr()
    fits = tensor.is_contiguous() and place not in seen
    seen.add(place)
    return tensor if fits else tensor.contiguous().clone()


def _groups(path: Path) -> Iterator[list[str]]:
    """Names of tensors that together take about `MAPPED` bytes."""
    with safe_open(str(path), framework="pt") as file:
        sizes = {name: _at_most(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    group, held = [], 0
    for name, size in sizes.items():
        group.append(name)
        held += size
        if held >= MAPPED:
            yield group
            group, held = [], 0
    if group:
        yield group


def _at_most(shape: list[int]) -> int:
    """Bytes, as if of the longest common type."""
    size = 8
    for length in shape:
        size *= length
    return size


def check_names(names: Iterable[str]) -> None:
    """Raises ExportError at a name that a safetensors file, or the code that torch writes of a graph, cannot hold."""
    for name in names:
        if name == "__metadata__":
            raise _unfit(name, "safetensors keeps this name for itself")
        if len(name) > LONGEST_NAME:
            raise _unfit(f"{name[:40]}…", f"it has {len(name):,} characters, {LONGEST_NAME:,} can be stored")
        if name.count(".") > DEEPEST:
            raise _unfit(f"{name[:40]}…", f"it lies more than {DEEPEST} levels deep")
        if any(character in '"\\' or not character.isprintable() for character in name):
            raise _unfit(name, "torch cannot write quotes, backslashes and control characters into a graph's code")


def own_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers in the order of the modules, a module that is there twice under its first name."""
    for owner, module in model.named_modules():
        for key, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
            if tensor is not None:
                yield f"{owner}.{key}" if owner else key, tensor


def _unfit(name: str, why: str) -> ExportError:
    return ExportError(f"a tensor or module named {name!r} cannot be stored: {why}", fix="rename it in the model")


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def digest(folder: Path) -> str | None:
    """SHA-256 over the files of a state and the version of their form; None where one of them is missing."""
    hasher = hashlib.sha256(f"{VERSION}".encode())
    for name in FILES:
        if not (folder / name).is_file():
            return None
        hasher.update(f"\n{name} {(folder / name).stat().st_size}\n".encode())
        with (folder / name).open("rb") as file:
            while part := file.read(_READ):
                hasher.update(part)
    return hasher.hexdigest()
