"""float32 is computed in float32, whatever a user has asked PyTorch for elsewhere."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import surgery
from surgery import Context, Data, Pass, PassReport
from surgery.precision import full_precision

BACKENDS = torch.backends
KINDS = [BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.cudnn.rnn]
KINDS += [BACKENDS.mkldnn.matmul, BACKENDS.mkldnn.conv, BACKENDS.mkldnn.rnn]


def settings() -> list[str]:
    return [kind.fp32_precision for kind in KINDS]


def set_new() -> None:
    BACKENDS.cuda.matmul.fp32_precision = "tf32"


def set_legacy() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = True


def set_one_kind() -> None:
    BACKENDS.cudnn.conv.fp32_precision = "ieee"


def set_all() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.fixture(params=[set_new, set_legacy, set_one_kind, set_all])
def asked(request):
    before = settings()
    request.param()
    yield settings()
    torch.set_float32_matmul_precision("highest")
    for kind, setting in zip(KINDS, before, strict=True):
        kind.fp32_precision = setting


@dataclass(frozen=True, kw_only=True)
class Look(Pass):
    """Notes how float32 is computed."""

    def apply(self, model, context):
        return PassReport(notes=tuple(settings()))


def test_passes_compute_in_full_precision_and_leave_the_users_settings(asked):
    model = surgery.capture(nn.Linear(3, 2), torch.rand(2, 3))
    _, report = Look()(model, Context(model, Data()))
    assert set(report.notes) == {"ieee"}
    assert settings() == asked


@pytest.mark.parametrize("asked", [set_new, set_one_kind], indirect=True)
def test_capture_and_export_work_whatever_precision_the_user_asked_for(asked, tmp_path):
    model = surgery.capture(nn.Sequential(nn.Conv1d(3, 2, 1), nn.ReLU()), torch.rand(2, 3, 4))
    surgery.export_onnx(model, model.inputs, tmp_path / "model.onnx")
    assert surgery.verify(model, model, model.inputs, onnx=tmp_path / "model.onnx").passed
    assert settings() == asked


@pytest.mark.parametrize("older", [True, False])
def test_the_older_switch_comes_back_also_where_the_newer_ones_hide_it(older):
    before, cudnn = settings(), BACKENDS.cudnn
    cudnn.allow_tf32 = older
    cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "ieee", "tf32"
    with full_precision():
        assert not cudnn.allow_tf32
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == ("ieee", "tf32")
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32" if older else "ieee"
    assert cudnn.allow_tf32 is older
    cudnn.allow_tf32 = True
    for kind, setting in zip(KINDS, before, strict=True):
        kind.fp32_precision = setting


def test_a_process_that_forbids_to_write_pytorchs_switches_is_served_too(monkeypatch):
    """`torch.testing._internal` forbids it when it is imported."""
    monkeypatch.setitem(BACKENDS.flags_frozen.__globals__, "__allow_nonbracketed_mutation_flag", False)
    model = surgery.capture(nn.Linear(3, 2), torch.rand(2, 3))
    _, report = Look()(model, Context(model, Data()))
    assert set(report.notes) == {"ieee"}
    assert BACKENDS.flags_frozen()
