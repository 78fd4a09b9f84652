"""What all decompositions share: kernels and metrics, chains, costs, budgets, fitting and the passes' options."""

from __future__ import annotations

import copy
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from decomposing import KINDS
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.low_rank import ChannelSvd, Svd
from surgery_plugins.low_rank.allocation import Option, allocate
from surgery_plugins.low_rank.chain import Chain, Stage, random_chain
from surgery_plugins.low_rank.cost import Geometry, default_step
from surgery_plugins.low_rank.kernel import Kernel
from surgery_plugins.low_rank.svd import ConvSvd, LinearSvd
from surgery_plugins.low_rank.timing import Stopwatch
from torch import Tensor, nn

from surgery.captured import CapturedModel, capture, relative_error
from surgery.context import Context
from surgery.data import Data
from surgery.errors import InputError, PassError, RecipeError, SurgeryError
from surgery.graph import layers
from surgery.measurement import measure
from surgery.passes import Pass, PassReport
from surgery.recipe import resolve
from surgery.registry import Registry
from surgery.replacement import replace_layer
from surgery.testing import check_pass, contract_cases


def apply(
    step: Pass, model: nn.Module, example: Tensor, data: Any = None, **more: Any
) -> tuple[CapturedModel, CapturedModel, PassReport]:
    before = capture(model.eval(), example)
    after, report = step(before, Context(before, Data.of(data), **more))
    return before, after, report


class Net(nn.Module):
    """A residual network with a BatchNorm behind one convolution and none behind another."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.hidden, self.head = nn.Linear(width, 40), nn.Linear(40, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.norm(self.conv(x))
        return self.head(self.hidden(self.last(x.relu()).mean((2, 3))).relu())


def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    made.norm.running_mean.normal_(0, 0.1)
    made.norm.running_var.uniform_(0.5, 1.5)
    return made


def images(count: int = 96, seed: int = 1) -> list[Tensor]:
    """Smooth images, so that neighbouring pixels have to do with each other."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randn(count, 3, 5, 5, generator=generator)
    return list(F.interpolate(small, size=(10, 10), mode="bilinear").split(32))


def covariance(size: int, seed: int = 0, rows: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    x = x @ torch.randn(size, size, generator=generator, dtype=torch.float64) / size**0.5
    return x.T @ x / rows


def kernel(shape: tuple[int, ...], seed: int = 0, metric: str = "output") -> Kernel:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    features = weight[0].numel()
    return Kernel(weight, covariance(features, seed) if metric == "output" else None)


# --- kernels and metrics ---


def test_the_error_in_the_outputs_metric_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    weight, other = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    lost, whole = (x - x.mean(0)) @ (weight - other).T, (x - x.mean(0)) @ weight.T
    found = Kernel(weight, torch.cov(x.T, correction=0)).error(other)
    assert found == pytest.approx(float(lost.norm() / whole.norm()), rel=1e-12)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 20), st.sampled_from(["weight", "output"]))
@settings(max_examples=30, deadline=None)
def test_a_truncated_svd_is_the_best_there_is(outputs: int, inputs: int, seed: int, metric: str) -> None:
    task = kernel((outputs, inputs), seed, metric)
    seen = task.weight if task.covariance is None else task.weight @ torch.linalg.cholesky(task.covariance)
    values = torch.linalg.svdvals(seen).square()
    for rank in range(1, min(outputs, inputs) + 1):
        least = float((values[rank:].sum() / values.sum()).sqrt())
        assert task.error(LinearSvd().decompose(task, (rank,)).product) == pytest.approx(least, abs=1e-7)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 20))
