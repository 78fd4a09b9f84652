"""A pack written: whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import IO, TYPE_CHECKING

import torch
from safetensors import safe_open
from torch import Tensor

from .. import __version__
from ..errors import ExportError, PluginError
from ..loading import SUFFIX, checked_model, model_file, read_graph, reading, weights_file
from ..paths import path_from
from ..process import memory_told
from ..registry import Registry
from ..state.allowed import Known
from .choosing import Elements, choose
from .codec import Codec
from .container import frame
from .elements import UNSIGNED, pieces
from .form import DTYPES, Header, TensorRecord
from .streams import FileSource, Sink, checksum

if TYPE_CHECKING:
    from .codec import Array

_IN_MEMORY = 64 << 20


@memory_told()
def pack(
    source: str | Path, path: str | Path | None = None, *, codec: str = "huffman", registry: Registry | None = None
) -> Path:
    """Write a run folder, or a `model.py` with its graph and weights beside it, as one file; nothing of it is lost.

    `path`: by default `model.surgery` beside the source. `codec`: the entropy coder, see `Registry.codecs`. The same
    input always gives the same bytes. On failure an older file at `path` stays as it was.

    Raises:
        ModelError: nothing to pack there, the weights are missing or damaged, `model.py` is not the one that was
            written with its graph, or the graph names what is not installed.
        ExportError: there is no such codec, an element type that a pack does not know, or the file cannot be written.
        PluginError: the codec fails, or loses something.
    """
    file, known = model_file(path_from(source, "the path of the source")), registry or Registry.load()
    target = path_from(path, "the path of the pack") if path is not None else file.with_suffix(SUFFIX)
    chosen = _codec(codec, known)
    document, weights = read_graph(file), weights_file(file)
    with reading(weights), safe_open(str(weights), framework="pt") as stored:
        shapes = {name: torch.empty(stored.get_slice(name).get_shape(), device="meta") for name in stored.offset_keys()}
    checked_model(document, shapes, file, Known(known))
    recipe = file.parent / "recipe.lock.yaml"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.SpooledTemporaryFile(_IN_MEMORY, dir=str(target.parent)) as streams,
            safe_open(str(weights), framework="pt") as stored,
        ):
            header = Header(
                format="surgery-pack",
                codec=chosen.name(),
                versions={"surgery": __version__, "torch": torch.__version__},
                recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else None,
                graph=document.model_copy(update={"source_sha256": None}).plain(),
                tensors=[_tensor(name, stored.get_tensor(name), streams, chosen) for name in sorted(shapes)],
            )
            _place(target, frame(header), streams)
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


def _tensor(name: str, tensor: Tensor, streams: IO[bytes], codec: Codec) -> TensorRecord:
    """Written, and read again."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ExportError(f"{name} is {dtype}, which a pack does not hold", fix=f"known are {', '.join(DTYPES)}")
    bits, at = patterns(tensor), streams.tell()
    try:
        data = choose(Elements(bits, tensor.is_floating_point()), codec).write(Sink(streams, codec))
        record = TensorRecord(name=name, dtype=dtype, shape=[*tensor.shape], crc=checksum([bits]), data=data)
        found = checksum(pieces(record.part, FileSource(streams, codec.name(), codec), at))
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise PluginError(
            f"{codec.name()} cannot encode {name} so that it comes back: {error}", fix="report this to its author"
        ) from error
    if found != record.crc:
        raise PluginError(
            f"{codec.name()} loses something: {name} comes back as other numbers", fix="report this to its author"
        )
    streams.seek(0, os.SEEK_END)
    return record


def patterns(tensor: Tensor) -> Array:
    """The bit patterns of a tensor's elements in row-major order, as unsigned integers (n,)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().view(UNSIGNED[tensor.element_size()])
