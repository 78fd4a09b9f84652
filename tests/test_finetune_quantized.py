"""Training through few values, and through the integers that will be written."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integers import HardGates, exported, session_outputs, steps_apart
from surgery_plugins.quantize import aware
from surgery_plugins.quantize.fixed_point import sqnr
from surgery_plugins.quantize.quantizers import QUANTIZERS
from surgery_plugins.quantize.training import fixed_point
from test_finetune import LABELLED, agreement, apply, bytes_of, finetuned, same, tied_model, trained_digits

import surgery
from surgery import Context, PluginError, RecipeError, Registry, WeightQuantizer, hookimpl, layers
from surgery.demo import digits
from surgery.testing import NETWORKS

INNER = ("4", "7")
"""The layers between the first and the last of the network for the digits."""


def weights(model):
    return {layer.name: surgery.weight_of(layer) for layer in layers(model) if layer.type in ("Conv2d", "Linear")}


def through(quantizer, **options):
    original, data = trained_digits()
    return finetuned(original, data, original=original, quantizer=quantizer, **options)


# --- quantisers of weights ---


@pytest.mark.parametrize(
    ("name", "most"),
    [("fixed_point", 8), ("stochastic", 8), ("qnn_log", 8), ("binary_connect", 2), ("qnn_binary", 2)],
)
def test_the_weights_that_are_left_have_few_values_and_the_network_still_works(name, most):
    model, report = through(name, bits=3)
    found = weights(model)
    spared = set(found) - set(INNER) if most == 2 else set()
    assert all((len(weight.unique()) <= most) == (layer not in spared) for layer, weight in found.items())
    ways = {edit.layer: edit.what for edit in report.edits}
    assert all(ways[layer] == f"trained through {name}" for layer in set(found) - spared)
    assert all("leaves the first and the last layer float" in ways[layer] for layer in spared)
    assert agreement(model)[0] > 0.9


@pytest.mark.parametrize("cls", QUANTIZERS, ids=lambda cls: cls.name())
@given(st.lists(st.floats(-2, 2, width=32), min_size=2, max_size=8), st.integers(2, 8))
@settings(max_examples=15)
def test_what_is_left_stays_what_it_is(cls, values, bits):
    weight = torch.tensor([values])
    made = cls(weight, bits)
    once = made.final(weight)
    torch.testing.assert_close(made.final(once), once, rtol=1e-6, atol=0)
    assert len(once.unique()) <= 2**bits
    noise = torch.rand(weight.shape) if cls.draws_after else None
    torch.testing.assert_close(made.final(made.after_update(once, noise)), once, rtol=1e-6, atol=0)


def test_the_point_of_fixed_point_numbers_follows_each_layers_weights():
    original = weights(trained_digits()[0])
    cls = Registry.load().find_weight_quantizer("fixed_point")
    for bits in (2, 4, 8):
        for weight in original.values():
            found = sqnr(weight, cls(weight, bits).final(weight))
            tried = [sqnr(weight, fixed_point(weight, bits - point, point)) for point in range(-4, 16)]
            assert found == max(tried)


def test_signs_with_a_scale_per_channel_are_clustered_to_one_bit_without_loss_and_packed(tmp_path):
    original, data = trained_digits()
    model, _ = through("xnor")
    options = {"bits": 1, "per": "channels", "metric": "weight", "select": INNER}
    clustered, report = apply("kmeans", model, data, original=original, **options)
    assert {edit.layer for edit in report.edits} == set(INNER)
    before, after = weights(model), weights(clustered)
    assert all(torch.equal(after[name], before[name]) for name in before)
    sizes = {}
    for name, result in (("original", original), ("clustered", clustered)):
        surgery.export_source(result, tmp_path / name)
        sizes[name] = surgery.pack(tmp_path / name).stat().st_size
    saved = sum(before[name].numel() for name in INNER) * 4
    assert sizes["original"] - sizes["clustered"] > 0.75 * saved


def test_noise_is_drawn_from_the_seed():
    runs = [bytes_of(finetuned(tied_model(), LABELLED, quantizer="stochastic", bits=4, seed=s)[0]) for s in (1, 1, 2)]
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_a_weight_that_is_computed_is_trained_as_it_stands_and_a_tied_one_in_float():
    original = NETWORKS["plain_cnn"].captured()
    data = NETWORKS["plain_cnn"].calibration()
    model, _ = apply("prune_weights", original, data, criterion="magnitude")
    _, report = finetuned(model, data, original=original, quantizer="fixed_point")
    whys = {edit.what for edit in report.edits if "float" in edit.what}
    assert whys
    assert all("its weight is computed from" in why for why in whys)
    _, report = finetuned(tied_model(), LABELLED, quantizer="fixed_point")
    ways = {edit.layer: edit.what for edit in report.edits}
    assert "shares its parameters with" in ways["second"]
    assert ways["head"] == "trained through fixed_point"


class Thirds(WeightQuantizer):
    """Multiples of a third."""

    draws = True

    def value(self, weight, noise=None):
        moved = weight if noise is None else weight + (noise - 0.5) / 3
        return ((moved * 3).round() / 3).detach() + (weight - weight.detach())


def plugin(*classes):
    return type("Plugin", (), {"surgery_weight_quantizers": hookimpl(lambda self: list(classes))})()


def test_a_plugin_adds_a_quantizer_that_draws_noise_at_every_forward():
    registry, model = Registry.load([plugin(Thirds)]), tied_model()
    step = registry.find_pass("finetune")(quantizer="thirds", learning_rate=0.05)
    step.check(registry)
    runs = [step(model, Context(model, LABELLED, seed=seed, registry=registry))[0] for seed in (1, 1, 2)]
    head = surgery.weight_of(next(layer for layer in layers(runs[0]) if layer.name == "head"))
    assert torch.equal((head * 3).round() / 3, head)
    assert same(bytes_of(runs[0]), bytes_of(runs[1]))
    assert not same(bytes_of(runs[0]), bytes_of(runs[2]))


def test_a_quantizer_that_no_gradient_passes_is_told():
    class Steps(WeightQuantizer):
        """Whole numbers, for which torch has no gradient."""

        def value(self, weight, noise=None):
            return weight.round()

    registry, model = Registry.load([plugin(Steps)]), tied_model()
    step = registry.find_pass("finetune")(quantizer="steps")
    _, report = step(model, Context(model, LABELLED, registry=registry))
    assert "no gradient reached head.weight" in report.notes
    assert not any("head.bias" in note for note in report.notes)
    _, report = finetuned(model, LABELLED, quantizer="fixed_point")
    assert not any("gradient" in note for note in report.notes)


def test_a_quantizer_that_nobody_offers_is_refused_with_those_there_are():
    from surgery.recipe import resolve

    with pytest.raises(RecipeError, match=r"unknown quantizer 'xnr' \(did you mean xnor") as caught:
        resolve({"name": "r", "passes": [{"finetune": {"quantizer": "xnr"}}]}, Registry.load())
    assert "binary_connect" in caught.value.fix
    first, second = plugin(Thirds), plugin(Thirds)
    first.__name__, second.__name__ = "alpha", "beta"
    with pytest.raises(PluginError, match="two plugins offer 'thirds': alpha and beta"):
        Registry([first, second])
    with pytest.raises(PluginError, match=r"int: is not a subclass of surgery\.WeightQuantizer"):
        Registry([plugin(int)])


# --- through the integers ---


def quantised(**options):
    original, data = trained_digits()
    return apply("quantize", original, data, original=original, **options)


@pytest.fixture
def twins(monkeypatch):
    """The twins that are trained, each with a copy from before."""
    made = []

    def recorded(*arguments):
        twin, rounded = original(*arguments)
        made.append((twin, copy.deepcopy(twin)))
        return twin, rounded

    original = aware.rounding_twin
    monkeypatch.setattr(aware, "rounding_twin", recorded)
    return made


@pytest.mark.parametrize("options", [{}, {"weight_bits": 2}, {"weight_bits": 4, "activation_bits": 4}])
def test_the_twin_computes_what_the_integers_compute_before_and_after_training(options, twins):
    untrained, _ = quantised(**options)
    model, _ = quantised(**options, training={"epochs": 1})
    images, [(twin, before)] = digits()[0][:200], twins
    for one, other in ((before, untrained), (twin, model)):
        with torch.no_grad():
            assert torch.equal(one(images), other(images))
    assert not torch.equal(model(images), untrained(images))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_twin_of_hard_gates_computes_what_the_integers_compute(bits, twins):
    torch.manual_seed(0)
    x = torch.randn(32, 3, 10, 10)
    original, data = surgery.capture(HardGates().eval(), x), [x]
    options = {"original": original, "activation_bits": bits}
    untrained, _ = apply("quantize", original, data, **options)
    model, report = apply("quantize", original, data, **options, training={"epochs": 2, "learning_rate": 1e-4})
    assert not any("no gradient" in note for note in report.notes)
    [(twin, before)] = twins
    for one, other in ((before, untrained), (twin, model)):
        with torch.no_grad():
            assert torch.equal(one(x), other(x))
    named = dict(twin.named_parameters())
    gradients = torch.autograd.grad(twin(x).square().sum(), list(named.values()))
    assert not [name for name, gradient in zip(named, gradients, strict=True) if not gradient.any()]


def test_a_model_of_few_bits_regains_its_accuracy_without_a_label(tmp_path):
    options = {"weight_bits": 2, "activation_bits": 2}
    before, after = quantised(**options)[0], quantised(**options, training={"epochs": 6, "learning_rate": 3e-3})[0]
    lost, left = (1 - agreement(model)[0] for model in (before, after))
    assert left < 0.5 * lost
    assert 1 - agreement(after)[1] < 0.5 * (1 - agreement(before)[1])
    assert all(int(w.abs().max()) <= 1 for w in after.state_dict().values() if w.dtype == torch.int8)
    path, images = exported(after, tmp_path), digits()[0][:360]
    assert max(steps_apart(after, path, images)) <= 1
    with torch.no_grad():
        scores = after(images)
    chosen = scores.gather(1, session_outputs(path, images)[0].argmax(1, keepdim=True))
    torch.testing.assert_close(chosen, scores.amax(1, keepdim=True))  # of so few values several may be the largest


def test_zeros_stay_zero_and_shared_values_are_let_go():
    original, data = trained_digits()
    pruned, _ = apply("prune_weights", original, data, criterion="magnitude")
    zeros = {name: weight == 0 for name, weight in weights(pruned).items()}
    model, _ = apply("quantize", pruned, data, original=original, training={"epochs": 1})
    state = model.state_dict()
    assert all(bool((state[f"{name}.weight"][zero] == 0).all()) for name, zero in zeros.items())
    clustered, _ = apply("kmeans", original, data, bits=3)
    _, report = apply("quantize", clustered, data, original=original, training={"epochs": 1})
    assert any("no longer shared" in edit.what for edit in report.edits)


@pytest.mark.parametrize("network", ["functional_conv", "shared_module", "attention"])
def test_any_wiring_can_be_trained_through_its_integers(network, tmp_path):
    network = NETWORKS[network]
    model, batches = network.captured(), network.calibration()
    trained, report = apply("quantize", model, batches, training={"epochs": 1, "learning_rate": 1e-4})
    assert any("trained through the integers: loss" in note for note in report.notes)
    value = network.inputs(4, seed=5)
    path = exported(trained, tmp_path)
    assert max(steps_apart(trained, path, value)) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epoch": 3}, r"training\.epoch"),
        ({"epochs": 0}, r"training\.epochs"),
        ({"quantizer": "xnor"}, "training: quantizer"),
    ],
)
def test_options_that_training_does_not_have_are_refused_before_anything_runs(options, message):
    from surgery.recipe import resolve

    with pytest.raises(RecipeError, match=message) as caught:
        resolve({"name": "r", "passes": [{"quantize": {"training": options}}]}, Registry.load())
    assert caught.value.fix
