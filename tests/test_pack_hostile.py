from __future__ import annotations

import random
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pack_attacks import ATTACKS, empty_tensors, header_of, one_symbol
from pack_mutations import (
    LIMIT,
    WAYS,
    every_kind,
    identical,
    outcome,
    put_together,
    taken_apart,
    write_model,
)

import surgery
from surgery import Codec, ModelError, Pack, PluginError, Registry, hookimpl


class DeflateBytes(Codec):
    """Symbols through zlib: a coder of another package."""

    def encode(self, symbols: np.ndarray, alphabet: int) -> bytes:
        return zlib.compress(symbols.tobytes(), 9)

    def decode(self, data: bytes, count: int, alphabet: int) -> np.ndarray:
        dtype = np.dtype(np.uint8 if alphabet <= 256 else np.uint16)
        return np.frombuffer(zlib.decompressobj().decompress(data, count * dtype.itemsize), dtype)


class Careless(DeflateBytes):
    """Gives one symbol too few."""

    def decode(self, data: bytes, count: int, alphabet: int) -> np.ndarray:
        return super().decode(data, count, alphabet)[1:]


class Rounding(DeflateBytes):
    """Gives even symbols."""

    def decode(self, data: bytes, count: int, alphabet: int) -> np.ndarray:
        return super().decode(data, count, alphabet) & ~np.uint8(1)


Changed = type("DeflateBytes", (Rounding,), {"__doc__": "Under the name of another."})


class Plugin:
    @hookimpl
    def surgery_codecs(self) -> list[type[Codec]]:
        return [DeflateBytes, Careless, Rounding]


@pytest.fixture(scope="module")
def registry() -> Registry:
    return Registry.load()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return surgery.pack(write_model(tmp_path_factory.mktemp("m"), every_kind())).read_bytes()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(data: bytes) -> Path:
        (tmp_path / "x.surgery").write_bytes(data)
        return tmp_path / "x.surgery"

    return write


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_mutated_pack_is_an_error_or_the_right_model(
    way: Any, original: bytes, registry: Registry, written: Callable[[bytes], Path]
) -> None:
    expected = every_kind()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(60):
        path = written(way(original, random.Random(seed)))
        assert outcome(path, expected, registry, same=WAYS[way]) in ("error", "read")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2 * LIMIT


