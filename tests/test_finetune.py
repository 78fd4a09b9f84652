"""Training after surgery: what is trained, towards what, and what stays."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_plugins.finetune.accelerating import accelerator
from surgery_plugins.finetune.losses import distillation
from surgery_plugins.finetune.training import LONGEST
from torch import Tensor, nn

import surgery
from surgery import Context, Data, InputError, PassError, RecipeError, Registry, capture, layers
from surgery.demo import digits, train
from surgery.testing import NETWORKS

REGISTRY = Registry.load()
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))


def apply(name, model, data=(X,), original=None, seed=0, **options):
    context = Context(original or model, Data.of(data), seed=seed, registry=REGISTRY)
    return REGISTRY.find_pass(name)(**options)(model, context)


def finetuned(model, data=(X,), **options):
    return apply("finetune", model, data, **options)


def linear(inputs=4, outputs=3):
    torch.manual_seed(0)
    return capture(nn.Linear(inputs, outputs), X[:2])


def bytes_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- one step, by hand ---


def half_square(output, target):
    return (output - target).square().sum() / 2


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_of_sgd_is_that_of_the_formula(decay):
    model, target = linear(), torch.zeros(8, 3)
    weight, bias = model.get_parameter("weight").detach(), model.get_parameter("bias").detach()
    error = 0.01 * (X @ weight.T + bias)
    data = Data(training=[(X, target)], loss=lambda output, target: 0.01 * half_square(output, target))
    options = {"epochs": 1, "learning_rate": 0.5, "optimizer": "sgd", "momentum": 0.0, "weight_decay": decay}
    trained, report = finetuned(model, data, loss="labels", **options)
    wanted = weight - 0.5 * (error.T @ X + decay * weight)
    torch.testing.assert_close(trained.get_parameter("weight").detach(), wanted, rtol=1e-6, atol=1e-7)
    wanted_bias = bias - 0.5 * (error.sum(0) + decay * bias)
    torch.testing.assert_close(trained.get_parameter("bias").detach(), wanted_bias, rtol=1e-6, atol=1e-7)
    moved, whole = (torch.cat([(wanted - weight).flatten(), wanted_bias - bias]), torch.cat([weight.flatten(), bias]))
    assert report.edits[0].numbers["change"] == pytest.approx(float(moved.norm() / whole.norm()), rel=1e-5)


def test_a_long_gradient_is_shortened_and_keeps_its_direction():
    model = linear()
    weight, bias = model.get_parameter("weight").detach(), model.get_parameter("bias").detach()
    error = 100 * (X @ weight.T + bias)
    data = Data(training=[(X, torch.zeros(8, 3))], loss=lambda output, target: 100 * half_square(output, target))
    trained, _ = finetuned(model, data, loss="labels", epochs=1, learning_rate=0.1, optimizer="sgd", momentum=0.0)
    gradient = torch.cat([(error.T @ X), error.sum(0, keepdim=True).T], 1)
    wanted = weight - 0.1 * LONGEST * gradient[:, :4] / gradient.norm()
    torch.testing.assert_close(trained.get_parameter("weight").detach(), wanted, rtol=1e-5, atol=1e-6)


def test_the_rate_falls_to_zero_as_a_cosine_does():
    model = linear()
    data = Data(training=[(X, None)] * 4, loss=lambda output, target: output.mean())
    trained, _ = finetuned(model, data, loss="labels", epochs=2, learning_rate=0.1, optimizer="sgd", momentum=0.0)
    rates = [0.1 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    moved = model.get_parameter("bias") - trained.get_parameter("bias")
    torch.testing.assert_close(moved, torch.full((3,), sum(rates) / 3), rtol=1e-5, atol=1e-6)


# --- what it trains towards ---

LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=5)


@given(LOGITS, st.floats(0.5, 10))
def test_distillation_is_zero_at_the_teacher_and_the_divergence_elsewhere(values, temperature):
    t = torch.tensor([values], dtype=torch.float64)
    y = t.flip(1)
    assert float(distillation(t, t, temperature)) == pytest.approx(0, abs=1e-6 * temperature**2)
    p, q = ([math.exp((v - max(row)) / temperature) for v in row] for row in (t[0].tolist(), y[0].tolist()))
    p, q = [v / sum(p) for v in p], [v / sum(q) for v in q]
    wanted = temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(distillation(y, t, temperature)) == pytest.approx(wanted, rel=1e-4, abs=1e-5 * temperature**2)


@given(st.floats(0.01, 100), st.floats(-5, 5))
def test_outputs_that_are_no_logits_count_in_units_of_the_teachers_spread(scale, shift):
    generator = torch.Generator().manual_seed(0)
    t, y = torch.randn(2, 5, 3, 2, generator=generator, dtype=torch.float64)
    error = float((y - t).square().mean() / t.var(correction=0))
    found = float(distillation(scale * (y + shift), scale * (t + shift), 1.0))
    assert found == pytest.approx(error, rel=1e-4)


def test_every_output_counts_and_integers_do_not():
    logits, features = torch.randn(4, 3), torch.randn(4, 3)
    both = {"logits": logits, "features": features, "ids": torch.arange(4)}
    assert float(distillation(both, both, 4.0)) == pytest.approx(0, abs=1e-5)
    other = both | {"features": features + 1, "ids": torch.arange(4) + 1}
    spread = float(features.var(correction=0))
    assert float(distillation(other, both, 4.0)) == pytest.approx(1 / spread, rel=1e-4)


@pytest.mark.parametrize("loss", [None, "both", "labels", "distillation"])
def test_labels_and_teacher_count_as_asked_for(loss):
    data, model = Data(training=[(X, torch.zeros(8, dtype=torch.long))]), linear()
    _, report = finetuned(model, data, epochs=1, loss=loss)
    labels = nn.functional.cross_entropy(model(X), torch.zeros(8, dtype=torch.long)).item()
    found = float(report.notes[0].split()[1])
    assert found == pytest.approx(0 if loss == "distillation" else labels, rel=1e-3, abs=1e-5)


def test_data_that_does_not_do_is_refused_with_a_remedy():
    model = linear()
    for data, loss, message in [
        (None, None, "no data to train on"),
        ([X], "labels", "needs labels"),
        (Data(training=[X]), None, "training batch 0"),
        (Data(training=[]), None, "no batches"),
        ([X[:, :2]], None, "dimension 1 is fixed at 4, and input input has 2"),
        ([X * float("nan")], None, "NaN"),
        (Data(training=[(X, torch.zeros(3))]), None, "no cross-entropy"),
        (Data(training=[(X, torch.full((8,), 3))]), None, "label 3, the model's output has the classes 0 to 2"),
        (Data(training=[(X, torch.full((8,), -1))]), None, "label -1"),
        (Data(training=[(X, torch.zeros(7).long())]), None, "7 labels for 8 samples"),
        (Data(training=[(X, None)], loss=lambda output, target: 1 / 0), "labels", "the loss fails: ZeroDivisionError"),
        (Data(training=[(X, None)], loss=lambda output, target: output), "labels", "the loss gives Tensor"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            finetuned(model, data, loss=loss)
        assert caught.value.fix


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_batch_that_does_not_do_is_named_by_its_place_in_the_data(place):
    batches = [X] * 8
    batches[place] = X[:, :2]
    with pytest.raises(InputError) as caught:
        finetuned(linear(), batches)
    assert caught.value.at == f"calibration batch {place}"


def test_a_loss_that_rises_is_noted():
    data = Data(training=[(X, torch.zeros(8, 3))], loss=half_square)
    _, report = finetuned(linear(), data, learning_rate=50.0, optimizer="sgd", loss="labels")
    assert "it rose, learning_rate 50 is too high" in report.notes[0]


def test_a_loss_that_is_not_finite_names_the_epoch_and_leaves_the_model(monkeypatch):
    model = linear()
    before, weight = bytes_of(model), model.get_parameter("weight")
    calls = []

    def loss(output, target):
        calls.append(0)
        return output.mean() * (float("inf") if len(calls) > 3 else 1)

    with pytest.raises(PassError, match="inf in epoch 2 of 3") as caught:
        finetuned(model, Data(training=[(X, None)] * 3, loss=loss), loss="labels")
    assert "lower learning_rate" in caught.value.fix
    assert same(bytes_of(model), before)
    assert model.get_parameter("weight") is weight


# --- what is trained ---


@pytest.mark.parametrize("network", ["plain_cnn", "shared_module", "residual"])
def test_zeros_indices_and_hashes_stay_and_what_they_hold_is_trained(network):
    original, data = NETWORKS[network].captured(), NETWORKS[network].calibration()
    for name, options, fixed in [
        ("prune_weights", {"sparsity": 0.7, "criterion": "magnitude"}, None),
        ("kmeans", {"bits": 2, "metric": "weight"}, "indices"),
        ("hashed", {"factor": 0.25, "min_weights": 8, "metric": "weight"}, "hash"),
    ]:
        model, _ = apply(name, original, data, **options)
        trained, report = finetuned(model, data, original=original, epochs=1)
        marked = {layer.name: layer for layer in layers(trained) if layer.computed}
        assert marked.keys() <= {edit.layer for edit in report.edits}
        for layer in [layer for layer in layers(model) if layer.computed]:
            zeros = surgery.weight_of(layer) == 0
            assert torch.equal(zeros, surgery.weight_of(marked[layer.name]) == 0)
        before = bytes_of(model)
        kept = [key for key in before if fixed and key.endswith(fixed)]
        assert bool(kept) == (fixed is not None)
        assert all(torch.equal(before[key], trained.state_dict()[key]) for key in kept)


class Tied(nn.Module):
    """Two layers that share a weight, one called twice, and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(4, 4), nn.Linear(4, 4), nn.Parameter(torch.ones(4))
        self.second.weight = self.first.weight
        self.norm, self.head = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(self.first(x)) * self.gain).relu()))


