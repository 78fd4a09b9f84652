"""Packs with every representation, and ways to damage them: at random, or with their checksums put right again."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import lzma
import random
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.errors import ModelError
from surgery.packing.container import FRAME
from surgery.packing.elements import pieces
from surgery.packing.form import TensorRecord as PackedTensor
from surgery.packing.form import leaves, read_header
from surgery.packing.huffman import Huffman
from surgery.packing.streams import FileSource, checksum
from surgery.state.form import Capture, Document, ModuleRecord, NodeRecord, TensorRecord, with_source

SOURCE = b"def load(): ..."
LIMIT = 32 << 20
_NUMBERS = [-1, 0, 1, 2, 3, 7, 255, 256, 65535, 65536, 1 << 21, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, 1 << 70]


def every_kind() -> dict[str, Tensor]:
    """Small tensors that between them are stored in every way."""
    g = torch.Generator().manual_seed(0)
    few = torch.randn(7, generator=g)
    indices = torch.randint(0, 7, (901,), generator=g)
    normal = torch.randn(600, generator=g)
    skewed = (torch.randn(1801, generator=g) * 3 + 8).clamp(0, 15).to(torch.uint8)

    def mostly(value: Any, share: float, others: Tensor) -> Tensor:
        return torch.where(torch.rand(len(others), generator=g) < share, torch.tensor(value).to(others.dtype), others)

    return {
        "raw": torch.randn(9, generator=g),
        "planes": normal.reshape(30, 20),
        "halves": normal.half().float(),
        "brain": normal.bfloat16(),
        "codebook": few[indices],
        "two_values": few[indices % 2],
        "many_values": torch.randn(300, generator=g)[torch.randint(0, 300, (2500,), generator=g)],
        "one_value": torch.ones(1000),
        "sparse": mostly(0.0, 0.9, torch.randn(1500, generator=g)),
        "sparse_far": mostly(0.0, 0.997, torch.randn(20000, generator=g)),
        "sparse_codebook": mostly(0.0, 0.9, few[torch.randint(0, 7, (1500,), generator=g)]),
        "indices4": skewed[:1800:2] | skewed[1:1800:2] << 4,
        "sparse_indices4": mostly(0x77, 0.93, torch.randint(0, 256, (1500,), generator=g).to(torch.uint8)),
        "int8": (normal * 20).to(torch.int8),
        "counter": torch.tensor(5),
        "empty": torch.empty(0, 4),
        "mask": torch.rand(3000, generator=g) < 0.2,
    }


def write_model(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A model whose buffers these are, and that gives what it takes."""
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_bytes(SOURCE)
    (folder / "model.graph.json").write_bytes(with_source(document(tensors), SOURCE).to_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def document(tensors: Iterable[str]) -> Document:
    parents = dict.fromkeys(name[: at.start()] for name in tensors for at in re.finditer(r"\.", name))
    return Document(
        format="surgery-graph",
        version=2,
        capture=Capture(dynamic_batch=True, notes=[], error=0.0),
        names=["x"],
        inputs={"tuple": [{"tuple": [None]}, {"dict": []}]},
        outputs=None,
        example=[{"tensor": ["float32", [2, 3]]}],
        modules=[ModuleRecord(name=name) for name in ("", *parents)],
        tensors=[TensorRecord(name=name, kind="buffer") for name in tensors],
        nodes=[
            NodeRecord(name="x", op="placeholder", target="x", rank=2),
            NodeRecord(name="output", op="output", target="output", args=[{"tuple": [{"node": "x"}]}]),
        ],
    )


def taken_apart(pack: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams."""
    stored = struct.unpack_from("<I", pack, 12)[0]
    return json.loads(lzma.decompress(pack[FRAME : FRAME + stored])), pack[FRAME + stored :]


def put_together(header: Any, streams: bytes, version: int = 2, claimed: int | None = None) -> bytes:
    """A pack whose frame and header fit."""
    plain = json.dumps(header).encode()
    stored = lzma.compress(plain, format=lzma.FORMAT_ALONE)
    size = len(plain) if claimed is None else claimed
    head = struct.pack("<8sIII", b"\x89SURGERY", version, len(stored), size)
    return head + struct.pack("<I", zlib.crc32(stored, zlib.crc32(head))) + stored + streams


def with_true_checksums(header: dict[str, Any], streams: bytes) -> dict[str, Any]:
    """The header with the checksum of every tensor as it decodes, as far as it does."""
    source, at = FileSource(io.BytesIO(streams), "huffman", Huffman()), 0
    for record in header["tensors"]:
        with contextlib.suppress(Exception):
            form = PackedTensor.model_validate(record)
            end = at + form.extent()
            if form.bytes <= LIMIT:
                record["crc"] = checksum(pieces(form.part, source, at))
            at = end
    return header


# --- ways to damage ---


def flipped(pack: bytes, chance: random.Random) -> bytes:
    data = bytearray(pack)
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(pack: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(pack))
    return chance.choice([pack[:at], pack + chance.randbytes(at % 50 + 1), pack[:at] + pack[at + 1 + at % 9 :]])


def stream_flipped(pack: bytes, chance: random.Random) -> bytes:
    """Streams damaged, often at the head of a block, checksums right."""
    header, streams = taken_apart(pack)
    data = bytearray(streams)
    form = read_header(json.dumps(header).encode())
    starts, at = [], 0
    for record in form.tensors:
        for leaf, count, size in leaves(record.part):
            starts += [at] if leaf.stored(count, size) else []
            at += leaf.stored(count, size)
    for _ in range(chance.choice([1, 1, 2, 5])):
        near = chance.choice(starts) + chance.randrange(24)
        place = min(chance.choice([near, chance.randrange(len(data))]), len(data) - 1)
        data[place] = chance.choice([data[place] ^ 1 << chance.randrange(8), 0, 255, chance.randrange(256)])
    return put_together(with_true_checksums(header, bytes(data)), bytes(data))


def header_edited(pack: bytes, chance: random.Random) -> bytes:
    """A field of the header changed, taken away, or put somewhere else; checksums right as far as they can be."""
    header, streams = taken_apart(pack)
    for _ in range(chance.choice([1, 1, 2])):
        holder, key = chance.choice(places_in(header))
        _edit(holder, key, chance, header)
    with contextlib.suppress(Exception):
        header = with_true_checksums(header, streams)
    return put_together(header, streams)


def places_in(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places_in(value[key])]


def _edit(holder: Any, key: Any, chance: random.Random, header: Any) -> None:
    old = holder[key]
    kind = chance.randrange(6)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        other, name = chance.choice(places_in(header))
        holder[key] = copy.deepcopy(other[name])
    elif kind == 2 and isinstance(old, list):
        old.append(copy.deepcopy(chance.choice(old)) if old else 1)
    elif isinstance(old, bool) or old is None:
        holder[key] = chance.choice([True, False, None, 0])
    elif isinstance(old, int):
        holder[key] = chance.choice([old + 1, old - 1, old * 2, old // 2, -old, *_NUMBERS, 1.5, "1"])
    elif isinstance(old, str):
        holder[key] = chance.choice(["", old + "x", "float64", "uint8", "bool", "raw", "../x", "\x00", 3])
    else:
        holder[key] = chance.choice([[], {}, None, 0, [old], "raw"])


def frame_edited(pack: bytes, chance: random.Random) -> bytes:
    header, streams = taken_apart(pack)
    claimed = chance.choice([None, *(n for n in _NUMBERS if 0 <= n < 1 << 32)])
    return put_together(header, streams, chance.choice([0, 1, 2, 3, 1 << 31]), claimed)


WAYS: dict[Callable[[bytes, random.Random], bytes], bool] = {
    flipped: True,
    cut: True,
    stream_flipped: False,
    header_edited: False,
    frame_edited: True,
}
"""Ways to damage a pack, and whether it must then be refused or hold what it held."""


def outcome(path: Path, expected: dict[str, Tensor], registry: surgery.Registry, *, same: bool) -> str:
    """`error`, or `read`. Anything else is raised: another exception, or with `same` another model."""
    try:
        with surgery.Pack(path, limit_bytes=LIMIT, registry=registry) as pack:
            assert pack.source
            tensors, model, recipe = dict(pack.tensors()), pack.model(), pack.recipe
    except ModelError:
        return "error"
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= LIMIT
    if same:
        assert recipe is None
        assert list(tensors) == sorted(expected) == sorted(model.state_dict())
        assert all(identical(tensors[name], expected[name]) for name in expected)
    return "read"


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, shape and element type included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(*(t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b)))
