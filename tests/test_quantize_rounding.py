"""Rounding that the outputs feel least, corrected biases, and equalised channels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.quantize.adaround import adaround
from surgery_plugins.quantize.equalisation import equalise, pairs
from surgery_plugins.quantize.gptq import gptq
from surgery_plugins.quantize.rounding import cost, descended, in_steps, nearest
from surgery_plugins.quantize.scheme import Grid
from surgery_plugins.quantize.weights import weight_scheme
from torch import nn

import surgery
from surgery import InputError, capture, layers
from surgery.calibration.moments import Scatter

LEARNED = {"gptq": gptq, "adaround": lambda *a, **k: adaround(*a, **k, iterations=60)}
every_rounding = pytest.mark.parametrize("rounding", list(LEARNED.values()), ids=list(LEARNED))


def task(groups=1, outputs=4, features=12, bits=3, seed=0):
    """A matrix, the Gram matrix of correlated inputs, and a scheme."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(groups, features, features, generator=generator, dtype=torch.float64)
    rows = torch.randn(groups, 3 * features, features, generator=generator, dtype=torch.float64) @ mixing
    matrix = torch.randn(groups, outputs, features, generator=generator, dtype=torch.float64)
    scheme = weight_scheme(matrix.flatten(0, 1), Grid.signed(bits))
    return matrix, rows.mT @ rows / rows.shape[1], scheme


def costs(integers, matrix, gram, scheme):
    return cost(in_steps(matrix, scheme), integers, gram)


@every_rounding
@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(2, 5), st.integers(0, 99))
def test_no_output_costs_more_than_rounded_to_the_nearest(rounding, groups, outputs, features, bits, seed):
    matrix, gram, scheme = task(groups, outputs, features, bits, seed)
    found = rounding(matrix, gram, scheme)
    plain = nearest(in_steps(matrix, scheme), scheme)
    assert torch.equal(found, found.round())
    assert float(found.min()) >= scheme.grid.low
    assert float(found.max()) <= scheme.grid.high
    assert bool((costs(found, matrix, gram, scheme) <= costs(plain, matrix, gram, scheme)).all())


@every_rounding
def test_correlated_inputs_let_most_of_the_error_go(rounding):
    ratios = []
    for seed in range(5):
        matrix, gram, scheme = task(1, 16, 40, 4, seed)
        plain = nearest(in_steps(matrix, scheme), scheme)
        ratios.append(
            costs(rounding(matrix, gram, scheme), matrix, gram, scheme).sum() / costs(plain, matrix, gram, scheme).sum()
        )
    assert float(sum(ratios)) / 5 < 0.5


@every_rounding
def test_inputs_without_correlation_leave_the_nearest(rounding):
    matrix, gram, scheme = task(2, 5, 10)
    diagonal = torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    assert torch.equal(rounding(matrix, diagonal, scheme), nearest(in_steps(matrix, scheme), scheme))


@every_rounding
def test_the_best_of_all_integers_is_nearly_found_where_they_can_be_tried(rounding):
    found, best = 0.0, 0.0
    for seed in range(20):
        matrix, gram, scheme = task(1, 1, 5, 2, seed)
        every = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)] * 5)
        best += float(cost(in_steps(matrix, scheme).expand(len(every), 1, 5), every.unsqueeze(1), gram).min())
        found += float(costs(rounding(matrix, gram, scheme), matrix, gram, scheme))
    assert best <= found <= 1.5 * best


@every_rounding
def test_weights_that_are_masked_stay_zero(rounding):
    matrix, gram, scheme = task(2, 6, 20)
    zeros = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    found = rounding(matrix.masked_fill(zeros, 0), gram, scheme, zeros=zeros)
    assert not found[zeros].any()
    assert found[~zeros].any()


@every_rounding
def test_inputs_that_are_always_zero_do_no_harm(rounding):
    matrix, gram, scheme = task(1, 3, 6)
    gram[:, 2], gram[:, :, 2] = 0, 0
    plain = nearest(in_steps(matrix, scheme), scheme)
    for own in (gram, torch.zeros_like(gram)):
        found = rounding(matrix, own, scheme)
        assert bool((costs(found, matrix, own, scheme) <= costs(plain, matrix, own, scheme)).all())


def test_second_moments_with_nan_are_refused():
    matrix, gram, scheme = task()
    with pytest.raises(InputError, match="second moments hold NaN"):
        gptq(matrix, gram * torch.nan, scheme)


@settings(max_examples=20)
@given(st.integers(0, 99), st.integers(2, 4))
def test_no_single_change_is_left_that_descent_would_make(seed, bits):
    matrix, gram, scheme = task(1, 3, 7, bits, seed)
    steps = in_steps(matrix, scheme)
    found = descended(steps, nearest(steps, scheme), gram, scheme, tolerance=0)
    for j in range(7):
        for change in (-1, 1):
            moved = found.clone()
            moved[:, :, j] = (moved[:, :, j] + change).clamp(scheme.grid.low, scheme.grid.high)
            assert bool((cost(steps, moved, gram) >= cost(steps, found, gram) - 1e-9).all())


