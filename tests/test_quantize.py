"""The pass `quantize`: options, what it leaves alone and why, bad input, and what stands in the graph."""

from __future__ import annotations

import pytest
import torch
from surgery_plugins.prune_weights import PruneWeights
from surgery_plugins.quantize import Quantize
from torch import nn

import surgery
from surgery import Context, Data, InputError, PluginError, RecipeError, Registry, Target, hookimpl
from surgery.recipe import build_pass
from surgery.testing import randomise

REGISTRY = Registry.load()


def network():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    norm.running_mean, norm.running_var = torch.randn(8), torch.rand(8) + 0.5
    body = [nn.Conv2d(3, 8, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(8 * 36, 5)).eval()


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantised(model=None, batches=(X,), **options):
    captured = surgery.capture(model or network(), X[:2])
    return Quantize(**options)(captured, Context(captured, Data.of(list(batches)), registry=REGISTRY))


def integers(model, dtype=torch.int8):
    return {name: b for name, b in model.named_buffers() if b.dtype == dtype and not name.endswith("_zero")}


def test_weights_are_8_bit_integers_with_a_scale_per_output_and_biases_32_bit_ones():
    after, report = quantised(vnni=True)
    assert {name: tuple(b.shape) for name, b in integers(after).items()} == {
        "0.weight": (8, 3, 3, 3),
        "3.weight": (8, 8, 1, 1),
        "6.weight": (5, 288),
    }
    assert all(int(b.abs().amax()) == 127 for b in integers(after).values())
    assert integers(after, torch.int32).keys() == {"0.bias", "3.bias", "6.bias"}
    assert [edit.layer for edit in report.edits] == ["0", "3", "6"]
    assert "1 BatchNorm folded first" in report.notes


def test_the_result_is_near_the_original():
    model = network()
    after, _ = quantised(model, vnni=True)
    expected = model(X)
    assert (after(X) - expected).norm() / expected.norm() < 0.02


def test_the_scale_of_a_bias_is_that_of_input_times_weight():
    after, _ = quantised()
    calls = [n for n in after.graph.nodes if str(n.target) in ("aten.conv2d.default", "aten.linear.default")]
    assert len(calls) == 3
    for node in calls:
        x, weight, bias = node.args[:3]
        scale = bias.args[1]
        assert str(scale.target) == "aten.mul.Tensor"
        assert scale.args == (weight.args[1], x.args[1])


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 3), (4, 7), (8, 127)])
def test_weights_of_few_bits_stay_on_their_grid(bits, largest):
    after, _ = quantised(weight_bits=bits, vnni=True)
    assert max(int(b.abs().max()) for b in integers(after).values()) == largest


def test_few_activation_bits_give_few_values():
    after, _ = quantised(activation_bits=3)
    grids = {n.args[3:5] for n in after.graph.nodes if "quantize_per_tensor" in str(n.target)}
    assert grids == {(0, 7)}


@pytest.mark.parametrize("rounding", ["gptq", "adaround"])
def test_a_better_rounding_lowers_the_output_error_at_4_bits(rounding):
    model = network()
    batch = torch.randn(64, 3, 8, 8)
    error = {}
    for way in ("nearest", rounding):
        after, _ = quantised(model, [batch], weight_bits=4, rounding=way)
        error[way] = float((after(batch) - model(batch)).norm())
    assert error[rounding] < error["nearest"]


def test_bias_correction_makes_the_mean_output_that_of_the_original():
    model = network()
    biased, corrected = (quantised(model, weight_bits=3, bias_correction=on)[0] for on in (False, True))
    off = [(m(X).mean(0) - model(X).mean(0)).norm() for m in (biased, corrected)]
    assert off[1] < 0.1 * off[0]


def test_excluded_layers_stay_float():
    after, report = quantised(exclude=("3",))
    assert "3.weight" not in integers(after)
    assert after.get_submodule("3").weight.dtype == torch.float32
    assert [edit.layer for edit in report.edits] == ["0", "6"]


def test_masked_weights_keep_their_zeros():
    captured = surgery.capture(network(), X[:2])
    context = Context(captured, Data.of([X]), registry=REGISTRY)
    pruned, _ = PruneWeights(criterion="magnitude")(captured, context)
    after, report = Quantize(rounding="gptq", weight_bits=4)(pruned, context)
    assert len(report.edits) == 3
    for layer in surgery.layers(pruned):
        if layer.computed:
            zero = surgery.weight_of(layer) == 0
            assert zero.sum() * 2 == zero.numel()
            assert (integers(after)[f"{layer.name}.weight"][zero] == 0).all()


def test_a_model_quantised_already_is_left_as_it_is():
    once, _ = quantised()
    context = Context(once, Data.of([X]), registry=REGISTRY)
    again, report = Quantize()(once, context)
    assert not report.modified
    assert torch.equal(again(X), once(X))


