from __future__ import annotations

from typing import Any

import pytest
import torch
from decomposing import (
    KINDS,
    METRICS,
    assert_computes_its_product,
    assert_keeps_its_promises,
    convolutions,
    kernel,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.low_rank import SpatialSvd, projection
from surgery_plugins.low_rank.kernel import Kernel
from surgery_plugins.low_rank.spatial import SpatialSvd as Method
from torch import Tensor, nn

from surgery.captured import CapturedModel, capture, relative_error
from surgery.context import Context
from surgery.data import Data
from surgery.measurement import measure
from surgery.passes import PassReport
from surgery.testing import check_pass, contract_cases

SHAPES = [(8, 6, 3, 3), (3, 20, 3, 2), (4, 3, 2, 5), (20, 2, 3, 3), (1, 4, 3, 3), (4, 1, 3, 3), (5, 4, 3, 2, 2)]
LAYERS = ["layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv2"]


def rewrite(
    model: nn.Module, example: Tensor, data: Any = None, **options: Any
) -> tuple[CapturedModel, CapturedModel, PassReport]:
    before = capture(model.eval(), example)
    after, report = SpatialSvd(**options)(before, Context(before, Data.of(data)))
    return before, after, report


# --- the decomposition ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_kernels_are_decomposed_as_promised(shape: tuple[int, ...], metric: str) -> None:
    assert_keeps_its_promises(Method(), kernel(shape, 0, metric), each=6)


@pytest.mark.parametrize("metric", ["weight", "output"])
@pytest.mark.parametrize("layer", LAYERS)
def test_trained_kernels_are_decomposed_as_promised(layer: str, metric: str) -> None:
    assert_keeps_its_promises(Method(), trained(layer, metric))


@given(st.sampled_from(SHAPES[:6]), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_for_weights_it_is_the_best_there_is(shape: tuple[int, ...], seed: int) -> None:
    task = kernel(shape, seed, "weight")
    values = torch.linalg.svdvals(task.weight.permute(1, 2, 0, 3).flatten(2).flatten(0, 1)).square()
    for rank in range(1, len(values)):
        least = float((values[rank:].sum() / values.sum()).sqrt())
        assert task.error(Method().decompose(task, (rank,)).product) == pytest.approx(least, rel=1e-8)
        assert Method().estimates(task, [(rank,)])[0] == pytest.approx(least**2, rel=1e-8)


def test_for_a_separable_metric_it_is_the_best_there_is() -> None:
    parts = [kernel((1, size), size).covariance for size in (4, 3, 3)]
    assert all(part is not None for part in parts)
    inputs, high, wide = (torch.eye(len(p), dtype=p.dtype) + p for p in parts if p is not None)
    task = Kernel(kernel((6, 4, 3, 3)).weight, torch.kron(torch.kron(inputs, high), wide))
    roots = [torch.linalg.cholesky(part) for part in (inputs, high, wide)]
    seen = torch.einsum("oiab,ij,ac,bd->jcod", task.weight, *roots).flatten(2).flatten(0, 1)
    values = torch.linalg.svdvals(seen).square()
    for rank in (1, 5, 9):
        least = float((values[rank:].sum() / values.sum()).sqrt())
        assert task.error(Method().decompose(task, (rank,)).product) == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("rank", [4, 12, 20])
def test_improving_the_vertical_filters_pays(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained("layer1.0.conv1", "output")
    improved = task.error(Method().decompose(task, (rank,)).product)
    monkeypatch.setattr(projection, "ROUNDS", 0)
    assert improved < 0.99 * task.error(Method().decompose(task, (rank,)).product)


@pytest.mark.parametrize("metric", METRICS)
def test_separable_filters_are_found_exactly(metric: str) -> None:
    task = kernel((5, 4, 3, 3), 0, metric)
    vertical, horizontal = task.weight[0, :, :, :2], task.weight[:, :2, 0]
    exact = Kernel(torch.einsum("iar,orb->oiab", vertical, horizontal), task.covariance)
    assert exact.error(Method().decompose(exact, (2,)).product) < 1e-6


# --- the layers ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(convolutions(least=2, both=True), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_the_layers_compute_what_their_product_computes(
    case: tuple[nn.Module, Tensor], batchnorm: bool, data: st.DataObject
) -> None:
    module, x = case
    (limit,) = Method().limits(tuple(module.weight.shape))
    assert_computes_its_product(Method(batchnorm), module, x, (data.draw(st.integers(1, limit)),))


def test_the_first_layer_is_vertical_and_the_second_horizontal() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, stride=(1, 2), padding=1), nn.Conv2d(12, 12, (3, 5)))
    _, after, report = rewrite(model, torch.randn(2, 8, 9, 9), rank=4)
    assert {name: tuple(p.shape) for name, p in after.named_parameters()} == {
        "0.vertical.weight": (4, 8, 3, 1), "0.horizontal.weight": (12, 4, 1, 3), "0.horizontal.bias": (12,),
        "1.vertical.weight": (4, 12, 3, 1), "1.horizontal.weight": (12, 4, 1, 5), "1.horizontal.bias": (12,),
    }  # fmt: skip
    assert sum(edit.numbers["macs_after"] for edit in report.edits) == measure(after, after.inputs).macs


