"""Small packs that declare much: to read one must take bounded time and memory, whatever it ends with."""

from __future__ import annotations

import json
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from pack_mutations import LIMIT, document, put_together

from surgery.packing.bits import packed_fields


def header_of(tensors: list[dict[str, Any]], **graph: Any) -> dict[str, Any]:
    plain = document([tensor["name"] for tensor in tensors]).plain() | graph
    return {"format": "surgery-pack", "codec": "huffman", "versions": {}, "graph": plain, "tensors": tensors}


def tensor(name: str, count: int, crc: int = 0, **data: Any) -> dict[str, Any]:
    return {"name": name, "dtype": "uint8", "shape": [count], "crc": crc, "data": {"kind": "raw"} | data}


def layer(cls: str, **arguments: Any) -> bytes:
    """A model with a layer of these arguments."""
    module = {"name": "a", "class": f"torch.nn.modules.{cls}", "arguments": arguments}
    return put_together(header_of([], modules=[{"name": ""}, module]), b"")


def empty_tensors() -> bytes:
    """3,000 tensors without elements."""
    return put_together(header_of([tensor(f"t{i}", 0) for i in range(3000)]), b"")


def many_more_tensors() -> bytes:
    """10,000 of them."""
    return put_together(header_of([tensor(f"t{i}", 0) for i in range(10_000)]), b"")


def wide_tables() -> bytes:
    """2,000 streams whose codes claim tables of a million entries."""
    lengths = np.array([*range(1, 21), 20])
    fields = packed_fields(lengths - 1, 5)
    head = struct.pack("<BHHBBIIB", 20, 0, 20, 1, 5, 1, 21, 0)
    block = head + b"\xff\xff\x1f" + fields + bytes(3)
    data = {"kind": "symbols", "width": 8, "blocks": [len(block)]}
    return put_together(header_of([tensor(f"t{i}", 21, **data) for i in range(2000)]), block * 2000)


def one_symbol() -> bytes:
    """A kilobyte of blocks that stand for as much as the limit allows."""
    blocks = LIMIT >> 18
    data = {"kind": "symbols", "width": 8, "blocks": [3] * blocks}
    return put_together(header_of([tensor("t", LIMIT, zlib.crc32(b"\7" * LIMIT), **data)]), b"\0\7\0" * blocks)


def million_blocks() -> bytes:
    """A stream cut into a million blocks of nothing."""
    data = {"kind": "symbols", "width": 8, "blocks": [0] * 1_000_000}
    return put_together(header_of([tensor("t", 1_000_000 << 18, **data)]), b"")


def inflating_header() -> bytes:
    """64 MB of blanks for a header."""
    plain = 1 << 26
    stored = lzma.compress(bytes(1 << 26), format=lzma.FORMAT_ALONE, preset=0)
    head = struct.pack("<8sIII", b"\x89SURGERY", 2, len(stored), plain)
    return head + struct.pack("<I", zlib.crc32(stored, zlib.crc32(head))) + stored


def greedy_dictionary() -> bytes:
    """A stream that wants a dictionary of 4 GB to be inflated with."""
    plain = json.dumps(header_of([])).encode()
    stored = bytearray(lzma.compress(plain, format=lzma.FORMAT_ALONE))
    stored[1:5] = b"\xff\xff\xff\xff"
    head = struct.pack("<8sIII", b"\x89SURGERY", 2, len(stored), len(plain))
    return head + struct.pack("<I", zlib.crc32(bytes(stored), zlib.crc32(head))) + bytes(stored)


def nested_values() -> bytes:
    """Structures and arguments within one another."""
    deep: Any = None
    for _ in range(400):
        deep = {"tuple": [deep]}
    return put_together(header_of([], outputs=deep), b"")


def deep_names() -> bytes:
    """Modules two thousand levels deep."""
    names = [".".join("a" * depth) for depth in range(1, 2000)]
    return put_together(header_of([], modules=[{"name": name} for name in ("", *names)]), b"")


def billion_layers() -> bytes:
    """A layer of a billion layers."""
    return layer("rnn:LSTM", input_size=1, hidden_size=1, num_layers=10**9)


def deep_copies() -> bytes:
    """A layer that copies another a billion times."""
    return layer("transformer:Transformer", d_model=8, nhead=1, num_encoder_layers=10**9, dim_feedforward=8)


def huge_layer() -> bytes:
    """A layer whose weights would take four terabytes."""
    return layer("linear:Linear", in_features=1 << 20, out_features=1 << 20)


def huge_input() -> bytes:
    """An example input that would take four terabytes."""
    return put_together(header_of([], example=[{"tensor": ["float32", [1 << 40]]}]), b"")


ATTACKS: list[Callable[[], bytes]] = [
    empty_tensors,
    many_more_tensors,
    wide_tables,
    one_symbol,
    million_blocks,
    inflating_header,
    greedy_dictionary,
    nested_values,
    deep_names,
    billion_layers,
    deep_copies,
    huge_layer,
    huge_input,
]