def test_a_recipe_with_quantize_twice_is_refused_before_anything_runs():
    recipe = {"name": "twice", "passes": [{"quantize": {}}, {"quantize": {}}]}
    with pytest.raises(RecipeError, match="quantised already"):
        surgery.operate(network(), X[:2], recipe, data=[X], latency_rounds=0)


def test_calibration_data_is_asked_for():
    captured = surgery.capture(network(), X[:2])
    with pytest.raises(InputError, match="quantize needs calibration data"):
        Quantize()(captured, Context(captured, registry=REGISTRY))


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_one_constant_batch_gives_scales_that_are_finite(value):
    after, _ = quantised(batches=[torch.full((4, 3, 8, 8), value)])
    scales = [n.args[1] for n in after.graph.nodes if "quantize_per_tensor" in str(n.target)]
    assert all(0 < scale < float("inf") for scale in scales)
    assert after(X).isfinite().all()


def test_calibration_data_with_nan_is_refused_with_its_place():
    with pytest.raises(InputError, match="NaN"):
        quantised(batches=[X, torch.full_like(X, float("nan"))])


def test_weights_that_are_not_finite_are_left_alone_with_the_reason():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.good(x), self.bad(x).isfinite().float()

    x = torch.rand(2, 4) + 0.5
    captured = surgery.capture(Unused(), x)
    captured.get_parameter("bad.weight").data[0, 0] = float("inf")
    _, report = Quantize()(captured, Context(captured, Data.of([x]), registry=REGISTRY))
    assert [(s.layer, s.why) for s in report.skips] == [("bad", "its weight holds NaN or infinity")]
    assert [e.layer for e in report.edits] == ["good"]


def test_a_batchnorm_that_stays_float_is_among_the_skips():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.first, self.second = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.second(self.conv(self.first(self.conv(x)).relu()))

    x = torch.rand(2, 4, 5, 5)
    captured = surgery.capture(randomise(Twice()), x)
    _, report = Quantize()(captured, Context(captured, Data.of([x]), registry=REGISTRY))
    assert [s.layer for s in report.skips] == ["first", "second"]
    assert all("stays float, as it cannot be folded" in s.why for s in report.skips)


def test_a_channel_without_weights_keeps_its_bias():
    model = network()
    model[3].weight.data[0] = 0
    model[3].bias.data[0] = 1.25
    after, _ = quantised(model, bias_correction=False)
    expected = model(X)
    assert (after(X) - expected).norm() / expected.norm() < 0.03


def test_bits_out_of_range_are_refused():
    for option in ("weight_bits", "activation_bits"):
        for bits in (1, 9):
            with pytest.raises(RecipeError, match=option):
                build_pass(Quantize, {option: bits})


def test_an_unknown_runtime_is_refused_with_those_there_are():
    recipe = {"name": "where", "passes": [{"quantize": {"runtime": "onnxruntime-cpus"}}]}
    with pytest.raises(RecipeError, match=r"did you mean onnxruntime-cpu\?"):
        surgery.operate(network(), X[:2], recipe, data=[X], latency_rounds=0)


FOLDED = "folded into 0, which gains a bias"


def test_a_plugin_adds_a_target():
    only_linear = Target(
        name="mine",
        layers=frozenset({"Linear"}),
        products=frozenset(),
        joins=frozenset(),
        moves=frozenset(),
        merged=frozenset(),
        float_outputs=frozenset({"Linear"}),
    )
    plugin = type("P", (), {"surgery_targets": hookimpl(lambda self: [only_linear])})()
    captured = surgery.capture(network(), X[:2])
    context = Context(captured, Data.of([X]), registry=Registry.load([plugin]))
    after, report = Quantize(runtime="mine", vnni=False)(captured, context)
    assert [(edit.layer, edit.what) for edit in report.edits] == [("6", "8-bit weights"), ("1", FOLDED)]
    assert int(integers(after)["6.weight"].abs().max()) == 127
    assert "mine has no integer kernel for Conv2d" in {skip.why for skip in report.skips}


def test_narrow_groups_stay_float_where_the_runtime_is_slow_with_them():
    sizes = [(8, 16, 8), (16, 16, 4), (16, 16, 16), (16, 16, 2), (16, 16, 1)]
    convolutions = [nn.Conv2d(read, given, 3, groups=groups) for read, given, groups in sizes]
    x = torch.randn(4, 8, 16, 16)
    captured = surgery.capture(nn.Sequential(*convolutions).eval(), x)
    _, report = Quantize()(captured, Context(captured, Data.of([x])))
    assert [edit.layer for edit in report.edits] == ["2", "3", "4"]
    narrow = "onnxruntime-cpu is slower in integers where a group has less than 8 channels"
    assert [skip.why for skip in report.skips] == [f"{narrow} (1 read, 2 given)", f"{narrow} (4 read, 4 given)"]


def test_a_hook_that_gives_no_target_is_refused():
    plugin = type("P", (), {"surgery_targets": hookimpl(lambda self: ["cpu"])})()
    with pytest.raises(PluginError, match=r"gives str, not a surgery\.Target"):
        Registry([plugin])
