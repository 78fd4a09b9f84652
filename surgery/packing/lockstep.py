"""Huffman blocks decoded in array code: one step takes a symbol from every lane of every block of a batch.

Four (or 49 // width) steps share one load of 49 or more bits per lane.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from .lanes import Head, only_symbol, read_head
from .lengths import tables

if TYPE_CHECKING:
    from .codec import Array, Block

_LANES = 16384
"""Lanes of a batch are added up to this number: their state fits the cache."""
_TABLE = 1 << 20
"""Table entries of a batch are added up to this number."""


@dataclass(frozen=True)
class _Job:
    index: int
    block: Block
    head: Head

    @property
    def lanes(self) -> int:
        return len(self.head.starts) - 1

    @property
    def table(self) -> int:
        """Width of the table in a batch: short codes are looked up in as wide a one as others need."""
        return max(self.head.width, 12)

    @property
    def steps(self) -> int:
        return -(-self.block.count // self.lanes)


def decoded(blocks: Sequence[Block]) -> list[Array]:
    """The symbols (count,) of each block.

    Raises:
        ValueError: a block is damaged.
    """
    result: list[Array] = [np.empty(0, np.uint8)] * len(blocks)
    jobs = []
    for index, block in enumerate(blocks):
        symbol = only_symbol(block.data, block.alphabet)
        if symbol is None:
            jobs.append(_Job(index, block, read_head(block.data, block.count, block.alphabet)))
        else:
            result[index] = np.full(block.count, symbol, symbol_type(block.alphabet))
    jobs.sort(key=lambda job: (job.table, -job.steps))
    for _, alike in groupby(jobs, key=lambda job: job.table):
        for batch in _batches([*alike]):
            for job, symbols in zip(batch, _decode(batch), strict=True):
                result[job.index] = symbols.astype(symbol_type(job.block.alphabet), copy=False)
    return result


def symbol_type(alphabet: int) -> type[np.unsignedinteger]:
    return np.uint8 if alphabet <= 256 else np.uint16


def _batches(jobs: list[_Job]) -> Iterator[list[_Job]]:
    """Runs of `jobs`; in each the steps fall, and to at least a quarter, so that memory is bounded by the symbols."""
    batch: list[_Job] = []
    lanes = 0
    for job in jobs:
        size = (len(batch) + 1) << job.table
        if batch and (lanes + job.lanes > _LANES or size > _TABLE or job.steps * 4 < batch[0].steps):
            yield batch
            batch, lanes = [], 0
        batch.append(job)
        lanes += job.lanes
    if batch:
        yield batch


def _decode(batch: Sequence[_Job]) -> list[Array]:
    width = max(job.head.width for job in batch)
    lanes = [job.lanes for job in batch]
    counts = np.concatenate([_lane_counts(job.block.count, job.lanes) for job in batch])
    order = np.argsort(-counts, kind="stable")  # the lanes that still run are the first ones
    words, position = _words(batch)
    expected = (position + np.concatenate([np.diff(job.head.starts) for job in batch]))[order]
    base = np.repeat(np.arange(len(batch)) << width, lanes)[order] if len(batch) > 1 else None
    machine = _Machine(words, *_joined_tables(batch, width), position[order], base, width)
    rows = machine.run(counts[order])
    if not np.array_equal(machine.position, expected):
        raise ValueError("a lane does not end where the next begins")
    if len(batch) == 1:
        return [rows.reshape(-1)[: batch[0].block.count]]
    column = np.empty(len(order), np.int64)
    column[order] = np.arange(len(order))
    own = np.split(column, np.cumsum(lanes)[:-1])
    return [rows[: job.steps, c].reshape(-1)[: job.block.count] for job, c in zip(batch, own, strict=True)]


def _lane_counts(count: int, lanes: int) -> Array:
    """Symbols in each lane (lanes,)."""
    return np.where(np.arange(lanes) < count % lanes, count // lanes + 1, count // lanes)


def _joined_tables(batch: Sequence[_Job], width: int) -> tuple[Array, Array]:
    """The tables of all blocks behind each other: symbols and lengths (blocks · 2^width,)."""
    found = [tables(job.head.symbols, job.head.lengths, width) for job in batch]
    dtype = np.uint8 if all(job.block.alphabet <= 256 for job in batch) else np.uint16
    symbols = np.concatenate([symbols.astype(dtype) for symbols, _ in found])
    return symbols, np.concatenate([lengths for _, lengths in found])


def _words(batch: Sequence[_Job]) -> tuple[Array, Array]:
    """The payloads' 64 bits from each multiple of 16 bits on, and where each lane begins, in bits."""
    parts, starts, at = [], [], 0
    for job in batch:
        data, begin = job.block.data, job.head.payload
        starts.append(job.head.starts[:-1] + at * 16)
        pairs, odd = divmod(len(data) - begin, 2)
        parts.append(np.frombuffer(data, "<u2", pairs, begin))
        parts.append(np.frombuffer(data[len(data) - odd :] + bytes(8 + odd), "<u2"))
        at += sum(map(len, parts[-2:]))
    halves = np.concatenate(parts)
    words = np.empty((len(halves) - 3, 4), "<u2")
    for k in range(4):
        words[:, k] = halves[k : len(halves) - 3 + k]
    return words.reshape(-1).view("<i8"), np.concatenate(starts)


class _Machine:
    """Lanes (n,) at their bit positions, and what they read. Every look-up is clipped: no position leads out of it."""

    def __init__(
        self, words: Array, symbol_of: Array, length_of: Array, position: Array, base: Array | None, width: int
    ) -> None:
        self.words, self.symbol_of, self.length_of = words, symbol_of, length_of
        self.position, self.base = position, base
        self._mask = np.int64((1 << width) - 1)
        self._per_load = 49 // width
        self._word, self._bits, self._index, self._length = (np.empty_like(position) for _ in range(4))

    def run(self, counts: Array) -> Array:
        """`counts` (n,) symbols of each lane, falling: (largest count, n); beyond a lane's count is no symbol."""
        rows = np.zeros((int(counts[0]), len(counts)), self.symbol_of.dtype)
        step = 0
        for end in np.unique(counts).tolist():
            active = int((counts > step).sum())
            while step < end:
                taken = min(self._per_load, end - step)
                self._load(rows[step : step + taken, :active], active)
                step += taken
        return rows

    def _load(self, rows: Array, n: int) -> None:
        """The next symbols (steps, n) of the first `n` lanes, from one load."""
        position, word, bits, index, length = (
            a[:n] for a in (self.position, self._word, self._bits, self._index, self._length)
        )
        np.right_shift(position, 4, out=word)
        np.bitwise_and(position, 15, out=index)
        self.words.take(word, out=bits, mode="clip")
        np.right_shift(bits, index, out=bits)
        for row in rows:
            np.bitwise_and(bits, self._mask, out=index)
            if self.base is not None:
                np.add(index, self.base[:n], out=index)
            self.symbol_of.take(index, out=row, mode="clip")
            self.length_of.take(index, out=length, mode="clip")
            np.add(position, length, out=position)
            np.right_shift(bits, length, out=bits)
