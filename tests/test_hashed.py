"""Shared values found by a hash: the hash, the least squares, training, files, and what is refused."""

from __future__ import annotations

from math import gcd

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_plugins.hashed import Hashed
from surgery_plugins.hashed.fitting import Layout, Problem
from surgery_plugins.hashed.hashing import (
    MOST_LINES,
    P,
    Q,
    constants,
    fifth_power,
    looked_up,
    number_of_values,
    places,
    sizes,
    summed,
)
from torch import nn
from torch.nn import functional as F

import surgery
from surgery import Context, Data, InputError, PassError, RecipeError, capture, layers
from surgery.calibration.moments import Scatter
from surgery.testing import check_pass, contract_cases, networks

SHAPES = st.lists(st.integers(1, 12), min_size=2, max_size=4).map(tuple)


def by_hand(drawn, shape, count):
    """Places of every position, in plain Python."""
    version, *primes, a, b, s, t = drawn.tolist()
    assert (version, primes) == (2, [P, Q])
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    u = [pow(1 + (line + s) % (P - 1), 5, P) for line in range(rows + columns)]
    v = [pow(1 + (line + t) % (Q - 1), 5, Q) for line in range(rows + columns)]
    xy = [(a * u[i] * u[rows + j] % P, b * v[i] * v[rows + j] % Q) for i in range(rows) for j in range(columns)]
    return [(Q * x + y) % (2 * count) for x, y in xy]


@given(SHAPES, st.integers(0, 2**70), st.text(max_size=8), st.integers(1, 50))
def test_virtual_weights_are_those_of_plain_python(shape, seed, name, count):
    drawn, values = constants(seed, name), torch.randn(count)
    found = places(drawn, shape, count)
    expected = by_hand(drawn, shape, count)
    assert found.tolist() == expected
    weights = [float(values[m]) if m < count else -float(values[m - count]) for m in expected]
    assert looked_up(values, found, shape).flatten().tolist() == weights


def test_the_primes_are_the_largest_whose_products_have_31_bits():
    primes = [n for n in range(40_000, 50_000) if all(n % d for d in range(2, 224))]
    assert max(n for n in primes if (n - 1) ** 2 + n < 2**31 and gcd(5, n - 1) == 1) == P
    assert max(n for n in primes if n < P and gcd(5, n - 1) == 1) == Q
    assert Q * (P - 1) + Q - 1 < 2**31
    assert MOST_LINES + P < 2**31


@given(st.integers(0, P - 1))
def test_fifth_powers_are_those_of_plain_python(x):
    assert int(fifth_power(torch.tensor(x, dtype=torch.int32), torch.tensor(P, dtype=torch.int32))) == pow(x, 5, P)


def test_the_constants_are_the_same_for_ever():
    assert constants(0, "classifier").tolist() == [2, 46337, 46327, 25816, 35609, 4071, 17873]
    drawn = {tuple(constants(seed, name).tolist()) for seed in range(50) for name in ("a", "b")}
    assert len(drawn) == 100


def test_a_count_that_would_leave_one_half_of_the_hash_unused_is_one_less():
    assert [number_of_values(0.5, 2 * count) for count in (Q - 1, Q, 3 * Q)] == [Q - 1, Q - 1, 3 * Q - 1]
    assert number_of_values(0.001, 10) == 1


