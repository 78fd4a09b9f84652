"""Numbers of a few bits, one behind the other, the least significant bit of the first byte first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .codec import Array


def packed_fields(values: Array, width: int) -> bytes:
    """`values` below 2^width as fields of `width` bits, filled up with zeros to whole bytes."""
    if width == 0:
        return b""
    bits = (values[:, None] >> np.arange(width)) & 1
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def unpacked_fields(data: bytes, count: int, width: int) -> Array:
    """The first `count` fields of `data`, as int64."""
    if width == 0:
        return np.zeros(count, np.int64)
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width, bitorder="little")
    return bits.reshape(count, width).astype(np.int64) @ (1 << np.arange(width))


def field_bytes(count: int, width: int) -> int:
    return (count * width + 7) // 8


def joined(values: Array, lengths: Array, longest: int) -> bytes:
    """`values` (n,) of `lengths` (n,) bits each, at most `longest` ≤ 24, one behind the other."""
    values, lengths = values.astype(np.uint64), lengths.astype(np.uint64)
    while longest * 2 <= 48 and len(values) > 1:
        values, lengths, longest = *_pairs(values, lengths), longest * 2
    ends = np.cumsum(lengths)
    words, shifts = np.divmod(ends - lengths, np.uint64(64))
    result = np.zeros(int(ends[-1]) // 64 + 2, np.uint64)
    first = np.flatnonzero(np.diff(words, prepend=words[:1] + np.uint64(1)))
    last = np.append(first[1:], len(words)) - 1
    result[words[first]] = np.bitwise_or.reduceat(values << shifts, first)
    result[words[last] + np.uint64(1)] |= values[last] >> np.uint64(1) >> (np.uint64(63) - shifts[last])
    return result.astype("<u8").tobytes()[: (int(ends[-1]) + 7) // 8]


def _pairs(values: Array, lengths: Array) -> tuple[Array, Array]:
    if len(values) % 2:
        values, lengths = np.append(values, np.uint64(0)), np.append(lengths, np.uint64(0))
    return values[::2] | values[1::2] << lengths[::2], lengths[::2] + lengths[1::2]