def test_descent_over_several_blocks_of_columns_costs_what_it_says(monkeypatch):
    matrix, gram, scheme = task(2, 5, 30)
    steps = in_steps(matrix, scheme)
    whole = descended(steps, nearest(steps, scheme), gram, scheme)
    monkeypatch.setattr("surgery_plugins.quantize.rounding.BLOCK", 7)
    assert torch.equal(descended(steps, nearest(steps, scheme), gram, scheme), whole)


def test_one_scale_for_all_outputs_is_taken_too():
    matrix, gram, _ = task(2, 4, 10)
    scheme = weight_scheme(matrix, Grid.signed(4), per_channel=False)
    assert gptq(matrix, gram, scheme).shape == matrix.shape


def test_a_corrected_bias_makes_the_mean_output_right():
    matrix, _, scheme = task(2, 3, 8)
    rows = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 2
    scatter = Scatter(True)
    scatter.add(rows)
    moments, bias = scatter.finish(), torch.ones(2, 3, dtype=torch.float64)
    rounded = nearest(in_steps(matrix, scheme), scheme) * scheme.scale.view(2, 3, 1)
    wanted = (rows @ matrix.mT + bias.unsqueeze(1)).mean(1).flatten()
    found = moments.regression(matrix, bias).bias(rounded)
    given_now = (rows @ rounded.mT + found.unsqueeze(1)).mean(1).flatten()
    torch.testing.assert_close(given_now, wanted, rtol=1e-12, atol=1e-12)


class Chain(nn.Module):
    """Convolutions in a chain, a depthwise and a grouped one among them, whose channels differ widely in range."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, bias=False)
        self.grouped = nn.Conv2d(8, 12, 1, groups=2)
        self.c = nn.Conv2d(12, 4, 3, padding=1)
        self.head = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 5))
        for layer in (self.a, self.depthwise, self.grouped, self.head[0]):
            layer.weight.data *= torch.logspace(-1, 2, len(layer.weight)).view(-1, *[1] * (layer.weight.ndim - 1))

    def forward(self, x):
        x = nn.functional.max_pool2d(self.a(x).relu(), 2)
        x = self.grouped(nn.functional.leaky_relu(self.depthwise(x), 0.1)).relu()
        return self.head(nn.functional.relu6(self.c(x)).mean((2, 3)))


def ranges(first, second):
    out = first.weight.flatten(1).abs().amax(1)
    groups = getattr(second, "groups", 1)
    parts = second.weight.unflatten(0, (groups, -1))
    return out, parts.abs().amax((1, *range(3, parts.ndim))).flatten()


def test_equalised_layers_compute_the_same_with_equal_ranges():
    torch.manual_seed(0)
    network, x = Chain().eval(), torch.randn(4, 3, 10, 10)
    model = capture(network, x)
    wanted = model(x)
    found = pairs(model)
    assert [(p.first.name, p.second.name) for p in found] == [
        ("a", "depthwise"),
        ("depthwise", "grouped"),
        ("grouped", "c"),
        ("head.0", "head.3"),
    ]
    edits = equalise(model, found)
    model.recompile()
    torch.testing.assert_close(model(x), wanted, rtol=2e-5, atol=2e-5 * float(wanted.detach().abs().max()))
    for pair in found:
        out, taken = ranges(pair.first.module, pair.second.module)
        torch.testing.assert_close(out, taken, rtol=5e-3, atol=0)
    assert all(edit.numbers["range_ratio"] < edit.numbers["range_ratio_before"] for edit in edits)


def test_functional_layers_are_equalised_too():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.randn(6, 3, 3, 3)), nn.Parameter(torch.randn(2, 6, 1, 1) * 9)

        def forward(self, x):
            return nn.functional.conv2d(nn.functional.conv2d(x, self.w).relu(), self.v)

    x = torch.randn(2, 3, 8, 8)
    model = capture(Functional(), x)
    wanted = model(x)
    equalise(model, pairs(model))
    model.recompile()
    torch.testing.assert_close(model(x), wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))
    out, taken = ranges(*[layer.module for layer in layers(model)])
    torch.testing.assert_close(out, taken)


def test_channels_without_weights_are_left_alone():
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        network[0].weight[0], network[2].weight[:, 1] = 0, 0
    x = torch.randn(2, 2, 4, 4)
    model = capture(network, x)
    wanted = model(x)
    equalise(model, pairs(model))
    torch.testing.assert_close(model(x), wanted)


class Obstacles(nn.Module):
    def __init__(self):
        super().__init__()
        self.twice, self.split, self.after, self.flat = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.linear = nn.Linear(4 * 25, 3)

    def forward(self, x):
        x = self.twice(self.twice(x).relu()).relu()
        y = self.split(x).relu()
        x = self.after(y) + y
        return self.linear(self.flat(x.sigmoid()).relu().flatten(1))


def test_no_pair_is_made_where_something_else_reads_the_channels():
    model = capture(Obstacles(), torch.randn(2, 4, 5, 5))
    assert pairs(model) == []
    assert equalise(model, []) == []


def test_only_chosen_layers_are_paired():
    model = capture(nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), torch.randn(2, 4))
    chosen = surgery.layers(model)[1:3]
    assert [(p.first.name, p.second.name) for p in pairs(model, chosen)] == [("1", "2")]
    assert pairs(model, []) == []
