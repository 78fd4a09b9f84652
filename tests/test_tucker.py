from __future__ import annotations

from typing import Any

import pytest
import tensorly
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
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from surgery_plugins.low_rank import Tucker, projection
from surgery_plugins.low_rank.kernel import Kernel
from surgery_plugins.low_rank.method import Ranks
from surgery_plugins.low_rank.svd import ConvSvd
from surgery_plugins.low_rank.tucker import Tucker2
from tensorly.decomposition import partial_tucker
from torch import Tensor, nn

from surgery.captured import CapturedModel, capture
from surgery.context import Context
from surgery.data import Data
from surgery.measurement import measure
from surgery.passes import PassReport
from surgery.recipe import resolve
from surgery.registry import Registry
from surgery.testing import check_pass, contract_cases

SHAPES = [
    (8, 6, 3, 3),
    (12, 2, 3),
    (3, 20, 3),
    (5, 4, 3, 2, 2),
    (4, 30, 2, 3),
    (20, 2, 3, 3),
    (1, 4, 3, 3),
    (4, 1, 3, 3),
]
LAYERS = ["layer1.0.conv1", "layer2.0.conv1", "layer3.1.conv2"]


def rewrite(model: nn.Module, example: Tensor, data: Any = None, **options: Any) -> tuple[CapturedModel, PassReport]:
    before = capture(model.eval(), example)
    return Tucker(**options)(before, Context(before, Data.of(data)))


def theirs(weight: Tensor, ranks: Ranks) -> Tensor:
    with tensorly.backend_context("pytorch"):
        (core, factors), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1])
        product: Tensor = tensorly.tenalg.multi_mode_dot(core, factors, modes=[0, 1])
    return product


# --- the decomposition ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_random_kernels_are_decomposed_as_promised(shape: tuple[int, ...], metric: str) -> None:
    assert_keeps_its_promises(Tucker2(), kernel(shape, 0, metric), tolerance=0.03)


@pytest.mark.parametrize("metric", ["weight", "output"])
@pytest.mark.parametrize("layer", LAYERS)
def test_trained_kernels_are_decomposed_as_promised(layer: str, metric: str) -> None:
    assert_keeps_its_promises(Tucker2(), trained(layer, metric), each=3)


@given(st.sampled_from(SHAPES), st.integers(0, 99), st.data())
@settings(max_examples=30, deadline=None)
def test_it_is_no_worse_than_tensorly(shape: tuple[int, ...], seed: int, data: st.DataObject) -> None:
    task, limits = kernel(shape, seed, "weight"), Tucker2().limits(shape)
    ranks = tuple(data.draw(st.integers(1, limit)) for limit in limits)
    assume(ranks in Tucker2().choices(shape, 1, 100))
    ours = task.error(Tucker2().decompose(task, ranks).product)
    assert ours <= task.error(theirs(task.weight, ranks)) * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("layer", LAYERS)
