from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_mutations import every_kind, identical, write_model
from safetensors.torch import save_file
from torch import Tensor, nn

import surgery
from surgery import ExportError, ModelError, Pack
from surgery.cli import cli
from surgery.packing.form import DTYPES


def packed(folder: Path, tensors: dict[str, Tensor], **options: Any) -> Path:
    return surgery.pack(write_model(folder, tensors), **options)


def tensors_of(path: Path) -> dict[str, Tensor]:
    with Pack(path) as pack:
        return dict(pack.tensors())


def from_bits(bits: np.ndarray, dtype: str) -> Tensor:
    kind = getattr(torch, dtype)
    return torch.from_numpy(bits.view(np.uint8).copy()).view(kind) if bits.size else torch.empty(0, dtype=kind)


def test_every_representation_gives_the_same_bits_together_and_alone(tmp_path: Path) -> None:
    path = packed(tmp_path / "m", every_kind())
    expected, found = every_kind(), tensors_of(path)
    assert list(found) == sorted(expected)
    assert all(identical(found[name], expected[name]) for name in expected)
    with Pack(path) as pack:
        assert all(identical(pack.tensor(name), expected[name]) for name in expected)
        used = " ".join(entry.representation for entry in pack.entries.values())
    assert all(kind in used for kind in ("raw", "symbols", "half", "codebook", "sparse", "planes"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("raw", "raw"),
        ("planes", "planes(raw, raw, raw, symbols)"),
        ("halves", "half(raw)"),
        ("codebook", "codebook(raw, symbols)"),
        ("one_value", "codebook(raw, symbols)"),
        ("indices4", "symbols"),
        ("int8", "symbols"),
        ("mask", "codebook(raw, symbols)"),
    ],
)
def test_what_passes_leave_is_found(name: str, expected: str, tmp_path: Path) -> None:
    with Pack(packed(tmp_path / "m", every_kind())) as pack:
        entry = pack.entries[name]
    if name == "halves":
        assert entry.representation.startswith("half(")
    else:
        assert entry.representation == expected
    assert entry.stored <= entry.bytes


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_bit_patterns_of_any_type_come_back(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    dtype = data.draw(st.sampled_from([name for name in DTYPES if name != "bool"]))
    seed = data.draw(st.integers(0, 1000))
    shape = data.draw(st.lists(st.integers(0, 17), max_size=3))
    chance = np.random.default_rng(seed)
    pool = chance.integers(0, 256, (data.draw(st.sampled_from([1, 2, 5, 16, 40, 5000])), DTYPES[dtype]), np.uint8)
    rows = pool[chance.integers(0, len(pool), int(np.prod(shape)))]
    rows[chance.random(len(rows)) < data.draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0
    tensor = from_bits(rows.reshape(-1), dtype).reshape(shape)
    path = packed(tmp_path_factory.mktemp("any"), {"t": tensor})
    assert identical(tensors_of(path)["t"], tensor)


def test_minus_zero_and_the_payload_of_nan_are_kept(tmp_path: Path) -> None:
    patterns = np.array([0x80000000, 0, 0x7FC00001, 0xFFC12345, 0x7F800001, 0x7F800000] * 50, "<u4")
    tensor = from_bits(patterns, "float32")
    assert identical(tensors_of(packed(tmp_path / "m", {"t": tensor}))["t"], tensor)


def test_streams_of_several_blocks_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("codec", "form", "streams", "elements", "reading"):
        monkeypatch.setattr(f"surgery.packing.{module}.BLOCK", 256, raising=False)
    monkeypatch.setattr("surgery.packing.elements.PIECE", 100)
    expected = every_kind()
    found = tensors_of(packed(tmp_path / "m", expected))
    assert all(identical(found[name], expected[name]) for name in expected)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (packed(tmp_path / name, every_kind()) for name in "ab")
    assert first.read_bytes() == second.read_bytes()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose last layer is the first one again."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 16))
    body.append(body[0])
    folder = tmp_path_factory.mktemp("exported")
    surgery.export_source(surgery.capture(body, torch.rand(2, 16)), folder)
    (folder / "recipe.lock.yaml").write_text("name: nothing\n")
    return folder


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "model"))


