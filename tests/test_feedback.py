"""Choices made column by column, and what the columns after them make up for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery import InputError, error_feedback


def task(outputs: int, features: int, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random matrix and second moments of this rank."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(max(4 * features, rank), rank, generator=generator, dtype=torch.float64)
    x = rows @ torch.randn(rank, features, generator=generator, dtype=torch.float64)
    return torch.randn(outputs, features, generator=generator, dtype=torch.float64), x.T @ x / len(x)


def loss(change: Tensor, gram: Tensor) -> float:
    return float(((change @ gram) * change).sum())


def damped(gram: Tensor, ridge: float) -> Tensor:
    return gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)


def keeping(columns: Tensor, curvature: Tensor, start: int):
    return lambda column, j: column


def removing(*places: tuple[int, int]):
    """Weights (output, feature) that go."""

    def begin(columns: Tensor, curvature: Tensor, start: int):
        def choose(column: Tensor, j: int) -> Tensor:
            rows = [row for row, feature in places if feature == start + j]
            return column.index_fill(0, torch.tensor(rows, dtype=torch.long), 0)

        return choose

    return begin


def masking(mask: Tensor, seen: list[Tensor] | None = None):
    """Weights outside the mask (outputs, features) go; notes what each choice costs."""

    def begin(columns: Tensor, curvature: Tensor, start: int):
        def choose(column: Tensor, j: int) -> Tensor:
            kept = column * mask[:, start + j]
            if seen is not None:
                seen.append(curvature[j] * (kept - column).square().sum())
            return kept

        return choose

    return begin


def random_mask(like: Tensor, share: float, seed: int) -> Tensor:
    return torch.rand(like.shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("rank", [20, 7])
def test_columns_that_are_kept_give_the_matrix_bit_for_bit(rank: int) -> None:
    matrix, gram = task(5, 20, rank)
    assert torch.equal(error_feedback(matrix, gram, keeping, block=6), matrix)


@pytest.mark.parametrize("feature", [0, 6, 11])
@pytest.mark.parametrize("block", [4, 12])
def test_one_removed_weight_is_made_up_for_as_by_optimal_brain_surgeon(feature: int, block: int) -> None:
    matrix, gram = task(3, 12, 12)
    found = error_feedback(matrix, gram, removing((1, feature)), block=block, ridge=1e-9)
    inverse = torch.linalg.inv(damped(gram, 1e-9)[feature:, feature:])
    expected = matrix.clone()
    expected[1, feature:] -= matrix[1, feature] / inverse[0, 0] * inverse[:, 0]
    expected[1, feature] = 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found[1, feature] == 0


@given(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30), st.integers(1, 9), st.integers(0, 99))
@settings(max_examples=60)
def test_the_costs_that_are_told_add_up_to_the_error(
    outputs: int, features: int, rank: int, block: int, seed: int
) -> None:
    matrix, gram = task(outputs, features, min(rank, features), seed)
    costs: list[Tensor] = []
    mask = random_mask(matrix, 0.5, seed)
    found = error_feedback(matrix, gram, masking(mask, costs), block=block, ridge=1e-3)
    total = loss(found - matrix, damped(gram, 1e-3))
    assert float(sum(costs)) == pytest.approx(total, rel=1e-8, abs=1e-12)
    assert torch.equal(found[~mask], torch.zeros_like(found[~mask]))


@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 99))
@settings(max_examples=60)
def test_blocks_of_any_size_give_the_same(features: int, block: int, seed: int) -> None:
    matrix, gram = task(4, features, features, seed)
    mask = random_mask(matrix, 0.4, seed)
    whole = error_feedback(matrix, gram, masking(mask), block=features)
    torch.testing.assert_close(error_feedback(matrix, gram, masking(mask), block=block), whole, rtol=1e-7, atol=1e-8)


@given(st.integers(2, 30), st.integers(2, 30), st.integers(0, 99))
@settings(max_examples=60)
def test_columns_that_all_go_first_leave_the_least_squares_optimum(features: int, rank: int, seed: int) -> None:
    matrix, gram = task(3, features, min(rank, features), seed)
    gone = features // 2
    mask = (torch.arange(features) >= gone).expand(3, -1)
    found = error_feedback(matrix, gram, masking(mask), block=5, ridge=1e-3)
    h = damped(gram, 1e-3)
    change = torch.linalg.solve(h[gone:, gone:], h[gone:, :gone] @ matrix[:, :gone].T).T
    torch.testing.assert_close(found[:, gone:], matrix[:, gone:] + change, rtol=1e-6, atol=1e-8)
    assert loss(found - matrix, h) <= loss(matrix * mask - matrix, h) * (1 + 1e-9)


def rounding(columns: Tensor, curvature: Tensor, start: int):
    return lambda column, j: (column * 2).round() / 2


def test_making_up_for_rounding_leaves_less_error_than_rounding_alone() -> None:
    ratios = []
    for seed in range(10):
        matrix, gram = task(8, 40, 30, seed)
        found = error_feedback(matrix, gram, rounding, block=16)
        assert torch.equal(found, (found * 2).round() / 2)
        ratios.append(loss(found - matrix, gram) / loss((matrix * 2).round() / 2 - matrix, gram))
    assert max(ratios) < 0.5


def test_a_block_sees_what_the_columns_before_have_made_of_it() -> None:
    matrix, gram = task(2, 9, 9)
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(columns: Tensor, curvature: Tensor, start: int):
        seen[start] = columns.clone(), curvature
        return masking(torch.zeros(2, 9))(columns, curvature, start)

    error_feedback(matrix, gram, begin, block=4, ridge=1e-9)
    h = damped(gram, 1e-9)
    assert list(seen) == [0, 4, 8]
    best = matrix[:, 4:] + torch.linalg.solve(h[4:, 4:], h[4:, :4] @ matrix[:, :4].T).T
    torch.testing.assert_close(seen[4][0], best[:, :4], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(seen[4][1][0], 1 / torch.linalg.inv(h[4:, 4:])[0, 0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("gram", [torch.zeros(4, 4), torch.ones(4, 4), torch.diag(torch.tensor([1.0, 0, 0, 2]))])
def test_singular_moments_are_no_obstacle(gram: Tensor) -> None:
    matrix = torch.arange(1.0, 9).view(2, 4)
    found = error_feedback(matrix, gram, removing((0, 1), (1, 0)), ridge=0)
    assert bool(found.isfinite().all())
    assert found[0, 1] == 0 == found[1, 0]
    assert loss(found - matrix, gram.double()) <= loss(removed(matrix) - matrix, gram.double()) + 1e-6


def removed(matrix: Tensor) -> Tensor:
    cut = matrix.double().clone()
    cut[0, 1] = cut[1, 0] = 0
    return cut


def test_moments_that_rounding_has_made_indefinite_get_more_ridge() -> None:
    matrix, gram = task(2, 6, 2)
    gram -= 1e-3 * gram.diagonal().mean() * torch.eye(6)
    assert bool(error_feedback(matrix, gram, removing((0, 1)), ridge=1e-6).isfinite().all())


def test_nothing_that_is_handed_over_is_written() -> None:
    matrix, gram = task(3, 8, 8)
    before = matrix.clone(), gram.clone()
    error_feedback(matrix, gram, masking(torch.zeros(3, 8)), block=3)
    assert torch.equal(matrix, before[0])
    assert torch.equal(gram, before[1])


def test_values_that_are_not_finite_are_errors() -> None:
    matrix, gram = task(2, 3, 3)
    with pytest.raises(InputError, match="the weights hold NaN"):
        error_feedback(matrix.index_fill(1, torch.tensor([1]), float("nan")), gram, keeping)
    with pytest.raises(InputError, match="the second moments hold NaN"):
        error_feedback(matrix, gram * float("inf"), keeping)
