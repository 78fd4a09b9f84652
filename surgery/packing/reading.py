"""A pack opened: what is in it, one tensor, or all of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING

import torch
from torch import Tensor

from ..captured import CapturedModel
from ..errors import ExportError, ModelError
from ..paths import path_from
from ..registry import Registry
from ..state.allowed import Known
from ..state.build import build_model
from ..state.form import Document
from .codec import BLOCK
from .container import AGAIN, read_frame
from .elements import UNSIGNED, pieces
from .form import DTYPES, Header, Part, Raw, Symbols, TensorRecord, leaves
from .streams import FileSource, checksum

if TYPE_CHECKING:
    from .codec import Array

_LEAST_LIMIT = 1 << 30


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
        """`limit_bytes`: what the tensors may take in memory; by default 1 GiB or 256 times the file.

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
        self._source = FileSource(self._file, self._header.codec)
        self._places = _places(self._header, start, size, str(self.path))
        _check_limit(self._header, self.limit_bytes, str(self.path))
        self._records = {record.name: record for record in self._header.tensors}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """What is in the file, by the tensors' names."""
        return {name: _entry(record) for name, record in self._records.items()}

    @property
    def versions(self) -> Mapping[str, str]:
        """What wrote the file, by package."""
        return self._header.versions

    @property
    def codec(self) -> str:
        """Name of the entropy coder."""
        return self._header.codec

    @property
    def recipe(self) -> str | None:
        """The text of `recipe.lock.yaml`, where there is one."""
        return self._header.recipe

    @property
    def document(self) -> Document:
        """The graph as data."""
        with self._blaming("the graph"):
            return Document.model_validate(self._header.graph)

    @property
    def source(self) -> str:
        """The text of `model.py`, written anew from the graph; no tensor is read.

        Raises:
            ModelError: the graph is damaged, or names a layer whose plugin is not installed.
        """
        from ..export.source import source

        document = self.document
        shapes = {
            record.name: torch.empty(record.shape, dtype=getattr(torch, record.dtype), device="meta")
            for record in self._header.tensors
        }
        with self._blaming("the graph"):
            return source(build_model(document, shapes, Known(self._registry)), header=document.provenance)

    def model(self) -> CapturedModel:
        """The model in eval mode, built from the graph: no source is run.

        Raises:
            ModelError: something is damaged, or names a layer or operator whose plugin is not installed.
        """
        document, tensors = self.document, dict(self.tensors())
        with self._blaming("the graph"):
            return build_model(document, tensors, Known(self._registry))

    def tensor(self, name: str) -> Tensor:
        """One tensor; nothing else is read or decoded.

        Raises:
            ModelError: there is none of this name, its streams are damaged, or its codec is not installed.
        """
        if name in self._records:
            self._find_codec()
            return self._decoded(self._records[name])
        raise ModelError(
            f"there is no tensor {name!r}", at=str(self.path), fix="`surgery unpack --list` prints the names"
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in the order of the file. What is decoded is not kept; small ones are decoded together."""
        self._find_codec()
        window: list[TensorRecord] = []
        size = 0
        for record in self._header.tensors:
            if size + record.bytes > BLOCK:
                yield from self._together(window)
                window, size = [], 0
            window.append(record)
            size += record.bytes
        yield from self._together(window)

    def _together(self, records: list[TensorRecord]) -> Iterator[tuple[str, Tensor]]:
        if len(records) > 1:
            wanted = [[*block_places(record.part, self._places[record.name])] for record in records]
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
            at = 0
            for part in pieces(record.part, self._source, self._places[record.name]):
                flat[at : at + len(part)] = part
                at += len(part)
            if checksum([flat]) != record.crc:
                raise ValueError("its elements have another checksum")
            return _checked_bool(result, flat)

    @contextmanager
    def _blaming(self, name: str, count: int = 1) -> Iterator[None]:
        try:
            yield
        except (ValueError, TypeError, OSError, ExportError) as error:
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


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", fix="check the path") from error


def _places(header: Header, start: int, size: int, place: str) -> dict[str, int]:
    """Where each tensor begins; they fill the file to its end."""
    places, at = {}, start
    for record in header.tensors:
        problem = f"there are two tensors {record.name}" if record.name in places else ""
        places[record.name] = at
        try:
            at += record.extent()
        except ValueError as error:
            problem = f"tensor {record.name}: {error}"
        if problem:
            raise ModelError(f"the pack is damaged: {problem}", at=place, fix=AGAIN)
        if at > size:
            raise ModelError(f"the pack is damaged: the file ends in tensor {record.name}", at=place, fix=AGAIN)
    if at != size:
        raise ModelError(f"the pack is damaged: {size - at} bytes too many", at=place, fix=AGAIN)
    return places


def _check_limit(header: Header, limit: int, place: str) -> None:
    total = sum(record.bytes for record in header.tensors)
    if total > limit:
        largest = max(header.tensors, key=lambda record: record.bytes)
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
