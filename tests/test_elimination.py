"""Elimination by least squares, against solving the problem anew without the units."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from surgery_plugins.prune_filters.elimination import Reader, eliminate, inverted, never_falling

RIDGE = 1e-3


def problem(units=6, k=1, outputs=3, rows=200, seed=0):
    """Rows X (rows, features), targets, and which columns (units, k) are each unit's; the first two are no unit's."""
    generator = torch.Generator().manual_seed(seed)
    features = units * k + 2
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64) @ mixing
    w = torch.randn(outputs, features, generator=generator, dtype=torch.float64)
    y = x @ w.T + torch.randn(rows, outputs, generator=generator, dtype=torch.float64)
    columns = (torch.randperm(units * k, generator=generator) + 2).view(units, k)
    return x - x.mean(0), y - y.mean(0), columns, w + 0.1


def reader(x, y, columns, towards, scale=1.0):
    xx = x.T @ x / len(x)
    inverse = inverted(xx, RIDGE * xx.diagonal().mean())
    return Reader.of(columns, solved(x, y, towards)[1], inverse, scale)


def weight_of(found):
    """(outputs, units, k) of a reader, zero where units are gone."""
    columns = found.columns.unflatten(0, (len(found.left), -1))
    weight = torch.zeros(found.size, *columns.shape[1:], dtype=columns.dtype)
    weight[found.left[~found.gone]] = columns[~found.gone]
    return weight.movedim(2, 0)


def solved(x, y, towards, gone=()):
    """Least E‖y - W x‖² + λ‖W - W₀‖² over all W whose columns `gone` are zero, and that W."""
    left = [f for f in range(x.shape[1]) if f not in set(map(int, gone))]
    damping = RIDGE * float((x.T @ x / len(x)).diagonal().mean())
    weight = torch.zeros_like(towards)
    if left:
        a = x[:, left].T @ x[:, left] / len(x) + damping * torch.eye(len(left), dtype=x.dtype)
        b = y.T @ x[:, left] / len(x) + damping * towards[:, left]
        weight[:, left] = torch.linalg.solve(a, b.T).T
    error = (y - x @ weight.T).square().sum(1).mean() + damping * (weight - towards).square().sum()
    return float(error), weight


@pytest.mark.parametrize("k", [1, 3])
def test_costs_are_the_exact_rise_of_the_least_squares_error(k):
    x, y, columns, towards = problem(k=k)
    whole, weight = solved(x, y, towards)
    found = reader(x, y, columns, towards, scale=2.0)
    torch.testing.assert_close(weight_of(found), weight[:, columns])
    rises = [(solved(x, y, towards, own)[0] - whole) / 2 for own in columns]
    torch.testing.assert_close(found.costs(), torch.tensor(rises, dtype=torch.float64), rtol=1e-8, atol=1e-10)
    assert float(found.costs().min()) > 0


@pytest.mark.parametrize("k", [1, 2])
def test_leaving_out_units_equals_solving_anew_without_them(k):
    x, y, columns, towards = problem(k=k, seed=1)
    found, gone = reader(x, y, columns, towards), []
    for units in ([2], [0, 5], [3]):
        found.leave_out(torch.tensor(units))
        gone += columns[units].flatten().tolist()
        error, weight = solved(x, y, towards, gone)
        torch.testing.assert_close(weight_of(found), weight[:, columns], rtol=1e-8, atol=1e-10)
        for unit in (1, 4):
            rise = solved(x, y, towards, [*gone, *columns[unit]])[0] - error
            assert float(found.costs()[unit]) == pytest.approx(rise, rel=1e-7)
    assert float(found.costs()[[0, 2, 3, 5]].abs().max()) == 0


def test_units_go_in_the_order_of_the_error_of_all_readers_together():
    tasks = [problem(k=k, seed=seed) for k, seed in ((1, 2), (2, 3), (3, 4))]
    fixed = torch.tensor([0.0, 0, 5, 0, 0, 1], dtype=torch.float64)

    def error(gone):
        errors = (solved(x, y, w, c[list(gone)].flatten())[0] for x, y, c, w in tasks)
        return sum(errors) + float(fixed[list(gone)].sum())

    expected, curve = [], [error([])]
    while len(expected) < 6:
        expected.append(min((u for u in range(6) if u not in expected), key=lambda u: error([*expected, u])))
        curve.append(error(expected))
    scores = eliminate(6, [reader(*task) for task in tasks], fixed)
    assert scores.argsort().tolist() == expected
    assert float(scores.sum()) == pytest.approx(curve[-1] - curve[0], rel=1e-6)


def test_without_a_reader_the_fixed_costs_are_the_scores():
    fixed = torch.tensor([3.0, 1.0, 2.0])
    torch.testing.assert_close(eliminate(3, [], fixed), fixed.double())


def test_of_channels_that_repeat_each_other_all_but_one_go_first_and_cost_nothing():
    x, y, columns, _ = problem(units=4, rows=300)
    copies = torch.cat([x, x[:, columns[1]], x[:, columns[1]] * 2], 1)
    six = torch.cat([columns, torch.tensor([[6], [7]])])
    xx = copies.T @ copies / 300
    inverse = inverted(xx, 1e-10 * xx.diagonal().mean())
    found = Reader.of(six, y.T @ copies / 300 @ inverse, inverse, 1.0)
    scores = eliminate(6, [found], torch.zeros(6))
    first = set(scores.argsort()[:2].tolist())
    assert first < {1, 4, 5}
    assert float(scores.sort().values[1]) < 1e-6 * float(scores.sort().values[2])


@pytest.mark.parametrize("seed", range(8))
def test_the_error_is_not_larger_than_when_the_smallest_weights_go(seed):
    x, y, columns, towards = problem(units=8, seed=seed)
    found = reader(x, y, columns, towards)
    magnitude = weight_of(found)[..., 0].norm(dim=0)
    chosen = eliminate(8, [found], torch.zeros(8)).argsort()[:4]
    errors = [solved(x, y, towards, columns[units].flatten())[0] for units in (chosen, magnitude.argsort()[:4])]
    best = min(solved(x, y, towards, columns[list(u)].flatten())[0] for u in itertools.combinations(range(8), 4))
    assert best <= errors[0] <= errors[1] * (1 + 1e-9)


def test_many_units_go_a_few_at_a_time_and_still_the_useless_ones_first():
    x, y, columns, towards = problem(units=200, outputs=4, rows=2000)
    generator = torch.Generator().manual_seed(0)
    useless = torch.randperm(200, generator=generator)[:50]
    towards[:, columns[useless, 0]] = 0
    y = x @ towards.T
    scores = eliminate(200, [reader(x, y, columns, towards)], torch.zeros(200))
    assert set(scores.argsort()[:50].tolist()) == set(useless.tolist())


def lower_hull(steps):
    """Slopes of the lower convex hull, by its definition: the curve under every chord."""
    curve = [0.0, *itertools.accumulate(steps)]
    n = len(steps)

    def hull(i):
        chords = ((a, b) for a in range(i + 1) for b in range(i, n + 1) if a < b)
        below = (curve[a] + (curve[b] - curve[a]) * (i - a) / (b - a) for a, b in chords)
        return min(curve[i], *below)

    return [hull(i + 1) - hull(i) for i in range(n)]


@given(st.lists(st.floats(-100, 100), max_size=12))
def test_never_falling_gives_the_slopes_of_the_lower_convex_hull(steps):
    found = never_falling(torch.tensor(steps, dtype=torch.float64))
    expected = torch.tensor(lower_hull(steps) if steps else [], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-8)
    assert bool((found.diff() >= 0).all())
    assert float(found.sum()) == pytest.approx(sum(steps), abs=1e-6)