@settings(max_examples=20, deadline=None)
def test_whitening_is_undone_and_of_a_separable_metric_exact(inputs: int, high: int, wide: int, seed: int) -> None:
    parts = [covariance(size, seed + i) for i, size in enumerate((inputs, high, wide))]
    task = Kernel(kernel((3, inputs, high, wide), seed).weight, torch.kron(torch.kron(parts[0], parts[1]), parts[2]))
    assert float(task.whitened.square().sum()) == pytest.approx(task.energy, rel=1e-3)
    for dim, size in enumerate((inputs, high, wide), start=1):
        r = task.roots[dim - 1]
        assert r is not None
        torch.testing.assert_close(
            r.T @ task.coloured(torch.eye(size, dtype=torch.float64), dim), torch.eye(size, dtype=torch.float64)
        )


def test_a_zero_kernel_has_no_error_and_no_energy() -> None:
    task = Kernel(torch.zeros(3, 4, dtype=torch.float64), covariance(4))
    assert (task.energy, task.error(task.weight)) == (0.0, 0.0)
    assert task.error(task.weight + 1) == 1


# --- chains ---


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Module, Chain, Tensor]:
    """A convolution of any form, stages of which no two reach along the same axis, and an input."""
    rank = draw(st.integers(1, 3))
    stages, width = draw(st.integers(2, 3)), draw(st.integers(1, 4))
    owner = [draw(st.integers(0, stages - 1)) for _ in range(rank)]
    size = [draw(st.integers(1, 3)) for _ in range(rank)]
    shapes, inputs = [], width
    for stage in range(stages):
        depthwise = stage == 1 and stages == 3 and draw(st.booleans())
        outputs = width if depthwise else draw(st.integers(1, 5))
        own = [size[axis] if owner[axis] == stage else 1 for axis in range(rank)]
        shapes.append((outputs, 1 if depthwise else width, *own))
        width = outputs
    padding: Any = draw(st.sampled_from([0, 1, "valid", "same"]))
    stride = 1 if padding == "same" else [draw(st.integers(1, 2)) for _ in range(rank)]
    mode = draw(st.sampled_from(["zeros", "circular", "replicate"]))
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    kind = getattr(nn, f"Conv{rank}d")
    module = kind(inputs, width, size, stride, padding, dilation, bias=True, padding_mode=mode)
    return module, random_chain(shapes), torch.randn(2, inputs, *[draw(st.integers(6, 8)) for _ in range(rank)])


@given(chains())
@settings(max_examples=60, deadline=None)
def test_a_chain_computes_what_its_product_computes(case: tuple[nn.Module, Chain, Tensor]) -> None:
    module, chain, x = case
    parts = nn.Sequential(*chain.parts(module, module.bias).values())
    dense: Any = copy.deepcopy(module)
    dense.weight = nn.Parameter(chain.product)
    assert relative_error(parts(x), dense(x)) < 1e-5
    torch.testing.assert_close(chain.last @ chain.features, chain.product.flatten(1))
    other = torch.randn(chain.last.shape)
    torch.testing.assert_close(chain.with_last(other).product.flatten(1), other @ chain.features)


@given(chains())
@settings(max_examples=30, deadline=None)
def test_the_cost_of_a_chain_is_what_is_measured(case: tuple[nn.Module, Chain, Tensor]) -> None:
    module, chain, x = case
    captured = capture(module.eval(), x)
    (layer,) = layers(captured)
    geometry = Geometry.of(captured, layer)
    assert geometry.macs == measure(module, x).macs
    replace_layer(captured, layer, chain.parts(layer.module, layer.module.bias))
    captured.recompile()
    assert geometry.macs_of([tuple(stage.weight.shape) for stage in chain.stages]) == measure(captured, x).macs


def test_two_depthwise_stages_in_a_row_are_one_channel_by_channel() -> None:
    first, second = torch.randn(4, 1, 3, 1), torch.randn(4, 1, 1, 3)
    found = Chain((Stage("a", first, 4), Stage("b", second, 4), Stage("c", torch.eye(4).view(4, 4, 1, 1)))).product
    torch.testing.assert_close(found, torch.diag_embed((first * second)[:, 0].permute(1, 2, 0)).permute(2, 3, 0, 1))


