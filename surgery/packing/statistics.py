"""What representations are chosen by: histograms, distinct values, distances between the rare ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .codec import Array

CHUNK = 1 << 20
MOST_VALUES = 1 << 16
_SAMPLE = 1 << 16
_SLOTS = 16


def histogram(values: Array, size: int) -> Array:
    """How often each of 0 … size - 1 occurs (size,)."""
    total = np.zeros(size, np.int64)
    for part in chunks(values):
        total += np.bincount(part, minlength=size)
    return total


def chunks(values: Array) -> Iterator[Array]:
    for at in range(0, len(values), CHUNK):
        yield values[at : at + CHUNK]


def sample(values: Array, size: int = _SAMPLE) -> Array:
    """At most `size` of the values, spread evenly."""
    return values[:: max(1, -(-len(values) // size))]


def byte_planes(values: Array, rotate: bool) -> list[Array]:
    """Each byte of unsigned elements (n,), the lowest first; rotated left by one bit before, where asked."""
    size = values.dtype.itemsize
    turned = rotated_left(values) if rotate else values
    split = turned.astype(values.dtype.newbyteorder("<"), copy=False).view(np.uint8).reshape(-1, size)
    return [split[:, k] for k in range(size)]


def rotated_left(values: Array) -> Array:
    return values << 1 | values >> (values.dtype.itemsize * 8 - 1)


def rotated_right(values: Array) -> Array:
    return values >> 1 | values << (values.dtype.itemsize * 8 - 1)


def distinct(values: Array) -> tuple[Array, Array] | None:
    """The distinct values (k,), ascending, and the index of each element's (n,), where they are few; else None.

    A sample decides whether it is worth looking at every element, so that the many are never sorted.
    """
    seen = sample(values)
    table = np.unique(seen)
    if len(table) > max(1, len(seen) // 2):
        return None
    for _ in range(8):
        found = _indices(values, table)
        if found is not None:
            return table, found
        table = _grown(values, table)
        if len(table) > min(MOST_VALUES, len(values) // 2):
            return None
    return None


def _indices(values: Array, table: Array) -> Array | None:
    """Where each of `values` stands in `table`, or None where one does not."""
    result = np.empty(len(values), np.uint8 if len(table) <= 256 else np.uint16)
    look_up = _Places(table)
    for at in range(0, len(values), CHUNK):
        part = values[at : at + CHUNK]
        places = look_up(part)
        if not np.array_equal(table.take(places, mode="clip"), part):
            return None
        result[at : at + CHUNK] = places
    return result


def _grown(values: Array, table: Array) -> Array:
    """`table` with every other value, as long as they are few."""
    look_up = _Places(table)
    for part in chunks(values):
        missing = part[table.take(look_up(part), mode="clip") != part]
        if len(missing):
            table = np.union1d(table, missing)
            look_up = _Places(table)
        if len(table) > MOST_VALUES:
            break
    return table


class _Places:
    """Where values stand in a table: by a product whose high bits differ for all of it where one is found, else by
    bisection. What is not in the table gets any place."""

    def __init__(self, table: Array) -> None:
        self._table = table
        self._shift = table.dtype.type(table.dtype.itemsize * 8 - _SLOTS)
        self._factor = self._find_factor() if len(table) <= 256 else None
        if self._factor is not None:
            self._slots = np.zeros(1 << _SLOTS, np.uint8)
            self._slots[table * self._factor >> self._shift] = np.arange(len(table))

    def _find_factor(self) -> np.unsignedinteger | None:
        state = 0x9E3779B97F4A7C15
        for _ in range(64):
            state = (state * 6364136223846793005 + 1442695040888963407) % (1 << 64)
            factor = self._table.dtype.type((state >> 32 | state << 32) % (1 << self._table.dtype.itemsize * 8) | 1)
            if len(np.unique(self._table * factor >> self._shift)) == len(self._table):
                return factor  # type: ignore[no-any-return]
        return None

    def __call__(self, values: Array) -> Array:
        if self._factor is None:
            return np.asarray(np.searchsorted(self._table, values))
        return np.asarray(self._slots.take(values * self._factor >> self._shift, mode="clip"))


def gaps(elements: Array, background: int, largest: int) -> tuple[Array, Array]:
    """How many of `background` stand before each other element, in steps (s,) of at most `largest`, which stands for
    that many and no element behind them; and the other elements (m,)."""
    places = np.flatnonzero(elements != background)
    before = np.diff(places, prepend=-1) - 1
    steps = np.full(len(before) + int((before // largest).sum()), largest, np.uint8 if largest < 256 else np.uint16)
    steps[np.cumsum(before // largest + 1) - 1] = before % largest
    return steps, elements[places]
