"""Weights that are zero for good: which ones, how many, and what the others become."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.prune_weights import PruneWeights
from torch import Tensor, nn

from surgery import (
    Context,
    Data,
    InputError,
    Pass,
    PassError,
    PassReport,
    RecipeError,
    export_onnx,
    export_source,
    load,
)
from surgery.captured import CapturedModel, capture
from surgery.parity import parity
from surgery.recipe import resolve
from surgery.registry import Registry
from surgery.testing import check_pass, contract_cases, networks


class Net(nn.Module):
    """Every kind of layer that can be pruned: before a BatchNorm and not, functional, called twice, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(4, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2, groups=2)
        self.w = nn.Parameter(torch.randn(8, 12, 1, 1) / 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.twice(self.twice(x).relu())
        return self.head(F.conv2d(self.up(x), self.w).relu().mean((2, 3)))


LAYERS = ("stem.weight", "twice.weight", "up.weight", "w", "head.weight")


def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    made.norm.running_mean.normal_(0, 0.1)
    made.norm.running_var.uniform_(0.5, 1.5)
    return made


def images(count: int = 64, seed: int = 1) -> list[Tensor]:
    """Smooth, so that neighbouring pixels have to do with each other."""
    small = torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return list(F.interpolate(small, size=(8, 8), mode="bilinear").split(32))


def apply(step: Pass, model: nn.Module, example: Tensor, data: Any = None) -> tuple[CapturedModel, PassReport]:
    before = capture(model.eval(), example)
    return step(before, Context(before, Data.of(data)))


def pruned(model: nn.Module | None = None, data: Any = None, **options: Any) -> tuple[CapturedModel, PassReport]:
    return apply(PruneWeights(**options), model or net(), images()[0][:2], data)


def linear(weight: Tensor, data: Any = None, **options: Any) -> tuple[Tensor, PassReport]:
    """The weight (outputs, features) of a linear layer once pruned."""
    model = nn.Linear(weight.shape[1], weight.shape[0])
    model.weight = nn.Parameter(weight)
    after, report = apply(PruneWeights(**options), nn.Sequential(model), torch.ones(2, weight.shape[1]), data)
    return after.get_parameter("0.weight").detach(), report


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_parameter(name).detach() for name in LAYERS}


def zeros(weight: Tensor) -> int:
    return int((weight == 0).sum())


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def output_error(model: nn.Module, x: Tensor) -> float:
    reference = net()
    with torch.no_grad():
        expected = reference(x)
        return float((model(x) - expected).square().sum() / (expected - expected.mean(0)).square().sum())


def rows(features: int, rank: int, count: int = 400) -> Tensor:
    return random(count, rank, seed=5) @ random(rank, features, seed=6) + 0.1 * random(count, features, seed=7)


# --- which weights, and how many ---


@given(st.integers(1, 6), st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.5, 0.77, 0.99]), st.integers(0, 9))
@settings(max_examples=25)
def test_a_layer_loses_exactly_its_share_the_smallest_first_and_the_rest_stays_bit_for_bit(
    outputs: int, features: int, sparsity: float, seed: int
) -> None:
    weight = random(outputs, features, seed=seed)
    after, report = linear(weight, sparsity=sparsity)
    count = min(round(sparsity * weight.numel()), weight.numel() - 1)
    kept = after != 0
    assert zeros(after) == count
    assert torch.equal(after[kept], weight[kept])
    if count:
        assert float(weight[~kept].abs().max()) <= float(weight[kept].abs().min())
        assert report.edits[0].numbers["sparsity"] == count / weight.numel()
    else:
        assert not report.edits


@given(st.integers(0, 9), st.floats(0, 0.99), st.floats(0, 0.99))
@settings(max_examples=15)
def test_more_sparsity_keeps_a_part_of_what_less_keeps(seed: int, one: float, other: float) -> None:
    weight = (random(6, 7, seed=seed) * 3).round() / 3  # ties
    less, more = (linear(weight, sparsity=s)[0] != 0 for s in sorted((one, other)))
    assert bool((less | ~more).all())


