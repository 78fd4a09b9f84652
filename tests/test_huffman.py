from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.packing.bits import joined, packed_fields, unpacked_fields
from surgery.packing.codec import Block, Codec
from surgery.packing.huffman import Huffman
from surgery.packing.lanes import predicted_bytes
from surgery.packing.lengths import codes, limited_lengths, tables

HUFFMAN = Huffman()


def symbol_array(values: list[int] | np.ndarray, alphabet: int) -> np.ndarray:
    return np.asarray(values).astype(np.uint8 if alphabet <= 256 else np.uint16)


def round_trip(symbols: np.ndarray, alphabet: int) -> bytes:
    data = HUFFMAN.encode(symbols, alphabet)
    found = HUFFMAN.decode(data, len(symbols), alphabet)
    assert found.dtype == symbols.dtype
    assert np.array_equal(found, symbols)
    return data


@given(
    st.sampled_from([2, 16, 256, 65536]).flatmap(
        lambda a: st.tuples(st.just(a), st.lists(st.integers(0, a - 1), min_size=1, max_size=300))
    )
)
def test_any_symbols_come_back(case: tuple[int, list[int]]) -> None:
    alphabet, values = case
    round_trip(symbol_array(values, alphabet), alphabet)


@pytest.mark.parametrize("count", [1, 2, 4095, 4096, 4097, 70_001])
def test_blocks_of_any_size_come_back(count: int) -> None:
    chance = np.random.default_rng(count)
    round_trip(symbol_array(np.minimum(chance.geometric(0.3, count) - 1, 255), 256), 256)


def test_one_symbol_takes_three_bytes() -> None:
    assert len(round_trip(symbol_array([65535] * 100_000, 65536), 65536)) == 3


def test_every_one_of_65536_symbols_comes_back() -> None:
    data = round_trip(symbol_array(np.random.default_rng(0).permutation(65536), 65536), 65536)
    assert len(data) < 65536 * 2 * 1.07  # 16 bits a symbol, and the list of the symbols


def test_the_frequencies_that_give_the_longest_codes_come_back() -> None:
    fibonacci = [1, 1]
    while sum(fibonacci) < 400_000:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    symbols = np.repeat(np.arange(len(fibonacci)), fibonacci)
    round_trip(symbol_array(np.random.default_rng(0).permutation(symbols), 256), 256)


def test_blocks_of_every_kind_come_back_together() -> None:
    chance = np.random.default_rng(0)
    cases = [
        (symbol_array(np.minimum(chance.geometric(p, n) - 1, a - 1), a), a)
        for a in (16, 256, 65536)
        for p in (0.01, 0.3, 0.9)
        for n in (1, 3, 700, 9000)
    ]
    blocks = [Block(HUFFMAN.encode(symbols, a), len(symbols), a) for symbols, a in cases]
    for (symbols, _), found in zip(cases, HUFFMAN.decode_all(blocks), strict=True):
        assert found.dtype == symbols.dtype
        assert np.array_equal(found, symbols)


@given(st.lists(st.integers(1, 10**9), min_size=2, max_size=200), st.integers(0, 8))
def test_lengths_are_a_complete_code_within_the_limit(counts: list[int], room: int) -> None:
    limit = (len(counts) - 1).bit_length() + room
    lengths = limited_lengths(np.array(counts), max(limit, 1))
    assert lengths.max() <= max(limit, 1)
    assert sum(2.0 ** -int(n) for n in lengths) == 1


@given(st.lists(st.integers(1, 10**6), min_size=2, max_size=60))
def test_without_a_limit_that_binds_the_length_is_huffmans(counts: list[int]) -> None:
    import heapq

    heap, total = list(counts), 0
    heapq.heapify(heap)
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        total += merged
        heapq.heappush(heap, merged)
    assert int(limited_lengths(np.array(counts), 59) @ np.array(counts)) == total


def test_a_limit_that_binds_still_gives_the_best_code() -> None:
    counts = np.array([1, 1, 2, 3, 5, 8])
    best = min(
        int(counts @ lengths)
        for lengths in np.ndindex(*(4,) * 6)
        if min(lengths) > 0 and sum(2.0**-n for n in lengths) <= 1
        for lengths in [np.array(lengths)]
    )
    assert int(limited_lengths(counts, 3) @ counts) == best