def test_it_is_no_worse_than_tensorly_on_trained_kernels(layer: str) -> None:
    task = trained(layer, "weight")
    for ranks in [(4, 4), (8, 6), (12, 12)]:
        ours = task.error(Tucker2().decompose(task, ranks).product)
        assert ours <= task.error(theirs(task.weight, ranks)) * (1 + 1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_kernel_of_low_rank_is_found_exactly(metric: str) -> None:
    core, task = kernel((3, 2, 3, 3), 1, "weight").weight, kernel((9, 8, 3, 3), 2, metric)
    outer, inner = task.weight[:, :3, 0, 0], task.weight[0, :, :2, 0]
    exact = Kernel(torch.einsum("op,psab,is->oiab", outer, core, inner), task.covariance)
    assert exact.error(Tucker2().decompose(exact, (3, 2)).product) < 1e-6
    assert Tucker2().ranks_by_energy(Kernel(exact.weight), 1 - 1e-9, 1) == (3, 2)


@pytest.mark.parametrize("metric", METRICS)
def test_with_all_inputs_it_is_the_best_there_is(metric: str) -> None:
    task = kernel((8, 5, 3, 3), 0, metric)
    for rank in (1, 4, 7):
        found, best = Tucker2().decompose(task, (rank, 5)), ConvSvd().decompose(task, (rank,))
        assert task.error(found.product) == pytest.approx(task.error(best.product), rel=1e-9)


@pytest.mark.parametrize("ranks", [(6, 5), (16, 6)])
def test_improving_the_inputs_projection_pays(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained("layer1.0.conv1", "output")
    improved = task.error(Tucker2().decompose(task, ranks).product)
    monkeypatch.setattr(projection, "ROUNDS", 0)
    assert improved < 0.99 * task.error(Tucker2().decompose(task, ranks).product)


def test_projections_that_keep_all_channels_are_left_out() -> None:
    task = kernel((8, 6, 3, 3))
    named = {r: [s.name for s in Tucker2().decompose(task, r).stages] for r in [(4, 3), (4, 6), (8, 3), (8, 6)]}
    assert named == {(4, 3): ["reduce", "core", "expand"], (4, 6): ["core", "expand"], (8, 3): ["reduce", "core"],
                     (8, 6): ["core"]}  # fmt: skip


def test_ranks_that_the_core_cannot_use_are_no_choice() -> None:
    assert (4, 1) not in Tucker2().choices((8, 6, 3), 1)
    chain = Tucker2().decompose(kernel((8, 6, 3)), (4, 1))
    assert [tuple(stage.weight.shape) for stage in chain.stages] == Tucker2().shapes((8, 6, 3), (4, 1))
    assert kernel((8, 6, 3)).error(chain.product) == pytest.approx(
        kernel((8, 6, 3)).error(Tucker2().decompose(kernel((8, 6, 3)), (3, 1)).product)
    )


@pytest.mark.parametrize("metric", ["weight", "output"])
@pytest.mark.parametrize("layer", LAYERS)
def test_tensorlys_engine_gives_the_same_error(layer: str, metric: str) -> None:
    task = trained(layer, metric)
    for ranks in [(4, 4), (8, 6), (12, 12)]:
        ours, other = (task.error(Tucker2(engine).decompose(task, ranks).product) for engine in ("own", "tensorly"))
        assert other == pytest.approx(ours, rel=1e-3)
    assert tensorly.get_backend() == "numpy"


@pytest.mark.parametrize("metric", ["weight", "output"])
def test_large_kernels_lose_nothing_to_single_precision(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = trained("layer2.0.conv1", metric)
    exact = [task.error(Tucker2().decompose(task, ranks).product) for ranks in [(8, 6), (24, 12), (31, 15)]]
    monkeypatch.setattr(projection, "LARGE", 1)
    found = [task.error(Tucker2().decompose(task, ranks).product) for ranks in [(8, 6), (24, 12), (31, 15)]]
    assert found == pytest.approx(exact, rel=1e-4)


# --- the layers ---


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@given(convolutions(), st.data())
@settings(max_examples=60, deadline=None)
def test_the_layers_compute_what_their_product_computes(case: tuple[nn.Module, Tensor], data: st.DataObject) -> None:
    module, x = case
    limits = Tucker2().limits(tuple(module.weight.shape))
    assert_computes_its_product(Tucker2(), module, x, tuple(data.draw(st.integers(1, limit)) for limit in limits))


def test_a_pair_of_ranks_is_that_of_outputs_and_inputs() -> None:
    model = nn.Sequential(nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3))
    after, report = rewrite(model, torch.randn(2, 8, 9, 9), rank=(4, 3))
    assert [(e.layer, e.numbers["rank_out"], e.numbers["rank_in"]) for e in report.edits] == [("0", 4, 3), ("2", 4, 3)]
    assert {name: tuple(p.shape) for name, p in after.named_parameters() if name.startswith("0.")} == {
        "0.reduce.weight": (3, 8, 1, 1), "0.core.weight": (4, 3, 3, 3),
        "0.expand.weight": (12, 4, 1, 1), "0.expand.bias": (12,),
    }  # fmt: skip
    assert sum(e.numbers["macs_after"] for e in report.edits) == measure(after, after.inputs).macs


def test_a_recipe_gives_ranks_as_a_number_a_pair_or_vbmf() -> None:
    registry = Registry.load()
    for rank, read in [(3, 3), ([4, 3], (4, 3)), ("vbmf", "vbmf")]:
        plan = resolve({"name": "r", "passes": [{"tucker": {"rank": rank}}]}, registry)
        assert [step.options["rank"] for step in plan.steps] == [read]


def test_vbmf_finds_both_ranks() -> None:
    core, task = kernel((3, 4, 3, 3), 1, "weight").weight, kernel((24, 20, 3, 3), 2, "weight")
    generator = torch.Generator().manual_seed(0)
    outer, inner = torch.randn(24, 3, generator=generator), torch.randn(20, 4, generator=generator)
    weight = torch.einsum("op,psab,is->oiab", outer.double(), core, inner.double()) + 0.3 * task.weight
    assert Tucker2().ranks_by_vbmf(weight, 1) == (3, 4)
    layer = nn.Conv2d(20, 24, 3)
    layer.weight = nn.Parameter(weight.float())
    _, report = rewrite(nn.Sequential(layer), torch.randn(1, 20, 8, 8), rank="vbmf", round_to=1)
    assert [(e.numbers["rank_out"], e.numbers["rank_in"]) for e in report.edits] == [(3, 4)]


def test_layers_that_have_no_such_form_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, groups=2),
                          nn.ConvTranspose2d(16, 16, 3), nn.Conv2d(16, 32, 3))  # fmt: skip
    _, report = rewrite(model, torch.randn(1, 3, 12, 12), rank=(6, 6))
    assert {skip.layer: skip.why for skip in report.skips} == {
        "0": "rank (6, 6) is above its maximum, (16, 3)",
        "1": "pointwise: channel_svd is its form",
        "2": "grouped (2 groups)",
        "3": "transposed convolutions are not decomposed",
    }
    assert [edit.layer for edit in report.edits] == ["4"]


