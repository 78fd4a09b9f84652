"""Streams of a file, written and read: raw bytes, and symbols through a codec."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING

import numpy as np

from ..errors import PluginError
from .codec import BLOCK, Block, Codec
from .form import Raw, Symbols

if TYPE_CHECKING:
    from .codec import Array


class Sink:
    """Where streams go, in the order of the calls."""

    def __init__(self, file: IO[bytes], codec: Codec) -> None:
        self.codec = codec
        self._file = file

    def raw(self, elements: Array) -> Raw:
        self._file.write(
            elements.astype(elements.dtype.newbyteorder("<"), copy=False).data.cast("B") if elements.size else b""
        )
        return Raw()

    def symbols(self, data: Array, width: int) -> Symbols:
        """`data`: bytes (n,)."""
        sizes = []
        per_block = BLOCK * width // 8
        for at in range(0, len(data), per_block):
            block = self._encoded(split(data[at : at + per_block], width), 1 << width)
            self._file.write(block)
            sizes.append(len(block))
        return Symbols(width=width, blocks=sizes)  # type: ignore[arg-type]

    def _encoded(self, symbols: Array, alphabet: int) -> bytes:
        block = self.codec.encode(symbols, alphabet)
        if not isinstance(block, bytes):
            raise PluginError(
                f"encode gives {type(block).__name__}, not bytes", at=f"codec {self.codec.name()}", fix="correct it"
            )
        return block


@dataclass
class FileSource:
    """The file's bytes, and its symbols through the codec."""

    file: IO[bytes]
    name: str
    codec: Codec | None = None
    _ready: dict[int, Array] = field(default_factory=dict)

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


def checksum(parts: Iterable[Array]) -> int:
    """CRC-32 of elements (n,), little-endian."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(np.ascontiguousarray(part).astype(part.dtype.newbyteorder("<"), copy=False).data, crc)
    return crc


def split(data: Array, width: int) -> Array:
    """Bytes (n,) as symbols of `width` bits: uint8 (2n,) for 4, (n,) for 8, uint16 (ceil(n / 2),) for 16."""
    if width == 4:
        return np.stack([data & 15, data >> 4], 1).reshape(-1)
    if width == 16:
        even = np.append(data, np.uint8(0)) if len(data) % 2 else np.ascontiguousarray(data)
        return even.view("<u2").astype(np.uint16, copy=False)
    return data


def merged(symbols: Array, width: int) -> Array:
    """The bytes that `split` gave these symbols for; for 16 with what filled an odd one up."""
    if width == 4:
        return np.asarray(symbols[::2] | symbols[1::2] << 4)
    return symbols.astype("<u2").view(np.uint8) if width == 16 else symbols
