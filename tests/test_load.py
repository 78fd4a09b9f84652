from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from surgery.errors import ModelError
from surgery.loading import load, load_weights


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def trained() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {name: torch.randn_like(t.float()).to(t.dtype) for name, t in model().state_dict().items()}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.parametrize(
    "wrapped",
    [lambda s: s, lambda s: {f"module.{name}": t for name, t in s.items()}],
    ids=["plain", "from DataParallel"],
)
def test_weights_load_from_every_usual_file(suffix: str, wrapped: Callable[[Any], Any], tmp_path: Path) -> None:
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(wrapped(trained()), path)  # type: ignore[operator]
    target = model()
    load_weights(target, path)
    assert all(map(torch.equal, target.state_dict().values(), trained().values()))


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_a_training_checkpoint_is_understood(key: str, tmp_path: Path) -> None:
    torch.save({key: trained(), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "checkpoint.pt")
    target = model()
    load_weights(target, tmp_path / "checkpoint.pt")
    assert all(map(torch.equal, target.state_dict().values(), trained().values()))


class Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('this must never run')",)


def without(name: str) -> dict[str, Tensor]:
    return {key: t for key, t in trained().items() if key != name}


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (lambda p: None, "no weights file"),
    "missing key": (lambda p: torch.save(without("2.bias"), p), r"1 missing \(2.bias\)"),
    "unexpected key": (lambda p: torch.save({**trained(), "9.bias": torch.ones(1)}, p), r"1 unexpected \(9.bias\)"),
    "renamed key": (
        lambda p: torch.save({**without("2.weight"), "2.weights": torch.ones(2, 4)}, p),
        "did the file's 2.weights mean 2.weight",
    ),
    "other shape": (
        lambda p: torch.save({**trained(), "2.bias": torch.ones(5)}, p),
        r"2.bias is \(5,\), the model has \(2,\)",
    ),
    "many missing": (lambda p: torch.save({"0.weight": torch.ones(4, 3)}, p), "8 missing .* and 3 more"),
    "not a number": (lambda p: torch.save({**trained(), "0.bias": torch.full((4,), torch.nan)}, p), "0.bias hold NaN"),
    "code": (lambda p: torch.save({"weights": Evil()}, p), "only be read by running code"),
    "bare pickle": (lambda p: p.write_bytes(pickle.dumps(Evil(), protocol=2)), "running code"),
    "whole model": (lambda p: torch.save(model(), p), "running code"),
    "no tensors": (lambda p: torch.save({"epoch": 1}, p), "holds no state_dict but keys epoch"),
    "a single tensor": (lambda p: torch.save(torch.ones(1), p), "but a Tensor"),
    "noise": (lambda p: p.write_bytes(b"weights"), "damaged"),
    "empty": (lambda p: p.write_bytes(b""), "damaged"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused_and_leave_the_model_alone(case: str, tmp_path: Path) -> None:
    write, problem = BAD[case]
    write(tmp_path / "weights.pt")
    target = model()
    with pytest.raises(ModelError, match=problem):
        load_weights(target, tmp_path / "weights.pt")
    assert all(map(torch.equal, target.state_dict().values(), model().state_dict().values()))


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    save_file(trained(), tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes((tmp_path / "w.safetensors").read_bytes()[:-8])
    with pytest.raises(ModelError, match="damaged"):
        load_weights(model(), tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda p: None, "looked for"),
        (lambda p: p.mkdir(), "model.py"),
        (lambda p: p.write_text("import os"), "no exported model"),
        (lambda p: (p.mkdir(), (p / "model.py").write_text("def load(:")), "SyntaxError"),
        (lambda p: (p.mkdir(), (p / "model.py").write_text("def load(): return 1 / 0")), "ZeroDivisionError"),
        (lambda p: (p.mkdir(), (p / "model.py").write_text("def load(): return 1")), "int, not a model"),
        (
            lambda p: (p.mkdir(), (p / "model.py").write_text("import nowhere_at_all\ndef load(): ...")),
            "nowhere_at_all",
        ),
    ],
    ids=["nothing", "empty folder", "no load", "syntax", "failing", "no model", "import"],
)
def test_what_is_no_model_is_refused(make: Callable[[Path], object], problem: str, tmp_path: Path) -> None:
    make(tmp_path / "run")
    with pytest.raises(ModelError, match=problem):
        load(tmp_path / "run", trust=True)
