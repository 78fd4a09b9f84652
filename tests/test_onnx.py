"""Every form of model exports to one valid file that ONNX Runtime agrees with, and that is the same everywhere."""

from __future__ import annotations

import copy
import errno
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import surgery.export.onnx as exporting
from surgery.captured import capture
from surgery.errors import ExportError, InputError, ModelError
from surgery.export.checked import export_onnx
from surgery.export.runtime import runtime_session
from surgery.export.tensor_names import named_inputs, named_outputs
from surgery.inputs import Inputs

TOLERANCE = 1e-5
"""Relative to the largest output: rounding of sums in another order is 1e-6 at most."""


class Recurrent(nn.Module):
    """Embedding, LSTM and GRU, a keyword argument and a dict of results."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 6, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(12, 5, batch_first=True)

    def forward(self, tokens: Tensor, *, scale: Tensor | None = None) -> dict[str, Any]:
        states = self.gru(self.lstm(self.embed(tokens))[0])[0]
        last = states[:, -1] if scale is None else states[:, -1] * scale[:, None]
        return {"last": last, "states": (states, last * 2)}


class Tied(nn.Module):
    """Attention between an embedding and the same weight as output layer; nested inputs; results beside tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(2000, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 2000, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, batch: dict[str, Tensor], pair: tuple[Tensor, Tensor]) -> tuple[Tensor, None, int, Tensor]:
        x = self.embed(batch["tokens"])
        return self.out(self.attend(x, x, x)[0]), None, 3, pair[0] + pair[1]


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.body(image).mean((2, 3)))


class Homonymous(nn.Module):
    """Weights that bear the names torch gives to values, and to constants."""

    def __init__(self) -> None:
        super().__init__()
        self.relu, self.linear = nn.Parameter(torch.rand(3)), nn.Linear(3, 3)
        self.register_buffer("add", torch.rand(3))
        self.register_buffer("val_0", torch.rand(3))
        self.register_buffer("model", torch.rand(3))

    def forward(self, mul: Tensor) -> Tensor:
        return torch.relu(self.linear(mul * self.relu) + self.add) * self.val_0 + self.model[:2].sum() * mul


class Clashing(nn.Module):
    """Results that bear the names of an input, of a parameter and of an intermediate value, or are these themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, output: Tensor) -> dict[str, Tensor]:
        y = self.linear(x) + output
        return {"x": x, "linear.weight": self.linear.weight * 2, "bias": self.linear.bias, "linear": y * 2, "again": y}


CASES: dict[str, tuple[nn.Module, Any, list[str], list[str]]] = {
    "recurrent": (
        Recurrent(),
        {"tokens": torch.randint(0, 20, (2, 7)), "scale": torch.randn(2)},
        ["tokens", "scale"],
        ["last", "states_0", "states_1"],
    ),
    "tied": (
        Tied(),
        ({"tokens": torch.randint(0, 2000, (1, 4))}, (torch.randn(1, 3), torch.randn(1, 3))),
        ["batch.tokens", "pair_0", "pair_1"],
        ["output_0", "output_3"],
    ),
    "convolutional": (Convolutional(), torch.randn(1, 3, 6, 6), ["image"], ["output"]),
    "homonymous": (Homonymous(), torch.randn(2, 3), ["mul"], ["output"]),
    "clashing": (
        Clashing(),
        (torch.randn(2, 3), torch.randn(2, 3)),
        ["x", "output"],
        ["x_2", "linear.weight", "bias", "linear", "again"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_every_form_of_model_agrees_with_onnx_runtime_at_any_batch_size(name: str, tmp_path: Path) -> None:
    model, example, inputs, outputs = CASES[name]
    session = runtime_session(export_onnx(model.eval(), example, tmp_path / "model.onnx"), threads=1)
    assert (session.input_names, session.output_names) == (inputs, outputs)
    assert all(value.shape[0] == "batch" for value in session.session.get_inputs())
    for size in (1, 2, 5):
        arguments = Inputs.of(model, example).with_batch(size)
        with torch.no_grad():
            expected = named_outputs(model(*arguments.args, **arguments.kwargs))
        for want, got in zip(expected.values(), session(**named_inputs(model, arguments)), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE * float(want.detach().abs().max()))


@pytest.mark.parametrize("name", CASES)
def test_types_and_shapes_on_the_way_are_left_to_be_inferred(name: str, tmp_path: Path) -> None:
    model, example, *_, outputs = CASES[name]
    file = onnx.load(export_onnx(model.eval(), example, tmp_path / "model.onnx"))
    inferred = onnx.shape_inference.infer_shapes(file, strict_mode=True).graph.value_info
    computed = {name for node in file.graph.node for name in node.output if name}
    assert {value.name for value in file.graph.value_info} <= set(outputs)
    assert {value.name for value in inferred} >= computed - set(outputs)
    assert all(value.type.tensor_type.HasField("shape") for value in inferred)


def test_a_captured_model_exports_as_the_model_itself(tmp_path: Path) -> None:
    model, example, *_ = CASES["convolutional"]
    captured = capture(model.eval(), example)
    files = [export_onnx(m, example, tmp_path / f"{type(m).__name__}.onnx") for m in (model, captured)]
    graphs = [onnx.load(file).graph for file in files]
    assert [n.op_type for n in graphs[0].node] == [n.op_type for n in graphs[1].node]
    assert [i.name for i in graphs[0].initializer] == [i.name for i in graphs[1].initializer]


def test_export_leaves_weights_and_modes_as_they_were(tmp_path: Path) -> None:
    model, example, *_ = CASES["convolutional"]
    model.train().body.eval()
    before = copy.deepcopy(model.state_dict())
    export_onnx(model, example, tmp_path / "model.onnx")
    assert [m.training for m in model.children()] == [False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_shared_and_codebook_weights_stay_small(tmp_path: Path) -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("index", torch.randint(0, 16, (64, 128), dtype=torch.uint8))
            self.values = nn.Parameter(torch.randn(16))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, self.values[self.index.long()])

    tied = export_onnx(*CASES["tied"][:2], tmp_path / "tied.onnx")
    assert tied.stat().st_size < 1.2 * 2000 * 8 * 4  # the float32 embedding once
    codebook = export_onnx(Codebook(), torch.randn(1, 128), tmp_path / "codebook.onnx")
    assert codebook.stat().st_size < 1.2 * 64 * 128  # one byte per weight


def test_a_table_made_of_numbers_is_stored_and_what_is_looked_up_in_it_is_not(tmp_path: Path) -> None:
    class Nibbles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("bytes", torch.randint(0, 256, (8 * 64,), dtype=torch.uint8))

        def forward(self, x: Tensor) -> Tensor:
            table = torch.div(torch.arange(256, dtype=torch.int32), 16, rounding_mode="floor") % 16
            return nn.functional.linear(x, table.float()[self.bytes.int()].view(8, 64))

    model, x = Nibbles(), torch.randn(3, 64)
    file = export_onnx(model, x, tmp_path / "model.onnx")
    assert not {n.op_type for n in onnx.load(file).graph.node} & {"Range", "Div", "Floor", "Mod"}
    assert file.stat().st_size < 8 * 64 + 256 * 4 + 1500
    assert torch.allclose(runtime_session(file)(x)[0], model(x), atol=1e-3)


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x.view(2, -1)


class SingleSample(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[0] == 1 else x * 3


@pytest.mark.parametrize("model", [FixedBatch(), SingleSample()])
def test_a_model_that_treats_one_sample_apart_is_exported_for_one_unless_told_otherwise(
    model: nn.Module, tmp_path: Path
) -> None:
    x = torch.randn(1, 4)
    session = runtime_session(export_onnx(model, x, tmp_path / "model.onnx"))
    assert session.session.get_inputs()[0].shape == [1, 4]
    assert torch.equal(session(x)[0], x * 2)
    with pytest.raises(ExportError, match="another batch size"):
        export_onnx(model, x, tmp_path / "model.onnx", dynamic_batch=True)


SCRIPT = """
import sys, torch
from torch import nn
from surgery import export_onnx
torch.manual_seed(0)
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(128, 10)
    def forward(self, image):
        return {"logits": self.head(self.body(image)), "sum": image.sum()}
