"""A pack written: whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import __version__
from ..errors import ExportError, ModelError, PluginError
from ..loading import model_file
from ..paths import path_from
from ..process import memory_told
from ..registry import Registry
from .choosing import Elements, choose
from .codec import Codec
from .container import frame
from .elements import UNSIGNED
from .form import DTYPES, Header, TensorRecord, TextRecord
from .streams import Sink

if TYPE_CHECKING:
    from .codec import Array

SUFFIX = ".surgery"
_IN_MEMORY = 64 << 20


@memory_told()
def pack(
    source: str | Path, path: str | Path | None = None, *, codec: str = "huffman", registry: Registry | None = None
) -> Path:
    """Write a run folder, or a `model.py` with its weights beside it, as one file; nothing of it is lost.

    `path`: by default `model.surgery` beside the source. `codec`: the entropy coder, see `Registry.codecs`. The same
    input always gives the same bytes. On failure an older file at `path` stays as it was.

    Raises:
        ModelError: nothing to pack there, the weights are missing or damaged, or the source has no `build(tensors)`.
        ExportError: there is no such codec, an element type that a pack does not know, or the file cannot be written.
    """
    file = model_file(path_from(source, "the path of the source"))
    target = path_from(path, "the path of the pack") if path is not None else file.with_suffix(SUFFIX)
    if b"def build(" not in file.read_bytes():
        raise ModelError(
            f"{file.name} has no build(tensors), by which a pack gives it its weights",
            at=str(file),
            fix="export it again",
        )
    chosen = _codec(codec, registry or Registry.load())
    weights = _weights_file(file)
    try:
        _write(file, weights, target, chosen)
    except SafetensorError as error:
        raise ModelError(
            f"{weights.name} is damaged: {error}", at=str(weights), fix="export the model again"
        ) from error
    except OSError as error:
        raise ExportError(
            f"{target} cannot be written: {error.strerror or error}",
            fix="make room or choose another place; an older file there is untouched",
        ) from error
    return target


def _codec(name: str, registry: Registry) -> Codec:
    if name not in registry.codecs:
        raise ExportError(f"unknown codec {name!r}", fix=f"installed are {', '.join(registry.codecs) or 'none'}")
    return registry.codecs[name]()


def _weights_file(file: Path) -> Path:
    """The weights that the source reads: those it names, else those of its own name."""
    named = re.search(r"/ (['\"])([^'\"/\\]+\.safetensors)\1", file.read_text(encoding="utf-8"))
    weights = file.parent / named.group(2) if named else file.with_suffix(".safetensors")
    if not weights.is_file():
        raise ModelError(f"there is no {weights.name} beside {file.name}", at=str(file), fix="put it back there")
    return weights


def _write(file: Path, weights: Path, target: Path, codec: Codec) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(target.parent)) as streams:
        texts = [*_texts(file, streams)]
        tensors = [_tensor(name, tensor, Sink(streams, codec)) for name, tensor in _tensors(weights)]
        header = Header(
            format="surgery-pack",
            codec=codec.name(),
            weights=weights.name,
            versions={"surgery": __version__, "torch": torch.__version__},
            texts=texts,
            tensors=tensors,
        )
        _place(target, frame(header), streams)


def _place(target: Path, head: bytes, streams: IO[bytes]) -> None:
    """Write beside the target, then rename."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(head)
            streams.seek(0)
            shutil.copyfileobj(streams, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _texts(file: Path, streams: IO[bytes]) -> Iterator[TextRecord]:
    names: dict[Literal["model.py", "recipe.lock.yaml"], Path] = {
        "model.py": file,
        "recipe.lock.yaml": file.parent / "recipe.lock.yaml",
    }
    for name, path in names.items():
        if path.is_file():
            plain = path.read_bytes()
            stored = zlib.compress(plain, 9)
            streams.write(stored)
            yield TextRecord(name=name, bytes=len(plain), stored=len(stored), crc=zlib.crc32(stored))


def _tensors(weights: Path) -> Iterator[tuple[str, Tensor]]:
    with safe_open(str(weights), framework="pt") as file:
        for name in sorted(file.keys()):
            yield name, file.get_tensor(name)


def _tensor(name: str, tensor: Tensor, sink: Sink) -> TensorRecord:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"{name} is {dtype}, which a pack does not hold", fix=f"known are {', '.join(DTYPES)}")
    bits = patterns(tensor)
    try:
        data = choose(Elements(bits, tensor.is_floating_point()), sink.codec).write(sink)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise PluginError(
            f"{sink.codec.name()} cannot encode {name}: {error}", fix="report this to its author"
        ) from error
    return TensorRecord(name=name, dtype=dtype, shape=[*tensor.shape], data=data)


def patterns(tensor: Tensor) -> Array:
    """The bit patterns of a tensor's elements in row-major order, as unsigned integers (n,)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().view(UNSIGNED[tensor.element_size()])
