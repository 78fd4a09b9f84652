"""Quantisers to train through: values and gradients as their papers have them, also inside a captured graph."""

from __future__ import annotations

import math
from itertools import product

import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_plugins.quantize.fixed_point import (
    DB_PER_BIT,
    GAUSSIAN_STEPS,
    bit_widths,
    fraction_bits,
    modelled_noise,
    sqnr,
)
from surgery_plugins.quantize.scheme import Grid, affine
from surgery_plugins.quantize.training import (
    binary_connect,
    clamped,
    fake_quantised,
    fixed_point,
    qnn_binary,
    qnn_linear,
    qnn_log,
    stochastic,
    xnor,
)
from surgery_plugins.quantize.weights import weight_scheme
from torch import nn

import surgery
from surgery import PluginError, capture

VALUES = torch.tensor([[-3.0, -1.0, -0.6, -0.26, 0.0], [0.1, 0.5, 0.74, 1.0, 2.5]])
INSIDE = (VALUES.abs() <= 1).float()
WEIGHTS = {
    "fake_quantised": lambda w: fake_quantised(w, weight_scheme(torch.ones(4, 1), Grid.signed(3))),
    "fixed_point": lambda w: fixed_point(w, 1, 3),
    "binary_connect": binary_connect,
    "xnor": xnor,
    "qnn_binary": qnn_binary,
    "qnn_linear": lambda w: qnn_linear(w, 3),
    "qnn_log": lambda w: qnn_log(w, 3),
}


def value_and_gradient(function, x=VALUES, seen=None):
    """What comes out, and the gradient of Σ seen · out."""
    x = x.clone().requires_grad_()
    out = function(x)
    (out * (torch.ones_like(x) if seen is None else seen)).sum().backward()
    return out.detach(), x.grad


@pytest.mark.parametrize("axis", [None, 0, 1])
def test_fake_quantisation_rounds_as_the_scheme_and_its_gradient_stops_where_it_clamps(axis):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    high = 1.0 if axis is None else torch.linspace(0.3, 2, x.shape[axis])
    scheme = affine(-0.5 * torch.as_tensor(high), high, Grid.unsigned(4), axis=axis)
    out, gradient = value_and_gradient(lambda x: fake_quantised(x, scheme), x)
    assert torch.equal(out, scheme.round(x))
    unclamped = (x / scheme.along(scheme.scale, x)).round() + scheme.along(scheme.zero_point, x)
    assert torch.equal(gradient, ((unclamped >= 0) & (unclamped <= 15)).float())


def test_fixed_point_numbers_are_multiples_of_a_power_of_two_within_their_range():
    out, gradient = value_and_gradient(lambda x: fixed_point(x, 2, 2))
    assert out.tolist() == [[-2, -1, -0.5, -0.25, 0], [0, 0.5, 0.75, 1, 1.75]]
    assert gradient.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]


@given(st.floats(-4, 4, width=32), st.integers(1, 3), st.integers(-1, 5))
def test_stochastic_rounding_gives_a_neighbour_and_is_right_in_the_mean(x, integer_bits, fraction):
    step, limit = 2.0**-fraction, 2.0 ** (integer_bits - 1)
    noise = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    value = torch.tensor(x, dtype=torch.float64).expand(1000)
    found = stochastic(value, noise, integer_bits, fraction)
    kept = min(max(x, -limit), limit - step)
    assert float((found - kept).abs().max()) < step
    assert torch.equal(fixed_point(found, integer_bits, fraction), found) or limit < step
    assert float(found.mean()) == pytest.approx(kept, abs=step / 1000)


def test_stochastic_rounding_passes_the_gradient_within_the_range():
    noise = torch.rand(VALUES.shape, generator=torch.Generator().manual_seed(0))
    gradient = value_and_gradient(lambda x: stochastic(x, noise, 1, 4))[1]
    assert torch.equal(gradient, ((VALUES >= -1) & (VALUES <= 1 - 2**-4)).float())


