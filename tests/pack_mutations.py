"""Packs with every representation, and ways to damage them: at random, or with their checksums put right again."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.errors import ModelError
from surgery.packing.container import FRAME
from surgery.packing.form import Header, leaves, read_header

SOURCE = """
from pathlib import Path
from safetensors.torch import load_file
from torch import nn

def load(folder=None):
    return build(load_file(Path(folder or ".") / "model.safetensors"))

def build(tensors):
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_buffer(name.replace(".", "_"), tensor)
    return model
"""
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
        "half": normal.half().float(),
        "bfloat16": normal.bfloat16(),
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
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(SOURCE)
    save_file(tensors, folder / "model.safetensors")
    return folder


def taken_apart(pack: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and streams."""
    stored = struct.unpack_from("<I", pack, 12)[0]
    return json.loads(zlib.decompress(pack[FRAME : FRAME + stored])), pack[FRAME + stored :]


def put_together(header: Any, streams: bytes, version: int = 1, claimed: int | None = None) -> bytes:
    """A pack whose frame and header fit."""
    plain = json.dumps(header).encode()
    stored = zlib.compress(plain)
    size = len(plain) if claimed is None else claimed
    head = struct.pack("<8sIII", b"\x89SURGERY", version, len(stored), size)
    return head + struct.pack("<I", zlib.crc32(stored, zlib.crc32(head))) + stored + streams


def with_true_checksums(header: dict[str, Any], streams: bytes) -> dict[str, Any]:
    """The header with the checksum of every stream as it stands."""
    form: Header = read_header(json.dumps(header).encode())
    at = sum(text.stored for text in form.texts)
    for record in form.tensors:
        for leaf, count, size in leaves(record.part):
            end = at + leaf.stored(count, size)
            object.__setattr__(leaf, "crc", zlib.crc32(streams[at:end]))
            at = end
    return json.loads(form.to_bytes())


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
    starts, at = [], sum(text.stored for text in form.texts)
    first = at
    for record in form.tensors:
        for leaf, count, size in leaves(record.part):
            starts += [at] if leaf.stored(count, size) else []
            at += leaf.stored(count, size)
    for _ in range(chance.choice([1, 1, 2, 5])):
        near = chance.choice(starts) + chance.randrange(24)
        place = min(chance.choice([near, chance.randrange(first, len(data))]), len(data) - 1)
        data[place] = chance.choice([data[place] ^ 1 << chance.randrange(8), 0, 255, chance.randrange(256)])
    return put_together(with_true_checksums(header, bytes(data)), bytes(data))


def header_edited(pack: bytes, chance: random.Random) -> bytes:
    """A field of the header changed, taken away, or put somewhere else; checksums right as far as they can be."""
    header, streams = taken_apart(pack)
    for _ in range(chance.choice([1, 1, 2])):
        holder, key = chance.choice(places_in(header))
        _edit(holder, key, chance, header)
    with contextlib.suppress(ValueError):
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
    return put_together(header, streams, chance.choice([0, 1, 2, 1 << 31]), claimed)


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
            texts = pack.source, pack.recipe
            tensors = dict(pack.tensors())
    except ModelError:
        return "error"
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= LIMIT
    if same:
        assert texts == (SOURCE, None)
        assert list(tensors) == sorted(expected)
        assert all(identical(tensors[name], expected[name]) for name in expected)
    return "read"


def identical(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, shape and element type included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(*(t.contiguous().reshape(-1).view(torch.uint8).numpy() for t in (a, b)))
