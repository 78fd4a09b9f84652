"""Counts agree with closed formulas and with published figures; latency is a ratio within rounds."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import pytest
import torch
from torch import Tensor, nn

from surgery.captured import capture
from surgery.errors import InputError
from surgery.measurement import latency, measure, seconds

TOKENS, WIDTH = 5, 8


def vgg16() -> nn.Module:
    """VGG-16 for CIFAR-10: 13 convolutions with BatchNorm, one linear layer."""
    layers: list[nn.Module] = []
    channels = 3
    for stage in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for width in stage:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def test_vgg16_has_the_published_parameters_and_macs() -> None:
    model = vgg16()
    measured = measure(model, torch.randn(4, 3, 32, 32))
    assert (measured.parameters, measured.macs) == (14_728_266, 313_201_664)
    assert measured.parameter_bytes == 4 * 14_728_266
    assert measured.by_module["0"] == 32 * 32 * 64 * 3 * 9
    assert sum(measured.by_module.values()) == measured.macs


def test_a_captured_model_measures_as_the_model_itself() -> None:
    model, example = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 5)).eval(), torch.randn(2, 3, 8, 8)
    assert measure(capture(model, example), example) == measure(model, example)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


class Products(nn.Module):
    """One product of each kind that torch's counter leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.vector = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.vector, torch.dot(self.vector, self.vector)


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class Twice(nn.Bilinear):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x, x)


PROJECTIONS = 4 * TOKENS * WIDTH * WIDTH
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "attention on bare tensors": (Attention, 2 * TOKENS * TOKENS * WIDTH),
    "nn.MultiheadAttention": (lambda: SelfAttention(WIDTH, 2, batch_first=True), PROJECTIONS + 2 * TOKENS**2 * WIDTH),
    "nn.LSTM": (lambda: nn.LSTM(WIDTH, WIDTH, batch_first=True), TOKENS * 4 * 2 * WIDTH * WIDTH),
    "nn.GRU": (lambda: nn.GRU(WIDTH, WIDTH, batch_first=True, bidirectional=True), 2 * TOKENS * 3 * 2 * WIDTH * WIDTH),
    "mv and dot": (Products, TOKENS * WIDTH + WIDTH),
    "nn.Bilinear": (lambda: Twice(WIDTH, WIDTH, 3), 2 * TOKENS * 3 * WIDTH * WIDTH),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [False, True])
def test_macs_equal_the_closed_formula(name: str, training: bool) -> None:
    build, expected = CASES[name]
    model = build().train(training)
    assert measure(model, torch.randn(3, TOKENS, WIDTH)).macs == expected
    assert model.training is training


def test_a_shared_parameter_counts_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    measured = measure(model, torch.randn(1, 8))
    assert (measured.parameters, measured.macs) == (64, 128)


class NeedsValues(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else x


class NeedsPairs(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(2, -1, 8))


@pytest.mark.parametrize("build", [NeedsValues, NeedsPairs])
def test_models_that_need_values_or_a_whole_batch_are_counted_per_sample(build: type[nn.Linear]) -> None:
    assert measure(build(8, 8), torch.ones(4, 8)).macs == 64


def test_a_model_that_does_not_run_is_an_input_error() -> None:
    with pytest.raises(InputError, match="does not run on the example inputs"):
        measure(nn.Linear(8, 8), torch.ones(4, 7))


def test_latency_is_relative_to_the_first_contestant_within_each_round() -> None:
    calls: list[str] = []

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        return lambda: (calls.append(name), time.sleep(seconds))[1]

    times = latency({"slow": contestant("slow", 0.02), "fast": contestant("fast", 0.005)}, rounds=4, warmup=1)
    rounds = [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert calls[:2] == ["slow", "fast"]
    assert len(rounds) == 4
    assert all(sorted(called) == ["fast", "slow"] for called in rounds)
    assert times["slow"].ratio == 1
    assert times["fast"].seconds < times["slow"].seconds
    assert 1 < times["fast"].quartiles[0] <= times["fast"].ratio <= times["fast"].quartiles[1]


def test_each_contestant_comes_after_each_as_often() -> None:
    calls: list[str] = []
    seconds({name: partial(calls.append, name) for name in "abc"}, rounds=600, warmup=0)
    after = Counter(pairwise(calls))
    for pair in product("abc", repeat=2):  # one of nine between two rounds, one of six within a round
        expected = 599 / 9 + (0 if pair[0] == pair[1] else 1200 / 6)
        assert abs(after[pair] - expected) < 4 * expected**0.5


@pytest.mark.parametrize(("contestants", "rounds"), [({}, 3), ({"a": lambda: None}, 0)])
def test_latency_of_nothing_is_an_input_error(contestants: dict[str, Callable[[], object]], rounds: int) -> None:
    with pytest.raises(InputError, match=f"{len(contestants)} contestants in {rounds} rounds"):
        latency(contestants, rounds=rounds)