# --- budgets ---


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[Option]], float]:
    problem = []
    for _ in range(draw(st.integers(1, 4))):
        costs = sorted(draw(st.sets(st.integers(1, 60), min_size=1, max_size=4)))
        errors = sorted((draw(st.floats(0.01, 1)) for _ in costs), reverse=True)
        own = [Option(cost, error, None) for cost, error in zip(costs, errors, strict=True)]
        problem.append([*own, Option(costs[-1] + draw(st.integers(1, 20)), 0.0, None)])
    return problem, draw(st.floats(1, sum(own[-1].cost for own in problem)))


@given(problems())
@settings(max_examples=200, deadline=None)
def test_a_budget_is_kept_where_it_can_be_and_near_the_optimum(case: tuple[list[list[Option]], float]) -> None:
    problem, target = case
    chosen, cost = allocate(problem, target)
    assert cost == sum(own[i].cost for own, i in zip(problem, chosen, strict=True))
    every = [
        [own[i] for own, i in zip(problem, picked, strict=True)]
        for picked in product(*(range(len(own)) for own in problem))
    ]
    kept = [picked for picked in every if sum(option.cost for option in picked) <= target]
    if not kept:
        assert chosen == [0] * len(problem)
        return
    assert cost <= target
    best = min(sum(option.error for option in picked) for picked in kept)
    # the greedy choice differs from the optimum by less than the largest step of one layer
    assert sum(own[i].error for own, i in zip(problem, chosen, strict=True)) <= best + max(
        own[0].error for own in problem
    )


def test_savings_are_made_where_they_cost_least() -> None:
    dear, cheap = (
        [Option(10, error, None), Option(20, error / 4, None), Option(40, 0.0, None)] for error in (1.0, 0.1)
    )
    assert allocate([dear, cheap], 60) == ([2, 1], 60)
    assert allocate([dear, cheap], 50) == ([2, 0], 50)


# --- the passes ---


@pytest.mark.parametrize(("metric", "sequential"), [("weight", False), ("output", False), ("output", True)])
def test_the_reported_errors_are_those_of_the_layers(metric: str, sequential: bool) -> None:
    data = images()
    step = ChannelSvd(rank=6, metric=metric, sequential=sequential, select=("stem",))
    model = net()
    _, after, report = apply(step, model, data[0][:2], data)
    (edit,) = [e for e in report.edits if "rank" in e.numbers]
    x = torch.cat(data)
    with torch.no_grad():
        reduced = after.get_submodule("stem.reduce")(x)
        ours, theirs = after.get_submodule("stem.expand")(reduced), model.stem(x)
    spread = theirs - theirs.mean((0, 2, 3), keepdim=True)
    assert edit.numbers["output_error"] == pytest.approx(float((ours - theirs).norm() / spread.norm()), rel=1e-3)
    expand, reduce = (after.get_submodule(f"stem.{part}").weight.detach() for part in ("expand", "reduce"))
    made, wanted = torch.einsum("or,rikl->oikl", expand[..., 0, 0], reduce), model.stem.weight.detach()
    by_hand = float((made - wanted).norm() / wanted.norm())
    assert edit.numbers["weight_error"] == pytest.approx(by_hand, rel=1e-4)
    assert edit.numbers["macs_after"] == measure(after.get_submodule("stem.reduce"), x[:1]).macs + 6 * 24 * 100


def test_a_layer_of_low_rank_is_reproduced() -> None:
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(6, 50), nn.ReLU(), nn.Linear(50, 50)).double().eval()
    wide[2].weight.data = torch.randn(50, 4).double() @ torch.randn(4, 50).double()
    x = torch.randn(400, 6).double()
    _, after, report = apply(Svd(rank=4, select=("2",)), wide, x[:2], [x])
    assert report.edits[0].numbers["output_error"] < 1e-6
    other = torch.randn(20, 6).double()
    assert relative_error(after(other), wide(other)) < 1e-8


