"""Canonical prefix codes of limited length, as pure array mathematics.

Bits are numbered from the least significant bit of the first byte on, and a code's first bit comes first. So a decoder
looks its next `width` bits up in a table of 2^width entries: the low bits of the index are the code, whatever follows.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .codec import Array

LONGEST = 20


def limited_lengths(counts: Array, limit: int) -> Array:
    """Code lengths (n,) of least total length for symbols that occur `counts` > 0 times, n ≥ 2, none longer than
    `limit` bits: package-merge (Larmore and Hirschberg 1990).

    Of each level only the order is needed: among the cheapest items of a level the leaves are always the rarest
    symbols, so how many leaves are among them says whose code grows by a bit.

    Raises:
        ValueError: 2^limit codes are too few.
    """
    n = len(counts)
    if n > 1 << limit:
        raise ValueError(f"{n} symbols do not fit codes of {limit} bits")
    order = np.argsort(counts, kind="stable")
    leaves = counts[order].astype(np.int64)
    items, kinds = leaves, []
    for _ in range(limit - 1):
        packages = items[: len(items) // 2 * 2].reshape(-1, 2).sum(1)
        merged = np.concatenate([leaves, packages])
        rank = np.argsort(merged, kind="stable")
        kinds.append(rank < n)
        items = merged[rank]
    lengths = np.zeros(n, np.int64)
    wanted = 2 * n - 2
    for is_leaf in reversed(kinds):
        taken = int(is_leaf[:wanted].sum())
        lengths[:taken] += 1
        wanted = 2 * (wanted - taken)
    lengths[:wanted] += 1
    result = np.empty(n, np.int64)
    result[order] = lengths
    return result


def chosen_limit(used: int) -> int:
    """Longest code for `used` symbols: a table that stays in the cache, and room to be near the optimum."""
    return min(max(used - 1, 1), max(12, (used - 1).bit_length() + 4), LONGEST)


@functools.cache
def reversed_bits(width: int) -> Array:
    """The index (2^width,) whose bits are those of its position, backwards."""
    result = np.zeros(1, np.int64)
    for _ in range(width):
        result = np.concatenate([result * 2, result * 2 + 1])
    return result


def codes(lengths: Array, width: int) -> Array:
    """The codes (n,) of symbols in ascending order with these lengths, first bit lowest."""
    order = np.argsort(lengths, kind="stable")
    spans = 1 << (width - lengths[order])
    starts = np.empty(len(lengths), np.int64)
    starts[order] = np.cumsum(spans) - spans
    return reversed_bits(width)[starts]


def tables(symbols: Array, lengths: Array, width: int) -> tuple[Array, Array]:
    """What the next `width` bits mean: the symbol (2^width,) and the bits it takes (2^width,).

    Raises:
        ValueError: the lengths are no complete prefix code (Kraft's sum is not one).
    """
    spans = np.left_shift(1, width - lengths)
    if int(spans.sum()) != 1 << width:
        raise ValueError("the code lengths are no complete prefix code")
    order = np.argsort(lengths, kind="stable")
    position = np.repeat(order, spans[order])[reversed_bits(width)]
    return symbols[position], lengths[position]
