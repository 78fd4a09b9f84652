"""Elements read in order, a piece at a time, so that no more than a piece of anything but the result is in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .codec import BLOCK
from .form import Codebook, Half, Part, Planes, Raw, Sparse, Symbols, extent
from .statistics import rotated_right
from .streams import merged

if TYPE_CHECKING:
    from .codec import Array

PIECE = 1 << 17
"""Elements read at once."""

UNSIGNED = {size: np.dtype(f"<u{size}") for size in (1, 2, 4, 8)}


class Source(Protocol):
    """Bytes of a file, and symbols of its blocks."""

    def bytes(self, offset: int, size: int) -> bytes: ...

    def symbols(self, offset: int, size: int, count: int, alphabet: int) -> Array: ...


class Reader(Protocol):
    def read(self, count: int) -> Array:
        """The next elements (count,), as unsigned integers; never asked for more than there are."""


def reader(part: Part, source: Source, offset: int) -> Reader:
    """Of a part whose streams begin at `offset`."""
    data, count, size = part
    if isinstance(data, Raw | Symbols):
        return _LEAVES[type(data)](data, count, size, source, offset)
    readers = []
    for child in data.parts(count, size):
        readers.append(reader(child, source, offset))
        offset += extent(child)
    return _READERS[type(data)](data, count, size, readers)


def pieces(part: Part, source: Source, offset: int) -> Iterator[Array]:
    """All elements of a part in order, a piece at a time."""
    elements, count = reader(part, source, offset), part[1]
    for at in range(0, count, PIECE):
        yield elements.read(min(PIECE, count - at))


class _Raw:
    def __init__(self, data: Raw, count: int, size: int, source: Source, offset: int) -> None:
        self._source, self._at, self._dtype = source, offset, UNSIGNED[size]

    def read(self, count: int) -> Array:
        size = count * self._dtype.itemsize
        self._at += size
        return np.frombuffer(self._source.bytes(self._at - size, size), self._dtype)


class _Symbols:
    def __init__(self, data: Symbols, count: int, size: int, source: Source, offset: int) -> None:
        self._width, self._dtype = data.width, UNSIGNED[size]
        self._left = data.symbols(count, size)
        self._source, self._at, self._sizes = source, offset, iter(data.blocks)
        self._ready = np.empty(0, np.uint8)

    def read(self, count: int) -> Array:
        """Bytes are taken from the block at hand, and from the next ones as far as they reach."""
        wanted = count * self._dtype.itemsize
        parts = []
        while wanted:
            if not len(self._ready):
                self._ready = self._next()
            parts.append(self._ready[:wanted])
            self._ready = self._ready[wanted:]
            wanted -= len(parts[-1])
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts or [self._ready])
        return np.ascontiguousarray(joined).view(self._dtype)

    def _next(self) -> Array:
        size, count = next(self._sizes), min(self._left, BLOCK)
        self._left -= count
        self._at += size
        return merged(self._source.symbols(self._at - size, size, count, 1 << self._width), self._width)


class _Half:
    def __init__(self, data: Half, count: int, size: int, parts: list[Reader]) -> None:
        [self._of], self._to = parts, data.to

    def read(self, count: int) -> Array:
        short = self._of.read(count)
        if self._to == "bfloat16":
            return short.astype(np.uint32) << 16
        with np.errstate(all="ignore"):
            return short.view(np.float16).astype(np.float32).view(np.uint32)


class _Codebook:
    def __init__(self, data: Codebook, count: int, size: int, parts: list[Reader]) -> None:
        table = parts[0].read(data.size)
        self._indices = parts[1]
        self._per = max(1, 8 // data.bits)
        self._table = _table_of_bytes(table, data.bits) if self._per > 1 else table
        self._left = np.empty(0, table.dtype)
        self._bound = data.size
        self._checks = data.size < 1 << data.bits

    def read(self, count: int) -> Array:
        fresh = -(-max(0, count - len(self._left)) // self._per)
        indices = self._indices.read(fresh)
        if self._per == 1:
            if self._checks and fresh and int(indices.max()) >= self._bound:
                raise ValueError("an index points behind the codebook")
            return self._table.take(indices, mode="clip")
        values = np.concatenate([self._left, self._table.take(indices, 0, mode="clip").reshape(-1)])
        self._left = values[count:]
        return values[:count]


def _table_of_bytes(table: Array, bits: int) -> Array:
    """The values that the indices in each byte stand for (256, 8 // bits); those behind the codebook are its last."""
    fields = np.arange(256)[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
    return table.take(fields, mode="clip")


class _Sparse:
    def __init__(self, data: Sparse, count: int, size: int, parts: list[Reader]) -> None:
        self._gaps, self._values = parts
        self._background, self._dtype, self._halves = data.background, UNSIGNED[size], data.bits == 4
        self._steps, self._others = data.steps, data.others
        self._largest, self._places = (1 << data.gap_bits) - 1, count * (2 if self._halves else 1)
        self._at = self._reached = 0
        self._ahead = np.empty(0, np.int64)

    def read(self, count: int) -> Array:
        places = count * 2 if self._halves else count
        result = np.full(places, self._background, np.uint8 if self._halves else self._dtype)
        self._look_ahead(self._at + places)
        here = int(np.searchsorted(self._ahead, self._at + places))
        values = self._values.read(here)
        if self._halves and here and int(values.max()) > 15:
            raise ValueError("a half byte is larger than 15")
        result[self._ahead[:here] - self._at] = values
        self._ahead, self._at = self._ahead[here:], self._at + places
        if self._at == self._places and (self._others or self._steps):
            raise ValueError("the gaps do not lead to the end of the elements")
        return merged(result, 4) if self._halves else result

    def _look_ahead(self, until: int) -> None:
        """Know the place of every other element before `until`."""
        while self._steps and self._reached < until:
            gaps = self._gaps.read(min(self._steps, PIECE // 8)).astype(np.int64)
            self._steps -= len(gaps)
            ends = np.cumsum(gaps + (gaps < self._largest)) + self._reached
            self._reached = int(ends[-1])
            places = ends[gaps < self._largest] - 1
            self._others -= len(places)
            if self._reached > self._places or self._others < 0:
                raise ValueError("the gaps lead beyond the elements")
            self._ahead = np.concatenate([self._ahead, places])


class _Planes:
    def __init__(self, data: Planes, count: int, size: int, parts: list[Reader]) -> None:
        self._planes, self._rotate, self._dtype = parts, data.rotate, UNSIGNED[size]

    def read(self, count: int) -> Array:
        result = np.empty((count, len(self._planes)), np.uint8)
        for k, plane in enumerate(self._planes):
            result[:, k] = plane.read(count)
        values = result.reshape(-1).view(self._dtype)
        return rotated_right(values) if self._rotate else values


_LEAVES: dict[type, Callable[..., Reader]] = {Raw: _Raw, Symbols: _Symbols}
_READERS: dict[type, Callable[..., Reader]] = {
    Half: _Half,
    Codebook: _Codebook,
    Sparse: _Sparse,
    Planes: _Planes,
}