def tied_model():
    torch.manual_seed(0)
    return capture(Tied(), X)


LABELLED = Data(training=[(X, torch.arange(8) % 3)] * 2)


def test_ties_stay_one_parameter():
    model = tied_model()
    trained, report = finetuned(model, LABELLED)
    assert trained.get_parameter("second.weight") is trained.get_parameter("first.weight")
    assert len(list(trained.parameters())) == len(list(model.parameters()))
    assert {edit.layer for edit in report.edits} == {"first", "second", "gain", "norm", "head"}
    assert all(a is not b for a, b in zip(trained.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "moved"),
    [
        ({"select": ("head",)}, {"head"}),
        ({"select": ("gain", "BatchNorm1d")}, {"gain", "norm"}),
        ({"exclude": ("norm", "Operand")}, {"first", "second", "head"}),
        ({"exclude": ("second", "norm")}, {"first", "gain", "head"}),
    ],
)
def test_layers_that_are_not_selected_stay_bit_for_bit(options, moved):
    model = tied_model()
    trained, report = finetuned(model, LABELLED, **options)
    assert {edit.layer for edit in report.edits} == moved
    before, after = bytes_of(model), bytes_of(trained)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in changed} == moved
    if "second" in options.get("exclude", ()):
        assert "first.weight" not in changed  # it is the weight of the layer that stays


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(RecipeError, match="matches no layer"):
        finetuned(tied_model(), LABELLED, select=("hed",))


