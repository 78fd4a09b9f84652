from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.low_rank import ChannelSvd, Cp, SpatialSvd, Svd, TensorTrain, Tucker
from surgery_plugins.low_rank.method import Ranks
from surgery_plugins.low_rank.options import LowRank
from surgery_plugins.low_rank.svd import ConvSvd
from surgery_plugins.low_rank.vbmf import evbmf_rank, noise_level, threshold
from torch import Tensor, nn

from surgery.captured import capture
from surgery.context import Context
from surgery.data import Data


def planted(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """Signal of variance `rank` with as many times `noise`² on it."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(rows, rank, generator=generator), torch.randn(rank, columns, generator=generator)
    return left @ right + noise * max(1, rank) ** 0.5 * torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize(("rows", "columns"), [(50, 50), (40, 60), (64, 576), (200, 40), (30, 3000), (256, 2304)])
@pytest.mark.parametrize("noise", [0.1, 0.5, 1.0])
def test_a_planted_rank_is_found(rows: int, columns: int, noise: float) -> None:
    assert evbmf_rank(planted(rows, columns, 5, noise)) == 5


@pytest.mark.parametrize("shape", [(16, 144), (64, 64), (100, 1000), (1, 20)])
def test_noise_has_no_rank(shape: tuple[int, int]) -> None:
    assert all(evbmf_rank(planted(*shape, 0, 1.0, seed)) == 0 for seed in range(5))


def test_without_noise_the_rank_is_that_of_the_matrix() -> None:
    assert [evbmf_rank(planted(30, 50, rank, 0.0).double()) for rank in (1, 4, 9)] == [1, 4, 9]
    assert evbmf_rank(torch.zeros(3, 7)) == 0


@given(st.integers(2, 30), st.integers(2, 30), st.integers(1, 3), st.floats(0.05, 2), st.integers(-12, 12))
@settings(max_examples=60, deadline=None)
def test_scale_and_transposition_do_not_matter(rows: int, columns: int, rank: int, noise: float, power: int) -> None:
    matrix = planted(rows, columns, rank, noise).double()
    found = evbmf_rank(matrix)
    assert found <= min(rows, columns)
    assert evbmf_rank(matrix.T) == found
    assert evbmf_rank(matrix * 2.0**power) == found


def test_more_noise_leaves_no_more_components() -> None:
    signal = planted(60, 300, 10, 0.0) * torch.linspace(0.2, 3, 300)
    ranks = [evbmf_rank(signal + level * planted(60, 300, 0, 1.0, 1)) for level in (0.1, 1.0, 3.0, 10.0, 100.0)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == 10
    assert ranks[-1] <= 1


@pytest.mark.parametrize(("rows", "columns", "noise"), [(100, 100, 0.3), (80, 700, 2.0)])
def test_the_level_of_the_noise_is_found(rows: int, columns: int, noise: float) -> None:
    ratio, matrix = rows / columns, planted(rows, columns, 1, noise).double()
    squared = torch.linalg.svdvals(matrix).square() / columns
    assert noise_level(squared, ratio, threshold(ratio)) == pytest.approx(noise**2, rel=0.05)


def test_the_threshold_of_square_matrices_is_that_of_the_paper() -> None:
    assert threshold(1.0) == pytest.approx((1 + 2.5129) * (1 + 1 / 2.5129), rel=1e-4)
    bounds = [(threshold(ratio), (1 + ratio**0.5) ** 2) for ratio in (0.001, 0.1, 0.5, 1.0)]
    assert all(found > edge for found, edge in bounds)  # above the largest value of pure noise


def test_a_method_takes_the_rank_in_steps_and_within_its_limits() -> None:
    weight = planted(64, 90, 5, 0.3).double().view(64, 10, 3, 3)
    assert [ConvSvd().ranks_by_vbmf(weight, step) for step in (1, 4, 8, 100)] == [(5,), (8,), (8,), (64,)]
    assert ConvSvd().ranks_by_vbmf(planted(64, 90, 0, 1.0).double().view(64, 10, 3, 3), 1) == (1,)


METHODS = [
    (Svd, (60, 40), (5,), {}),
    (ChannelSvd, (40, 12, 3, 3), (5,), {}),
    (Tucker, (32, 24, 3, 3), (5, 4), {}),
    (SpatialSvd, (32, 24, 3, 3), (5,), {}),
    (Cp, (32, 24, 3, 3), (5,), {}),
    (TensorTrain, (48, 36), (2,), {"min_features": 4}),
    (TensorTrain, (216, 216), (3,), {"min_features": 4, "cores": 3}),
]
"""Passes with the shape of a layer and the ranks that its weight has under the noise."""


def applied(step: LowRank, shape: tuple[int, ...], ranks: Ranks, noise: float, data: bool) -> dict[str, float]:
    """The numbers of a layer whose weight is a product of factors, with `noise` of their size on it."""
    generator = torch.Generator().manual_seed(1)
    weight = step.method.random(shape, ranks).product.double()
    weight = weight / weight.std() + noise * torch.randn(shape, generator=generator)
    layer = nn.Linear(*shape[1::-1]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:], padding=1)
    layer.weight = nn.Parameter(weight.float())
    x = torch.randn(64, shape[1], *[8 for _ in shape[2:]], generator=generator).cumsum(-1)
    norm = [nn.BatchNorm2d(shape[0])] if len(shape) > 2 else []
    before = capture(nn.Sequential(layer, *norm).eval(), x[:2])
    _, report = step(before, Context(before, Data.of([x] if data else None)))
    return report.edits[0].numbers


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("noise", [0.02, 0.1])
@pytest.mark.parametrize(("kind", "shape", "ranks", "options"), METHODS)
def test_every_pass_finds_the_planted_rank_with_or_without_data(kind, shape, ranks, options, noise, data):
    step = kind(rank="vbmf", round_to=1, **options)
    numbers = applied(step, shape, ranks, noise, data)
    assert tuple(numbers[name] for name in step.method.names) == ranks
    if not data:
        assert numbers["weight_error"] < 1.2 * noise


@pytest.mark.parametrize(("kind", "shape", "ranks", "options"), METHODS)
def test_every_pass_keeps_the_energy_asked_for(kind, shape, ranks, options):
    step = kind(energy=0.999, round_to=1, **options)
    numbers = applied(step, shape, ranks, 0.02, data=False)
    found = tuple(numbers[name] for name in step.method.names)
    # orthogonal components, by which `cp` judges, are more than those that were planted
    assert ranks <= found <= (25,) if kind is Cp else found == ranks
    assert 1 - numbers["weight_error"] ** 2 >= 0.999 - 1e-4