@pytest.mark.parametrize("sparsity", [0.3, 0.9])
@pytest.mark.parametrize("criterion", ["magnitude", "obd", "obs"])
def test_the_global_scope_takes_its_share_of_all_layers_together(criterion: str, sparsity: float) -> None:
    model, report = pruned(data=images(), criterion=criterion, scope="global", sparsity=sparsity)
    found = weights(model)
    total = sum(weight.numel() for weight in found.values())
    assert sum(map(zeros, found.values())) == round(sparsity * total)
    assert len({round(edit.numbers["sparsity"], 2) for edit in report.edits}) > 2


def test_the_global_scope_takes_the_smallest_weights_of_all_and_leaves_every_layer_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[0].weight = nn.Parameter(random(6, 6) / 1000)
    model[1].weight = nn.Parameter(random(6, 6, seed=1).abs() + 1)
    after, _ = apply(PruneWeights(sparsity=0.75, scope="global"), model, torch.ones(2, 6))
    first, second = (after.get_parameter(f"{n}.weight").detach() for n in (0, 1))
    assert zeros(first) == 35
    assert zeros(second) == 54 - 35
    assert float(first.abs().max()) == float(model[0].weight.detach().abs().max())


def test_sensitivity_cuts_below_so_many_standard_deviations() -> None:
    weight = random(20, 30)
    after, report = linear(weight, sensitivity=0.7)
    threshold = 0.7 * float(weight.double().std(correction=0))
    assert torch.equal(after == 0, weight.abs() < threshold)
    assert report.edits[0].numbers["threshold"] == threshold


def test_a_layer_without_weights_below_the_threshold_says_so() -> None:
    after, report = linear(torch.ones(3, 4), sensitivity=2.0)
    assert zeros(after) == 0
    assert [skip.why for skip in report.skips] == ["no weight is below the threshold"]


def test_one_weight_stays_whatever_the_sensitivity() -> None:
    after, _ = linear(random(4, 4), sensitivity=1e6)
    assert zeros(after) == 15


def test_by_optimal_brain_damage_weights_of_loud_inputs_stay() -> None:
    x = random(64, 4) * torch.tensor([10.0, 1, 1, 1])
    weight = torch.tensor([[0.5, 1, 2, 3], [3, 0.4, 2, 1]])
    after, _ = linear(weight, [x], criterion="obd", sparsity=0.5)
    assert torch.equal(after != 0, torch.tensor([[True, False, False, True], [True, False, True, False]]))
    assert torch.equal(after[after != 0], weight[after != 0])


def test_with_labels_optimal_brain_damage_asks_the_loss() -> None:
    """Two classes of three have no samples and even odds: what tells those two apart has no gradient."""
    x, target = torch.cat([random(32, 3), random(32, 3).abs()], 1), random(32, seed=3)
    data = Data(training=[(x, target)], loss=lambda out, y: ((out[:, 0] - y) ** 2).mean())
    weight = random(2, 6, seed=2)
    after, _ = linear(weight, data, criterion="obd", sparsity=0.5)
    assert zeros(after[0]) == 0
    assert zeros(after[1]) == 6


def test_the_information_is_that_of_single_samples() -> None:
    from surgery_plugins.prune_weights.scores import of_loss

    from surgery import layers

    x, target = random(5, 3), random(5, 2, seed=1)
    model = capture(nn.Sequential(nn.Linear(3, 2)), x)
    data = Data(training=[(x[:3], target[:3]), (x[3:], target[3:])], loss=lambda out, y: ((out - y) ** 2).sum())
    found = of_loss(model, layers(model), Context(model, data))["0"]
    slope = 2 * (model(x) - target).detach()
    gradients = slope.unsqueeze(2) * x.unsqueeze(1)
    expected = gradients.square().mean(0) / 2 * model.get_parameter("0.weight").detach().square()
    torch.testing.assert_close(found[0], expected)


# --- patterns ---


