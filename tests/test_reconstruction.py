"""Weights solved anew after filters went."""

from __future__ import annotations

import copy

import pytest
import torch
from pruning_trials import captured, pruned, registry_of, widths
from surgery_plugins.prune_filters import PruneFilters
from torch import nn

import surgery
from surgery import (
    Context,
    Data,
    capture,
)
from surgery.calibration import affine_maps
from surgery.captured import relative_error
from surgery.testing import NETWORKS, networks
from surgery.testing.trial import first_difference, state_of


def redundant():
    """Of eight channels 5 repeats 2, 7 is twice 2, and 6 is always 1.5; behind a ReLU all of them."""
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[5], first.bias[5] = first.weight[2], first.bias[2]
        first.weight[7], first.bias[7] = first.weight[2] * 2, first.bias[2] * 2
        first.weight[6], first.bias[6] = 0, 1.5
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    return capture(model, torch.randn(2, 3, 8, 8))


def without(model, *units, **options):
    """`model` without these units of its first group, with reconstruction, and its relative error on other data."""
    given = registry_of(lambda found: [torch.tensor([float(u not in units) for u in range(8)]), torch.ones(4)])
    data = [torch.randn(64, 3, 8, 8) for _ in range(4)]
    step = PruneFilters(ratio=len(units) / 8, criterion="given", select=("0",), **options)
    result, report = step(model, Context(model, Data(data), registry=given))
    assert result.get_submodule("0").out_channels == 8 - len(units)
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        return result, report, relative_error(result(x), model(x))


@pytest.mark.parametrize(("ridge", "bound"), [(1e-4, 5e-3), (1e-7, 5e-4)])
def test_channels_that_others_make_up_for_can_go_without_a_loss(monkeypatch, ridge, bound):
    monkeypatch.setattr(surgery.Regression, "damping", lambda self, share=None: ridge * self.x_mean.new_ones(1))
    model = redundant()
    assert without(model, 5, 6, 7)[2] < bound
    assert without(model, 5, 6, 7, reconstruct=False)[2] > 0.05


def test_what_a_constant_channel_gave_goes_into_the_bias():
    model = redundant()
    result, report, error = without(model, 6)
    assert error < 1e-4
    before, after = model.get_submodule("2"), result.get_submodule("2")
    kept = [0, 1, 2, 3, 4, 5, 7]
    torch.testing.assert_close(after.weight, before.weight[:, kept], rtol=0, atol=5e-3)
    torch.testing.assert_close(after.bias, before.bias + 1.5 * before.weight[:, 6, 0, 0], rtol=0, atol=5e-3)
    assert {e.layer for e in report.edits if "anew" in e.what} == {"0", "2", "5"}


def test_layers_before_the_first_that_lost_anything_keep_their_weights():
    model = redundant()
    given = registry_of(lambda found: [torch.ones(8), torch.tensor([0.0, 1.0, 1.0, 1.0])])
    step = PruneFilters(ratio=0.25, criterion="given", select=("2",))
    result, report = step(model, Context(model, Data([torch.randn(64, 3, 8, 8)]), registry=given))
    assert {edit.layer for edit in report.edits if "anew" in edit.what} == {"2", "5"}
    for name, value in model.get_submodule("0").state_dict().items():
        assert torch.equal(result.get_submodule("0").state_dict()[name], value)


def test_channels_that_vary_only_by_rounding_do_not_become_large_weights():
    """What the others knew is lost: to have it back from these would take weights of 1e5, which show the rounding."""
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[:5] *= 1e-6
        first.bias[:5] = 1.5
    model = capture(nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(256, 3)), torch.randn(2, 3, 8, 8))
    small, _, _ = without(model, 5, 6, 7)
    assert float(small.get_submodule("2").weight.detach().abs().max()) < 2
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        assert relative_error(small(x).double(), copy.deepcopy(small).double()(x.double())) < 1e-6


@pytest.mark.parametrize("network", NETWORKS.values(), ids=str)
def test_no_layer_is_worse_for_being_solved_anew(network):
    if network.name in ("lstm", "gru"):
        pytest.skip("nothing can be removed")
    model, report = pruned(network.name, data=True, ratio=0.5)
    numbers = {e.layer: e.numbers for e in report.edits if "error_after" in e.numbers}
    solvable = {affine.layer.name for affine in affine_maps(model)}
    assert numbers.keys() == solvable
    for own in numbers.values():
        assert 0 <= own["error_after"] <= own["error_before"] * (1 + 1e-9) + 1e-9


GAINS = ("plain_cnn", "residual", "grouped_depthwise", "transposed_conv", "conv_1d", "conv_3d", "constant_views")


@pytest.mark.parametrize("name", GAINS)
def test_the_output_is_nearer_to_the_original_for_reconstruction(name):
    network, errors = NETWORKS[name], []
    x = torch.cat(network.calibration(batches=8))
    data = Data(network.calibration(batches=16))
    for reconstruct in (False, True):
        step = PruneFilters(ratio=0.4, criterion="l2", reconstruct=reconstruct)
        result, _ = step(captured(name), Context(captured(name), data))
        expected = network.call(captured(name), x)
        errors.append(float((network.call(result, x) - expected).norm() / expected.norm()))
    assert errors[1] < 0.8 * errors[0]


