"""Integers in files stay below 2³¹, so that runtimes with fewer bits than ONNX Runtime compute the same."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from surgery_plugins.hashed import Hashed
from surgery_plugins.hashed.hashing import constants, looked_up, places
from torch import nn
from torch.nn import functional as F

import surgery
from surgery import Context, capture
from surgery.export.runtime import runtime_session
from surgery.testing import randomise


class Virtual(nn.Module):
    """A hashed weight whose constants are an input."""

    def __init__(self, shape, count):
        super().__init__()
        self.shape, self.values = shape, nn.Parameter(torch.arange(1.0, count + 1))

    def forward(self, hash):
        return looked_up(self.values, places(hash, self.shape, len(self.values)), self.shape)


@cache
def runners(shape, count):
    model = Virtual(shape, count)
    with TemporaryDirectory() as folder:
        path = surgery.export_onnx(model, constants(0, "a"), Path(folder) / "m.onnx", dynamic_batch=False)
        reference, session = ReferenceEvaluator(onnx.load(path)), runtime_session(path)
    return (
        lambda hash: model(hash).detach().flatten().tolist(),
        lambda hash: session(hash)[0].flatten().tolist(),
        lambda hash: reference.run(None, {"hash": hash.numpy()})[0].flatten().tolist(),
    )


@settings(deadline=None)
@pytest.mark.parametrize(("shape", "count"), [((7, 5), 3), ((4, 3, 3, 3), 40), ((3, 30), 1_000_000)])
@given(seed=st.integers(0, 2**40))
def test_hashed_weights_are_the_same_in_python_torch_onnx_runtime_and_the_reference(shape, count, seed):
    drawn = constants(seed, "layer")
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    _, p, q, a, b, s, t = drawn.tolist()
    x = [pow(1 + (line + s) % (p - 1), 5, p) for line in range(rows + columns)]
    y = [pow(1 + (line + t) % (q - 1), 5, q) for line in range(rows + columns)]
    expected = []
    for i in range(rows):
        for j in range(rows, rows + columns):
            place = (q * (a * x[i] * x[j] % p) + b * y[i] * y[j] % q) % (2 * count)
            expected.append(float(place + 1) if place < count else float(count - place - 1))
    for run in runners(shape, count):
        assert run(drawn) == expected


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.body, self.short = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(16, 32, 1, stride=2)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 40)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.norm(self.body(F.relu(self.down(x)))) + self.short(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """Path, input and output of a small hashed network."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12, 12)
    model = capture(randomise(Residual()).eval(), x)
    hashed, report = Hashed(factor=0.25, min_weights=1)(model, Context(model))
    assert len(report.edits) == 5
    path = surgery.export_onnx(hashed, x, tmp_path_factory.mktemp("hashed") / "m.onnx", dynamic_batch=False)
    with torch.no_grad():
        return path, x.numpy(), hashed(x)


def assert_same(actual, expected):
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_hashed_network_is_right_in_onnx_reference(residual):
    path, x, expected = residual
    assert_same(ReferenceEvaluator(onnx.load(path)).run(None, {"x": x})[0], expected)


def test_a_hashed_network_is_right_in_openvino(residual):
    openvino = pytest.importorskip("openvino")
    path, x, expected = residual
    compiled = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same(compiled(x)[0], expected)


def test_a_hashed_network_is_right_in_opencv(residual):
    cv2 = pytest.importorskip("cv2")
    path, x, expected = residual
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(x)
    assert_same(network.forward(), expected)