def test_ranks_that_save_macs_but_need_more_weights_are_left_out() -> None:
    model = nn.Sequential(nn.Conv2d(12, 8, 3, padding=2))  # makes 5×5 of 3×3: the first stage is cheap for its weights
    _, report = rewrite(model, torch.randn(2, 12, 3, 3), rank=(8, 11))
    assert [skip.why for skip in report.skips] == ["rank (8, 11) would get larger: 924 weights instead of 864"]
    for options in ({"layer_macs": 0.95}, {"macs": 0.95}):
        _, report = rewrite(model, torch.randn(2, 12, 3, 3), round_to=1, **options)
        (numbers,) = (edit.numbers for edit in report.edits)
        assert all(numbers[f"{what}_after"] < numbers[f"{what}_before"] for what in ("macs", "parameters"))


@pytest.mark.parametrize("metric", ["weight", "output"])
def test_a_budget_is_met(metric: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Conv2d(a, 24, 3, padding=1), nn.ReLU()) for a in (3, 24, 24)))
    data = list(torch.randn(64, 3, 10, 10).split(16))
    after, _ = rewrite(model, data[0], data, macs=0.5, metric=metric)
    assert 0.45 < measure(after, after.inputs).macs / measure(model, data[0]).macs <= 0.505


@pytest.mark.parametrize(
    ("step", "network"),
    contract_cases([Tucker(layer_macs=0.8), Tucker(rank=(3, 2), metric="weight", engine="tensorly")], KINDS),
)
def test_contract(step: Tucker, network: Any) -> None:
    check_pass(step, network)
