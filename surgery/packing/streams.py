"""Streams written: raw bytes, and symbols through a codec, each with its checksum."""

from __future__ import annotations

import zlib
from typing import IO, TYPE_CHECKING

import numpy as np

from ..errors import PluginError
from .codec import BLOCK, Codec
from .form import Raw, Symbols

if TYPE_CHECKING:
    from .codec import Array


class Sink:
    """Where streams go, in the order of the calls."""

    def __init__(self, file: IO[bytes], codec: Codec) -> None:
        self.codec = codec
        self._file = file

    def raw(self, elements: Array) -> Raw:
        data = elements.astype(elements.dtype.newbyteorder("<"), copy=False).data.cast("B") if elements.size else b""
        self._file.write(data)
        return Raw(crc=zlib.crc32(data))

    def symbols(self, data: Array, width: int) -> Symbols:
        """`data`: bytes (n,)."""
        sizes, crc = [], 0
        per_block = BLOCK * width // 8
        for at in range(0, len(data), per_block):
            block = self._encoded(split(data[at : at + per_block], width), 1 << width)
            self._file.write(block)
            sizes.append(len(block))
            crc = zlib.crc32(block, crc)
        return Symbols(width=width, blocks=sizes, crc=crc)  # type: ignore[arg-type]

    def _encoded(self, symbols: Array, alphabet: int) -> bytes:
        block = self.codec.encode(symbols, alphabet)
        if not isinstance(block, bytes):
            raise PluginError(
                f"encode gives {type(block).__name__}, not bytes", at=f"codec {self.codec.name()}", fix="correct it"
            )
        return block


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