def error_after(step: Pass, model: nn.Module, data: list[Tensor]) -> float:
    _, after, _ = apply(step, model, data[0][:2], data)
    x = torch.cat(images(seed=5))
    with torch.no_grad():
        return float((after(x) - model(x)).norm() / model(x).norm())


def test_data_helps_and_making_up_for_earlier_layers_helps_more() -> None:
    data, model = images(384), net()
    weight, output, sequential = (
        error_after(ChannelSvd(layer_macs=0.5, **options), model, data)
        for options in ({"metric": "weight"}, {"sequential": False}, {})
    )
    assert sequential < 0.9 * output < 0.9 * weight


@pytest.mark.parametrize("name", ["macs", "parameters", "bytes"])
@pytest.mark.parametrize("share", [0.8, 0.5])
def test_budgets_are_met_within_one_percent(name: str, share: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 64, 3)).eval()
    before, after, _ = apply(ChannelSvd(**{name: share}), model, torch.randn(2, 8, 12, 12), [torch.randn(8, 8, 12, 12)])
    whole, left = (measure(m, m.inputs) for m in (before, after))
    key = {"bytes": "parameter_bytes"}.get(name, name)
    assert share * 0.99 <= getattr(left, key) / getattr(whole, key) <= share * 1.01


def test_a_budget_on_the_outputs_error_is_met() -> None:
    data, model = images(), net()
    before, after, report = apply(ChannelSvd(output_error=0.02, round_to=1), model, data[0][:2], data)
    x = torch.cat(data)
    with torch.no_grad():
        error = float((after(x) - before(x)).norm() / before(x).norm())
    assert 0.015 < error <= 0.02
    assert f"{error:.3g}" in report.notes[0]
    assert measure(after, after.inputs).macs < measure(before, before.inputs).macs


def test_energy_decides_by_the_spectrum() -> None:
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    values = torch.tensor([3.0, 2.0, 1.0, *[1e-4] * 29])
    left, right = (torch.linalg.qr(torch.randn(32, 32)).Q for _ in range(2))
    model[0].weight.data = left @ torch.diag(values) @ right
    for energy, rank in ((0.6, 1), (0.9, 2), (0.99, 3)):
        _, _, report = apply(Svd(energy=energy, round_to=1), model, torch.randn(2, 32))
        assert report.edits[0].numbers["rank"] == rank
    _, _, report = apply(Svd(energy=0.6, round_to=4), model, torch.randn(2, 32))
    assert report.edits[0].numbers["rank"] == 4


def test_layers_that_would_not_get_cheaper_stay_and_are_named() -> None:
    _, _, report = apply(ChannelSvd(rank=24), net(), torch.randn(2, 3, 10, 10))
    whys = {skip.layer: skip.why for skip in report.skips}
    assert "would not get cheaper: " in whys["stem"]
    assert not any(edit.layer == "stem" for edit in report.edits)


def test_layers_that_are_no_faster_stay_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "gain", lambda self, layer, rung: 0.9 if layer.name == "conv" else 1.2)
    for options in ({"layer_macs": 0.5}, {"macs": 0.8}, {"decomposed_macs": 0.5}):
        _, _, report = apply(ChannelSvd(only_if_faster=True, **options), net(), torch.randn(2, 3, 10, 10))
        assert {"stem", "last"} & {edit.layer for edit in report.edits}
        assert ("conv", True) in {(s.layer, "0.90 times as fast" in s.why) for s in report.skips}


def test_a_layer_is_timed_in_onnx_runtime_once_per_form() -> None:
    model = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.Conv2d(128, 128, 3, padding=1)).eval()
    captured = capture(model, torch.randn(1, 128, 32, 32))
    watch, method = Stopwatch(ConvSvd()), ConvSvd()
    from surgery_plugins.low_rank.cost import rung

    first, second = layers(captured)
    small = rung(method, Geometry.of(captured, first), (2,), 0.0)
    assert watch.gain(first, small) > 1  # a hundredth of the MACs: no load of the machine turns this round
    assert watch.gain(second, small) == watch.gain(first, small)


