"""ONNX Runtime makes integer kernels of everything that is meant to be one, and computes what PyTorch simulates."""

from __future__ import annotations

from collections import Counter

import onnx
import pytest
import torch
import torch.nn.functional as F
from integers import HardGates, exported, session_outputs, steps_apart
from surgery_plugins.quantize import Quantize
from surgery_plugins.quantize.counting import FLOAT_LAYERS, kernels
from torch import nn

import surgery
from surgery import Context, Data, Registry
from surgery.testing import NETWORKS

REGISTRY = Registry.load()


def quantised(model, inputs, calibration=None, **options):
    captured = surgery.capture(model.eval(), inputs)
    data = Data.of([inputs] if calibration is None else calibration)
    return Quantize(**options)(captured, Context(captured, data, registry=REGISTRY))


EXPECTED = {
    "plain_cnn": {"QLinearConv": 2, "QGemm": 1, "NhwcMaxPool": 1},
    "residual": {"QLinearConv": 6, "QLinearAdd": 2, "QLinearAveragePool": 1, "QGemm": 1},
    "channel_shuffle": {"QLinearConv": 3, "QLinearConcat": 1, "QGemm": 1},
    "grouped_depthwise": {"QLinearConv": 4, "QGemm": 1},
    "squeeze_excite": {"QLinearConv": 3, "QLinearSigmoid": 2, "QLinearMul": 2, "QLinearAveragePool": 2, "QGemm": 1},
    "zero_padded_shortcut": {"QLinearConv": 3, "QLinearAdd": 1, "QGemm": 1},
    "shared_module": {"QLinearConv": 3, "QGemm": 1},
    "functional_conv": {"QLinearConv": 2, "QGemm": 1},
    "slices": {"QLinearConv": 2, "QLinearSigmoid": 1, "QLinearMul": 1, "QLinearConcat": 1, "QGemm": 1},
    "conv_1d": {"QLinearConv": 2, "QGemm": 2},
    "conv_3d": {"QLinearConv": 2, "QGemm": 1},
    "constant_views": {"QLinearConv": 2, "QGemm": 2},
    "pixels": {"QLinearConv": 4},
    "concatenation": {"QLinearConv": 3, "QGemm": 1},
    "attention": {"QGemm": 5},
    "windows": {"QLinearConv": 1, "QGemm": 3, "QLinearMatMul": 1, "MatMulIntegerToFloat": 1},
    "two_inputs": {"QLinearConv": 1, "QGemm": 2, "QLinearSigmoid": 1, "QLinearMul": 1},
}
FLOAT_PRODUCTS = {"attention": 2}
"""Of scaled_dot_product_attention, which stays whole."""
NARROW = {"grouped_depthwise": 1}
"""Convolutions with groups of few channels, float between integers."""


@pytest.mark.parametrize("name", EXPECTED)
def test_every_layer_meant_to_be_quantised_is_an_integer_kernel(name, tmp_path):
    network = NETWORKS[name]
    model = network.captured()
    data = Data.of(list(network.calibration()))
    after, report = Quantize()(model, Context(model, data, registry=REGISTRY))
    found = kernels(exported(after, tmp_path))
    assert {kind: found.count[kind] for kind in EXPECTED[name]} == EXPECTED[name]
    assert len(found.stranded) == NARROW.get(name, 0)
    assert found.float_layers == FLOAT_PRODUCTS.get(name, 0) + NARROW.get(name, 0)
    assert found.integer_layers >= sum("weight_error" in edit.numbers for edit in report.edits)


def test_the_count_sees_a_layer_that_is_left_in_float(tmp_path):
    """Its weight is a float."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    after, _ = quantised(model, torch.randn(2, 3, 8, 8))
    path = exported(after, tmp_path)
    graph = (proto := onnx.load(path)).graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    graph.initializer.append(onnx.numpy_helper.from_array(torch.randn(4, 3, 1, 1).numpy(), "plain"))
    first.input[1] = "plain"
    onnx.save(proto, path)
    found = kernels(path)
    assert len(found.stranded) == 1
    assert found.float_layers == 1


def test_padding_slicing_and_pooling_keep_the_scale():
    class Moves(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.second(F.pad(F.max_pool2d(self.first(x), 2)[:, :, ::2], (0, 0, 0, 0, 2, 2)))

    after, _ = quantised(Moves(), torch.randn(2, 3, 10, 10))
    pairs = [n.args[1:3] for n in after.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert len(set(pairs)) == 3  # the input, the first convolution and all that is moved of it, the second


@pytest.mark.parametrize(("low", "high", "merged"), [(0, 6, True), (-1, 1, True), (0.5, 2, False), (None, 3, True)])
def test_a_clamp_is_taken_into_the_range_where_that_holds_zero(low, high, merged):
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)
            self.first.weight = nn.Parameter(3 * self.first.weight.detach())

        def forward(self, x):
            return self.second(torch.clamp(self.first(x), low, high))

    torch.manual_seed(0)
    model, x = Clamped(), torch.randn(4, 3, 6, 6)
    after, _ = quantised(model, x)
    kinds = [str(n.target) for n in after.graph.nodes]
    assert ("aten.clamp.default" not in kinds) == merged
    error = (after(x) - model(x)).abs().max() / model(x).abs().max()
    assert error < 0.03


def mobile(channels=8):
    """An inverted bottleneck between two convolutions: no average that halves steps, no shortcut."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, 2, 1),
        nn.ReLU6(),
        nn.Conv2d(channels, channels, 3, 1, 1, groups=channels),
        nn.ReLU6(),
        nn.Conv2d(channels, 6, 1),
        nn.Flatten(),
        nn.Linear(96, 10),
    )


