"""Codebooks of values on a line, packed indices, and the lookup in the graph: the mathematics of kmeans."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.kmeans import optimum
from surgery_plugins.kmeans.codebooks import _started, assign, cells, codebooks, lloyd
from surgery_plugins.kmeans.fitting import How, Shared, compensated, gains, nearest, refitted
from surgery_plugins.kmeans.lookup import Lookup
from surgery_plugins.kmeans.optimum import best_cuts
from surgery_plugins.kmeans.packing import pack, packed_bytes, unpack
from surgery_plugins.kmeans.points import Points, points
from torch import Tensor

BITS = st.integers(1, 8)
SEED = st.integers(0, 1000)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def distortion(values: Tensor, codebook: Tensor, weights: Tensor | None = None) -> Tensor:
    """Σ w (x - nearest value)², per group."""
    lost = (values.unsqueeze(2) - codebook.unsqueeze(1)).abs().amin(2).square()
    return (lost if weights is None else lost * weights).sum(1)


def by_brute_force(values: Tensor, weights: Tensor, k: int) -> float:
    """The least distortion over all cuts of the sorted values."""
    order = values.argsort()
    x, w, best = values[order], weights[order], float("inf")
    for inner in combinations(range(1, len(x)), k - 1):
        cuts = [0, *inner, len(x)]
        cells = [(w[a:b], x[a:b]) for a, b in pairwise(cuts)]
        best = min(best, sum(float((v * (y - (v * y).sum() / v.sum()) ** 2).sum()) for v, y in cells))
    return best


# --- the optimum ---


@given(st.integers(1, 10), st.integers(1, 5), SEED, st.booleans())
@settings(max_examples=60, deadline=None)
def test_dynamic_programming_finds_what_trying_all_cuts_finds(count: int, k: int, seed: int, rounded: bool) -> None:
    k = min(k, count)
    x = random(count, seed=seed).mul(3).round() if rounded else random(count, seed=seed)
    w = random(count, seed=seed + 1).abs() + 0.1
    line = points(x[None], w[None], exact=True)
    found = float(line.distortion(best_cuts(line, k)))
    assert found == pytest.approx(by_brute_force(x, w, k), rel=1e-9, abs=1e-12)


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=60), st.lists(st.floats(-100, 100), min_size=3, max_size=3))
@settings(max_examples=100, deadline=None)
def test_no_other_codebook_is_better(given_values: list[float], other: list[float]) -> None:
    x = torch.tensor([given_values], dtype=torch.float64)
    rival = torch.tensor([sorted(other)], dtype=torch.float64)
    least = distortion(x, rival)
    assert bool((distortion(x, codebooks(x, 3)) <= least * (1 + 1e-9) + 1e-7).all())
    assert bool((distortion(x, codebooks(x, 3, start="exact")) <= least * (1 + 1e-9) + 1e-7).all())


@given(st.integers(3, 40), st.integers(3, 9), SEED)
@settings(max_examples=30, deadline=None)
def test_cuts_found_by_halves_are_as_good(count: int, k: int, seed: int) -> None:
    line = points(random(2, count, seed=seed), None, exact=True)
    whole = line.distortion(best_cuts(line, min(k, count)))
    memory, optimum.MEMORY = optimum.MEMORY, 0
    try:
        halves = best_cuts(line, min(k, count))
    finally:
        optimum.MEMORY = memory
    assert bool((halves.diff(dim=1) >= 0).all())
    torch.testing.assert_close(line.distortion(halves), whole, rtol=1e-9, atol=1e-12)


def test_candidates_in_pieces_are_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    line = points(random(1, 500), None, exact=True)
    whole = best_cuts(line, 7)
    monkeypatch.setattr(optimum, "CHUNK", 20)
    assert torch.equal(best_cuts(line, 7), whole)


@given(st.integers(2, 12), st.integers(1, 4), SEED)
@settings(max_examples=40, deadline=None)
def test_weights_count_like_repetitions(count: int, k: int, seed: int) -> None:
    x = random(1, count, seed=seed)
    times = torch.randint(1, 5, (count,), generator=torch.Generator().manual_seed(seed))
    weighted = codebooks(x, k, times.double()[None])
    repeated = codebooks(x.repeat_interleave(times, 1), k)
    torch.testing.assert_close(distortion(x, weighted, times[None]), distortion(x, repeated, times[None]))


@pytest.mark.parametrize("shape", ["normal", "laplace", "outlier", "offset"])
@pytest.mark.parametrize("k", [4, 16])
def test_a_histogram_comes_within_a_hundredth_of_the_optimum(shape: str, k: int) -> None:
    x = random(1, 2**17)
    made = {"laplace": x * random(1, 2**17, seed=1).abs(), "offset": x * 1e-2 + 1}.get(shape, x).float()
    if shape == "outlier":
        made[0, 7] = 1e4
    best, fast = (codebooks(made, k, start=start) for start in ("exact", "optimal"))
    assert float(distortion(made.double(), fast) / distortion(made.double(), best)) < 1.002


# --- Lloyd ---


@given(st.integers(5, 200), st.integers(2, 9), SEED, st.sampled_from(["linear", "density", "random"]))
@settings(max_examples=60, deadline=None)
def test_no_round_of_lloyd_raises_the_distortion(count: int, k: int, seed: int, start: str) -> None:
    line = points(random(1, count, seed=seed), random(1, count, seed=seed + 1).abs() + 0.01)
    values = _started(line, min(k, count), start, torch.Generator().manual_seed(seed))
    known = float("inf")
    for _ in range(10):
        lost = float(distortion(line.position, values, line.weight))
        assert lost <= known * (1 + 1e-12) + 1e-12
        values, known = lloyd(line, values, 1), lost
        assert bool((values.diff(dim=1) >= 0).all())


def test_the_starts_are_those_of_the_paper() -> None:
    line = points(random(1, 1001), None)
    linear, density = (_started(line, 5, start, None) for start in ("linear", "density"))
    torch.testing.assert_close(linear.diff(dim=1), linear.diff(dim=1)[:, :1].expand(1, 4))
    assert (float(linear.min()), float(linear.max())) == (float(line.position.min()), float(line.position.max()))
    ranks = torch.searchsorted(line.position, density)
    assert ranks.tolist() == [[100, 300, 500, 700, 900]]
    drawn = [_started(line, 5, "random", torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert bool(torch.isin(drawn[0], line.position).all())


@given(st.integers(1, 3), st.integers(1, 80), st.integers(1, 40), SEED)
@settings(max_examples=60, deadline=None)
def test_every_value_is_given_the_nearest(groups: int, count: int, k: int, seed: int) -> None:
    x, book = random(groups, count, seed=seed), codebooks(random(groups, 50, seed=seed + 1), k)
    chosen = book.gather(1, assign(x, book).long())
    torch.testing.assert_close((chosen - x).square().sum(1), distortion(x, book))


def test_fewer_points_than_values_repeat_the_last() -> None:
    assert codebooks(torch.tensor([[3.0, 1.0]]), 4).tolist() == [[1.0, 3.0, 3.0, 3.0]]


@given(
    st.integers(6, 60), st.integers(2, 5), SEED, st.sampled_from(["optimal", "exact", "linear", "density", "random"])
)
@settings(max_examples=60, deadline=None)
def test_zero_is_one_of_the_values_when_asked_for(count: int, k: int, seed: int, start: str) -> None:
    x = random(2, count, seed=seed) + 0.5
    book = codebooks(x, k, start=start, zero=True, generator=torch.Generator())
    assert bool((book == 0).any(1).all())
    if start == "exact":
        others = codebooks(x, k - 1, start="exact")
        rival = torch.cat([others, torch.zeros(2, 1, dtype=torch.float64)], 1)
        assert bool((distortion(x, book) <= distortion(x, rival) * (1 + 1e-4)).all())


def test_points_of_a_histogram_keep_count_and_mean() -> None:
    x = random(1, 2**17).float() * 3 + 1
    line = points(x, None)
    assert line.count < 2**17
    assert float(line.weight.sum()) == 2**17
    mean = float((line.weight * line.position).sum() / line.weight.sum() + line.centre)
    assert mean == pytest.approx(float(x.double().mean()), rel=1e-6)
    assert bool((line.position.diff(dim=1) > 0).all())


def test_merged_points_stand_for_those_between_the_edges() -> None:
    line = Points(torch.tensor([[0.0, 1.0, 3.0, 7.0]]), torch.tensor([[1.0, 3.0, 1.0, 2.0]]), torch.zeros(1, 1))
    merged = line.merged(torch.tensor([[0, 2, 2, 4]]))
    assert merged.weight.tolist() == [[4.0, 0.0, 3.0]]
    assert merged.position[0, [0, 2]].tolist() == pytest.approx([0.75, 17 / 3])
    assert cells(line, torch.tensor([[0.5, 6.0]])).tolist() == [[0, 3, 4]]


# --- packing and lookup ---


@given(BITS, st.integers(1, 70), SEED)
@settings(max_examples=150, deadline=None)
def test_indices_come_back_from_their_bytes(bits: int, count: int, seed: int) -> None:
    made = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(made, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == packed_bytes(count, bits) <= count * bits / 8 + 3
    assert torch.equal(unpack(packed, count, bits), made)


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 30), BITS, st.booleans(), SEED)
@settings(max_examples=80, deadline=None)
def test_a_lookup_gives_every_weight_its_value(
    outputs: int, inputs: int, span: int, bits: int, zero: bool, seed: int
) -> None:
    shape = (outputs, inputs, 3)
    count = outputs * inputs * 3
    groups = -(-count // span)
    book = random(groups, 2**bits, seed=seed).sort(1).values.float()
    if zero:
        book.scatter_(1, book.abs().argmin(1, keepdim=True), 0.0)
    indices = torch.randint(0, 2**bits, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    lookup = Lookup(shape, bits, span, zero)
    by_hand = book[torch.arange(count) // span, indices.long()].view(shape)
    assert torch.equal(lookup(**lookup.tensors(book, indices)), by_hand)
    assert torch.equal(Shared(book, indices).values(span).view(shape), by_hand)


@given(BITS, st.booleans(), SEED)
@settings(max_examples=30, deadline=None)
def test_the_gradient_of_a_value_is_the_sum_over_its_weights(bits: int, zero: bool, seed: int) -> None:
    book = random(2, 2**bits, seed=seed).sort(1).values
    if zero:
        book.scatter_(1, book.abs().argmin(1, keepdim=True), 0.0)
    indices = torch.randint(0, 2**bits, (48,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    lookup = Lookup((4, 12), bits, 24, zero)
    tensors = lookup.tensors(book, indices)
    given_gradient = random(4, 12, seed=seed + 1)
    lookup(**tensors).backward(given_gradient)
    sums = torch.zeros_like(book)
    for place in range(48):
        sums[place // 24, int(indices[place])] += given_gradient.view(-1)[place]
    kept = sums[book != 0].view(2, -1) if zero else sums
    torch.testing.assert_close(tensors["codebook"].grad, kept)


def test_weights_of_a_transposed_convolution_are_counted_by_outputs() -> None:
    from surgery import weight_matrix

    module = torch.nn.ConvTranspose2d(4, 6, 3, groups=2)
    rows = weight_matrix(module).detach().flatten(0, 1)
    shared = nearest(rows, None, How(16, 27), torch.float32)
    lookup = Lookup(tuple(module.weight.shape), 4, 27, False, transposed=2)
    module.weight = torch.nn.Parameter(lookup(**lookup.tensors(shared.codebook, shared.indices)))
    assert torch.equal(weight_matrix(module).detach().flatten(), shared.values(27))
    assert float((weight_matrix(module).detach().flatten(0, 1) - rows).norm() / rows.norm()) < 0.15


# --- towards outputs ---


def task(seed: int = 0) -> tuple[Tensor, Tensor]:
    """W (1, 8, 12) and H of features that have to do with each other."""
    x = random(300, 12, seed=seed) @ random(12, 12, seed=seed + 1)
    return random(1, 8, 12, seed=seed + 2), (x.T @ x / 300).unsqueeze(0)


def lost(found: Shared, matrix: Tensor, gram: Tensor, span: int) -> float:
    change = found.values(span).double().view(matrix.shape) - matrix
    return float(((change @ gram) * change).sum())


@given(SEED, st.sampled_from([96, 24, 40]))
@settings(max_examples=20, deadline=None)
def test_a_refitted_codebook_is_the_least_squares_solution(seed: int, span: int) -> None:
    matrix, gram = task(seed)
    how = How(4, span)
    start = nearest(matrix[0], None, how, torch.float64)
    found = refitted(matrix, gram, torch.ones(1, 8).double(), start, how)
    groups = -(-96 // span)
    # column (group, value): what a unit of it adds to every weight, seen through a root of H
    member = torch.zeros(96, groups * 4, dtype=torch.float64)
    member[torch.arange(96), torch.arange(96) // span * 4 + start.indices.long()] = 1.0
    root = torch.linalg.cholesky(gram[0])
    seen = (member.view(8, 12, -1).transpose(1, 2) @ root).transpose(1, 2).reshape(96, -1)
    wanted = (matrix[0] @ root).reshape(96, 1)
    best = torch.linalg.lstsq(seen, wanted, driver="gelsd").solution
    least = float((seen @ best - wanted).square().sum())
    assert lost(found, matrix, gram, span) == pytest.approx(least, rel=1e-6)


def test_making_up_for_earlier_columns_lowers_the_error_of_outputs() -> None:
    shares = []
    for seed in range(10):
        matrix, gram = task(seed)
        how = How(4, 96)
        plain = lost(nearest(matrix[0], None, how, torch.float64), matrix, gram, 96)
        shares.append(lost(compensated(matrix, gram, None, how, torch.float64), matrix, gram, 96) / plain)
    assert sum(shares) / 10 < 0.75


@pytest.mark.parametrize("span", [96, 12])
def test_weights_that_are_zero_stay_so(span: int) -> None:
    matrix, gram = task()
    matrix = matrix * (matrix.abs() > 0.7)
    found = compensated(matrix, gram, None, How(4, span, zero=True), torch.float32)
    assert bool((found.values(span).view(matrix.shape)[matrix == 0] == 0).all())


def test_gains_are_those_of_least_squares() -> None:
    matrix, gram = task()
    wanted = random(1, 8, 12, seed=9)
    cross = wanted @ gram
    matrix[0, 3] = 0
    found = gains(matrix, gram, cross, torch.full((1, 8), 7.0, dtype=torch.float64))
    root = torch.linalg.cholesky(gram[0])
    for row in (0, 5):
        seen, goal = matrix[0, row] @ root, wanted[0, row] @ root
        assert float(found[0, row]) == pytest.approx(float(seen @ goal / (seen @ seen)), rel=1e-9)
    assert float(found[0, 3]) == 7.0
