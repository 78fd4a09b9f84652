"""Canonical polyadic decompositions: the sums of components, and the pass."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import tensorly
import torch
from decomposing import KINDS, METRICS, assert_computes_its_product, convolutions, every_rank, kernel, trained
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.low_rank import Cp
from surgery_plugins.low_rank.als import als, assembled, balanced, penalty, random_start, sliced, strengths
from surgery_plugins.low_rank.chain import Chain
from surgery_plugins.low_rank.cp import BOUND, CpSum
from surgery_plugins.low_rank.kernel import Kernel
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor, nn

from surgery.captured import capture
from surgery.context import Context
from surgery.data import Data
from surgery.errors import PassError, RecipeError
from surgery.measurement import measure
from surgery.names import tensors
from surgery.testing import check_pass, contract_cases

SHAPES = [
    (8, 6, 3, 3),
    (12, 2, 3),
    (3, 20, 3),
    (5, 4, 3, 2, 2),
    (4, 30, 2, 3),
    (6, 5, 1, 3),
    (1, 4, 3, 3),
    (2, 1, 5, 5),
]
LAYERS = ["layer1.0.conv1", "layer2.0.conv1"]


def border() -> Tensor:
    """Near a∘a∘b + a∘b∘a + b∘a∘a: sums of two components come as near to it as one likes, and grow without bound."""
    a, b = torch.eye(2, dtype=torch.float64)
    noise = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return sum((torch.einsum("i,j,k->ijk", *p) for p in ((a, a, b), (a, b, a), (b, a, a))), 1e-3 * noise)


def theirs(tensor: Tensor, start: list[Tensor], damping: float, iterations: int) -> Tensor:
    with tensorly.backend_context("pytorch"):
        given = CPTensor((None, [factor.clone() for factor in start]))
        found = parafac(tensor, start[0].shape[1], n_iter_max=iterations, init=given, tol=0, l2_reg=damping)
        product: Tensor = tensorly.cp_to_tensor(found)
    return product


# --- sums of components ---


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (12, 2, 3), (5, 4, 3, 2, 2)], ids=str)
@pytest.mark.parametrize(("damping", "iterations"), [(0.0, 1), (0.0, 10), (0.1, 1)])
def test_a_round_is_that_of_tensorly(shape, damping, iterations):
    tensor = kernel(shape, 3).weight
    start = random_start(tensor, 5, 0)
    expected = theirs(tensor, start, damping, iterations)
    assert float((assembled(als(tensor, start, damping, iterations)) - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_tensorlys_rounds_from_the_same_start_give_the_same_sum(damping):
    tensor = trained(LAYERS[0], "weight").weight
    start = random_start(tensor, 12, 0)
    ours, other = (assembled(als(tensor, start, damping, 5, engine=engine)) for engine in ("own", "tensorly"))
    assert float((ours - other).norm() / other.norm()) < 1e-6
    assert tensorly.get_backend() == "numpy"


@pytest.mark.parametrize("metric", ["weight", "output"])
def test_tensorlys_engine_gives_the_same_error(metric):
    task = trained(LAYERS[0], metric)
    for rank in (8, 24):
        ours, other = (task.error(CpSum(engine=e).decompose(task, (rank,)).product) for e in ("own", "tensorly"))
        assert other == pytest.approx(ours, rel=1e-3)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_slices_components_are_orthogonal_and_add_up_to_the_tensor(shape):
    tensor = kernel(shape, 1).weight
    factors, energies = sliced(tensor)
    assert float((assembled(factors) - tensor).norm() / tensor.norm()) < 1e-12
    assert torch.allclose(strengths(factors).square(), energies)
    assert len(energies) == tensor.numel() // max(shape)
    rank = len(energies) // 2
    lost = (assembled([factor[:, :rank] for factor in factors]) - tensor).square().sum()
    assert torch.allclose(lost, energies[rank:].sum())


def test_balancing_keeps_the_sum_and_gives_every_factor_of_a_component_the_same_norm():
    tensor = kernel((6, 5, 3, 3), 2).weight
    factors = [factor * scale for factor, scale in zip(random_start(tensor, 4, 1), (5.0, -0.1, 2.0, 1.0), strict=True)]
    found = balanced(factors)
    assert torch.allclose(assembled(found), assembled(factors))
    norms = torch.stack([factor.norm(dim=0) for factor in found])
    assert torch.allclose(norms, norms[:1].expand_as(norms))
    assert all(bool((factor.amax(0) >= -factor.amin(0)).all()) for factor in found[1:])


def test_more_rounds_and_the_penalty_never_raise_what_is_made_least():
    tensor = kernel((9, 7, 3, 3), 4).weight
    damping, start = penalty(tensor, 12, 1e-2), random_start(tensor, 12, 0)

    def least(iterations: int) -> float:
        found = als(tensor, start, damping, iterations)
        lost = float((tensor - assembled(found)).square().sum())
        return lost + damping * sum(float(factor.square().sum()) for factor in found)

    values = [least(iterations) for iterations in range(1, 12)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(values))


def test_the_penalty_scales_with_the_tensor():
    tensor = kernel((6, 5, 3, 3), 5).weight
    small, large = (CpSum().decompose(Kernel(scale * tensor), (6,)).product for scale in (1.0, 1e4))
    assert torch.allclose(large, 1e4 * small, rtol=1e-5, atol=1.0)


def test_components_stay_small_where_the_best_sum_does_not_exist():
    tensor = border()
    free = als(tensor, [factor[:, :2] for factor in sliced(tensor)[0]], 0.0, 1000)
    bounded = CpSum(iterations=1000, tolerance=0.0, regularisation=1e-3)._factors(tensor, 2)
    size = float(tensor.square().sum())
    assert float(strengths(free).square().sum()) > BOUND * size
    assert float(strengths(bounded).square().sum()) < BOUND * size
    assert Kernel(tensor).error(assembled(bounded)) < 0.03


# --- the method ---


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_limit_reproduces_and_the_stages_are_as_said(shape, metric):
    method, task = CpSum(), kernel(shape, 0, metric)
    for ranks in every_rank(method, task, 3):
        chain = method.decompose(task, ranks)
        assert [tuple(stage.weight.shape) for stage in chain.stages] == method.shapes(shape, ranks)
    assert float((chain.product - task.weight).norm() / task.weight.norm()) < 1e-10


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_a_higher_rank_loses_no_more_and_the_metric_of_outputs_less_of_them(shape, metric):
    method, task = CpSum(), kernel(shape, 0, metric)
    ranks = every_rank(method, task, 5)
    errors = [task.error(method.decompose(task, own).product) for own in ranks]
    assert all(high <= low * 1.03 + 1e-3 for low, high in pairwise(errors))
    blind = [task.error(method.decompose(Kernel(task.weight), own).product) for own in ranks]
    assert all(own <= other * (1 + 1e-6) + 1e-9 for own, other in zip(errors, blind, strict=True))


@pytest.mark.parametrize("metric", ["weight", "output"])
@pytest.mark.parametrize("layer", LAYERS)
def test_trained_kernels_are_decomposed_with_small_components(layer, metric):
    method, task = CpSum(), trained(layer, metric)
    shape = tuple(task.weight.shape)
    ranks = method.choices(shape, 8)
    errors = []
    for own in ranks[:: max(1, len(ranks) // 4)]:
        chain = method.decompose(task, own)
        errors.append(task.error(chain.product))
        assert errors[-1] <= 1.02 * task.error(method.decompose(Kernel(task.weight), own).product)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.3


@pytest.mark.parametrize("layer", LAYERS)
def test_estimates_fall_and_bound_the_error_about(layer):
    method, task = CpSum(), trained(layer, "weight")
    ranks = method.choices(tuple(task.weight.shape), 8)
    estimates = method.estimates(task, ranks)
    assert estimates == sorted(estimates, reverse=True)
    reached = [task.error(method.decompose(task, own).product) ** 2 for own in ranks]
    for own, estimate, orthogonal in zip(reached, estimates, _orthogonal(task, ranks), strict=True):
        assert own <= 1.15 * estimate + 1e-3
        assert estimate <= orthogonal * (1 + 1e-9)


def _orthogonal(task: Kernel, ranks: list[tuple[int, ...]]) -> list[float]:
    (spectrum,) = CpSum().spectra(task)
    return [float(spectrum[own[0] :].sum() / spectrum.sum()) for own in ranks]


def test_ranks_keep_the_energy_asked_for():
    method, task = CpSum(), trained(LAYERS[0], "weight")
    ranks = [method.ranks_by_energy(task, energy, 4) for energy in (0.3, 0.6, 0.9, 1.0)]
    assert ranks == sorted(ranks)
    for own, energy in zip(ranks, (0.3, 0.6, 0.9, 1.0), strict=True):
        assert 1 - task.error(method.decompose(task, own).product) ** 2 >= energy - 0.02
    assert all(own[0] % 4 == 0 for own in ranks)


def test_choices_end_where_nothing_is_saved():
    choices = CpSum().choices((64, 64, 3, 3), 8)
    assert len(choices) <= 33
    assert choices[-1][0] * (64 + 64 + 3 + 3) < 64 * 64 * 9 <= (choices[-1][0] + 1) * (64 + 64 + 3 + 3)


def test_no_random_state_is_touched_and_results_repeat():
    task = kernel((8, 6, 3, 3), 0)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first, second = (CpSum().decompose(task, (7,)) for _ in range(2))
    assert torch.equal(first.product, second.product)
    assert torch.equal(torch.get_rng_state(), before)
    assert tensorly.get_backend() == "numpy"


@settings(max_examples=25, deadline=None)
@given(convolutions(), st.integers(1, 6))
def test_layers_compute_their_product(case: tuple[Any, Tensor], rank: int) -> None:
    module, x = case
    method = CpSum()
    limit = method.limits(tuple(module.weight.shape))[0]
    assert_computes_its_product(method, module, x, (min(rank, limit),))


# --- failures ---


def test_a_sum_that_does_not_converge_is_an_error_with_what_was_reached_and_a_remedy():
    unbounded = CpSum(iterations=1000, restarts=1, regularisation=0.0, tolerance=0.0)
    with pytest.raises(PassError, match=r"does not converge: error .* with components of .*;") as caught:
        unbounded._factors(border(), 2)
    assert "more regularisation" in caught.value.fix


def diverging() -> nn.Module:
    """Two layers, of which `hard` has a weight that no two components come nearest to."""
    easy, hard = nn.Conv1d(8, 8, 3, padding=1, bias=False), nn.Conv1d(8, 8, 3, padding=1, bias=False)
    easy.weight = nn.Parameter(assembled(random_start(torch.ones(8, 8, 3, dtype=torch.float64), 2, 0)).float())
    hard.weight = nn.Parameter(torch.zeros(8, 8, 3))
    hard.weight.data[:2, :2, :2] = border().float()
    return nn.Sequential(OrderedDict(easy=easy, hard=hard)).eval()


@pytest.mark.parametrize("pool", [None, ThreadPoolExecutor, ProcessPoolExecutor])
@pytest.mark.parametrize("options", [{"metric": "weight"}, {"sequential": False}, {"sequential": True}])
def test_an_error_names_the_layer_that_it_comes_from(options, pool):
    data = [torch.randn(32, 8, 20)]
    before = capture(diverging(), data[0][:2])
    step = Cp(rank=2, iterations=1000, restarts=0, regularisation=0.0, tolerance=0.0, **options)
    with pool(1) if pool else nullcontext() as executor, pytest.raises(PassError, match=r"^hard: the decomp") as caught:
        step(before, Context(before, Data.of(data), executor=executor))
    assert caught.value.at == "pass cp"
    assert "more regularisation" in caught.value.fix


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.point(self.conv(x).relu())


def applied(**options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    before = capture(Net().eval(), torch.randn(2, 6, 9, 9))
    after, report = Cp(**options)(before, Context(before, Data.of(None)))
    return before, after, report


def test_too_much_regularisation_is_an_error_and_the_model_stays():
    torch.manual_seed(0)
    before = capture(Net().eval(), torch.randn(2, 6, 9, 9))
    known = {name: value.clone() for name, value in tensors(before).items()}
    with pytest.raises(PassError, match="does not converge"):
        Cp(rank=8, regularisation=100.0)(before, Context(before, Data.of(None)))
    assert all(torch.equal(value, known[name]) for name, value in tensors(before).items())


@pytest.mark.parametrize("options", [{"rank": 0}, {"iterations": 0}, {"restarts": -1}, {"regularisation": -1.0}])
def test_options_out_of_range_are_refused(options):
    from surgery.recipe import resolve
    from surgery.registry import Registry

    with pytest.raises(RecipeError):
        resolve({"name": "r", "passes": [{"cp": options}]}, Registry.load())


# --- the pass ---


def test_the_report_tells_what_stands_in_the_model():
    before, after, report = applied(rank=4)
    (edit,), (skip,) = report.edits, report.skips
    assert (edit.layer, skip.layer, skip.why) == ("conv", "point", "pointwise: channel_svd is its form")
    names = [name for name, _ in after.named_modules() if name.startswith("conv.")]
    assert names == ["conv.reduce", "conv.depthwise_1", "conv.depthwise_2", "conv.expand"]
    saved = edit.numbers["macs_before"] - edit.numbers["macs_after"]
    assert measure(before, before.inputs).macs - measure(after, after.inputs).macs == saved


def test_components_of_the_layer_are_balanced():
    chain = CpSum().decompose(kernel((8, 6, 3, 3), 0, "weight"), (5,))
    assert isinstance(chain, Chain)
    norms = [stage.weight.flatten(1).norm(dim=1) for stage in chain.stages[:-1]]
    assert all(torch.allclose(own, norms[0]) for own in norms)


@pytest.mark.parametrize(
    ("step", "network"),
    contract_cases([Cp(layer_macs=0.9), Cp(rank=2, metric="weight", engine="tensorly"), Cp(energy=0.5)], KINDS),
)
def test_contract(step, network):
    check_pass(step, network)
