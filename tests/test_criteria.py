"""Criteria of importance, each against a plain computation of the same quantity on the eager model."""

from __future__ import annotations

import copy
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from surgery_plugins.prune_filters import PruneFilters
from surgery_plugins.prune_filters.losses import Oracle
from torch import nn
from torch.utils._pytree import tree_leaves

from surgery import Context, Data, InputError, ModelError, PassError, Registry, capture, find_channels
from surgery.testing import NETWORKS
from surgery.testing.trial import first_difference, state_of

CRITERIA = Registry.load().criteria
RESIDUAL = NETWORKS["residual"]
STREAM = {"convs": ("stem.0", "first.1"), "norms": ("stem.1", "first.2")}  # what gives the channels of group 0


@cache
def prepared(name):
    """The eager model, and what is known about the channels of its captured form."""
    network = NETWORKS[name]
    model = network.model()
    captured = capture(model, network.inputs())
    return model, captured, find_channels(captured)


def labelled(network, classes=4):
    batches = network.calibration()
    targets = torch.randint(0, classes, (len(batches), 8), generator=torch.Generator().manual_seed(5))
    return list(zip(batches, targets, strict=True))


def scores(criterion, name, *, loss=None, seed=0, training=None):
    """Per group by name of its first layer."""
    _, captured, found = prepared(name)
    network = NETWORKS[name]
    data = Data(network.calibration(), training=training or labelled(network), loss=loss)
    context = Context(captured, data, seed=seed)
    return [*context.criterion(criterion).scores(found, context)]


def read_by(model, *layers):
    """Runs the calibration batches through the eager model: what each of `layers` was called on, all samples."""
    seen = {name: [] for name in layers}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
        for name in layers
    ]
    for batch in RESIDUAL.calibration():
        RESIDUAL.call(model, batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(seen[name]).double() for name in layers]


def distances_to_the_others(weight):
    rows = weight.flatten(1)
    return torch.stack([sum((row - other).norm() for other in rows) for row in rows])


@pytest.mark.parametrize(
    ("criterion", "measure"),
    [
        ("l1", lambda weight: torch.stack([row.abs().sum() for row in weight])),
        ("l2", lambda weight: torch.stack([row.square().sum().sqrt() for row in weight])),
        ("geometric_median", distances_to_the_others),
    ],
)
def test_a_criterion_of_weights_adds_up_over_the_layers_that_give_the_unit(criterion, measure):
    weights = [prepared("residual")[0].get_submodule(name).weight.detach().double() for name in STREAM["convs"]]
    torch.testing.assert_close(scores(criterion, "residual")[0], sum(map(measure, weights)))


def test_batchnorm_scale_adds_up_over_the_norms_of_the_unit():
    scales = [prepared("residual")[0].get_submodule(name).weight.detach().double() for name in STREAM["norms"]]
    torch.testing.assert_close(scores("batchnorm_scale", "residual")[0], sum(scale.abs() for scale in scales))


def test_batchnorm_scale_falls_back_on_l1_where_no_batchnorm_scales_the_units():
    fallback, plain = scores("batchnorm_scale", "attention"), scores("l1", "attention")
    assert plain
    assert all(torch.equal(a, b) for a, b in zip(fallback, plain, strict=True))