def changed(original: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """With the header edited and its checksum right."""
    header, streams = taken_apart(original)
    change(header)
    return put_together(header, streams)


def record(header: dict[str, Any], name: str) -> dict[str, Any]:
    return next(tensor for tensor in header["tensors"] if tensor["name"] == name)


HEADERS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda h: h.update(extra=1), "extra"),
    "no tensors": (lambda h: h.pop("tensors"), "tensors"),
    "shape as text": (lambda h: record(h, "raw").update(shape="9"), "shape"),
    "negative shape": (lambda h: record(h, "raw").update(shape=[-9]), "shape"),
    "another shape": (lambda h: record(h, "raw").update(shape=[10]), "damaged"),
    "gigantic shape": (lambda h: record(h, "empty").update(shape=[0, 1 << 47, 1 << 47]), "shape"),
    "unknown dtype": (lambda h: record(h, "raw").update(dtype="storage"), "no dtype of a pack"),
    "a name twice": (lambda h: record(h, "raw").update(name="empty"), "two tensors empty"),
    "weights elsewhere": (lambda h: h.update(weights="../x.safetensors"), "weights"),
    "graph of another kind": (lambda h: h.update(graph=[]), "graph"),
    "half of bytes": (lambda h: record(h, "halves").update(dtype="int8"), "half of elements that are not 4 bytes"),
    "a block too many": (lambda h: record(h, "int8")["data"]["blocks"].append(0), "2 blocks instead of 1"),
    "a large block": (lambda h: record(h, "int8")["data"].update(blocks=[1 << 60]), "the file ends in tensor int8"),
    "few planes": (lambda h: record(h, "planes")["data"]["planes"].pop(), "3 planes for 4 bytes"),
    "large codebook": (lambda h: record(h, "codebook")["data"].update(bits=2), "7 values for indices of 2 bits"),
    "many others": (lambda h: record(h, "sparse")["data"].update(others=1 << 40), "more values than elements"),
    "many steps": (lambda h: record(h, "sparse")["data"].update(steps=1 << 40), "more steps than elements"),
    "wide background": (lambda h: record(h, "sparse_indices4")["data"].update(background=256), "background"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(
    case: str, original: bytes, written: Callable[[bytes], Path], registry: Registry
) -> None:
    change, message = HEADERS[case]
    with pytest.raises(ModelError, match=message):
        Pack(written(changed(original, change)), limit_bytes=LIMIT, registry=registry)


def test_representations_cannot_be_nested_without_end(original: bytes, written: Callable[[bytes], Path]) -> None:
    def nest(header: dict[str, Any], times: int) -> None:
        data = record(header, "halves")["data"]
        for _ in range(times):
            data = {"kind": "half", "to": "float16", "of": data}
        record(header, "halves")["data"] = data

    for times in (5, 400):
        with pytest.raises(ModelError, match="damaged"):
            Pack(written(changed(original, lambda header, times=times: nest(header, times))))


FRAMES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "older": (lambda d: put_together(*taken_apart(d), version=1), "format version 1(.|\n)*pack the model again"),
    "newer": (lambda d: put_together(*taken_apart(d), version=7), "format version 7; this SDK reads version 2"),
    "no pack": (lambda d: b"PK" + d, "no pack"),
    "empty": (lambda d: b"", "no pack"),
    "only magic": (lambda d: d[:10], "ends in its first bytes"),
    "cut in the header": (lambda d: d[:100], "ends in its header"),
    "cut in a stream": (lambda d: d[:-1], "the file ends in tensor two_values"),
    "longer": (lambda d: d + b"\0", "1 bytes too many"),
    "header checksum": (lambda d: d[:40] + bytes([d[40] ^ 1]) + d[41:], "header has another checksum"),
    "header size": (lambda d: put_together(*taken_apart(d), claimed=10), "another size than 10"),
    "huge header": (lambda d: put_together(*taken_apart(d), claimed=1 << 31), "the limit allows"),
}


@pytest.mark.parametrize("case", FRAMES)
def test_a_damaged_frame_is_named(case: str, original: bytes, written: Callable[[bytes], Path]) -> None:
    damage, message = FRAMES[case]
    with pytest.raises(ModelError, match=message):
        surgery.load(written(damage(original)), limit_bytes=LIMIT)


def test_a_wrong_checksum_names_the_tensor(original: bytes, written: Callable[[bytes], Path]) -> None:
    header, streams = taken_apart(original)
    record(header, "int8")["crc"] ^= 1
    with (
        pytest.raises(ModelError, match="int8 is damaged: its elements have another checksum"),
        Pack(written(put_together(header, streams))) as pack,
    ):
        dict(pack.tensors())