def chi_square(classes, count):
    """Standard normal by Wilson and Hilferty (1931), of numbers that should be uniform on 0 … count - 1."""
    expected, freedom = classes.numel() / count, count - 1
    statistic = float(((torch.bincount(classes.flatten(), minlength=count) - expected).square() / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


@pytest.mark.parametrize(("shape", "count"), [((512, 512), 16), ((64, 64, 3, 3), 4608), ((256, 1024), 4096)])
def test_buckets_and_signs_are_uniform_and_unrelated_to_neighbours(shape, count):
    """By chi-square, of all places and of pairs of neighbours in a row, a column and a diagonal."""
    scores = []
    for seed in range(6):
        found = places(constants(seed, "layer"), shape, count).long().view(shape[0], -1)
        few = found % count % 8 * 2 + (found < count)
        scores += [
            chi_square(found, 2 * count),
            chi_square(found % count, count),
            chi_square((found < count).long(), 2),
        ]
        pairs = [(few[1:], few[:-1]), (few[:, 1:], few[:, :-1]), (few[1:, 1:], few[:-1, :-1])]
        scores += [chi_square(16 * a + b, 256) for a, b in pairs]
    assert max(map(abs, scores)) < 4.5
    assert sum(score**2 for score in scores) / len(scores) < 1.6


def test_a_virtual_matrix_is_as_far_from_singular_as_a_random_one():
    shape, count = (256, 256), 64
    virtual = looked_up(torch.randn(count).double(), places(constants(1, "layer"), shape, count), shape)
    values, of_noise = (torch.linalg.svdvals(m / m.std()) for m in (virtual, torch.randn(shape).double()))
    torch.testing.assert_close(values[:200], of_noise[:200], rtol=0.08, atol=0)
    assert float(values[-1]) > 1e-4


@given(SHAPES, st.integers(1, 30), st.integers(0, 99))
def test_summing_is_the_transpose_of_looking_up(shape, count, seed):
    found = places(constants(seed, "layer"), shape, count)
    values, weight = torch.randn(count).double(), torch.randn(shape).double()
    left = (looked_up(values, found, shape) * weight).sum()
    right = (values * summed(weight.flatten(), found, count)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    assert int(sizes(found, count).sum()) == weight.numel()


@given(SHAPES, st.integers(1, 30), st.integers(0, 99))
def test_the_mean_of_a_bucket_is_the_least_squares_optimum(shape, count, seed):
    found = places(constants(seed, "layer"), shape, count)
    matrix = torch.randn(1, shape[0], torch.Size(shape[1:]).numel()).double()
    layout = Layout(found, tuple(matrix.shape), count)
    basis = torch.stack([looked_up(unit, found, (matrix.numel(),)) for unit in torch.eye(count).double()], 1)
    best = torch.linalg.lstsq(basis, matrix.flatten().unsqueeze(1), driver="gelsd").solution.flatten()
    torch.testing.assert_close(layout.mean(matrix), best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(layout.spread(layout.mean(matrix)).flatten(), basis @ best, rtol=1e-9, atol=1e-9)


def problem(groups=2, outputs=6, features=9, count=10, rows=400):
    """Correlated inputs and the outputs of a random layer with noise."""
    x = torch.randn(groups, rows, features).double().cumsum(2)
    weight = torch.randn(groups, outputs, features).double()
    y = x @ weight.mT + 0.1 * torch.randn(groups, rows, outputs).double()
    scatter = Scatter(True)
    scatter.add(torch.cat([x, y], 2))
    regression = surgery.Regression.of(scatter.finish(), features)
    shape = (groups * outputs, features)
    return Problem(Layout(places(constants(3, "layer"), shape, count), weight.shape, count), regression, weight)


def test_conjugate_gradients_find_the_least_output_error():
    task = problem()
    layout, gain = task.layout, torch.rand(2, 6).double() + 0.5
    basis = torch.stack([layout.spread(unit) for unit in torch.eye(10).double()])
    seen = gain.square().unsqueeze(2) * (basis @ task.damped)
    normal = torch.einsum("kgof,lgof->kl", basis, seen)
    goal = torch.einsum("kgof,gof->k", basis, gain.unsqueeze(2) * task.wanted)
    torch.testing.assert_close(task.values(gain, None), torch.linalg.solve(normal, goal), rtol=1e-3, atol=1e-5)


def test_gains_lower_the_error_and_are_the_best_for_their_rows():
    task = problem()
    values = task.values(torch.ones(2, 6).double(), None)
    gain = task.gain(values, torch.ones(2, 6).double())

    def error(g):
        return float(task.regression.error(task.fit(values, g).map, task.fit(values, g).bias))

    assert error(gain) < error(torch.ones(2, 6).double())
    for change in (-1e-2, 1e-2):
        assert error(gain) <= error(gain * (1 + change)) + 1e-5


# --- the pass ---


class Net(nn.Module):
    """A convolution with BatchNorm, a transposed one, groups, and two linear layers, one of them called twice."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12)
        self.up, self.grouped = nn.ConvTranspose2d(12, 8, 3), nn.Conv2d(8, 12, 3, groups=2)
        self.twice, self.head = nn.Linear(12, 12), nn.Linear(12, 40)

    def forward(self, x):
        x = F.relu(self.grouped(self.up(F.relu(self.norm(self.conv(x)))))).mean((2, 3))
        return self.head(self.twice(F.relu(self.twice(x))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return capture(surgery.testing.randomise(Net()).eval(), torch.randn(2, 3, 8, 8))


def batches(count=6):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 8, 8, generator=generator) for _ in range(count)]


def hashed(model, data=False, **options):
    context = Context(model, Data(calibration=batches()) if data else Data())
    return Hashed(min_weights=1, **options)(model, context)


def layer_of(model, name):
    return next(layer for layer in layers(model) if layer.name == name)


@pytest.mark.parametrize("data", [False, True])
def test_every_layer_gets_the_values_that_its_factor_says(net, data):
    result, report = hashed(net, data, factor=0.25)
    assert [edit.layer for edit in report.edits] == ["conv", "up", "grouped", "twice", "head"]
    for edit in report.edits:
        old = layer_of(net, edit.layer).module.weight
        count = round(0.25 * old.numel())
        state = result.state_dict()
        assert state[f"{edit.layer}.values"].shape == (count,) == (edit.numbers["values"],)
        drawn = state[f"{edit.layer}.hash"]
        assert drawn.tolist() == constants(0, edit.layer).tolist()
        m = by_hand(drawn, tuple(old.shape), count)
        both = torch.cat([state[f"{edit.layer}.values"], -state[f"{edit.layer}.values"]])
        torch.testing.assert_close(
            surgery.weight_of(layer_of(result, edit.layer)), both[m].view(old.shape), rtol=0, atol=0
        )
        assert edit.numbers["bits_per_weight"] == pytest.approx((count * 4 + 28) * 8 / old.numel())


def test_the_weight_error_is_that_of_the_weight(net):
    result, report = hashed(net, factor=0.5)
    for edit in report.edits:
        old, new = (surgery.weight_of(layer_of(model, edit.layer)).double() for model in (net, result))
        assert edit.numbers["weight_error"] == pytest.approx(float((old - new).norm() / old.norm()), rel=1e-6)


@pytest.mark.parametrize("name", ["head", "conv", "up", "grouped", "twice"])
def test_the_output_error_is_that_of_the_output(net, name):
    """A layer called twice is judged on the inputs that it had."""
    result, report = hashed(net, True, factor=0.3, select=(name,))
    calls = [f"{name}_1", name] if name == "twice" else ["norm" if name == "conv" else name]
    y, z = outputs(net, calls), outputs(result, calls)
    if name == "twice":
        x, layer = torch.cat(inputs(net, name)), layer_of(result, name)
        y, z = (F.linear(x, surgery.weight_of(layer_of(m, name)), layer.module.bias) for m in (net, result))
    y, z = (value.detach().double().movedim(1, -1).flatten(0, -2) for value in (y, z))
    error = float(((y - z).square().sum() / (y - y.mean(0)).square().sum()).sqrt())
    assert 0 < error < 1
    assert report.edits[0].numbers["output_error"] == pytest.approx(error, rel=1e-3)


def watched(model, of_node):
    """What `of_node(node, environment, value)` gives wherever it is not None, over the calibration data."""
    found = []

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            kept = of_node(n, self.env, value)
            found.extend([] if kept is None else [kept])
            return value

    with torch.no_grad():
        for batch in batches():
            Watch(model).run(batch, enable_io_processing=False)
    return found


def inputs(model, name):
    nodes = layer_of(model, name).nodes
    return watched(model, lambda n, env, value: env[n.args[0]] if n in nodes else None)


def outputs(model, calls):
    """Of the layer of this name, wherever it is called."""
    nodes = [node for call in calls for layer in layers(model) if layer.name == call for node in layer.nodes]
    return torch.cat(watched(model, lambda n, env, value: value if n in nodes else None))


def test_the_output_metric_loses_less_of_the_outputs(net):
    with_data, without = hashed(net, True, factor=0.3)[0], hashed(net, True, factor=0.3, metric="weight")[0]
    wanted = outputs(net, ["head"])
    errors = [float((outputs(model, ["head"]) - wanted).norm()) for model in (with_data, without)]
    assert errors[0] < 0.7 * errors[1]


def test_a_layer_too_large_for_its_covariance_goes_by_the_power_of_its_inputs(net):
    context = Context(net, Data(calibration=batches()))
    context.calibration.gram_bytes = 4000
    result, report = Hashed(factor=0.3, min_weights=1)(net, context)
    assert ["output_error" in edit.numbers for edit in report.edits] == [False, False, False, True, True]
    target = layer_of(net, "conv")
    power = torch.nn.functional.unfold(torch.cat(batches()), 3).square().mean((0, 2)).double()
    shape, count = (12, 3, 3, 3), report.edits[0].numbers["values"]
    m = places(constants(0, "conv"), shape, count)
    weight = target.module.weight.detach().double().flatten()
    best = summed(weight * power.repeat(12), m, count)
    best /= torch.zeros(count).double().index_add_(0, m % count, power.repeat(12)).clamp_min(1e-9)
    torch.testing.assert_close(result.get_parameter("conv.values").double(), best, rtol=1e-2, atol=1e-4)


def test_the_gradient_of_a_value_is_the_signed_sum_over_its_bucket(net):
    result, _ = hashed(net, factor=0.2)
    weights = {layer.weight_node: layer.name for layer in layers(result) if layer.computed}
    found = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n):
            value = super().run_node(n)
            if n in weights:
                value.retain_grad()
                found[weights[n]] = value
            return value

    [output] = Watch(result).run(torch.randn(5, 3, 8, 8), enable_io_processing=False)
    output.square().sum().backward()
    assert len(found) == 5
    for name, weight in found.items():
        values = result.get_parameter(f"{name}.values")
        expected = torch.zeros(len(values)).double()
        for g, m in zip(
            weight.grad.flatten(),
            by_hand(result.get_buffer(f"{name}.hash"), tuple(weight.shape), len(values)),
            strict=True,
        ):
            expected[m % len(values)] += g if m < len(values) else -g
        torch.testing.assert_close(values.grad.double(), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_seeds_names_and_other_layers(net):
    first, again, other = (hashed(net, factor=0.2, seed=seed)[0].state_dict() for seed in (0, 0, 1))
    alone = hashed(net, factor=0.2, select=("head",))[0].state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["head.hash"], other["head.hash"])
    assert torch.equal(first["head.values"], alone["head.values"])


# --- what stays ---


def reasons(report):
    return {skip.layer: skip.why for skip in report.skips}


def test_hashed_layers_are_not_hashed_again(net):
    once, _ = hashed(net, select=("head",))
    _, report = hashed(once, factor=0.5, seed=3)
    assert reasons(report) == {"head": "already hashed"}
    assert [edit.layer for edit in report.edits] == ["conv", "up", "grouped", "twice"]


def test_weights_that_are_computed_otherwise_stay(net):
    masked = surgery.snapshot(net)
    layer = layer_of(masked, "head")
    tensors = {"weight": nn.Parameter(layer.module.weight.detach() * (layer.module.weight.detach() > 0))}
    surgery.replace_weight(masked, layer, lambda weight: weight * (weight != 0), tensors)
    masked.recompile()
    why = reasons(hashed(masked, select=("head",))[1])["head"]
    assert why == "its weight is computed from head.weight, which hashed values would undo"


def test_small_zero_and_tied_layers_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 30), nn.Linear(30, 30), nn.Linear(30, 30), nn.Linear(30, 30))
    model[3].weight = model[2].weight
    nn.init.zeros_(model[4].weight)
    captured = capture(model, torch.randn(2, 2))
    found = reasons(hashed(captured, factor=0.9)[1])
    assert found["0"] == "too small to gain: 4 values and the hash take no less than 4 weights"
    assert found["2"].startswith("shares its parameters with")
    assert found["4"] == "its weight is zero"
    found = reasons(Hashed(min_weights=901)(captured, Context(captured))[1])
    assert found["1"] == "60 weights, fewer than min_weights: 901"


def test_a_weight_with_nan_is_an_error_that_names_its_layer(net):
    broken = surgery.snapshot(net)
    weight = layer_of(broken, "up").module.weight.detach().clone()
    weight[0, 0] = torch.nan
    broken.get_submodule("up").weight = nn.Parameter(weight)
    with pytest.raises(PassError, match="up: its weight holds NaN") as caught:
        hashed(broken)
    assert caught.value.at == "pass hashed"
    assert "exclude" in caught.value.fix


def test_the_output_metric_without_data_is_an_error(net):
    with pytest.raises(InputError, match="pass hashed needs calibration data and there is none"):
        hashed(net, metric="output")


@pytest.mark.parametrize("options", [{"factor": 0}, {"factor": 1}, {"factor": -0.1}, {"factor": 1.5}, {"seed": -1}])
def test_options_out_of_range_are_refused_before_anything_runs(options):
    from surgery.recipe import resolve

    with pytest.raises(RecipeError, match=next(iter(options))):
        resolve({"name": "r", "passes": [{"hashed": options}]}, surgery.Registry.load())
    assert resolve({"name": "r", "passes": [{"hashed": {"factor": 0.5}}]}, surgery.Registry.load()).steps


# --- files ---


@pytest.mark.parametrize(("rows", "folded"), [((2,), ["Gemm"]), ((2, 3), ["MatMul", "Add"])])
def test_the_file_holds_the_values_and_runs_as_a_dense_layer(tmp_path, rows, folded):
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    model = capture(nn.Sequential(nn.Linear(1024, 4096)), torch.randn(*rows, 1024))
    result, _ = Hashed(factor=1 / 64)(model, Context(model))
    path = surgery.export_onnx(result, result.inputs, tmp_path / "hashed.onnx")
    assert 4096 * 16 * 4 + 4096 * 4 < path.stat().st_size < 300_000
    file = onnx.load(path)
    assert {node.domain for node in file.graph.node} == {""}
    assert [entry.version for entry in file.opset_import] == [18]
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options)
    assert [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node] == folded
    [expected], x = model_outputs(result), result.inputs.tensors[0]
    [found] = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


def model_outputs(model):
    with torch.no_grad():
        return [model(*model.inputs.args)]


OF_SMALL_LAYERS = ("transposed_conv", "shared_module", "functional_conv", "attention", "grouped_depthwise", "conv_3d")


@pytest.mark.parametrize(("step", "network"), contract_cases([Hashed(min_weights=1)], networks(*OF_SMALL_LAYERS)))
def test_hashing_small_layers_keeps_the_contract(step, network):
    check_pass(step, network)


def test_groups_that_see_only_zeros_keep_values_that_a_weight_can_hold() -> None:
    """A depthwise layer before a BatchNorm: with a gain of next to nothing, the values of dead channels overflowed."""
    torch.manual_seed(0)
    stem, depthwise = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 5, groups=8, bias=False)
    with torch.no_grad():
        stem.weight[:6], stem.bias[:6] = 0, -1
    model = nn.Sequential(stem, nn.ReLU(), depthwise, nn.BatchNorm2d(8)).eval()
    x = torch.randn(16, 3, 8, 8)
    recipe = {"name": "dead channels", "passes": [{"hashed": {"factor": 0.5, "min_weights": 1, "select": ["2"]}}]}
    small = surgery.operate(model, x[:2], recipe, data=surgery.Data([x]), latency_rounds=0)
    assert small.reports[0].edits
    with torch.no_grad():
        assert bool(small.model(x).isfinite().all())
