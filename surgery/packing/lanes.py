"""A Huffman block: its head, and encoding.

    u8   width    longest code in bits, 1 to 20; 0: one symbol only, which follows as u16, and the block ends
    u16  first    u16 last: the smallest and the largest symbol that occurs
    u8   shortest code length    u8 f: bits of a length field
    u32  lanes    u32 least: bits of the shortest lane    u8 g: bits of a lane field
    bitmap of the symbols first … last that occur, ceil((last - first + 1) / 8) bytes
    length - shortest of each that occurs, ascending, f bits each        (filled up to whole bytes)
    bits - least of each lane, g bits each                               (filled up to whole bytes)
    the lanes' code bits, lane behind lane, without gaps                 (filled up to whole bytes)

Symbol p stands in lane p mod lanes, at step p // lanes.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .bits import field_bytes, joined, packed_fields, unpacked_fields
from .lengths import LONGEST, chosen_limit, codes, limited_lengths

if TYPE_CHECKING:
    from .codec import Array

_HEAD = struct.Struct("<BHHBBIIB")
_LANE_BITS = 8192
LONGEST_LANE = 4096
"""Symbols in a lane at most; bounds the steps that a hostile block can ask for."""


@dataclass(frozen=True)
class Head:
    """The read and checked head of a block of `count` symbols."""

    width: int
    symbols: Array
    """The symbols (used,) that occur, ascending."""
    lengths: Array
    """Their code lengths (used,)."""
    starts: Array
    """Where each lane begins, and the last ends (lanes + 1,), in bits of the payload."""
    payload: int
    """Where the code bits begin, in bytes of the block."""


def encoded(symbols: Array, alphabet: int) -> bytes:
    """The block of these symbols."""
    counts = np.bincount(symbols, minlength=alphabet)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        return struct.pack("<BH", 0, used[0])
    lengths = limited_lengths(counts[used], chosen_limit(len(used)))
    lanes = _lane_count(len(symbols), int(counts[used] @ lengths))
    bits, payload = _payload(symbols, used, lengths, lanes)
    return _head(used, lengths, bits) + payload


def _lane_count(count: int, bits: int) -> int:
    return max(-(-count // LONGEST_LANE), min(count, -(-bits // _LANE_BITS)), 1)


def _payload(symbols: Array, used: Array, lengths: Array, lanes: int) -> tuple[Array, bytes]:
    """Bits of each lane (lanes,), and the code bits of all."""
    width = int(lengths.max())
    of_symbol = np.zeros((2, int(used[-1]) + 2), np.uint32)  # the last symbol fills incomplete rows up: no bits
    of_symbol[0, used], of_symbol[1, used] = codes(lengths, width), lengths
    steps = -(-len(symbols) // lanes)
    grid = np.full(steps * lanes, used[-1] + 1, np.int64)
    grid[: len(symbols)] = symbols
    order = grid.reshape(steps, lanes).T.ravel()
    bits = of_symbol[1][order]
    return bits.reshape(lanes, steps).sum(1, dtype=np.int64), joined(of_symbol[0][order], bits, width)


def _head(used: Array, lengths: Array, bits: Array) -> bytes:
    first, last, shortest, least = int(used[0]), int(used[-1]), int(lengths.min()), int(bits.min())
    spread, lane_spread = int(lengths.max()) - shortest, int(bits.max()) - least
    bitmap = np.zeros(last - first + 1, np.uint8)
    bitmap[used - first] = 1
    widths = spread.bit_length(), lane_spread.bit_length()
    head = _HEAD.pack(int(lengths.max()), first, last, shortest, widths[0], len(bits), least, widths[1])
    fields = packed_fields(lengths - shortest, widths[0]) + packed_fields(bits - least, widths[1])
    return head + np.packbits(bitmap, bitorder="little").tobytes() + fields


def predicted_bytes(counts: Array) -> float:
    """About the bytes of a block with these counts; exact but for the lane fields."""
    used = np.flatnonzero(counts)
    if len(used) < 2:
        return 3.0
    occurring = counts[used]
    lengths = limited_lengths(occurring, chosen_limit(len(used)))
    bits = float(occurring @ lengths)
    fields = field_bytes(len(used), int(lengths.max() - lengths.min()).bit_length())
    return _HEAD.size + int(used[-1] - used[0]) / 8 + 1 + fields + bits * (1 + 10 / _LANE_BITS) / 8


def only_symbol(data: bytes, alphabet: int) -> int | None:
    """The symbol of a block that has no other, else None; ValueError where it is none of the alphabet."""
    if not data:
        raise ValueError("the block is empty")
    if data[0]:
        return None
    if len(data) != 3:
        raise ValueError("the block of one symbol is not 3 bytes long")
    symbol = data[1] | data[2] << 8
    if symbol >= alphabet:
        raise ValueError(f"symbol {symbol} of an alphabet of {alphabet}")
    return symbol


def read_head(data: bytes, count: int, alphabet: int) -> Head:
    """The head of a block that has more than one symbol.

    Raises:
        ValueError: the block ends early or late, or its head contradicts itself, `count` or `alphabet`.
    """
    if len(data) < _HEAD.size:
        raise ValueError("the block ends in its head")
    width, first, last, shortest, f, lanes, least, g = _HEAD.unpack_from(data)
    _check(width <= LONGEST and first < last < alphabet, "the head names symbols or lengths out of range")
    _check(0 < shortest <= width and f <= 5, "the head names symbols or lengths out of range")
    _check(-(-count // LONGEST_LANE) <= lanes <= count, f"{lanes} lanes for {count} symbols")
    _check(g <= 32, f"lane fields of {g} bits")
    at = _HEAD.size + (last - first) // 8 + 1
    _check(len(data) >= at, "the block ends in its head")
    bitmap = np.frombuffer(data, np.uint8, at - _HEAD.size, _HEAD.size)
    symbols = first + np.flatnonzero(np.unpackbits(bitmap, count=last - first + 1, bitorder="little"))
    lane_at = at + field_bytes(len(symbols), f)
    payload = lane_at + field_bytes(lanes, g)
    _check(len(data) >= payload, "the block ends in its head")
    lengths = shortest + unpacked_fields(data[at:lane_at], len(symbols), f)
    _check(len(symbols) > 1 and int(lengths.max()) == width, "the longest code is not as long as the head says")
    _check(width <= chosen_limit(len(symbols)), f"codes of {width} bits for {len(symbols)} symbols")
    starts = np.zeros(lanes + 1, np.int64)
    np.cumsum(least + unpacked_fields(data[lane_at:payload], lanes, g), out=starts[1:])
    _check(payload + (int(starts[-1]) + 7) // 8 == len(data), "the lanes' lengths do not sum to the block's")
    return Head(width, symbols, lengths, starts, payload)


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