def test_layers_that_have_no_such_form_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (3, 1)), nn.Conv2d(8, 8, (1, 3)), nn.Conv2d(8, 16, 3))
    _, _, report = rewrite(model, torch.randn(1, 8, 12, 12), rank=4)
    assert {skip.layer: skip.why for skip in report.skips} == {
        str(i): f"a kernel of {size} has nothing to separate" for i, size in enumerate(["1x1", "3x1", "1x3"])
    }
    _, _, report = rewrite(nn.Sequential(nn.Conv1d(8, 8, 3)), torch.randn(1, 8, 12), rank=4)
    assert [skip.why for skip in report.skips] == ["a kernel of 3 has nothing to separate"]


# --- with a BatchNorm ---


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list((2 + torch.randn(64, 8, 9, 9, generator=generator)).split(16))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())


@pytest.mark.parametrize("options", [{}, {"metric": "weight"}, {"data": None}])
def test_a_batchnorm_between_changes_nothing_in_eval_mode(options: dict[str, Any]) -> None:
    data = options.pop("data", images())
    x = images()[0]
    _, plain, _ = rewrite(small(), x, data, rank=6, **options)
    _, normed, report = rewrite(small(), x, data, rank=6, batchnorm=True, **options)
    assert isinstance(normed.get_submodule("0.vertical_norm"), nn.BatchNorm2d)
    assert relative_error(normed(x), plain(x)) < 1e-5
    parameters = {name: p for name, p in normed.named_parameters() if name.startswith("0.")}
    assert report.edits[0].numbers["parameters_after"] == sum(p.numel() for p in parameters.values())


@pytest.mark.parametrize("metric", ["weight", "output"])
def test_the_batchnorm_knows_the_data(metric: str) -> None:
    _, after, _ = rewrite(small(), images()[0], images(), rank=6, batchnorm=True, metric=metric)
    seen = after.get_submodule("0.vertical")(torch.cat(images())).transpose(0, 1).flatten(1)
    norm: Any = after.get_submodule("0.vertical_norm")
    torch.testing.assert_close(norm.running_mean, seen.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(norm.running_var, seen.var(1, correction=0), rtol=1e-3, atol=1e-4)


def test_with_the_batchnorm_training_starts_from_the_same_output() -> None:
    _, after, _ = rewrite(small(), images()[0], images(), rank=6, batchnorm=True)
    inner = nn.Sequential(*(after.get_submodule(f"0.{name}") for name in ("vertical", "vertical_norm", "horizontal")))
    x = torch.cat(images())
    still = inner.eval()(x)
    moving = inner.train()(x)
    assert relative_error(moving, still) < 1e-3
    moving.square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in inner.parameters())


@pytest.mark.parametrize(
    ("step", "network"),
    contract_cases(
        [SpatialSvd(layer_macs=0.8), SpatialSvd(rank=2, batchnorm=True), SpatialSvd(rank=2, metric="weight")],
        KINDS,
    ),
)
def test_contract(step: SpatialSvd, network: Any) -> None:
    check_pass(step, network)
