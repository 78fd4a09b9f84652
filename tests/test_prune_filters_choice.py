"""The order in which units of channels go, and where it is cut."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruning_trials import captured
from surgery_plugins.prune_filters.choice import (
    NEVER,
    Budget,
    Limits,
    cut_for,
    first_units,
    keys_by_score,
    keys_by_share,
    marks_at,
)
from surgery_plugins.prune_filters.choosing import Start

from surgery import (
    find_channels,
)

LIMITS = st.builds(Limits, st.integers(1, 9), st.integers(1, 8) | st.just("auto"))
SCORES = st.lists(st.floats(-100, 100), min_size=1, max_size=24).map(lambda s: torch.tensor(s, dtype=torch.float64))


@given(SCORES, LIMITS, st.integers(0, 5), st.floats(0.1, 100))
def test_keys_keep_the_order_of_the_scores_and_the_limits(scores, limits, gone, cost):
    size = len(scores)
    multiple = limits.multiple(size)
    for keys in (keys_by_share(scores, limits, gone), keys_by_score(scores, limits, cost)):
        in_order = keys[scores.argsort(stable=True)]
        assert bool((in_order[1:] >= in_order[:-1]).all())
        for cut in {float(k) for k in keys if k < NEVER}:
            left = size - int((keys <= cut).sum())
            assert left >= limits.least
            assert left % multiple == 0
        least = min([k for k in range(limits.least, size) if k % multiple == 0], default=size)
        assert int((keys == NEVER).sum()) == least


@given(SCORES, st.floats(0.5, 100))
def test_single_units_are_ordered_by_score_per_cost(scores, cost):
    keys = keys_by_score(scores, Limits(), cost)
    goes = keys < NEVER
    assert int(goes.sum()) == len(scores) - 1
    torch.testing.assert_close(keys[goes], scores[goes] / cost, rtol=1e-9, atol=1e-9)
    assert len(keys[goes].unique()) == len(scores) - 1


@given(st.lists(SCORES, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_cuts_are_nested_and_counts_are_exact(scores, first, second):
    low, high = sorted((first, second))
    shares = [keys_by_share(s, Limits()) for s in scores]
    assert all(bool((b | ~a).all()) for a, b in zip(marks_at(shares, low), marks_at(shares, high), strict=True))
    keys = [keys_by_score(s, Limits(), 1.0) for s in scores]
    free = sum(len(s) - 1 for s in scores)
    counts = [int(low * free), int(high * free)]
    less, more = (first_units(keys, count) for count in counts)
    assert [sum(int(m.sum()) for m in marks) for marks in (less, more)] == counts
    assert all(bool((b | ~a).all()) for a, b in zip(less, more, strict=True))


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.05, 1), LIMITS)
def test_a_cut_is_within_one_percent_above_the_target_or_as_far_as_it_goes(seed, target, limits):
    found = find_channels(captured("deep"))
    generator = torch.Generator().manual_seed(seed)
    keys = [keys_by_score(torch.rand(g.size, generator=generator), limits, 1.0) for g in found.groups]
    budget = Budget("macs", target, found.cost.macs, Start.of(found).costs["macs"])
    marks, left = cut_for(found, keys, budget)
    assert left == pytest.approx(found.cost.macs(found.alive(marks)) / budget.whole)
    furthest = found.cost.macs(found.alive([k < NEVER for k in keys])) / budget.whole
    assert left <= max(target * 1.01, furthest)


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        (3, {1, 2}),
        (4, {2}),
        (7, {2, 4, 6}),
        (8, {4}),
        (16, {4, 8, 12}),
        (23, {4, 8, 12, 16, 20}),
        (24, {16}),
        (32, {16}),
        (64, {16, 32, 48}),
    ],
)
def test_automatic_multiples_are_finer_in_narrow_groups(size, kept):
    assert {size - gone for gone in Limits(round_to="auto").counts(size)} == kept | {size}