def test_binary_connect_is_the_sign_with_an_unchanged_gradient():
    seen = torch.randn(VALUES.shape, generator=torch.Generator().manual_seed(0))
    out, gradient = value_and_gradient(binary_connect, seen=seen)
    assert out.tolist() == [[-1, -1, -1, -1, 1], [1, 1, 1, 1, 1]]
    assert torch.equal(gradient, seen)


def test_stochastic_binary_connect_is_positive_as_often_as_the_hard_sigmoid_says():
    noise = torch.arange(1000).view(-1, 1, 1) / 1000
    share = (binary_connect(VALUES.expand(1000, 2, 5), noise) > 0).float().mean(0)
    torch.testing.assert_close(share, ((VALUES + 1) / 2).clamp(0, 1), atol=1e-3, rtol=0)


def test_weights_of_binary_connect_are_clamped_after_an_update():
    assert clamped(VALUES).tolist() == VALUES.clamp(-1, 1).tolist()
    w = nn.Parameter(torch.tensor([0.9, -0.2]))
    optimiser = torch.optim.SGD([w], lr=1.0)
    (binary_connect(w) * torch.tensor([-1.0, 0.5])).sum().backward()
    optimiser.step()
    assert clamped(w.detach()).tolist() == pytest.approx([1.0, -0.7])


def test_binarised_weights_have_the_scale_of_their_channel_and_the_gradient_of_the_paper():
    seen = torch.randn(VALUES.shape, generator=torch.Generator().manual_seed(0))
    out, gradient = value_and_gradient(xnor, seen=seen)
    scale = VALUES.abs().mean(1, keepdim=True)
    assert torch.equal(out.abs(), scale.expand_as(out))
    torch.testing.assert_close(gradient, seen * (1 / 5 + scale * INSIDE), rtol=1e-6, atol=1e-6)


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=12))
def test_no_other_scale_of_signs_comes_nearer_to_the_weights(values):
    w = torch.tensor([values], dtype=torch.float64)
    least = float((w - xnor(w)).square().sum())
    scale = float(w.abs().mean())
    signs = torch.where(w >= 0, 1.0, -1.0)
    for other in (0.9 * scale, 1.1 * scale, scale + 0.01):
        assert least <= float((w - other * signs).square().sum()) + 1e-9
    assert least <= float((w + scale * signs).square().sum()) + 1e-9


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (qnn_binary, [[-1, -1, -1, -1, 1], [1, 1, 1, 1, 1]]),
        (lambda x: qnn_linear(x, 3), [[-1, -1, -0.5, -0.25, 0], [0, 0.5, 0.75, 0.75, 0.75]]),
        (lambda x: qnn_log(x, 3), [[-1, -1, -0.5, -0.25, 0], [0.125, 0.5, 0.5, 1, 1]]),
    ],
    ids=["binary", "linear", "log"],
)
def test_qnn_values_pass_the_gradient_between_minus_one_and_one(function, wanted):
    wanted = torch.tensor(wanted, dtype=torch.float32)
    if wanted[1, 2] == 0.5:
        wanted[1, 2] = 2.0 ** round(math.log2(0.74))
    out, gradient = value_and_gradient(function)
    assert torch.equal(out, wanted)
    assert torch.equal(gradient, INSIDE)


@pytest.mark.parametrize("name", ["fixed_point", "qnn_linear", "qnn_log", "qnn_binary"])
@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=10))
def test_quantising_twice_is_quantising_once(name, values):
    once = WEIGHTS[name](torch.tensor(values))
    assert torch.equal(WEIGHTS[name](once), once)


@pytest.mark.parametrize("name", list(WEIGHTS))
def test_a_layer_trains_through_its_computed_weight(name):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)), torch.randn(2, 3, 6, 6)
    model = capture(network, x)
    layer = surgery.layers(model)[0]
    weight = nn.Parameter(layer.module.weight.detach().clone())
    surgery.replace_weight(model, layer, lambda weight: WEIGHTS[name](weight), {"weight": weight})
    model.recompile()
    by_hand = weight.detach().clone().requires_grad_()
    out = network[3](torch.conv2d(x, WEIGHTS[name](by_hand), network[0].bias).relu().flatten(1))
    torch.testing.assert_close(model(x), out, rtol=1e-6, atol=1e-6)
    model(x).square().sum().backward()
    out.square().sum().backward()
    assert bool(by_hand.grad.any())
    torch.testing.assert_close(weight.grad, by_hand.grad, rtol=1e-5, atol=1e-6)