@pytest.mark.parametrize("pool", [ThreadPoolExecutor, ProcessPoolExecutor])
def test_an_executor_gives_the_same_model(pool: Any) -> None:
    data, step = images(), ChannelSvd(layer_macs=0.5, sequential=False)
    _, here, _ = apply(step, net(), data[0][:2], data)
    with pool(2) as executor:
        _, there, _ = apply(step, net(), data[0][:2], data, executor=executor)
    for name, tensor in here.state_dict().items():
        assert torch.equal(tensor, there.state_dict()[name]), name


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.twice = nn.MultiheadAttention(32, 4, batch_first=True), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.twice(self.twice(self.attention(x, x, x)[0]).relu())


def test_projections_of_attention_and_layers_called_twice_are_decomposed() -> None:
    torch.manual_seed(0)
    model, data = Attending().eval(), [torch.randn(64, 7, 32)]
    before, after, report = apply(Svd(rank=8), model, data[0][:2], data)
    assert {e.layer for e in report.edits if "rank" in e.numbers} == {
        "attention.in_proj_weight",
        "attention.out_proj",
        "twice",
    }
    assert measure(after, after.inputs).macs < 0.75 * measure(before, before.inputs).macs
    assert relative_error(after(data[0]), model(data[0])) < 0.5


# --- bad input ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 4, "macs": 0.5}, "rank and macs are both given"),
        ({"layer_macs": 0.5, "energy": 0.5}, "both given"),
        ({"macs": 0}, "macs"),
        ({"energy": 1.5}, "energy"),
        ({"metric": "weight", "sequential": True}, "drop one"),
        ({"rank": "auto"}, "rank: should be a valid integer or 'vbmf', got 'auto'"),
    ],
)
def test_wrong_options_are_refused_when_the_recipe_is_read(options: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        resolve({"name": "trial", "passes": [{"channel_svd": options}]}, Registry.load())


@pytest.mark.parametrize("options", [{"metric": "output"}, {"sequential": True}, {"output_error": 0.1}])
def test_what_needs_data_says_so(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="needs calibration data"):
        apply(ChannelSvd(**options), net(), torch.randn(2, 3, 10, 10))


def refused(step: Pass, model: nn.Module, *says: str) -> None:
    """The pass raises an error that says so, and the model stays as it was."""
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(SurgeryError) as caught:
        apply(step, model, torch.randn(2, 3, 10, 10), images())
    assert all(part in str(caught.value) for part in (*says, "fix:"))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_budget_that_nobody_can_meet_says_how_far_it_goes() -> None:
    refused(ChannelSvd(macs=0.01), net(), "macs: 0.01 cannot be met", "is as far as it goes")


def numbers_of(report: PassReport) -> list[Any]:
    """Of the layers that were decomposed, not only solved anew."""
    return [edit.numbers for edit in report.edits if "macs_before" in edit.numbers]


def macs_of(report: PassReport, captured: CapturedModel) -> tuple[int, int]:
    """Of all convolutions, before and after."""
    saved = sum(int(n["macs_before"] - n["macs_after"]) for n in numbers_of(report))
    before = measure(captured, captured.inputs).by_module
    whole = sum(before[name] for name in ("stem", "conv", "last"))
    return whole, whole - saved


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_a_share_of_what_can_be_decomposed_is_met_whatever_else_the_model_has(share: float) -> None:
    model = net()
    model.hidden = nn.Sequential(nn.Linear(24, 4000), nn.ReLU(), nn.Linear(4000, 40))
    before, _, report = apply(ChannelSvd(decomposed_macs=share), model, torch.randn(2, 3, 10, 10), images())
    whole, left = macs_of(report, before)
    assert share - 0.03 < left / whole <= share * 1.01


def test_layers_that_are_no_faster_do_not_count_in_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "gain", lambda self, layer, rung: 0.9 if layer.name == "conv" else 1.2)
    step = ChannelSvd(only_if_faster=True, decomposed_macs=0.5)
    before, _, report = apply(step, net(), torch.randn(2, 3, 10, 10))
    own = measure(before, before.inputs).by_module
    whole, left = macs_of(report, before)
    assert (left - own["conv"]) / (whole - own["conv"]) == pytest.approx(0.5, abs=0.02)