def test_every_value_of_the_runtime_is_within_one_step_of_the_simulation(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    after, _ = quantised(mobile(), x)
    assert max(steps_apart(after, exported(after, tmp_path), x)) <= 1


def test_hardswish_and_hardsigmoid_are_sums_and_products_of_integers(tmp_path):
    torch.manual_seed(0)
    model, x = HardGates().eval(), torch.randn(32, 3, 10, 10)
    after, report = quantised(model, x)
    path = exported(after, tmp_path)
    found = kernels(path)
    assert {kind: found.count[kind] for kind in ("QLinearConv", "QLinearAdd", "QLinearMul")} == {
        "QLinearConv": 5,
        "QLinearAdd": 3,
        "QLinearMul": 3,
    }
    assert found.count.keys() & {"HardSigmoid", "Mul", *FLOAT_LAYERS} == set()
    assert not report.notes
    sums = [node.name for node in after.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    assert sums == sorted(sums)  # made in the order of the graph, so that files are the same in every process
    assert max(steps_apart(after, path, x)) <= 1
    with torch.no_grad():
        wanted, given = model(x), after(x)
    assert (given - wanted).norm() < 0.032 * wanted.norm()  # 0.0291 here, 0.0292 with the gates in float


def test_a_hardsigmoid_of_floats_stays_what_it_is():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, x):
            return F.hardsigmoid(self.last(F.hardswish(self.first(x).exp())))

    after, _ = quantised(Late(), torch.randn(4, 3, 8, 8))
    kinds = [str(node.target) for node in after.graph.nodes]
    assert kinds.count("aten.hardsigmoid.default") == 2
    assert "aten.add.Tensor" not in kinds


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_convolutions_round_as_the_runtime_does_to_the_last_value(bits, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(256, 3, 8, 8)
    after, _ = quantised(mobile(32), x[:16], weight_bits=bits, vnni=True)
    assert max(steps_apart(after, exported(after, tmp_path), x)) == 0


def test_weights_of_4_bits_are_int4_in_the_file_from_opset_21_on(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    after, _ = quantised(mobile(64), x, weight_bits=4)
    sizes = {}
    for opset in (18, 21):
        path = exported(after, tmp_path, opset=opset)
        stored = Counter(t.data_type for t in onnx.load(path).graph.initializer if t.name.endswith(".weight"))
        assert stored == {onnx.TensorProto.INT4 if opset >= 21 else onnx.TensorProto.INT8: 4}
        found = kernels(path)
        assert (found.count["QLinearConv"], found.count["QGemm"], found.float_layers) == (3, 1, 0)
        assert max(steps_apart(after, path, x)) == 0
        sizes[opset] = path.stat().st_size
    weights = sum(b.numel() for name, b in after.named_buffers() if name.endswith(".weight"))
    assert 0.35 * weights < sizes[18] - sizes[21] <= 0.5 * weights


@pytest.mark.parametrize("network", [mobile, HardGates])
def test_fewer_bits_of_activations_are_the_same_in_the_runtime(network, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    after, _ = quantised(network(), x / 2, activation_bits=4)
    given = session_outputs(exported(after, tmp_path), x)[0]  # twice as large as what was seen
    assert (given - after(x)).abs().max() <= 1e-5 * after(x).abs().max()


def test_seven_bits_are_used_without_vnni(tmp_path):
    x = torch.randn(8, 3, 8, 8)
    plain, narrow = (quantised(mobile(), x, vnni=vnni)[0] for vnni in (True, False))
    largest = [max(int(b.abs().max()) for b in m.buffers() if b.dtype == torch.int8) for m in (plain, narrow)]
    assert largest == [127, 63]


def test_a_run_writes_a_file_that_agrees_and_is_small(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 128, 3), nn.Flatten(), nn.Linear(2048, 64))
    x = torch.randn(8, 3, 8, 8)
    recipe = {"name": "int8", "passes": [{"quantize": {"vnni": True}}]}
    operation = surgery.operate(model.eval(), x, recipe, data=[x], out=tmp_path / "run", latency_rounds=0)
    assert operation.passed
    surgery.export_onnx(surgery.capture(model, x), x, tmp_path / "float.onnx")
    ratio = (tmp_path / "run/model.onnx").stat().st_size / (tmp_path / "float.onnx").stat().st_size
    assert ratio < 0.28
    assert kernels(tmp_path / "run/model.onnx").count.keys() & FLOAT_LAYERS == set()


class Mixed(nn.Module):
    """Layers that may be left in float between integers, and one that has no integer kernel."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.up, self.d = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(8, 8, 3)
        self.e, self.f = nn.Linear(8, 8), nn.Linear(8, 4)
        with torch.no_grad():
            self.b.weight[0] *= 50  # one scale for all channels would cost the others their bits

    def forward(self, x):
        x = torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.f(torch.relu(self.e(self.d(self.up(x)).mean((2, 3)))))


@pytest.mark.parametrize("exclude", [(), ("b",), ("b", "e"), ("e", "f"), ("c", "d")])
def test_onnx_runtime_leaves_layers_in_float_that_are_to_stay_float(exclude, tmp_path):
    """It would give them int8 weights of one scale, where they read integers."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    after, _ = quantised(Mixed(), x, exclude=exclude)
    file = exported(after, tmp_path)
    found = kernels(file)
    assert found.integer_layers == 6 - len(exclude)
    assert found.float_layers == len(exclude)  # without the transposed convolution, which is not counted
    [output] = session_outputs(file, x)
    assert float((torch.as_tensor(output) - after(x).detach()).abs().max() / after(x).detach().abs().max()) < 1e-6