@given(
    st.sampled_from([(1, 2), (2, 4), (1, 4), (5, 8)]), st.sampled_from(["magnitude", "obd", "obs"]), st.integers(0, 9)
)
@settings(max_examples=15)
def test_no_window_keeps_more_than_the_pattern_says(window: tuple[int, int], criterion: str, seed: int) -> None:
    kept, size = window
    weight = random(5, 16, seed=seed)
    after, _ = linear(weight, [rows(16, 8)], pattern=f"{kept}:{size}", criterion=criterion)
    assert bool(((after != 0).unflatten(1, (-1, size)).sum(2) == kept).all())


def test_a_window_lies_along_the_inputs_at_one_place_of_the_kernel() -> None:
    model, report = pruned(pattern="2:4", criterion="magnitude")
    stem, up = model.get_parameter("stem.weight"), model.get_parameter("up.weight")
    assert bool(((stem != 0).sum(1) == 2).all())
    assert bool(((up.unflatten(0, (2, 4)) != 0).sum(1) == 2).all())
    top = net().stem.weight.abs().topk(2, 1).indices
    assert bool((stem.gather(1, top) != 0).all())
    assert not report.skips


def test_inputs_that_windows_do_not_divide_are_left() -> None:
    _, report = linear(random(4, 6), pattern="2:4")
    assert [skip.why for skip in report.skips] == ["its 6 inputs are no multiple of 4"]


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from(["magnitude", "obd", "obs"]),
    st.sampled_from(["layer", "global"]),
)
@settings(max_examples=10)
def test_blocks_go_as_a_whole_also_at_the_edges(height: int, width: int, criterion: str, scope: str) -> None:
    weight = random(5, 11, seed=height)
    options = {"block": (height, width), "criterion": criterion, "scope": scope, "sparsity": 0.6}
    after, _ = linear(weight, [rows(11, 6)], **options)
    blocks = [block for line in after.split(height) for block in line.split(width, 1)]
    gone = [block for block in blocks if zeros(block) == block.numel()]
    assert len(gone) == min(round(0.6 * len(blocks)), len(blocks) - 1)
    assert all(zeros(block) in (0, block.numel()) for block in blocks)


def test_the_blocks_that_go_are_the_smallest_on_average() -> None:
    weight = torch.tensor([[9.0, 9, 1, 1, 3], [9, 9, 1, 2, 3]])
    after, _ = linear(weight, block=(2, 2), sparsity=0.34)
    assert torch.equal(after == 0, torch.tensor([[False, False, True, True, False]] * 2))


def test_a_block_larger_than_the_matrix_leaves_the_layer() -> None:
    _, report = linear(random(4, 6), block=(8, 2))
    assert [skip.why for skip in report.skips] == ["a block 8 × 2 is larger than its 4 × 6 weights"]


# --- the others make up for what went ---


@pytest.mark.parametrize("options", [{}, {"pattern": "2:4"}, {"block": (1, 2)}, {"scope": "global"}])
def test_making_up_for_what_went_loses_less_of_the_outputs(options: dict[str, Any]) -> None:
    share = {} if "pattern" in options else {"sparsity": 0.6}
    error = {
        criterion: output_error(pruned(data=images(), criterion=criterion, **share, **options)[0], torch.cat(images()))
        for criterion in ("magnitude", "obs")
    }
    assert error["obs"] < error["magnitude"] / 2


@pytest.mark.parametrize("criterion", ["magnitude", "obd"])
def test_any_criterion_can_be_followed_by_solving_anew(criterion: str) -> None:
    plain, _ = pruned(data=images(), criterion=criterion, sparsity=0.6)
    solved, report = pruned(data=images(), criterion=criterion, sparsity=0.6, reconstruct=True)
    assert {name: zeros(weight) for name, weight in weights(plain).items()} == {
        name: zeros(weight) for name, weight in weights(solved).items()
    }
    assert all("output_error" in edit.numbers for edit in report.edits)
    x = torch.cat(images())
    assert output_error(solved, x) < output_error(plain, x)