def test_batchnorm_renews_its_statistics_or_keeps_them():
    model = tied_model()
    renewed, frozen = (finetuned(model, LABELLED, freeze_batchnorm=on)[0] for on in (False, True))
    for name in ("norm.running_mean", "norm.running_var"):
        assert not torch.equal(renewed.get_buffer(name), model.get_buffer(name))
        assert torch.equal(frozen.get_buffer(name), model.get_buffer(name))
    assert not torch.equal(frozen.get_parameter("norm.weight"), model.get_parameter("norm.weight"))
    assert not any(module.training for module in renewed.modules())


def test_a_batch_of_one_says_what_to_do_about_batchnorm():
    with pytest.raises(PassError, match="more than 1 value per channel") as caught:
        finetuned(tied_model(), [X, X[:1]])
    assert "freeze_batchnorm" in caught.value.fix
    assert finetuned(tied_model(), [X, X[:1]], freeze_batchnorm=True)[0]


def test_frozen_parameters_are_skipped_with_the_reason():
    model = tied_model()
    model.get_submodule("norm").requires_grad_(False)
    trained, report = finetuned(model, LABELLED)
    assert [(skip.layer, skip.why) for skip in report.skips] == [("norm", "its parameters are frozen")]
    assert torch.equal(trained.get_buffer("norm.running_mean"), model.get_buffer("norm.running_mean"))
    model.requires_grad_(False)
    trained, report = finetuned(model, LABELLED)
    assert not report.edits
    assert {skip.layer for skip in report.skips} == {"first", "second", "gain", "norm", "head"}


def test_integers_are_skipped_and_a_recipe_that_trains_them_is_refused():
    from surgery.recipe import resolve

    model, _ = apply("quantize", linear())
    trained, report = finetuned(model)
    assert not report.edits
    assert same(bytes_of(trained), bytes_of(model))
    with pytest.raises(RecipeError, match=r"finetune cannot run after quantize: .*quantize: {training") as caught:
        resolve({"name": "r", "passes": ["quantize", "finetune"]}, REGISTRY)
    assert "put finetune before quantize" in caught.value.fix


