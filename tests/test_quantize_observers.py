"""What a grid should span: ranges from histograms against the raw values, and scales of weights."""

from __future__ import annotations

import math
from collections import defaultdict
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_plugins.quantize.observers import OBSERVERS, mse, percentile
from surgery_plugins.quantize.scheme import Grid, Scheme, affine
from surgery_plugins.quantize.weights import weight_scheme

from surgery import InputError
from surgery.calibration.ranges import BINS, RunningHistogram, RunningRange

NUMBERS = st.floats(-1e4, 1e4, width=32)
GRIDS = st.sampled_from(
    [Grid.unsigned(8), Grid.unsigned(4), Grid(-128, 127), Grid.signed(8), Grid.signed(2), Grid(-64, 63)]
)
KINDS = ("normal", "relu", "skewed", "laplace")


def drawn(kind, count=20_000):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, generator=generator, dtype=torch.float64)
    return {
        "normal": x,
        "relu": x.relu(),
        "skewed": torch.nn.functional.silu(3 * x),
        "laplace": x.sign() * -torch.rand(count, generator=generator, dtype=torch.float64).log(),
    }[kind]


def seen(values):
    running, histogram = RunningRange(), RunningHistogram()
    running.add(values.reshape(-1, 1))
    histogram.add(values)
    return running.finish(), histogram.finish()


def error(values, scheme):
    return float((values - scheme.round(values)).square().mean())


@pytest.mark.parametrize(("value", "integer"), [(-15.0, 0), (5.0, 128), (25.0, 255)])
def test_a_range_of_minus_15_to_25_is_stored_as_in_the_survey(value, integer):
    assert int(affine(-15.0, 25.0, Grid.unsigned(8)).quantise(torch.tensor(value))) == integer


@given(NUMBERS, NUMBERS, GRIDS, st.booleans(), st.lists(NUMBERS, min_size=1, max_size=20))
def test_rounding_is_idempotent_monotone_and_keeps_zero(a, b, grid, symmetric, values):
    scheme = affine(min(a, b), max(a, b), grid, symmetric)
    x = torch.tensor([0.0, *values], dtype=torch.float64).sort().values
    integers, rounded = scheme.quantise(x), scheme.round(x)
    assert torch.equal(scheme.quantise(rounded), integers)
    assert bool((integers.diff() >= 0).all())
    assert bool((integers >= grid.low).all())
    assert bool((integers <= grid.high).all())
    assert bool((rounded[x == 0] == 0).all())


@given(NUMBERS, NUMBERS, GRIDS, st.booleans(), st.floats(0, 1))
def test_what_lies_in_the_range_moves_by_half_a_step_at_most(a, b, grid, symmetric, place):
    """One step at the ends, where the zero point was rounded to an integer."""
    low, high, symmetric = min(a, b, 0), max(a, b, 0), symmetric and grid.low < 0
    scheme = affine(low, high, grid, symmetric)
    x = torch.tensor(low + place * (high - low), dtype=torch.float64)
    step = float(scheme.scale)
    inside = low + step / 2 <= float(x) <= high - step / 2 or symmetric
    assert float((scheme.round(x) - x).abs()) <= step * (0.5 if inside else 1) * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [50.0, 99.0, 99.9, 100.0])
def test_percentiles_are_those_of_the_values_to_one_bin(kind, share):
    values = drawn(kind)
    running, histogram = seen(values)
    low, high = percentile(running, histogram, Grid.unsigned(8), share)
    tail = (1 - share / 100) / 2
    width = 2 * histogram.bound / BINS
    wanted = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    gap = float(values.sort().values.diff()[[0, -1]].max()) if share < 100 else 0
    assert low == pytest.approx(float(wanted[0]), abs=width + gap)
    assert high == pytest.approx(float(wanted[1]), abs=width + gap)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_mse_range_is_as_good_as_the_best_of_all_tried_on_the_values(kind, bits):
    values, grid = drawn(kind), Grid.unsigned(bits)
    running, histogram = seen(values)
    found = error(values, affine(*mse(running, histogram, grid), grid))
    tried = [
        error(values, affine(running.low * a, running.high * b, grid))
        for a in torch.linspace(0.02, 1, 50 if running.low < 0 else 1).tolist()
        for b in torch.linspace(0.02, 1, 50).tolist()
    ]
    assert found <= 1.02 * min(tried)


