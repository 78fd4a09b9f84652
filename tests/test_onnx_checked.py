"""No ONNX file that computes something else than the model: corrected, or refused by the operator's name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import surgery
from surgery import ExportError, export_onnx
from surgery.export.runtime import runtime_session
from surgery.parity import parity


class Between(nn.Module):
    """An operator between two convolutions."""

    def __init__(self, operator):
        super().__init__()
        self.operator, self.first, self.last = operator, nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.last(self.operator(torch.relu(self.first(x))))


POOLS = [
    (F.avg_pool2d, {"kernel_size": 2, "divisor_override": 3}),
    (F.avg_pool2d, {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True, "divisor_override": 5}),
    (F.avg_pool2d, {"kernel_size": 2, "stride": (3, 2), "padding": (1, 0), "ceil_mode": True, "divisor_override": 1}),
    (F.avg_pool2d, {"kernel_size": 2, "stride": 3, "padding": 1, "ceil_mode": True, "count_include_pad": False}),
    (F.max_pool2d, {"kernel_size": 2, "stride": (3, 2), "padding": 1, "ceil_mode": True}),
    (F.max_pool2d, {"kernel_size": 2, "stride": 5, "padding": 1, "dilation": 2, "ceil_mode": True}),
]
"""The last four drop, in one dimension at least, a window that would begin in the padding."""


@pytest.mark.parametrize(("pool", "options"), POOLS)
def test_pools_are_exported_as_they_are(pool, options, tmp_path):
    model, x = Between(lambda x: pool(x, **options)).eval(), torch.randn(2, 3, 7, 9)
    [found] = runtime_session(export_onnx(model, x, tmp_path / "m.onnx", check=False))(x)
    torch.testing.assert_close(found, model(x).detach(), rtol=1e-5, atol=1e-6)


def test_a_volume_is_pooled_by_any_divisor_too(tmp_path):
    model, x = nn.AvgPool3d(2, 2, 1, ceil_mode=True, divisor_override=5), torch.randn(2, 3, 5, 6, 7)
    [found] = runtime_session(export_onnx(model, x, tmp_path / "m.onnx", check=False))(x)
    torch.testing.assert_close(found, model(x), rtol=1e-5, atol=1e-6)


class LogSigmoid(nn.Module):
    def forward(self, x):
        return F.logsigmoid(x)


def test_the_logarithm_of_a_sigmoid_is_finite_far_from_zero(tmp_path):
    x = torch.linspace(-200, 200, 41).view(1, 41)
    [found] = runtime_session(export_onnx(LogSigmoid(), x, tmp_path / "m.onnx", check=False))(x)
    torch.testing.assert_close(found, F.logsigmoid(x), rtol=1e-5, atol=1e-7)


class Cross(nn.Module):
    def forward(self, x, y):
        return torch.cross(x, y)


@pytest.mark.filterwarnings("ignore:Using torch.cross without specifying the dim")
def test_a_cross_product_is_taken_along_the_first_dimension_of_size_three(tmp_path):
    x, y = torch.randn(2, 2, 3, 4, 3)
    [found] = runtime_session(export_onnx(Cross(), (x, y), tmp_path / "m.onnx", check=False))(x, y)
    torch.testing.assert_close(found, torch.linalg.cross(x, y, dim=1), rtol=1e-5, atol=1e-6)


def resized(mode):
    model = Between(lambda x: F.interpolate(x, scale_factor=0.6, mode=mode, antialias=True))
    return model.eval(), torch.randn(2, 3, 6, 6)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_a_file_that_computes_something_else_does_not_appear(mode, tmp_path):
    (tmp_path / "m.onnx").write_text("older")
    model, x = resized(mode)
    with pytest.raises(ExportError, match=rf"_upsample_{mode}2d_aa.* is off by") as caught:
        export_onnx(model, x, tmp_path / "m.onnx")
    assert "recompute_scale_factor=True" in caught.value.fix
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("m.onnx", "older")]
    assert not parity(model, export_onnx(model, x, tmp_path / "m.onnx", check=False), [x]).passed


def test_the_remedy_for_antialias_helps(tmp_path):
    scale = {"scale_factor": 0.6, "recompute_scale_factor": True}
    model = Between(lambda x: F.interpolate(x, mode="bicubic", antialias=True, **scale))
    assert export_onnx(model.eval(), torch.randn(2, 3, 6, 6), tmp_path / "m.onnx").exists()


class Projected(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(10, 16, 2, batch_first=True, proj_size=8, bidirectional=True)
        self.hidden, self.out = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(self.rnn(x)[0])))


WRONG = {
    "_upsample_bicubic2d_aa": resized("bicubic"),
    r"nn.LSTM\(proj_size=…\)": (Projected().eval(), torch.rand(2, 5, 10)),
}


class Untouched:
    def __iter__(self):
        raise AssertionError("the data was read")


@pytest.mark.parametrize("operator", WRONG)
def test_a_run_refuses_such_an_operator_before_it_reads_any_data(operator, tmp_path):
    model, x = WRONG[operator]
    recipe = {"name": "r", "passes": ["svd"]}
    with pytest.raises(ExportError, match=operator) as caught:
        surgery.operate(model, x, recipe, data=Untouched(), out=tmp_path / "run", latency_rounds=0)
    assert "`export: [source]` in a recipe" in caught.value.fix


@pytest.mark.parametrize("operator", WRONG)
def test_the_same_run_without_onnx_goes_through_and_says_what_it_could_not_measure(operator, tmp_path):
    model, x = WRONG[operator]
    recipe = {"name": "r", "passes": ["svd"], "export": ["source"]}
    operation = surgery.operate(model, x, recipe, data=[x], out=tmp_path / "run", latency_rounds=2)
    assert operation.passed
    assert (operation.verification.parity, operation.latency) == ((), {})
    assert any("neither parity nor latency was measured" in note for note in operation.steps[0].report.notes)
    assert {path.suffix for path in (tmp_path / "run").iterdir() if path.is_file()} >= {".py", ".safetensors"}
    assert not list((tmp_path / "run").glob("*.onnx"))


class Chaotic(nn.Module):
    """Blows rounding up to the size of its output."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(300, 40)

    def forward(self, x):
        return torch.frac(self.linear(x) * 1e6)


def test_rounding_that_a_model_blows_up_is_no_fault_of_the_file(tmp_path):
    torch.manual_seed(0)
    model, x = Chaotic().eval(), torch.randn(8, 300)
    assert not parity(model, export_onnx(model, x, tmp_path / "m.onnx"), [x]).passed


class Best(nn.Module):
    """Places of the largest values, beside an attention whose first row sees nothing."""

    def forward(self, x):
        scores = torch.where(torch.arange(5) < torch.arange(5)[:, None], x[:, None] * x[..., None], -torch.inf)
        return x.relu().topk(3)[1], scores.softmax(-1).nan_to_num()


def test_equal_values_may_stand_in_either_order_and_nan_may_come_on_the_way(tmp_path):
    x = torch.tensor([[-1.0, 0, -2, 0, -3], [1, 2, 2, 2, 2]])
    assert export_onnx(Best(), x, tmp_path / "m.onnx").exists()