def test_where_no_layer_is_faster_a_share_leaves_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stopwatch, "gain", lambda self, layer, rung: 0.9)
    step = ChannelSvd(only_if_faster=True, decomposed_macs=0.5)
    _, _, report = apply(step, net(), torch.randn(2, 3, 10, 10))
    assert not report.edits
    assert all("times as fast" in skip.why for skip in report.skips)


def test_an_output_error_below_what_any_rank_reaches_is_an_error() -> None:
    refused(ChannelSvd(output_error=1e-9), net(), "output_error: 1e-09 cannot be met", "is as near as it goes")


def test_a_budget_that_no_ranks_come_near_to_is_noted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()).eval()
    before, after, report = apply(ChannelSvd(macs=0.75), model, torch.randn(2, 8, 12, 12))
    left = measure(after, after.inputs).macs / measure(before, before.inputs).macs
    assert left < 0.75 * 0.99
    assert f"macs: {left:.3g} of the model is left" in report.notes[0]


def test_a_model_without_layers_of_the_kind_is_noted() -> None:
    _, _, report = apply(ChannelSvd(), nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    assert (report.edits, report.skips) == ((), ())
    assert report.notes == ("no Conv layer is among those that are selected",)


def test_patterns_may_name_layers_of_other_kinds() -> None:
    _, _, report = apply(ChannelSvd(layer_macs=0.5, exclude=("head", "conv")), net(), torch.randn(2, 3, 10, 10))
    assert {edit.layer for edit in report.edits} == {"stem", "last"}


def test_a_rank_above_every_maximum_is_an_error() -> None:
    refused(ChannelSvd(rank=10_000), net(), "10000 is above its maximum")


def test_nan_weights_are_named() -> None:
    captured = capture(net(), torch.randn(2, 3, 10, 10))
    captured.get_parameter("conv.weight").data[0, 0] = float("nan")
    with pytest.raises(PassError, match="conv: its weight holds NaN"):
        ChannelSvd(rank=4)(captured, Context(captured))


def test_a_zero_kernel_is_left_alone() -> None:
    model = net()
    nn.init.zeros_(model.conv.weight)
    _, _, report = apply(ChannelSvd(rank=4), model, torch.randn(2, 3, 10, 10), images())
    assert ("conv", "its weight is zero") in {(skip.layer, skip.why) for skip in report.skips}
    assert {edit.layer for edit in report.edits if "rank" in edit.numbers} == {"stem", "last"}


def test_ranks_keep_to_what_kernels_like() -> None:
    assert [default_step((n, n, 3, 3)) for n in (16, 32, 64, 128, 512)] == [1, 2, 4, 8, 8]
    _, _, report = apply(ChannelSvd(layer_macs=0.6, round_to=5), net(), torch.randn(2, 3, 10, 10))
    assert {edit.numbers["rank"] % 5 for edit in report.edits} == {0}


STEPS = [Svd(layer_macs=0.9), Svd(energy=0.5, metric="weight"), ChannelSvd(rank=2), ChannelSvd(sequential=False)]


@pytest.mark.parametrize(("step", "network"), contract_cases(STEPS, KINDS))
def test_contract(step: Pass, network: Any) -> None:
    check_pass(step, network)