def kl_by_hand(values, running, histogram, grid, most):
    """Migacz's divergence for one threshold, bin by bin."""
    low, high = max(min(running.low, 0), -most), min(max(running.high, 0), most)
    counts, edges = histogram.counts.tolist(), histogram.edges.tolist()
    inside = [i for i, c in enumerate(counts) if c and edges[i + 1] > low and edges[i] <= high]
    if not inside:
        return float("inf")
    p = {i: counts[i] for i in inside}
    p[inside[0]] += sum(counts[: inside[0]])
    p[inside[-1]] += sum(counts[inside[-1] + 1 :])
    middles = torch.tensor([(edges[i] + edges[i + 1]) / 2 for i in inside], dtype=torch.float64)
    levels = affine(low, high, grid).quantise(middles).tolist()
    groups = defaultdict(list)
    for i, level in zip(inside, levels, strict=True):
        groups[level].append(i)
    q = {i: sum(counts[j] for j in group) / len(group) for group in groups.values() for i in group}
    kept = sum(q.values())
    terms = [p[i] / len(values) * math.log(p[i] / len(values) / (q[i] / kept)) for i in inside]
    return sum(terms)


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_range_has_the_least_divergence_of_all_thresholds(kind):
    values, grid = drawn(kind, 2000), Grid.unsigned(4)
    running, histogram = seen(values)
    low, high = OBSERVERS["entropy"](running, histogram, grid)
    largest = max(-running.low, running.high)
    divergences = [kl_by_hand(values, running, histogram, grid, largest * k / 128) for k in range(1, 129)]
    found = kl_by_hand(values, running, histogram, grid, max(-low, high))
    assert found == pytest.approx(min(divergences), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", list(OBSERVERS))
@given(st.lists(NUMBERS, min_size=1, max_size=30), GRIDS)
def test_every_range_lies_within_what_was_seen_or_ends_at_zero(name, values, grid):
    running, histogram = seen(torch.tensor(values, dtype=torch.float64))
    low, high = OBSERVERS[name](running, histogram, grid)
    assert min(running.low, 0) <= low <= high <= max(running.high, 0)


@pytest.mark.parametrize("name", list(OBSERVERS))
@pytest.mark.parametrize("value", [-3.0, 0.0, 0.7])
def test_one_constant_value_is_kept(name, value):
    grid = Grid.unsigned(8)
    low, high = OBSERVERS[name](*seen(torch.full((100,), value, dtype=torch.float64)), grid)
    rounded = affine(low, high, grid).round(torch.tensor(value, dtype=torch.float64))
    assert float(rounded) == pytest.approx(value, rel=2 / 256)


@pytest.mark.parametrize("name", list(OBSERVERS))
def test_a_tensor_without_a_finite_value_is_refused(name):
    with pytest.raises(InputError, match="range from inf to -inf"):
        OBSERVERS[name](*seen(torch.full((4,), torch.nan)), Grid.unsigned(8))


def test_far_outliers_are_cut_by_all_but_minmax():
    values = torch.cat([drawn("normal"), torch.tensor([60.0])])
    running, histogram = seen(values)
    highs = {name: observe(running, histogram, Grid.unsigned(4))[1] for name, observe in OBSERVERS.items()}
    assert highs.pop("minmax") == 60
    assert all(high < 30 for high in highs.values())


def test_least_squares_scales_are_as_good_as_a_fine_grid_search():
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0)) ** 3
    for grid in (Grid.signed(2), Grid.signed(4), Grid(-64, 63)):
        found = weight_scheme(weight, grid, observer="mse")
        start = weight_scheme(weight, grid).scale
        errors = torch.stack(
            [by_channel(weight, Scheme(f * start, found.zero_point, grid, 0)) for f in torch.linspace(0.05, 1, 2000)]
        )
        assert bool((by_channel(weight, found) <= 1.005 * errors.amin(0)).all())


def by_channel(weight, scheme, importance=1.0):
    return (importance * (weight.double() - scheme.round(weight.double())).square()).flatten(1).sum(1)


def test_importance_decides_what_the_error_counts():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    importance = torch.rand(40, generator=torch.Generator().manual_seed(2)) ** 8
    plain = weight_scheme(weight, Grid.signed(3), observer="mse")
    weighted = weight_scheme(weight, Grid.signed(3), observer="mse", importance=importance)
    assert float(by_channel(weight, weighted, importance).sum()) < 0.95 * float(
        by_channel(weight, plain, importance).sum()
    )


@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_channels_lie_along_the_axis_and_zero_channels_are_kept(observer):
    weight = torch.randn(3, 5, 2, generator=torch.Generator().manual_seed(0))
    weight[:, 2] = 0
    scheme = weight_scheme(weight, Grid.signed(8), observer=observer, axis=1)
    turned = weight_scheme(weight.transpose(0, 1), Grid.signed(8), observer=observer)
    torch.testing.assert_close(scheme.scale, turned.scale, rtol=1e-12, atol=0)
    torch.testing.assert_close(scheme.round(weight), weight, atol=float(scheme.scale.max()), rtol=0)
    assert not scheme.round(weight)[:, 2].any()
    assert weight_scheme(weight, Grid.signed(8), False, observer).scale.ndim == 0


def test_minmax_scales_clip_nothing_on_a_lopsided_grid():
    weight = torch.tensor([[-64.0, 10.0], [-10.0, 63.0]])
    scheme = weight_scheme(weight, Grid(-64, 63))
    assert torch.equal(scheme.quantise(weight), weight)


def test_the_percentile_can_be_set():
    observe = partial(percentile, share=50.0)
    low, high = observe(*seen(torch.arange(-100.0, 101.0)), Grid.unsigned(8))
    assert (low, high) == (pytest.approx(-50, abs=1), pytest.approx(50, abs=1))