def test_more_symbols_than_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 symbols do not fit codes of 2 bits"):
        limited_lengths(np.ones(5, np.int64), 2)


def test_the_table_says_the_symbol_whatever_follows_its_code() -> None:
    lengths = np.array([1, 3, 3, 2])
    symbols, taken = tables(np.array([7, 8, 9, 10]), lengths, 4)
    for code, length, symbol in zip(codes(lengths, 4), lengths, [7, 8, 9, 10], strict=True):
        for rest in range(1 << (4 - length)):
            assert symbols[code | rest << length] == symbol
            assert taken[code | rest << length] == length


@given(st.lists(st.tuples(st.integers(0, 2**20 - 1), st.integers(0, 20)), min_size=1, max_size=99))
def test_joined_codes_are_their_bits_one_after_the_other(parts: list[tuple[int, int]]) -> None:
    expected, at = 0, 0
    for value, length in parts:
        expected |= (value & (1 << length) - 1) << at
        at += length
    values = np.array([value & (1 << length) - 1 for value, length in parts])
    data = joined(values, np.array([length for _, length in parts]), 20)
    assert data == expected.to_bytes((at + 7) // 8, "little")


@given(st.integers(0, 32).flatmap(lambda w: st.tuples(st.just(w), st.lists(st.integers(0, (1 << w) - 1), min_size=1))))
def test_fields_come_back(case: tuple[int, list[int]]) -> None:
    width, values = case
    data = packed_fields(np.array(values), width)
    assert len(data) == (len(values) * width + 7) // 8
    assert unpacked_fields(data, len(values), width).tolist() == values


@pytest.mark.parametrize(("deviation", "allowed"), [(1.5, 1.02), (4, 1.015), (12, 1.01)])
def test_a_block_is_near_the_entropy_and_as_large_as_predicted(deviation: float, allowed: float) -> None:
    chance = np.random.default_rng(0)
    symbols = np.clip(chance.normal(128, deviation, 1 << 18), 0, 255).astype(np.uint8)
    counts = np.bincount(symbols, minlength=256)
    size = len(HUFFMAN.encode(symbols, 256))
    assert size < Codec.cost(HUFFMAN, counts) * allowed
    assert predicted_bytes(counts) == pytest.approx(size, rel=1e-3)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6))
def test_a_damaged_block_is_an_error_or_symbols_of_the_alphabet(seed: int) -> None:
    chance = random.Random(seed)
    symbols = symbol_array([min(int(chance.expovariate(0.3)), 40) for _ in range(500)], 256)
    data = bytearray(HUFFMAN.encode(symbols, 256))
    for _ in range(chance.randrange(1, 4)):
        data[min(chance.choice([chance.randrange(30), chance.randrange(len(data))]), len(data) - 1)] = chance.randrange(
            256
        )
    try:
        found = HUFFMAN.decode(bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]), 500, 256)
    except ValueError:
        return
    assert found.shape == (500,)
    assert found.dtype == np.uint8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: b"", "empty"),
        (lambda d: d[:9], "ends in its head"),
        (lambda d: bytes([21]) + d[1:], "out of range"),
        (lambda d: d[:7] + bytes(4) + d[11:], "0 lanes for 300 symbols"),
        (lambda d: d[:-1], "do not sum"),
        (lambda d: d + b"\0", "do not sum"),
        (lambda d: b"\0\0", "not 3 bytes"),
        (lambda d: b"\0\0\1", "symbol 256 of an alphabet of 256"),
        (lambda d: d[:16] + bytes([d[16] ^ 1]) + d[17:], "longest code|complete prefix code|do not sum"),
    ],
)
def test_a_head_that_contradicts_itself_is_refused(change: object, message: str) -> None:
    data = HUFFMAN.encode(symbol_array([min(i % 17, 9) for i in range(300)], 256), 256)
    with pytest.raises(ValueError, match=message):
        HUFFMAN.decode(change(data), 300, 256)  # type: ignore[operator]