def test_what_is_left_is_the_least_squares_optimum_of_its_zeros() -> None:
    x, weight = rows(12, 6), random(4, 12, seed=3)
    after, report = linear(weight, [x], sparsity=0.5)
    centred = (x - x.mean(0)).double()
    target = centred @ weight.double().T
    rest = 0.0
    for row, wanted in zip(after, target.T, strict=True):
        kept = centred[:, row != 0]
        best = torch.linalg.lstsq(kept, wanted.unsqueeze(1)).solution
        rest += float((kept @ best - wanted.unsqueeze(1)).square().sum())
    found = report.edits[0].numbers["output_error"]
    assert found == pytest.approx((rest / float(target.square().sum())) ** 0.5, rel=1e-2)


def test_what_data_shows_to_be_redundant_goes_without_error() -> None:
    x = random(200, 3)
    x = torch.cat([x, x, x], 1)
    _, report = linear(random(4, 9), [x], sparsity=0.33)
    assert report.edits[0].numbers["output_error"] < 1e-3


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    x = rows(8, 8) * torch.tensor([1.0, 0, 1, 0, 1, 1, 1, 1])
    after, _ = linear(random(4, 8), [x], sparsity=0.5)
    assert bool(after.isfinite().all())
    assert zeros(after) == 16
    assert zeros(after[:, [1, 3]]) == 8


def test_a_layer_whose_moments_take_too_much_room_is_judged_by_their_diagonal() -> None:
    before = capture(net(), images()[0][:2])
    context = Context(before, Data(calibration=images()))
    context.calibration.gram_bytes = 36 * 36 * 8
    _, report = PruneWeights()(before, context)
    hows = {edit.layer: edit.what.partition(", ")[2] for edit in report.edits}
    assert hows["stem"] == "the others solved anew"
    assert hows["twice"] == "the others stay: its Gram matrix is too large"


def test_more_steps_reach_the_same_share_and_judge_anew() -> None:
    once, _ = pruned(data=images(), sparsity=0.8)
    model, report = pruned(data=images(), sparsity=0.8, steps=3)
    assert [zeros(w) for w in weights(model).values()] == [zeros(w) for w in weights(once).values()]
    assert len(report.edits) == 5
    assert output_error(model, torch.cat(images())) < 1.0


# --- what comes out ---


@pytest.mark.parametrize(
    "optimiser",
    [
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
        lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
    ],
    ids=["sgd", "adamw"],
)
def test_zeros_stay_zero_under_training_and_the_others_move(optimiser: Any) -> None:
    model, _ = pruned(sparsity=0.7)
    before = {name: weight.clone() for name, weight in weights(model).items()}
    model.train()
    stepper, x = optimiser(model.parameters()), images()[0]
    for _ in range(5):
        stepper.zero_grad()
        model(x).square().mean().backward()
        stepper.step()
    for name, weight in weights(model).items():
        assert torch.equal(weight == 0, before[name] == 0)
        assert not torch.equal(weight, before[name])


def test_the_keys_of_the_state_dict_stay_and_the_plain_network_computes_the_same() -> None:
    model, _ = pruned(data=images(), sparsity=0.7)
    plain = net()
    plain.load_state_dict({**plain.state_dict(), **model.state_dict()}, strict=True)
    assert set(plain.state_dict()) - set(model.state_dict()) <= {"norm.num_batches_tracked"}
    x = images()[1]
    with torch.no_grad():
        torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-6)


def test_the_exported_file_holds_plain_weights_and_computes_the_same(tmp_path: Any) -> None:
    model, _ = pruned(data=images(), sparsity=0.7)
    path = export_onnx(model, model.inputs, tmp_path / "model.onnx")
    graph = onnx.load(path).graph
    assert not {node.op_type for node in graph.node} & {"Equal", "Not", "Where", "Cast", "Mul"}
    assert parity(model, path, [model.inputs]).passed
    export_source(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(images()[1]), model(images()[1]))