def norm_inputs(model, batches):
    """What every BatchNorm takes in, by name."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values).transpose(0, 1).flatten(1).double() for name, values in seen.items()}


@pytest.mark.parametrize("name", ["plain_cnn", "residual", "transposed_conv", "conv_1d", "conv_3d"])
def test_batchnorm_keeps_the_statistics_of_its_new_input_and_the_model_trains(name):
    network = NETWORKS[name]
    model, _ = pruned(name, data=True, ratio=0.5)
    inputs = norm_inputs(model, network.calibration())
    behind = {a.norm.name for a in affine_maps(model) if a.norm is not None}
    assert behind
    for norm in behind:
        module, rows = model.get_submodule(norm), inputs[norm]
        torch.testing.assert_close(module.running_mean.double(), rows.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(module.running_var.double(), rows.var(1, correction=0), rtol=1e-3, atol=1e-5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, losses = torch.cat(network.calibration()), []
    for _ in range(8):
        losses.append((model(x) - 1).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert losses[-1].item() < losses[0].item()


def test_a_layer_that_is_called_twice_and_tied_layers_are_left_alone():
    for name, layers in (("shared_module", ["shared", "norm"]), ("tied_weights", ["embed", "decode"])):
        plain, _ = pruned(name, data=True, ratio=0.5, criterion="l2", reconstruct=False)
        solved, report = pruned(name, data=True, ratio=0.5, criterion="l2")
        assert not {e.layer for e in report.edits if "anew" in e.what} & set(layers)
        for layer in layers:
            assert first_difference(*(state_of(m.get_submodule(layer)) for m in (plain, solved))) is None
        assert first_difference(state_of(plain), state_of(solved)) is not None


def test_a_residual_sum_is_aimed_at_by_the_last_of_its_terms_less_the_operated_rest():
    maps = {affine.layer.name: affine for affine in affine_maps(captured("residual"))}
    first, shortcut, second = (maps[name] for name in ("first.1", "shortcut.0", "second.1"))
    (total,) = first.end.users
    aim = first.step().aim
    assert (aim.target, aim.minus) == (total.name, tuple(n.name for n in total.all_input_nodes if n is not first.end))
    earlier, later = sorted((shortcut, second), key=lambda a: a.end)
    (total,) = later.end.users
    assert (earlier.step().aim.target, earlier.step().aim.minus) == (earlier.end.name, ())
    assert (later.step().aim.target, later.step().aim.minus) == (total.name, (earlier.end.name,))
    assert later.step().rectified
    assert not earlier.step().rectified


def test_a_bias_is_added_only_where_no_batchnorm_has_one():
    residual, _ = pruned("residual", data=True, ratio=0.5)
    assert all(residual.get_submodule(name).bias is None for name in ("stem.0", "first.0.0", "first.1", "shortcut.0"))
    assert float(residual.get_submodule("second.1").bias.detach().abs().max()) == 0
    assert captured("windows").get_submodule("qkv").bias is None
    windows, _ = pruned("windows", data=True, ratio=0.5)
    assert windows.get_submodule("qkv").bias.shape == (windows.get_submodule("qkv").out_features,)


def test_a_trained_network_keeps_its_accuracy_at_half_the_macs(shared):
    import cifar10
    import resnet_cifar

    train, (pictures, labels) = cifar10.lossless("train")[0], cifar10.lossless("test")
    data = list(resnet_cifar.normalise(torch.from_numpy(train[:512])).split(128))
    test, labels = resnet_cifar.normalise(torch.from_numpy(pictures)), torch.from_numpy(labels)
    original = capture(resnet_cifar.resnet20(), data[0][:2])
    accuracy = {}
    for options in ({}, {"reconstruct": False}):
        result, _ = PruneFilters(macs=0.5, **options)(original, Context(original, Data(data)))
        before, after = (surgery.measure(m, original.inputs).macs for m in (original, result))
        assert after / before == pytest.approx(0.5, rel=0.01)
        with torch.no_grad():
            accuracy[not options] = float((result(test).argmax(1) == labels).float().mean())
    assert len(labels) == 846
    assert accuracy[True] >= 0.80
    assert accuracy[False] <= 0.40


@pytest.mark.parametrize("network", networks("residual", "constant_views", "functional_conv", "attention"), ids=str)
def test_several_steps_with_reconstruction_run_on_what_is_left(network):
    model, report = pruned(network.name, data=True, ratio=0.5, steps=3)
    once = widths(pruned(network.name, data=True, ratio=0.5)[0])
    assert all(once[layer] <= n <= 1.2 * once[layer] for layer, n in widths(model).items())
    assert any("anew" in edit.what for edit in report.edits)