def test_a_pack_loads_as_its_folder_does_and_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = surgery.pack(folder, tmp_path / "alone" / "model.surgery")
    expected = surgery.load(folder)
    monkeypatch.chdir(tmp_path / "alone")
    model = surgery.load("model.surgery")
    assert os.listdir() == [path.name]
    x = torch.rand(3, 16)
    assert torch.equal(model(x), expected(x))
    assert list(model.state_dict()) == list(expected.state_dict())
    assert {type(p.data) for p in model.parameters()} == {Tensor}
    assert not model.training
    model.train()(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_unpacking_gives_the_very_files_that_were_packed(folder: Path, tmp_path: Path) -> None:
    written = surgery.unpack(surgery.pack(folder), tmp_path / "new")
    assert {path.name for path in written} == {path.name for path in folder.iterdir()} - {"model.surgery"}
    assert all(path.read_bytes() == (folder / path.name).read_bytes() for path in written)


def test_one_tensor_is_read_without_the_others(folder: Path) -> None:
    path = surgery.pack(folder)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the last tensor's stream
    path.write_bytes(data)
    with Pack(path) as pack:
        *others, last = pack.entries
        for name in others:
            pack.tensor(name)
        with pytest.raises(ModelError, match=f"{last} is damaged"):
            pack.tensor(last)


def test_an_unknown_tensor_is_named(folder: Path) -> None:
    with Pack(surgery.pack(folder)) as pack, pytest.raises(ModelError, match="no tensor 'head'"):
        pack.tensor("head")


def test_a_full_disk_leaves_the_older_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out" / "model.surgery"
    target.parent.mkdir()
    target.write_bytes(b"older")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for place in ("os.fsync", "shutil.copyfileobj", "surgery.packing.streams.Sink.raw"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(ExportError, match="cannot be written: No space left"):
                surgery.pack(folder, target)
        assert os.listdir(target.parent) == ["model.surgery"]
        assert target.read_bytes() == b"older"


def test_a_full_disk_while_unpacking_leaves_the_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = surgery.pack(folder)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("surgery.packing.unpacking.save_file", full)
    with pytest.raises(ExportError, match="No space left"):
        surgery.unpack(path, tmp_path / "new")
    assert os.listdir(tmp_path / "new") == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no weights"), "model.safetensors is damaged"),
        (lambda f: save_file({"0.weight": torch.ones(1)}, f / "model.safetensors"), "do not make a model"),
        (lambda f: (f / "model.py").unlink(), "looked for"),
        (lambda f: (f / "model.graph.json").unlink(), "no model.graph.json"),
        (lambda f: (f / "model.graph.json").write_text("{}"), "model.graph.json is damaged"),
        (lambda f: (f / "model.py").write_text((f / "model.py").read_text() + "\n"), "model.py has been edited"),
    ],
)
def test_what_cannot_be_packed_is_named(damage: Any, message: str, folder: Path) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=message):
        surgery.pack(folder)
    assert not list(folder.glob("*.surgery*"))


def test_a_source_of_another_name_finds_its_weights(folder: Path, tmp_path: Path) -> None:
    surgery.export_source(surgery.capture(nn.Linear(4, 4), torch.rand(1, 4)), tmp_path / "t", name="teacher")
    path = surgery.pack(tmp_path / "t" / "teacher.py")
    assert path == tmp_path / "t" / "teacher.surgery"
    x = torch.rand(2, 4)
    expected = surgery.load(tmp_path / "t" / "teacher.py")(x)
    assert torch.equal(surgery.load(path)(x), expected)
    surgery.unpack(path, tmp_path / "u")
    for trust in (False, True):
        assert torch.equal(surgery.load(tmp_path / "u", trust=trust)(x), expected)


