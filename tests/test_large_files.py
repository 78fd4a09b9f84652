"""Large weights: written without a second copy, files looked into without reading them, sessions apart."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from surgery.errors import InputError, ModelError
from surgery.export import runtime, streaming
from surgery.export.checked import export_onnx
from surgery.export.runtime import runtime_session
from surgery.export.session_process import SessionProcess
from surgery.state.files import read_tensors, write_tensors


@pytest.fixture
def file(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 600), nn.ReLU(), nn.Linear(600, 600, bias=False), nn.ReLU(), nn.Linear(600, 3))
    return export_onnx(model, torch.randn(2, 600), tmp_path / "model.onnx")


@pytest.fixture
def in_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "LARGE_FILE", 0)


def test_large_weights_come_last_and_the_file_is_as_long_as_any_writer_makes_it(file: Path) -> None:
    whole = onnx.load(file)
    onnx.checker.check_model(whole, full_check=True)
    assert [w.raw_data != b"" for w in whole.graph.initializer[-2:]] == [True, True]
    assert {len(w.raw_data) for w in whole.graph.initializer[-2:]} == {4 * 600 * 600}
    assert file.stat().st_size == len(whole.SerializeToString())


def test_operators_are_read_past_the_weights(file: Path) -> None:
    assert streaming.operators(file) == {"Gemm", "Relu"}


@pytest.mark.parametrize("content", [b"no model" * 9, b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x3a"])
def test_what_is_no_message_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="no ONNX model"):
        streaming.operators(tmp_path / "model.onnx")


def test_a_session_in_a_process_of_its_own_gives_the_same_bits(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 600)
    expected = runtime_session(file, threads=1)(x)[0]
    monkeypatch.setattr(runtime, "LARGE_FILE", 0)
    apart = runtime_session(file, threads=1)
    assert isinstance(apart.session, SessionProcess)
    assert torch.equal(apart(x)[0], expected)


@pytest.mark.usefixtures("in_processes")
def test_its_errors_are_those_of_a_session_here(file: Path) -> None:
    session = runtime_session(file)
    with pytest.raises(InputError, match="invalid dimensions"):
        session(torch.randn(2, 7))
    assert session(torch.randn(2, 600))[0].shape == (2, 3)
    file.write_bytes(b"no model" * 9)
    with pytest.raises(ModelError, match="no ONNX model"):
        runtime_session(file)


@pytest.mark.usefixtures("in_processes")
def test_its_process_ends_with_it_and_when_it_is_killed_that_is_told(file: Path) -> None:
    session = runtime_session(file)
    assert isinstance(session.session, SessionProcess)
    process = session.session._process
    process.kill()
    with pytest.raises(InputError, match="memory ran out"):
        session(torch.randn(2, 600))
    another = runtime_session(file)
    assert isinstance(another.session, SessionProcess)
    process = another.session._process
    assert process.poll() is None
    del another
    assert process.poll() is not None


def test_tensors_that_share_memory_or_have_gaps_are_written_as_they_are_and_lie_apart_when_read(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {"whole": base, "row": base[1], "turned": base.T, "none": torch.empty(0, 3)}
    write_tensors(tensors, tmp_path / "t.safetensors")
    read = read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert len({t.untyped_storage().data_ptr() for t in read.values()}) == len(tensors)


@pytest.mark.big
def test_weights_beyond_two_gigabytes_lie_in_a_file_beside_and_compute_the_same(tmp_path: Path) -> None:
    """Written, checked by onnx and compared in ONNX Runtime before both files appear."""
    model = nn.Sequential(nn.Linear(23_500, 23_500), nn.ReLU(), nn.Linear(23_500, 3))
    x = torch.randn(2, 23_500)
    path = export_onnx(model, x, tmp_path / "model.onnx")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert path.stat().st_size < 10_000
    assert path.with_name("model.onnx.data").stat().st_size > 2**31
    [found] = runtime_session(path)(x)
    with torch.no_grad():
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)