def one_symbol_pack(count: int) -> bytes:
    """A few bytes that decode to `count` bytes."""
    blocks = -(-count // (1 << 18))
    data = {"kind": "symbols", "width": 8, "blocks": [3] * blocks}
    tensor = {
        "name": "bomb",
        "dtype": "uint8",
        "shape": [count],
        "crc": zlib.crc32(b"\7" * min(count, 64 << 20)),
        "data": data,
    }
    return put_together(header_of([tensor]), b"\0\7\0" * blocks)


def test_a_small_file_cannot_ask_for_more_than_the_limit(written: Callable[[bytes], Path]) -> None:
    path = written(one_symbol_pack(64 << 20))
    with pytest.raises(ModelError, match="67,108,864 of them for bomb; the limit is 33,554,432"):
        Pack(path, limit_bytes=LIMIT)
    with Pack(path) as pack:
        assert pack.entries["bomb"].stored == 3 * 256
        assert bool((pack.tensor("bomb") == 7).all())


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_small_file_takes_little_time_and_memory_whatever_it_declares(
    attack: Callable[[], bytes], registry: Registry, written: Callable[[bytes], Path]
) -> None:
    path = written(attack())
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    assert outcome(path, {}, registry, same=False) == ("read" if attack in (empty_tensors, one_symbol) else "error")
    assert time.process_time() - start < 4
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 4 * LIMIT


def test_the_limit_without_one_given_is_a_gibibyte(written: Callable[[bytes], Path]) -> None:
    with pytest.raises(ModelError, match="the limit is 1,073,741,824"):
        surgery.load(written(one_symbol_pack(3 << 30)))


def test_a_bool_is_zero_or_one(written: Callable[[bytes], Path]) -> None:
    header, streams = taken_apart(one_symbol_pack(10))
    header["tensors"][0]["dtype"] = "bool"
    with Pack(written(put_together(header, streams))) as pack, pytest.raises(ModelError, match="neither 0 nor 1"):
        pack.tensor("bomb")


# --- codecs of others ---


def test_a_codec_of_another_package_replaces_the_built_in_one(tmp_path: Path) -> None:
    registry = Registry.load([Plugin()])
    path = surgery.pack(write_model(tmp_path / "m", every_kind()), codec="deflate_bytes", registry=registry)
    with Pack(path, registry=registry) as pack:
        assert pack.codec == "deflate_bytes"
        found = dict(pack.tensors())
    assert all(identical(found[name], tensor) for name, tensor in every_kind().items())


def test_a_pack_of_an_unknown_codec_lists_and_says_what_is_missing(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", every_kind())
    path = surgery.pack(folder, codec="deflate_bytes", registry=Registry.load([Plugin()]))
    with Pack(path) as pack:
        assert "int8" in pack.entries
        with pytest.raises(ModelError, match=r"needs the codec 'deflate_bytes'(.|\n)*installed are huffman"):
            pack.tensor("int8")
    with pytest.raises(ModelError, match="deflate_bytes"):
        surgery.load(path)


def test_an_unknown_codec_to_pack_with_is_named(tmp_path: Path) -> None:
    with pytest.raises(surgery.ExportError, match=r"unknown codec 'zip'(.|\n)*huffman"):
        surgery.pack(write_model(tmp_path / "m", {"a": torch.ones(3)}), codec="zip")


@pytest.mark.parametrize(("codec", "problem"), [("careless", "gives other symbols"), ("rounding", "loses something")])
def test_a_codec_that_loses_something_is_caught_before_a_file_is_written(
    codec: str, problem: str, tmp_path: Path
) -> None:
    folder = write_model(tmp_path / "m", every_kind())
    with pytest.raises(PluginError, match=problem):
        surgery.pack(folder, codec=codec, registry=Registry([Plugin()]))
    assert not (folder / "model.surgery").exists()


def test_a_codec_that_gives_other_values_in_another_version_is_caught(tmp_path: Path) -> None:
    path = surgery.pack(write_model(tmp_path / "m", every_kind()), codec="deflate_bytes", registry=Registry([Plugin()]))
    later = type("P", (), {"surgery_codecs": hookimpl(lambda self: [Changed])})()
    with (
        Pack(path, registry=Registry([later])) as pack,
        pytest.raises(ModelError, match="int8 is damaged: its elements"),
    ):
        pack.tensor("int8")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (int, "not a subclass of surgery.Codec"),
        (type("Bare", (Codec,), {"__doc__": "Bare."}), "does not define decode, encode"),
        (type("Quiet", (DeflateBytes,), {"__doc__": None}), "no docstring"),
    ],
)
def test_a_class_that_is_no_codec_is_refused(cls: Any, message: str) -> None:
    plugin = type("P", (), {"surgery_codecs": hookimpl(lambda self: [cls])})()
    with pytest.raises(PluginError, match=message):
        Registry([plugin])