def test_every_quantiser_is_exported_as_it_stands(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 4)
    model = capture(nn.Sequential(*[nn.Linear(4, 4) for _ in WEIGHTS]), x)
    for layer, quantise in zip(surgery.layers(model), WEIGHTS.values(), strict=True):
        weight = nn.Parameter(layer.module.weight.detach().clone())
        surgery.replace_weight(model, layer, lambda weight, quantise=quantise: quantise(weight), {"weight": weight})
    model.recompile()
    surgery.export_onnx(model, x, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), rtol=1e-5, atol=1e-5)


def noise_of(step, bits):
    """Of 2^bits even levels about zero on the standard normal distribution, by the trapezoidal rule."""
    x = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    half = 2**bits / 2
    level = ((x / step).floor().clamp(-half, half - 1) + 0.5) * step
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    return float(torch.trapezoid((x - level).square() * density, x))


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_steps_for_normal_values_are_the_best_ones(bits):
    step = GAUSSIAN_STEPS[bits - 1]
    own = noise_of(step, bits)
    assert own < noise_of(0.99 * step, bits)
    assert own < noise_of(1.01 * step, bits)


@given(st.floats(1e-3, 1e3), st.integers(1, 8))
def test_the_point_stands_where_the_step_is_the_next_above_the_best(std, bits):
    step = 2.0 ** -fraction_bits(std, bits)
    assert step / 2 < std * GAUSSIAN_STEPS[bits - 1] <= step * (1 + 1e-12)


def test_signal_to_noise_is_in_decibels():
    x = torch.tensor([3.0, -4.0])
    assert sqnr(x, x + torch.tensor([0.3, 0.4])) == pytest.approx(20, abs=1e-5)
    assert sqnr(x, x) == math.inf


@pytest.mark.parametrize("average", [2.0, 3.5, 6.0])
def test_bits_differ_as_the_sizes_do_in_decibels(average):
    sizes = [100, 1600, 25_600, 400]
    bits = bit_widths(modelled_noise(4, 32), sizes, average)
    assert sum(b * s for b, s in zip(bits, sizes, strict=True)) <= average * sum(sizes)
    for i, j in product(range(4), repeat=2):
        wanted = 10 / DB_PER_BIT * math.log10(sizes[j] / sizes[i])
        if min(bits[i], bits[j]) > 1:
            assert abs(bits[i] - bits[j] - wanted) <= 1 + 1e-9


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.integers(0, 99), st.floats(1, 4))
def test_no_other_allocation_with_the_same_cost_has_less_noise(sizes, seed, average):
    generator = torch.Generator().manual_seed(seed)
    falls = torch.rand(len(sizes), 4, generator=generator, dtype=torch.float64) * 0.5
    noise = 10 * falls.cumprod(1)  # each further bit takes away less
    bits = bit_widths(noise, sizes, average)
    spent, own = cost_of(bits, sizes), noise_in_all(bits, noise)
    assert spent <= average * sum(sizes) + 1e-9
    for other in product(range(1, 5), repeat=len(sizes)):
        if cost_of(other, sizes) <= spent:
            assert own <= noise_in_all(other, noise) + 1e-12


def cost_of(bits, sizes):
    return sum(b * s for b, s in zip(bits, sizes, strict=True))


def noise_in_all(bits, noise):
    return sum(float(noise[i, b - 1]) for i, b in enumerate(bits))


def test_less_than_a_bit_is_refused():
    with pytest.raises(PluginError, match=r"0\.5 bits a weight"):
        bit_widths(modelled_noise(2, 8), [1, 1], 0.5)
