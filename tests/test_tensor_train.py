"""Tensor trains of linear layers: the cores, the operators between them, and the pass."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import onnxruntime
import pytest
import tensorly
import torch
from decomposing import KINDS, METRICS, every_rank, kernel
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from surgery_plugins.low_rank import TensorTrain
from surgery_plugins.low_rank.kernel import Kernel
from surgery_plugins.low_rank.tensor_train import TensorTrain as Trains
from surgery_plugins.low_rank.tensor_train import factorised
from tensorly.decomposition import tensor_train_matrix
from torch import Tensor, nn

from surgery import export_onnx, export_source, load
from surgery.captured import capture
from surgery.context import Context
from surgery.data import Data
from surgery.measurement import measure
from surgery.testing import check_pass, contract_cases

SHAPES = [(12, 8), (8, 18), (16, 16), (36, 24)]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(48, 36), nn.Linear(36, 48, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(self.wide(x).relu()) + x


def applied(example: Tensor, data: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    torch.manual_seed(0)
    before = capture(Net().eval(), example)
    after, report = TensorTrain(min_features=4, **options)(before, Context(before, Data.of(data)))
    return before, after, report


# --- the cores ---


@pytest.mark.parametrize(
    ("size", "count", "factors"),
    [(768, 2, (32, 24)), (3072, 2, (64, 48)), (768, 3, (12, 8, 8)), (64, 2, (8, 8)), (14, 2, (7, 2)), (6, 3, None)],
)
def test_features_split_into_nearly_equal_factors(size, count, factors):
    assert factorised(size, count) == factors


@given(st.integers(2, 400), st.integers(1, 4))
def test_factors_multiply_to_the_size_wherever_there_are_enough(size, count):
    primes, rest = 0, size
    for p in range(2, size + 1):
        while rest % p == 0:
            primes, rest = primes + 1, rest // p
    found = factorised(size, count)
    assert (found is None) == (primes < count)
    assert found is None or (prod(found) == size and min(found) > 1 and len(found) == count)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_trains_reproduce_at_the_limit_and_lose_no_more_with_a_higher_rank(shape, metric, cores):
    method, task = Trains(cores, 4), kernel(shape, 0, metric)
    ranks = every_rank(method, task, 4)
    trains = [method.decompose(task, own) for own in ranks]
    errors = [task.error(train.product) for train in trains]
    assert all(high <= low * 1.01 + 1e-9 for low, high in pairwise(errors))
    assert float((trains[-1].product - task.weight).norm() / task.weight.norm()) < 1e-10
    blind = [task.error(method.decompose(Kernel(task.weight), own).product) for own in ranks]
    assert all(own <= other * (1 + 1e-6) + 1e-9 for own, other in zip(errors, blind, strict=True))


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_estimates_bound_the_error_of_the_weight_and_with_two_cores_are_it(shape, cores):
    method, task = Trains(cores, 4), kernel(shape, 0, "weight")
    ranks = every_rank(method, task, 5)
    for own, estimate in zip(ranks, method.estimates(task, ranks), strict=True):
        reached = task.error(method.decompose(task, own).product) ** 2
        assert reached <= estimate + 1e-9
        assert cores > 2 or reached == pytest.approx(estimate, abs=1e-9)


@pytest.mark.parametrize("cores", [2, 3])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_that_of_tensorlys_matrix_in_this_format(cores, rank):
    method, task = Trains(cores, 4), kernel((36, 24), 0, "weight")
    outputs, inputs = method._sizes((36, 24))
    turned = task.weight.view(*outputs[::-1], *inputs).permute(*reversed(range(cores)), *range(cores, 2 * cores))
    bonds = (1, *(core.shape[3] for core in method.decompose(task, (rank,)).cores[:-1]), 1)
    with tensorly.backend_context("pytorch"):
        expected = tensor_train_matrix(turned.contiguous(), bonds).to_tensor()
    found = method.decompose(task, (rank,)).product
    lost = float((expected - turned).norm() / turned.norm())
    assert task.error(found) == pytest.approx(lost, rel=1e-9)
    assert tensorly.get_backend() == "numpy"


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_layers_compute_their_product_on_any_leading_dimensions(data):
    cores = data.draw(st.integers(2, 3))
    outputs, inputs = (data.draw(st.sampled_from([8, 12, 18, 20, 30])) for _ in range(2))
    method, leading = Trains(cores, 4), data.draw(st.lists(st.integers(1, 3), max_size=3))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    module = nn.Linear(inputs, outputs, bias=data.draw(st.booleans()))
    assume(method.obstacle(module) is None)
    ranks = (data.draw(st.integers(1, method.limits((outputs, inputs))[0])),)
    train = method.decompose(Kernel(module.weight.detach().double()), ranks)
    x = torch.randn(*leading, inputs)
    parts = train.parts(module, module.bias)
    expected = nn.functional.linear(x, train.product.float(), module.bias)
    torch.testing.assert_close(nn.Sequential(*parts.values())(x), expected, rtol=1e-4, atol=1e-5)
    made = [tuple(part.weight.shape) for part in parts.values() if isinstance(part, nn.Linear)]
    assert made == method.shapes((outputs, inputs), ranks)


# --- the pass ---


@pytest.mark.parametrize("options", [{"rank": 3}, {"rank": 2, "cores": 3}, {"layer_macs": 0.6}])
def test_the_report_tells_what_stands_in_the_model(options):
    before, after, report = applied(torch.randn(4, 7, 48), **options)
    assert len(report.edits) == 2
    for which in ("macs", "parameters"):
        saved = sum(edit.numbers[f"{which}_before"] - edit.numbers[f"{which}_after"] for edit in report.edits)
        assert getattr(measure(before, before.inputs), which) - getattr(measure(after, after.inputs), which) == saved


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
def test_a_budget_on_parameters_never_raises_macs(share):
    before, after, report = applied(torch.randn(4, 7, 48), parameters=share)
    assert measure(after, after.inputs).parameters <= share * measure(before, before.inputs).parameters
    assert report.edits
    assert all(edit.numbers["macs_after"] <= edit.numbers["macs_before"] for edit in report.edits)


def test_data_bring_the_outputs_nearer_and_not_the_weights():
    data = [torch.randn(16, 7, 48).cumsum(-1) for _ in range(3)]
    lost = {}
    for metric in ("weight", "output"):
        _, _, report = applied(data[0][:4], data, rank=6, metric=metric, sequential=False)
        lost[metric] = [edit.numbers["output_error"] for edit in report.edits]
    assert all(own < 0.95 * other for own, other in zip(lost["output"], lost["weight"], strict=True))


@pytest.mark.parametrize("cores", [2, 3])
def test_exports_run_without_this_sdk_at_any_batch(tmp_path, cores):
    _, after, _ = applied(torch.randn(4, 7, 48), rank=2, cores=cores)
    export_onnx(after, torch.randn(4, 7, 48), tmp_path / "m.onnx", dynamic_batch=True)
    export_source(after, tmp_path / "s")
    x = torch.randn(9, 7, 48)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), after(x).detach(), rtol=1e-4, atol=1e-5)
    assert "surgery" not in (tmp_path / "s" / "model.py").read_text()
    torch.testing.assert_close(load(tmp_path / "s" / "model.py")(x), after(x))


def test_small_layers_and_prime_sizes_are_skipped_with_the_reason():
    method = Trains()
    assert method.obstacle(nn.Linear(511, 600)) == "511 inputs and 600 outputs, of which min_features asks for 512"
    assert method.obstacle(nn.Linear(512, 521)) == "its 521 outputs are no product of 2 factors above 1"
    assert Trains(3).obstacle(nn.Linear(514, 512)) == "its 514 inputs are no product of 3 factors above 1"
    assert method.obstacle(nn.Linear(512, 768)) is None


@pytest.mark.parametrize(
    ("step", "network"),
    contract_cases([TensorTrain(min_features=4, rank=1), TensorTrain(min_features=8, cores=3, layer_macs=0.9)], KINDS),
)
def test_contract(step, network):
    check_pass(step, network)