def test_random_scores_repeat_with_the_seed_and_change_with_it():
    first, again, other = (scores("random", "residual", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    ("criterion", "measure"),
    [("activation_mean", torch.Tensor.abs), ("apoz", lambda value: 1 - (value == 0).double())],
)
def test_a_criterion_of_activations_adds_up_over_the_places_where_layers_read_the_unit(criterion, measure):
    values = read_by(prepared("residual")[0], "first.0.0", "shortcut.0")
    expected = sum(measure(value).mean((0, 2, 3)) for value in values)
    torch.testing.assert_close(scores(criterion, "residual")[0], expected, rtol=1e-6, atol=1e-9)


def test_activations_are_averaged_over_tokens_wherever_the_batch_stands():
    network, (model, _, found) = NETWORKS["attention"], prepared("attention")
    batch = torch.cat(network.calibration())
    with torch.no_grad():
        x = model.embed(batch) + model.positions
        first = model.first_norm(x)
        x = x + model.attention(first, first, first, need_weights=False)[0]
        second = model.second_norm(x)
        read = [first, second, (x + model.mlp(second)).mean(1)]
    expected = sum(value.double().abs().reshape(-1, 16).mean(0) for value in read)
    assert found.walk.values[found.carriers[0][0].node].shape[:2] == (6, 2)  # tokens first
    torch.testing.assert_close(scores("activation_mean", "attention")[0], expected, rtol=1e-5, atol=1e-7)


def test_a_channel_that_is_always_zero_has_the_lowest_apoz_score_and_goes_first():
    model = RESIDUAL.model()
    with torch.no_grad():
        norm = model.first[0][1]
        norm.weight[5], norm.bias[5] = 0, -1
    captured = capture(model, RESIDUAL.inputs())
    context = Context(captured, Data(RESIDUAL.calibration()))
    inner = context.criterion("apoz").scores(find_channels(captured), context)[1]
    others = torch.arange(8) != 5
    assert inner[5] == 0
    assert bool((inner[others] > 0).all())
    step = PruneFilters(ratio=1 / 8, criterion="apoz", select=("first.0.0",), reconstruct=False)
    pruned, _ = step(captured, context)
    assert torch.equal(pruned.get_submodule("first.0.0").weight, model.first[0][0].weight[others])


def plain_information(values, classes):
    """I(level; class) by counting."""
    count = max(2, min(32, math.isqrt(len(values))))
    edges = np.quantile(values, np.linspace(0, 1, count + 1)[1:-1])
    levels = [sum(value > edge for edge in edges) for value in values]
    total = len(values)
    pairs, of_level, of_class = Counter(zip(levels, classes, strict=True)), Counter(levels), Counter(classes)
    return sum(
        n / total * math.log(n * total / (of_level[level] * of_class[label])) for (level, label), n in pairs.items()
    )


def test_mutual_information_counts_levels_of_the_mean_activation_against_classes():
    (values,) = read_by(prepared("residual")[0], "first.1")
    means = values.mean((2, 3)).numpy()
    classes = [int(target) for _, targets in labelled(RESIDUAL) for target in targets]
    expected = [plain_information(column, classes) for column in means.T]
    assert min(expected) > 0
    torch.testing.assert_close(scores("mutual_information", "residual")[1], torch.tensor(expected).double())


def test_mutual_information_is_zero_for_a_constant_and_the_entropy_for_the_class_itself():
    from surgery_plugins.prune_filters.information import mutual_information

    classes = torch.arange(64) % 2
    assert mutual_information(torch.full((64,), 3.0), classes) == 0
    torch.testing.assert_close(float(mutual_information(classes.float(), classes)), math.log(2))


def sample_products(network, model, layer, loss):
    """activation · gradient of what `layer` reads, from the loss of one sample after the other."""
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for inputs, targets in labelled(network):
        for sample in range(8):
            value = loss(model(inputs[sample : sample + 1]), targets[sample : sample + 1])
            (gradient,) = torch.autograd.grad(value, seen[-1:])
            seen[-1] = (seen[-1] * gradient).detach().double()
    hook.remove()
    return torch.cat(seen)


def test_taylor_is_the_mean_over_samples_of_activation_times_gradient():
    model = prepared("residual")[0]
    stream, inner = scores("taylor", "residual")[:2]
    first, second, third = (
        sample_products(RESIDUAL, model, name, F.cross_entropy).sum((2, 3)).abs().mean(0)
        for name in ("first.1", "first.0.0", "shortcut.0")
    )
    torch.testing.assert_close(inner, first, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(stream, second + third, rtol=1e-4, atol=1e-9)


def test_taylor_takes_the_loss_of_the_data_and_knows_where_the_samples_are():
    def squares(output, target):
        return (output - target[:, None]).square().mean()

    network, (model, _, found) = NETWORKS["attention"], prepared("attention")
    assert [group.name for group in found.groups][::2] == ["embed", "mlp.0"]
    attended, normed, classified, inner = (
        sample_products(network, model, name, squares) for name in ("attention", "mlp.0", "classify", "mlp.2")
    )
    stream = [attended.sum(1), normed.sum(1), classified]
    given = scores("taylor", "attention", loss=squares)
    torch.testing.assert_close(given[2], inner.sum(1).abs().mean(0), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(given[0], sum(part.abs().mean(0) for part in stream), rtol=1e-4, atol=1e-9)


def eager_loss(model):
    batches = labelled(RESIDUAL)
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(inputs), target)) for inputs, target in batches) / len(batches)