def test_a_second_application_finds_nothing_to_do_and_a_stronger_one_goes_on() -> None:
    model, _ = pruned(data=images(), sparsity=0.5)
    context = Context(model, Data(calibration=images()))
    _, again = PruneWeights(sparsity=0.5)(model, context)
    assert not again.edits
    assert again.skips[0].why == "already 144 of 288 weights are zero"
    further, report = PruneWeights(sparsity=0.8)(model, context)
    assert len(report.edits) == 5
    for name, weight in weights(model).items():
        assert bool((weights(further)[name][weight == 0] == 0).all())
        assert zeros(weights(further)[name]) == round(0.8 * weight.numel())


def test_tied_weights_are_left_with_the_reason() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.one(x).relu())

    _, report = apply(PruneWeights(), Tied(), torch.ones(2, 4))
    assert not report.edits
    assert [skip.why for skip in report.skips] == [
        "shares its parameters with other.weight",
        "shares its parameters with one.weight",
    ]


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("criterion", ["magnitude", "obd", "obs"])
def test_constant_weights_lose_their_share_and_weights_of_zero_are_done(criterion: str, value: float) -> None:
    after, report = linear(torch.full((4, 6), value), [rows(6, 6)], criterion=criterion)
    assert zeros(after) == (12 if value else 24)
    assert len(report.edits) == bool(value)
    assert [skip.why for skip in report.skips] == ([] if value else ["already 24 of 24 weights are zero"])


# --- bad input ---


def test_weights_of_nan_are_an_error_that_names_the_layer_and_leaves_the_model() -> None:
    before = capture(net(), images()[0][:2])
    with torch.no_grad():
        before.get_parameter("up.weight")[0, 0, 0, 0] = float("nan")
    kept = before.get_parameter("stem.weight").clone()
    with pytest.raises(PassError, match="up: its weight holds NaN or infinity"):
        PruneWeights()(before, Context(before))
    assert torch.equal(before.get_parameter("stem.weight"), kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"criterion": "obs"}, "prune_weights with criterion obs needs calibration data"),
        ({"criterion": "obd"}, "criterion obd and no training data needs calibration data"),
        ({"criterion": "magnitude", "reconstruct": True}, "prune_weights with reconstruct needs calibration data"),
    ],
)
def test_what_needs_data_says_so_before_it_begins(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        pruned(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({"sensitivity": 0}, "greater than 0"),
        ({"block": [0, 4]}, "greater than or equal to 1"),
        ({"criterion": "random"}, "magnitude"),
        ({"sparsity": 0.5, "sensitivity": 1.0}, "sparsity and sensitivity are both given"),
        ({"pattern": "2:4", "block": [1, 4]}, "pattern and block are both given"),
        ({"pattern": "4:4"}, "pattern '4:4' is not of the form N:M with 0 < N < M"),
        ({"pattern": "two:four"}, "is not of the form N:M"),
        ({"pattern": "2:4", "sparsity": 0.9}, "sparsity 0.9 contradicts pattern 2:4"),
        ({"pattern": "2:4", "scope": "global"}, "scope: global with pattern"),
        ({"sensitivity": 1.0, "criterion": "obs"}, "sensitivity is a magnitude, not a criterion obs"),
        ({"pattern": "2:4", "steps": 3}, "pattern says how many weights go, in one step, and steps is 3"),
        ({"criterion": "obs", "reconstruct": False}, "criterion obs solves the weights left anew"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        resolve({"name": "r", "passes": [{"prune_weights": options}]}, Registry.load())


def test_a_pattern_may_be_given_with_the_sparsity_it_has() -> None:
    assert PruneWeights(pattern="2:4", sparsity=0.5).window == (2, 4)


VARIANTS = [
    {"scope": "global", "criterion": "magnitude"},
    {"scope": "global"},
    {"block": (1, 2)},
    {"pattern": "1:2"},
    {"sensitivity": 0.8},
    {"sparsity": 0.7, "steps": 2},
]


@pytest.mark.parametrize(
    ("step", "network"), contract_cases([PruneWeights(**o) for o in VARIANTS], networks("plain_cnn"))
)
def test_every_variant_keeps_the_contract(step: Pass, network: Any) -> None:
    check_pass(step, network)
