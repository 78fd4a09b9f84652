"""Conjugate gradients."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery import conjugate_gradients


def semidefinite(size: int, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """A (size, size) matrix of this rank and a vector in its range."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randn(size, rank, generator=generator, dtype=torch.float64)
    matrix = half @ half.T
    return matrix, matrix @ torch.randn(size, generator=generator, dtype=torch.float64)


def jacobi(matrix: Tensor):
    """Divides by the diagonal."""
    return lambda residual: residual / matrix.diagonal()


@pytest.mark.parametrize("start", [None, torch.ones(12, dtype=torch.float64)])
@pytest.mark.parametrize("rank", [12, 5])
def test_as_many_steps_as_the_rank_solve_a_system(rank, start):
    matrix, goal = semidefinite(12, rank, 0)
    found = conjugate_gradients(lambda x: matrix @ x, goal, start, lambda r: r, rank + 3)
    assert float((matrix @ found - goal).norm() / goal.norm()) < 1e-8


def test_what_undoes_the_matrix_needs_one_step_and_any_shape_will_do():
    matrix, _ = semidefinite(6, 6, 1)
    goal = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = conjugate_gradients(lambda x: matrix @ x, goal, None, lambda r: torch.linalg.solve(matrix, r), 1)
    torch.testing.assert_close(matrix @ found, goal)


@given(st.integers(2, 12), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_no_step_raises_the_quadratic(size: int, rank: int, seed: int) -> None:
    matrix, goal = semidefinite(size, min(size, rank), seed)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(size, generator=generator, dtype=torch.float64)
    values = []
    for steps in range(size + 1):
        found = conjugate_gradients(lambda x: matrix @ x, goal, start, jacobi(matrix), steps)
        values.append(float(found @ matrix @ found / 2 - found @ goal))
    scale = max(map(abs, values))
    assert all(after <= before + 1e-9 * scale for before, after in pairwise(values))


def test_it_ends_where_the_residual_has_fallen_far_enough():
    matrix, goal = semidefinite(40, 40, 2)
    calls = []

    def apply(x: Tensor) -> Tensor:
        calls.append(x)
        return matrix @ x

    found = conjugate_gradients(apply, goal, None, lambda r: r, 500, 1e-1)
    assert 1e-3 < float((matrix @ found - goal).norm() / goal.norm()) <= 1e-1
    assert 1 < len(calls) < 40


def test_a_solution_and_a_matrix_of_zeros_stay_as_they_are():
    start = torch.ones(3, dtype=torch.float64)
    assert torch.equal(conjugate_gradients(lambda x: 2 * x, 2 * start, start, lambda r: r, 5), start)
    assert torch.equal(conjugate_gradients(torch.zeros_like, start, start, lambda r: r, 5), start)