export_onnx(Model(), torch.ones(1, 3, 6, 6), "model.onnx", metadata={"b": "1", "a": "2"})
"""


def test_two_processes_in_two_folders_write_the_same_bytes_and_print_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "script.py").write_text(SCRIPT)
    monkeypatch.chdir(here)
    runpy.run_path("script.py")
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, str(there / "script.py")]
    other = subprocess.run(command, cwd=there, env=environment, capture_output=True, check=False)
    assert (other.returncode, other.stdout, other.stderr) == (0, b"", b"")
    first, second = ((folder / "model.onnx").read_bytes() for folder in (here, there))
    assert first == second
    assert str(tmp_path).encode() not in first
    metadata = {p.key: p.value for p in onnx.load_from_string(first).metadata_props}
    assert list(metadata) == ["a", "b", "onnx", "surgery", "torch"]
    assert metadata["a"] == "2"


class Unsupported(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.svdvals(x)


class Undecidable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "problem", "place"),
    [(Unsupported(), "aten._linalg_svd", "_linalg_svd"), (Undecidable(), "data-dependent", "test_onnx.py")],
)
def test_a_failed_export_names_operator_or_line_and_leaves_the_old_file(
    model: nn.Module, problem: str, place: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(ExportError, match=problem) as failure:
        export_onnx(model, torch.randn(2, 3, 3), path)
    assert place in failure.value.at
    assert failure.value.fix
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"old"
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    monkeypatch.setattr(exporting, "save", full)
    with pytest.raises(ExportError, match="No space left on device"):
        export_onnx(nn.Linear(3, 3), torch.randn(1, 3), path)
    assert [*tmp_path.iterdir()] == [path]
    assert path.read_bytes() == b"old"


def test_a_missing_folder_is_an_export_error(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be written"):
        export_onnx(nn.Linear(3, 3), torch.randn(1, 3), tmp_path / "nowhere" / "model.onnx")


def test_weights_too_large_for_one_message_go_into_a_file_beside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "MAX_PROTO_BYTES", 1000)
    model = nn.Linear(30, 30)
    path = export_onnx(model, torch.randn(1, 30), tmp_path / "model.onnx")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    x = torch.randn(4, 30)
    torch.testing.assert_close(runtime_session(path)(x)[0], model(x).detach(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", None])
def test_a_file_that_is_no_model_is_a_model_error(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.onnx"):
        runtime_session(path)


def test_the_runtime_names_what_it_expects(tmp_path: Path) -> None:
    session = runtime_session(export_onnx(nn.Linear(3, 3), torch.randn(1, 3), tmp_path / "model.onnx"))
    with pytest.raises(InputError, match=r"input: tensor\(float\) \['batch', 3\]"):
        session(torch.randn(2, 4))
    with pytest.raises(InputError, match="2 tensors"):
        session(torch.randn(2, 3), torch.randn(2, 3))
    with pytest.raises(ExportError, match="NoSuchProvider"):
        runtime_session(session.path, ["NoSuchProvider"])