# --- the same bytes ---


def test_the_same_seed_gives_the_same_bytes_and_leaves_torchs_generator_alone():
    model, data = tied_model(), Data(training=[(X[i : i + 4], torch.arange(4) % 3) for i in range(5)])
    state = torch.get_rng_state()
    one, other, third = (bytes_of(finetuned(model, data, seed=seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert same(one, other)
    assert not same(one, third)


class AsTheyCome:
    """Batches without a number, and a note of what was asked for."""

    def __init__(self) -> None:
        self.gone = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.gone += 1
        yield from (X, X * 2, X * 3)


def test_batches_that_have_no_number_are_taken_as_they_come():
    model, batches = tied_model(), AsTheyCome()
    one, other = (bytes_of(finetuned(model, batches, seed=seed, epochs=2)[0]) for seed in (1, 2))
    assert same(one, other)  # nothing else is left to chance
    assert batches.gone == 2 * (2 + 1)  # they are counted first


def test_a_run_that_is_resumed_in_the_middle_gives_the_same_bytes(tmp_path):
    model, data = Tied().eval(), Data(calibration=[X, X + 1])
    recipe = {"name": "r", "passes": ["finetune", {"finetune": {"epochs": 1}}]}

    def run(out, **options):
        return surgery.operate(model, X, recipe, data=data, out=out, latency_rounds=0, registry=REGISTRY, **options)

    def stop(what, done, total):
        if (what, done) == ("finetune", 2):
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", progress=stop)
    resumed = run(tmp_path / "killed", resume=True)
    assert same(bytes_of(resumed.model), bytes_of(whole.model))
    files = [(tmp_path / name / "model.onnx").read_bytes() for name in ("whole", "killed")]
    assert files[0] == files[1]


# --- accelerate ---


def test_a_callers_own_accelerator_goes_on_as_it_was():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    own = Accelerator(cpu=True, gradient_accumulation_steps=3)
    before = dict(AcceleratorState._shared_state)
    finetuned(linear(), Data(training=[(X, torch.arange(8) % 3)]))
    assert AcceleratorState._shared_state == before
    assert own.device.type == "cpu"
    assert own.gradient_accumulation_steps == 3
    model = own.prepare(nn.Linear(4, 3))
    own.backward(model(X).sum())
    assert model.weight.grad is not None


def test_nothing_of_ours_is_left_in_the_process():
    from accelerate.state import AcceleratorState, PartialState

    shared = (PartialState._shared_state, AcceleratorState._shared_state)
    for state in shared:
        state.clear()
    with accelerator("cpu") as made:
        assert made.device.type == "cpu"
        assert all(shared)
    assert not any(shared)


def test_without_accelerate_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match="not installed") as caught:
        finetuned(linear())
    assert 'pip install "model-surgery[train]"' in caught.value.fix


# --- what it is worth, on the digits ---


@cache
def trained_digits():
    """A small network that knows the digits, and data without labels."""
    torch.manual_seed(0)
    images, labels = digits()
    network = nn.Sequential(
        *(nn.Conv2d(1, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(12, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )
    network = train(network, images[360:], labels[360:], 8, lambda *_: None)
    return capture(network, images[:2]), Data(calibration=list(images[360:].split(64)))


def agreement(model):
    """With the original, on 360 held-out digits; and accuracy."""
    images, labels = digits()
    with torch.no_grad():
        own, wanted = (m(images[:360]).argmax(1) for m in (model, trained_digits()[0]))
    return float((own == wanted).float().mean()), float((own == labels[:360]).float().mean())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("prune_weights", {"sparsity": 0.7, "criterion": "magnitude"}),
        ("hashed", {"factor": 0.25, "metric": "weight", "min_weights": 200}),
        ("kmeans", {"bits": 1, "metric": "weight"}),
        ("svd", {"layer_macs": 0.5}),
    ],
)
def test_without_a_label_a_model_that_lost_much_comes_near_to_the_original_again(name, options):
    original, data = trained_digits()
    operated, _ = apply(name, original, data, **options)
    trained, _ = finetuned(operated, data, original=original, learning_rate=5e-3)
    before, after = agreement(operated), agreement(trained)
    assert all(1 - a < 0.55 * (1 - b) for a, b in zip(after, before, strict=True)), (before, after)