def test_oracle_is_the_loss_of_the_masked_model_less_that_of_the_model():
    model, captured, _ = prepared("residual")
    before, rises = state_of(captured), scores("oracle", "residual")[0]
    for unit in (0, 6):
        masked = copy.deepcopy(model)
        with torch.no_grad():
            for name in STREAM["convs"]:
                masked.get_submodule(name).weight[unit] = 0
            for name in STREAM["norms"]:
                for tensor in ("weight", "bias", "running_mean", "running_var"):
                    getattr(masked.get_submodule(name), tensor)[unit] = 0
            for name in ("first.0.0", "shortcut.0", "second.0.0"):
                masked.get_submodule(name).weight[:, unit] = 0
        assert float(rises[unit]) == pytest.approx(eager_loss(masked) - eager_loss(model), abs=1e-6)
    assert first_difference(state_of(captured), before) is None


def test_oracle_refuses_a_model_of_too_many_units(monkeypatch):
    monkeypatch.setattr(Oracle, "most_units", 39)
    with pytest.raises(PassError, match=r"evaluate the model 40 times.*at most 39"):
        scores("oracle", "residual")


READINGS = [
    ("plain_cnn", 0, {"2.0": lambda unit: [unit]}),
    ("plain_cnn", 1, {"5": lambda unit: range(unit * 16, unit * 16 + 16)}),
    ("residual", 0, dict.fromkeys(("first.0.0", "shortcut.0", "second.0.0"), lambda unit: [unit])),
    ("concatenation", 1, {"second.2": lambda unit: [6 + unit], "head.2": lambda unit: [6 + unit]}),
    ("grouped_depthwise", 0, {"1.0": lambda unit: [unit, unit + 4]}),
    ("transposed_conv", 0, {"1.0": lambda unit: [unit]}),
    ("transposed_conv", 1, {"2": lambda unit: [unit, unit + 4]}),
]
"""Network, number of the group, and by reader the channels of its input that are each unit's."""


def contributions_to(network, model, reader, channels, size):
    """(units, …) what each unit brings into the output of `reader`, over all calibration samples."""
    layer, seen = model.get_submodule(reader), []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in network.calibration():
        network.call(model, batch)
    hook.remove()
    x, parts = torch.cat(seen), []
    with torch.no_grad():
        nothing = layer(torch.zeros_like(x))
        for unit in range(size):
            alone = torch.zeros_like(x)
            alone[:, list(channels(unit))] = x[:, list(channels(unit))]
            parts.append((layer(alone) - nothing).double())
    return torch.stack(parts)


@pytest.mark.parametrize(("name", "number", "readers"), READINGS)
def test_thinet_scores_are_the_measured_change_of_the_next_layers_outputs(name, number, readers):
    network, (model, _, found) = NETWORKS[name], prepared(name)
    size, given = found.groups[number].size, scores("thinet", name)[number]
    parts = [contributions_to(network, model, reader, channels, size) for reader, channels in readers.items()]

    def error(units):
        """Squared change summed over output channels, meaned over positions and samples."""
        changes = [part[list(units)].sum(0) for part in parts]
        return sum(float(change.square().sum(1).mean()) for change in changes)

    gone, largest = [], 0.0
    for _ in range(size):
        chosen = min((u for u in range(size) if u not in gone), key=lambda u: error([*gone, u]))
        gone.append(chosen)
        largest = max(largest, error(gone))
        assert float(given[chosen]) == pytest.approx(largest, rel=1e-4)
    assert given.argsort().tolist() == gone


def test_thinet_judges_units_that_no_layer_reads_by_their_mean_square():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 6), nn.Linear(5, 6)

        def forward(self, x):
            return self.first(x) @ self.second(x).mT

    model = Product()
    data = [torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    captured = capture(model, data[0][:2])
    context = Context(captured, Data(data))
    given = context.criterion("thinet").scores(find_channels(captured), context)[0]
    x = torch.cat(data)
    power = sum(layer(x).detach().double().square().mean((0, 1)) for layer in (model.first, model.second))
    torch.testing.assert_close(given.sort().values, power.sort().values.cumsum(0), rtol=1e-5, atol=0)


def test_units_are_read_where_layers_take_them_and_not_where_they_pass():
    found = {name: prepared(name)[2] for name in ("shared_module", "grouped_depthwise")}
    readers = [[node.name for node in carrier.readers] for carrier in found["shared_module"].carriers[0]]
    assert readers == [["shared"], ["shared_1"], ["head_2"]]
    (expansion,) = found["grouped_depthwise"].carriers[2]
    assert found["grouped_depthwise"].groups[2].name == "2.0.0"
    assert [node.target for node in expansion.readers] == ["2.2"]  # not the depthwise 2.1.0


def sum_of_squares(output, target):
    return sum(value.square().mean() for value in tree_leaves(output))


@pytest.mark.parametrize("network", NETWORKS.values(), ids=str)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_criterion_prunes_every_network(criterion, network):
    _, captured, found = prepared(network.name)
    context = Context(captured, Data(network.calibration(), training=labelled(network), loss=sum_of_squares))
    step = PruneFilters(ratio=0.5, criterion=criterion, reconstruct=False)
    if not found.groups:
        with pytest.raises(ModelError, match="nothing can be removed"):
            step(captured, context)
        return
    pruned, report = step(captured, context)
    assert report.modified
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in captured.parameters())
    assert all(bool(t.isfinite().all()) for t in tree_leaves(network.call(pruned, network.inputs())))