def test_a_recipe_writes_the_pack_with_or_without_the_source(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.rand(1, 3, 8, 8)
    recipe = {"name": "small", "passes": ["fold_batchnorm"], "export": ["pack"]}
    operation = surgery.operate(model, x, recipe, out=tmp_path / "run", latency_rounds=0)
    assert list(operation.sizes) == ["model.surgery"]
    assert not (tmp_path / "run" / "model.py").exists()
    assert torch.equal(surgery.load(tmp_path / "run" / "model.surgery")(x), operation.model(x))
    with Pack(tmp_path / "run" / "model.surgery") as pack:
        assert pack.recipe == (tmp_path / "run" / "recipe.lock.yaml").read_text()
        assert pack.versions["torch"] == torch.__version__
    assert "pack bytes" in (tmp_path / "run" / "report.md").read_text()


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], catch_exceptions=True)


def test_the_command_line_packs_lists_and_unpacks(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.surgery"
    assert invoke("pack", folder, "--out", path).exit_code == 0
    assert "3.weight" in invoke("unpack", "--list", path).output
    listed = json.loads(invoke("unpack", "--list", path, "--json").output)
    assert {t["name"] for t in listed["tensors"]} >= {"0.weight", "3.weight"}
    assert listed["file_bytes"] == path.stat().st_size
    assert not (tmp_path / "new").exists()
    assert invoke("unpack", path, tmp_path / "new").exit_code == 0
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert "huffman" in invoke("codecs").output


def test_the_command_line_wants_a_folder_or_a_list(folder: Path, tmp_path: Path) -> None:
    path = surgery.pack(folder)
    for arguments in (("unpack", path), ("unpack", "--list", path, tmp_path)):
        assert isinstance(invoke(*arguments).exception, surgery.SurgeryError)


def test_packing_needs_no_more_than_the_listing_says(folder: Path) -> None:
    path = surgery.pack(folder)
    with Pack(path) as pack:
        stored = sum(entry.stored for entry in pack.entries.values())
        assert stored < path.stat().st_size < stored + 1500
        assert pack.source == (folder / "model.py").read_text()
        assert pack.entries["0.weight"].shape == (32, 16)


def test_a_pack_is_known_by_its_name_and_by_its_content(folder: Path, tmp_path: Path) -> None:
    path = surgery.pack(folder)
    path.rename(tmp_path / "weights.pt")
    (tmp_path / "b.surgery").write_text("import os\ndef load(): os.abort()")
    for name, problem in (("weights.pt", "by its content and not by its name"), ("b.surgery", "this is no pack")):
        with pytest.raises(ModelError, match=problem):
            surgery.load(tmp_path / name, trust=True)


RUN = "raise SystemExit('run')\ndef load(): ..."


def test_nothing_of_a_file_is_run_unless_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    expected, x = surgery.load(folder), torch.rand(3, 16)
    path = surgery.pack(folder, tmp_path / "m.surgery")
    (folder / "model.py").write_text(RUN)
    with pytest.raises(ModelError, match=r"edited(.|\n)*trust=True"):
        surgery.load(folder)
    (folder / "model.graph.json").unlink()
    with pytest.raises(ModelError, match=r"no model.graph.json(.|\n)*trust=True"):
        surgery.load(folder / "model.py")
    with pytest.raises(SystemExit):
        surgery.load(folder, trust=True)
    assert torch.equal(surgery.load(path)(x), expected(x))


def test_verify_runs_a_source_only_where_it_is_trusted(folder: Path, tmp_path: Path) -> None:
    edited = Path(shutil.copytree(folder, tmp_path / "edited"))
    (edited / "model.py").write_text((edited / "model.py").read_text() + "\n# mine\n")
    compare = ("verify", folder, edited, "--input", "3x16")
    assert "has been edited" in str(invoke(*compare).exception)
    assert invoke(*compare, "--trust").exit_code == 0
