"""The cheapest representation of a tensor, by computed cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .codec import BLOCK, Codec
from .form import Codebook, Half, Planes, Representation, Sparse
from .statistics import byte_planes, chunks, distinct, gaps, histogram, sample
from .streams import Sink, split

if TYPE_CHECKING:
    from .codec import Array

RECORD = {"raw": 30, "symbols": 60, "half": 30, "codebook": 90, "sparse": 120, "planes": 40}
"""About the bytes of each representation in the compressed header, halved: few repeat as they stand."""
_WORTHWHILE = 64
_SPARSE_FROM = 0.3
_PAIRS_FROM = 1 << 14


@dataclass(frozen=True)
class Candidate:
    """A way to store elements, what it costs in bytes, and how to do it."""

    cost: float
    write: Callable[[Sink], Representation]


@dataclass(frozen=True)
class Elements:
    """Bit patterns (n,) of unsigned type, and what they stand for."""

    bits: Array
    is_float: bool
    may_nest: bool = True
    """Whether sparse and half may still be tried: once each is enough."""


def choose(elements: Elements, codec: Codec) -> Candidate:
    """The cheapest candidate; the first where several cost the same."""
    return min(_candidates(elements, codec), key=lambda candidate: candidate.cost)


def _candidates(elements: Elements, codec: Codec) -> Iterator[Candidate]:
    bits = elements.bits
    yield Candidate(bits.nbytes + RECORD["raw"], lambda sink: sink.raw(bits))
    if bits.nbytes < _WORTHWHILE:
        return
    if bits.dtype.itemsize == 1:
        yield from _of_bytes(bits, codec, elements.may_nest)
        return
    found = distinct(bits)
    if found is not None:
        yield _codebook(*found, codec)
    if elements.may_nest:
        yield from _sparse(
            bits, bits.dtype.itemsize * 8, 0, float((sample(bits) == 0).mean()), codec, elements.is_float
        )
        yield from _half(elements, codec)
    yield from _planes(elements, codec)


def _cost(counts: Array, codec: Codec) -> float:
    """Bytes of a stream whose symbols occur `counts` times: that of its blocks, each with its own code."""
    blocks = max(1, -(-int(counts.sum()) // BLOCK))
    return blocks * codec.cost(np.rint(counts / blocks).astype(np.int64))


def _of_bytes(data: Array, codec: Codec, may_nest: bool) -> Iterator[Candidate]:
    counts = histogram(data, 256)
    halves = counts.reshape(16, 16).sum(0) + counts.reshape(16, 16).sum(1)
    costs = {8: _cost(counts, codec), 4: _cost(halves, codec)}
    if len(data) >= _PAIRS_FROM and costs[8] > 1.004 * Codec.cost(codec, counts):
        costs[16] = _cost(histogram(split(data, 16), 1 << 16), codec)
    for width, cost in costs.items():
        yield Candidate(cost + RECORD["symbols"], lambda sink, width=width: sink.symbols(data, width))  # type: ignore[misc]
    used = np.flatnonzero(counts).astype(np.uint8)
    if may_nest and len(used) <= 16:
        places = np.zeros(256, np.uint8)
        places[used] = np.arange(len(used))
        yield _codebook(used, places[data], codec)
    if may_nest:
        yield from _sparse(data, 8, int(counts.argmax()), counts.max() / len(data), codec, False)
        yield from _sparse(data, 4, int(halves.argmax()), halves.max() / len(data) / 2, codec, False)


def _codebook(table: Array, indices: Array, codec: Codec) -> Candidate:
    width = next(w for w in (1, 2, 4, 8, 16) if len(table) <= 1 << w)
    stored = _joined_fields(indices, width) if width < 8 else indices
    of = choose_indices(stored, codec)

    def write(sink: Sink) -> Representation:
        head = sink.raw(table)
        return Codebook(size=len(table), bits=width, table=head, indices=of.write(sink))  # type: ignore[arg-type]

    return Candidate(of.cost + table.nbytes + RECORD["codebook"], write)


def choose_indices(indices: Array, codec: Codec) -> Candidate:
    """As `choose` for the indices of a codebook, of one or two bytes."""
    if indices.dtype.itemsize == 1:
        return choose(Elements(indices, False, may_nest=False), codec)
    cost = _cost(histogram(indices, 1 << 16), codec)
    data = indices.astype("<u2").view(np.uint8)
    return Candidate(cost + RECORD["symbols"], lambda sink: sink.symbols(data, 16))


def _joined_fields(indices: Array, width: int) -> Array:
    """Indices (n,) below 2^width, several to a byte, low bits first."""
    per_byte = 8 // width
    filled = np.zeros(-(-len(indices) // per_byte) * per_byte, np.uint8)
    filled[: len(indices)] = indices
    result = filled[::per_byte].copy()
    for k in range(1, per_byte):
        result |= filled[k::per_byte] << (k * width)
    return result


def _sparse(
    bits: Array, width: int, background: int, share: float, codec: Codec, is_float: bool
) -> Iterator[Candidate]:
    if share < _SPARSE_FROM or share >= 1:
        return
    places = split(bits, 4) if width == 4 else bits
    gap_bits = 8 if share < 0.98 else 16
    steps, others = gaps(places, background, (1 << gap_bits) - 1)
    if not len(others):
        return
    of = choose(Elements(others, is_float, may_nest=False), codec)
    gap = choose_indices(steps, codec)

    def write(sink: Sink) -> Representation:
        stored = gap.write(sink)
        return Sparse(
            bits=width,  # type: ignore[arg-type]
            background=background,
            gap_bits=gap_bits,  # type: ignore[arg-type]
            steps=len(steps),
            others=len(others),
            gaps=stored,
            values=of.write(sink),
        )

    yield Candidate(gap.cost + of.cost + RECORD["sparse"], write)


def _half(elements: Elements, codec: Codec) -> Iterator[Candidate]:
    if not elements.is_float or elements.bits.dtype.itemsize != 4:
        return
    for name, shortened in (("bfloat16", _bfloat16), ("float16", _float16)):
        if shortened(sample(elements.bits)) is None:
            continue
        parts = [shortened(part) for part in chunks(elements.bits)]
        if all(part is not None for part in parts):
            of = choose(Elements(np.concatenate(parts), True, may_nest=False), codec)  # type: ignore[arg-type]
            yield Candidate(
                of.cost + RECORD["half"],
                lambda sink, name=name, of=of: Half(to=name, of=of.write(sink)),  # type: ignore[misc]
            )


def _bfloat16(bits: Array) -> Array | None:
    return (bits >> 16).astype(np.uint16) if not (bits & 0xFFFF).any() else None


def _float16(bits: Array) -> Array | None:
    with np.errstate(all="ignore"):
        short = bits.view(np.float32).astype(np.float16)
        same = np.array_equal(short.astype(np.float32).view(np.uint32), bits)
    return short.view(np.uint16) if same else None


def _planes(elements: Elements, codec: Codec) -> Iterator[Candidate]:
    planes = byte_planes(elements.bits, elements.is_float)
    chosen = [_plane(plane, codec) for plane in planes]

    def write(sink: Sink) -> Representation:
        return Planes(rotate=elements.is_float, planes=[plane.write(sink) for plane in chosen])

    yield Candidate(sum(plane.cost for plane in chosen) + RECORD["planes"], write)


def _plane(plane: Array, codec: Codec) -> Candidate:
    """Raw or symbols, by the histogram of a sample: a byte of a mantissa is not worth more."""
    some = sample(plane, 1 << 20)
    cost = _cost(histogram(some, 256), codec) * (len(plane) / len(some)) + RECORD["symbols"]
    if cost < len(plane) + RECORD["raw"]:
        return Candidate(cost, lambda sink: sink.symbols(np.ascontiguousarray(plane), 8))
    return Candidate(len(plane) + RECORD["raw"], lambda sink: sink.raw(np.ascontiguousarray(plane)))
