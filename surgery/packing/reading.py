"""A pack opened: what is in it, one tensor, or all of them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import ModelError
from ..paths import path_from
from ..registry import Registry
from .codec import BLOCK, Block, Codec
from .container import AGAIN, inflated, read_frame
from .elements import PIECE, UNSIGNED, reader
from .form import DTYPES, Header, Part, Raw, Symbols, TensorRecord, TextRecord, leaves

if TYPE_CHECKING:
    from .codec import Array

_LEAST_LIMIT = 1 << 30
_READ = 1 << 18


@dataclass(frozen=True)
class Entry:
    """A tensor of a pack, as it is stored."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    representation: str
    """Such as `codebook(symbols)`; what is in brackets stores what the word before it leaves."""
    bytes: int
    """Of the tensor in memory."""
    stored: int
    """Of its streams in the file."""


class Pack:
    """A pack file, read as far as it is asked for. A context manager; `close` it otherwise.

    with surgery.Pack("model.surgery") as pack:
        weight = pack.tensor("features.0.weight")
    """

    def __init__(self, path: str | Path, *, limit_bytes: int | None = None, registry: Registry | None = None) -> None:
        """`limit_bytes`: what the tensors and texts may take in memory; by default 1 GiB or 256 times the file.

        Raises:
            ModelError: no pack, one of a newer format, a damaged one, or one that would take more than the limit.
        """
        self.path = path_from(path, "the path of the pack")
        self._registry = registry
        self._file = _opened(self.path)
        try:
            self._open(limit_bytes)
        except BaseException:
            self.close()
            raise

    def _open(self, limit_bytes: int | None) -> None:
        size = os.fstat(self._file.fileno()).st_size
        self.limit_bytes = max(_LEAST_LIMIT, 256 * size) if limit_bytes is None else limit_bytes
        self._header, start = read_frame(self._file, size, max(1 << 20, self.limit_bytes // 16), str(self.path))
        self._source = _Source(self._file, self._header.codec)
        self._places = _places(self._header, start, size, str(self.path))
        _check_limit(self._header, self.limit_bytes, str(self.path))
        self.entries = {record.name: _entry(record) for record in self._header.tensors}

    @property
    def versions(self) -> Mapping[str, str]:
        """What wrote the file, by package."""
        return self._header.versions

    @property
    def codec(self) -> str:
        """Name of the entropy coder."""
        return self._header.codec

    @property
    def weights_name(self) -> str:
        """The weights file that the source reads."""
        return self._header.weights

    @property
    def source(self) -> str:
        """The text of `model.py`."""
        return self.text("model.py") or ""

    @property
    def recipe(self) -> str | None:
        """The text of `recipe.lock.yaml`, where there is one."""
        return self.text("recipe.lock.yaml")

    def text(self, name: str) -> str | None:
        """A text file of the pack, or None."""
        for record in self._header.texts:
            if record.name == name:
                with self._blaming(name):
                    offset = self._places[record.name]
                    self._source.checked(offset, record.stored, record.crc)
                    return inflated(self._source.bytes(offset, record.stored), record.bytes).decode()
        return None

    def tensor(self, name: str) -> Tensor:
        """One tensor; nothing else is read or decoded.

        Raises:
            ModelError: there is none of this name, its streams are damaged, or its codec is not installed.
        """
        for record in self._header.tensors:
            if record.name == name:
                self._find_codec()
                return self._decoded(record)
        raise ModelError(
            f"there is no tensor {name!r}", at=str(self.path), fix="`surgery unpack --list` prints the names"
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of the file. What is decoded is not kept; small ones are decoded together."""
        self._find_codec()
        window: list[TensorRecord] = []
        for record in self._header.tensors:
            if sum(r.bytes for r in window) + record.bytes > BLOCK:
                yield from self._together(window)
                window = []
            window.append(record)
        yield from self._together(window)

    def _together(self, records: list[TensorRecord]) -> Iterator[tuple[str, Tensor]]:
        if len(records) > 1:
            wanted = [[*block_places(record.part, self._places[f"tensor {record.name}"])] for record in records]
            with self._blaming(records[0].name, len(records)):
                self._source.prepare([block for blocks in wanted for block in blocks])
        for record in records:
            yield record.name, self._decoded(record)
        self._source.forget()

    def _decoded(self, record: TensorRecord) -> Tensor:
        size = DTYPES[record.dtype]
        with self._blaming(record.name):
            result = torch.empty(record.shape, dtype=getattr(torch, record.dtype))
            flat = result.reshape(-1).view(torch.uint8).numpy().view(UNSIGNED[size])
            elements = reader(record.part, self._source, self._places[f"tensor {record.name}"])
            for at in range(0, record.count, PIECE):
                part = flat[at : at + PIECE]
                part[:] = elements.read(len(part))
            return _checked_bool(result, flat)

    @contextmanager
    def _blaming(self, name: str, count: int = 1) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError) as error:
            among = f"one of the {count} tensors from {name} on" if count > 1 else name
            raise ModelError(f"{among} is damaged: {error}", at=str(self.path), fix=AGAIN) from error

    def _find_codec(self) -> None:
        if self._source.codec is None:
            codecs = (self._registry or Registry.load()).codecs
            if self.codec not in codecs:
                raise ModelError(
                    f"the pack needs the codec {self.codec!r}",
                    at=str(self.path),
                    fix=f"install the package that offers it; installed are {', '.join(codecs) or 'none'}",
                )
            self._source.codec = codecs[self.codec]()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Pack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass
class _Source:
    """The file's bytes, and its symbols through the codec."""

    file: IO[bytes]
    name: str
    codec: Codec | None = None
    _ready: dict[int, Array] = field(default_factory=dict)

    def checked(self, offset: int, size: int, crc: int) -> None:
        found = 0
        for at in range(offset, offset + size, _READ):
            found = zlib.crc32(self.bytes(at, min(_READ, offset + size - at)), found)
        if found != crc:
            raise ValueError("a stream has another checksum")

    def bytes(self, offset: int, size: int) -> bytes:
        self.file.seek(offset)
        data = self.file.read(size)
        if len(data) != size:
            raise ValueError("the file ends early")
        return data

    def symbols(self, offset: int, size: int, count: int, alphabet: int) -> Array:
        if offset in self._ready:
            return self._ready.pop(offset)
        return self._decoded([Block(self.bytes(offset, size), count, alphabet)])[0]

    def prepare(self, blocks: list[tuple[int, int, int, int]]) -> None:
        """Decode blocks (offset, size, count, alphabet) together."""
        found = self._decoded([Block(self.bytes(offset, size), count, top) for offset, size, count, top in blocks])
        self._ready = {block[0]: symbols for block, symbols in zip(blocks, found, strict=True)}

    def forget(self) -> None:
        self._ready = {}

    def _decoded(self, blocks: list[Block]) -> list[Array]:
        assert self.codec is not None
        try:
            found = self.codec.decode_all(blocks)
        except Exception as error:
            raise ValueError(f"{self.name} cannot decode a block: {error}") from error
        for block, symbols in zip(blocks, found, strict=True):
            kind = np.uint8 if block.alphabet <= 256 else np.uint16
            if symbols.shape != (block.count,) or symbols.dtype != kind or int(symbols.max()) >= block.alphabet:
                raise ValueError(f"{self.name} gives other symbols than the {block.count} below {block.alphabet}")
        return found


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error


def _places(header: Header, start: int, size: int, place: str) -> dict[str, int]:
    """Where each text and tensor begins; they fill the file to its end."""
    names, at = {}, start
    records: list[TextRecord | TensorRecord] = [*header.texts, *header.tensors]
    for record in records:
        key = f"tensor {record.name}" if isinstance(record, TensorRecord) else record.name
        problem = f"there are two {key}" if key in names else ""
        names[key] = at
        try:
            at += record.extent() if isinstance(record, TensorRecord) else record.stored
        except ValueError as error:
            problem = f"{key}: {error}"
        if problem:
            raise ModelError(f"the pack is damaged: {problem}", at=place, fix=AGAIN)
        if at > size:
            raise ModelError(f"the pack is damaged: the file ends in {key}", at=place, fix=AGAIN)
    if at != size:
        raise ModelError(f"the pack is damaged: {size - at} bytes too many", at=place, fix=AGAIN)
    return names


def _check_limit(header: Header, limit: int, place: str) -> None:
    records: list[TextRecord | TensorRecord] = [*header.texts, *header.tensors]
    total = sum(record.bytes for record in records)
    if total > limit:
        largest = max(records, key=lambda record: record.bytes)
        raise ModelError(
            f"the pack asks for {total:,} bytes, {largest.bytes:,} of them for {largest.name}; the limit is {limit:,}",
            at=place,
            fix="raise limit_bytes if you trust the file",
        )


def _entry(record: TensorRecord) -> Entry:
    dtype = getattr(torch, record.dtype)
    return Entry(record.name, tuple(record.shape), dtype, described(record.part), record.bytes, record.extent())


def described(part: Part) -> str:
    """A representation in words, such as `sparse(symbols, codebook(raw, symbols))`."""
    data, count, size = part
    if isinstance(data, Raw | Symbols):
        return data.kind
    return f"{data.kind}({', '.join(map(described, data.parts(count, size)))})"


def block_places(part: Part, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """(offset, size, symbols, alphabet) of every block of a part whose streams begin at `offset`."""
    for leaf, count, size in leaves(part):
        if isinstance(leaf, Symbols):
            at, left = offset, leaf.symbols(count, size)
            for block in leaf.blocks:
                yield at, block, min(left, BLOCK), 1 << leaf.width
                at, left = at + block, left - BLOCK
        offset += leaf.stored(count, size)


def _checked_bool(result: Tensor, flat: Array) -> Tensor:
    """A byte other than 0 and 1 is no bool."""
    if result.dtype == torch.bool and flat.size and int(flat.max()) > 1:
        raise ValueError("a bool is neither 0 nor 1")
    return result
