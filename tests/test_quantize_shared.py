"""Computed weights become integers: those of few values stay few, zeros stay zero, all others become ordinary ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import exported
from surgery_plugins.quantize import Quantize
from surgery_plugins.quantize.counting import kernels
from surgery_plugins.quantize.scheme import Grid
from surgery_plugins.quantize.shared import Lookup
from torch import nn

import surgery
from surgery import Context, Data, Registry

REGISTRY = Registry.load()
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network(channels=32):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    norm.running_mean, norm.running_var = torch.randn(channels), torch.rand(channels) + 0.5
    norm.weight = nn.Parameter(torch.randn(channels))
    body = [nn.Conv2d(3, channels, 3, bias=False), norm, nn.ReLU(), nn.Conv2d(channels, channels, 3), nn.ReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(channels * 16, 40)).eval()


def context(model):
    return Context(model, Data.of([X]), registry=REGISTRY)


def after(*passes, model=None):
    """The model after passes by name with options, and the last report."""
    now = surgery.capture(model or network(), X[:2])
    for name, options in passes:
        now, report = REGISTRY.find_pass(name)(**options)(now, context(now))
    return now, report


class Weights(torch.fx.Interpreter):
    """Notes W₈ of every layer, by name."""

    def run_node(self, n):
        if "dequantize_per_channel" in str(n.target) and n.args[1].op == "get_attr":
            self.found[n.args[1].target.removesuffix(".weight_scale")] = self.env[n.args[0]]
        return super().run_node(n)


def integer_weights(model):
    run = Weights(model, garbage_collect_values=False)
    run.found = {}
    with torch.no_grad():
        run.run(X, enable_io_processing=False)
    assert run.found.keys() == {"0", "3", "6"}
    return run.found


KMEANS = ("kmeans", {"bits": 4, "metric": "weight"})
HASHED = ("hashed", {"factor": 0.25, "metric": "weight"})


@pytest.mark.parametrize("sharing", [KMEANS, HASHED])
def test_shared_values_become_integers_that_the_graph_looks_up(sharing):
    before, _ = after(sharing)
    quantised, report = after(sharing, ("quantize", {"vnni": True}))
    shared = [edit.layer for edit in report.edits if "looked up as before" in edit.what]
    assert {"3", "6"} <= set(shared)
    state = quantised.state_dict()
    assert not any(tensor.is_floating_point() and tensor.numel() > 40 for tensor in state.values())
    expected = before(X)
    assert (quantised(X) - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("sharing", [KMEANS, HASHED])
def test_shared_values_run_in_integer_kernels_all_the_same(sharing, tmp_path):
    quantised, _ = after(sharing, ("quantize", {}))
    path = exported(quantised, tmp_path)
    assert path.stat().st_size < sum(weight.numel() for weight in integer_weights(quantised).values())
    found = kernels(path)
    assert (found.count["QLinearConv"], found.count["QGemm"], found.float_layers) == (2, 1, 0)


def test_a_codebook_of_16_values_gives_16_integers_at_most():
    quantised, _ = after(KMEANS, ("quantize", {"vnni": True}))
    for name, weight in integer_weights(quantised).items():
        count = len(weight.abs().unique()) if name == "0" else len(weight.unique())  # signs of the BatchNorm
        assert count <= 16, name


def test_a_batchnorm_behind_shared_weights_goes_into_scales_and_signs():
    model = network()
    quantised, report = after(KMEANS, ("quantize", {"vnni": True}), model=model)
    assert "looked up as before" in report.edits[0].what
    assert "1 BatchNorm folded first" in report.notes
    signs = dict(quantised.named_buffers())["0.sign"]
    assert torch.equal(signs < 0, model[1].weight < 0)
    assert not any(layer.type == "BatchNorm2d" for layer in surgery.layers(quantised))


def test_zeros_of_pruned_and_shared_weights_stay_zero():
    pruned = ("prune_weights", {"criterion": "magnitude", "sparsity": 0.7})
    before, _ = after(pruned, KMEANS)
    quantised, _ = after(pruned, KMEANS, ("quantize", {}))
    integers = integer_weights(quantised)
    for layer in surgery.layers(before):
        if layer.computed:
            zero = surgery.weight_of(layer) == 0
            assert zero.double().mean() > 0.6
            assert (integers[layer.name][zero] == 0).all()


def test_channels_with_codebooks_of_their_own_have_scales_of_their_own():
    model = network()
    model[3].weight = nn.Parameter(model[3].weight * torch.logspace(-3, 0, 32).view(-1, 1, 1, 1))
    quantised, report = after(
        ("kmeans", {"bits": 2, "per": "channels", "metric": "weight"}), ("quantize", {}), model=model
    )
    edit = next(edit for edit in report.edits if edit.layer == "3")
    assert "looked up as before" in edit.what
    assert all(int(row.abs().max()) >= 63 for row in integer_weights(quantised)["3"])


def test_one_value_far_larger_than_all_others_makes_the_weights_ordinary_ones():
    hashed, _ = after(HASHED)
    with torch.no_grad():
        hashed.get_submodule("3").values[0] = 1000
    quantised, report = Quantize()(hashed, context(hashed))
    assert "no longer shared" in next(edit.what for edit in report.edits if edit.layer == "3")
    assert quantised.get_submodule("3").weight.dtype == torch.int8


def test_weights_computed_in_another_way_become_ordinary_ones():
    model = surgery.capture(network(), X[:2])
    layer = next(layer for layer in surgery.layers(model) if layer.name == "3")
    weight = layer.module.weight.detach()

    def standardised(weight):
        return (weight - weight.mean((1, 2, 3), keepdim=True)) / weight.std((1, 2, 3), keepdim=True)

    surgery.replace_weight(model, layer, standardised, {"weight": nn.Parameter(weight)})
    model.recompile()
    expected = model(X)
    quantised, report = Quantize(vnni=True)(model, context(model))
    assert [edit.layer for edit in report.edits] == ["0", "3", "6"]
    assert quantised.get_submodule("3").weight.dtype == torch.int8
    assert (quantised(X) - expected).norm() / expected.norm() < 0.02


@settings(max_examples=12, deadline=None)
@given(
    bits=st.integers(1, 5),
    quantised=st.sampled_from([2, 4, 7, 8]),
    per=st.sampled_from([{}, {"per": "channels", "size": 3}, {"per": "block", "size": 100}]),
    gains=st.lists(st.floats(0.25, 4), min_size=12, max_size=12),
    seed=st.integers(0, 2**16),
)
def test_every_shared_weight_is_within_half_a_step_of_its_scale(bits, quantised, per, gains, seed):
    torch.manual_seed(seed)
    model = surgery.capture(nn.Conv2d(9, 12, 3).eval(), torch.randn(2, 9, 4, 4))
    clustered, _ = REGISTRY.find_pass("kmeans")(bits=bits, metric="weight", **per)(model, Context(model))
    layer = surgery.layers(clustered)[0]
    if (lookup := Lookup.of(clustered, layer)) is None:
        assert clustered.get_submodule(layer.name).codebook.numel() * 2 > 12 * 81 / 8  # no smaller than integers
        return
    factor = torch.tensor(gains) * (torch.rand(12) - 0.5).sign()
    weight = surgery.weight_of(layer) * factor.view(-1, 1, 1, 1)
    found = lookup.rounded(weight, Grid.signed(quantised), "minmax")
    step = found.scale.view(-1, 1, 1, 1)
    assert ((found.integers * step - weight).abs() <= step * 0.5001).all()
    assert int(found.integers.abs().max()) <= Grid.signed(quantised).high
    assert torch.equal(found.looked_up(found.tensors).double(), found.integers)