NEEDS = [(name, "calibration") for name, cls in CRITERIA.items() if cls.needs_calibration]
NEEDS += [(name, "training") for name, cls in CRITERIA.items() if cls.needs_training]


@pytest.mark.parametrize(("criterion", "role"), NEEDS)
def test_missing_or_empty_data_is_an_error_that_leaves_the_model_alone(criterion, role):
    captured = prepared("residual")[1]
    before = state_of(captured)
    step = PruneFilters(ratio=0.5, criterion=criterion)
    with pytest.raises(InputError, match=f"criterion {criterion} needs {role} data"):
        step(captured, Context(captured))
    with pytest.raises(InputError, match=f"{role} data has no batches"):
        step(captured, Context(captured, Data(**{role: []})))
    assert first_difference(state_of(captured), before) is None


@pytest.mark.parametrize(
    ("criterion", "batch", "loss", "message"),
    [
        ("taylor", torch.rand(2, 3, 8, 8), None, "training batch 0"),
        ("taylor", (torch.rand(2, 3, 9, 8), torch.zeros(2).long()), None, "height is fixed at 8, and input x has 9"),
        ("taylor", (torch.full((2, 3, 8, 8), torch.nan), torch.zeros(2).long()), None, "NaN"),
        ("taylor", (torch.rand(2, 3, 8, 8), torch.rand(3)), None, r"no cross-entropy of an output \(2, 5\)"),
        ("taylor", (torch.rand(2, 3, 8, 8), None), lambda output, target: output, "return a scalar"),
        ("taylor", (torch.rand(2, 3, 8, 8), None), lambda output, target: output.detach().sum(), "no gradient"),
        ("oracle", (torch.rand(2, 3, 8, 8), None), lambda output, target: float(output.sum()), "return a scalar"),
        ("mutual_information", (torch.rand(2, 3, 8, 8), torch.rand(2)), None, "one class per sample"),
        ("mutual_information", (torch.rand(2, 3, 8, 8), [0, 1]), None, "the target is list"),
    ],
)
def test_data_that_a_criterion_cannot_use_is_an_error(criterion, batch, loss, message):
    captured = prepared("residual")[1]
    with pytest.raises(InputError, match=message):
        PruneFilters(ratio=0.5, criterion=criterion)(captured, Context(captured, Data(training=[batch], loss=loss)))


def test_scores_do_not_depend_on_how_the_data_is_cut_into_batches():
    network = RESIDUAL
    whole = [tuple(torch.cat(parts) for parts in zip(*labelled(network), strict=True))]
    cut = [(x[i : i + 4], y[i : i + 4]) for x, y in whole for i in range(0, 16, 4)]
    for criterion in ("taylor", "oracle", "mutual_information"):
        results = [scores(criterion, "residual", training=training) for training in (whole, cut)]
        for first, second in zip(*results, strict=True):
            torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-6)


def test_thinet_reads_the_weights_of_functional_layers():
    network, (model, _, found) = NETWORKS["functional_conv"], prepared("functional_conv")
    assert found.groups[0].name == "weight"
    with torch.no_grad():
        x = F.relu(model.norm(F.conv2d(torch.cat(network.calibration()), model.weight, padding=1))).double()
    weight = model.pointwise.detach().double()
    alone = [F.conv2d(x[:, u : u + 1], weight[:, u : u + 1]).square().sum(1).mean() for u in range(8)]
    given = scores("thinet", "functional_conv")[0]
    assert int(given.argmin()) == int(torch.stack(alone).argmin())
    torch.testing.assert_close(given.min(), min(alone), rtol=1e-5, atol=0)
