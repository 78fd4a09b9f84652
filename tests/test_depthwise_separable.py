from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.depthwise_separable import DepthwiseSeparable
from surgery_plugins.depthwise_separable.factors import Factors, fit, nearest, weight_error
from surgery_plugins.depthwise_separable.modules import factored, parameters_after
from torch import Tensor, nn

from surgery.calibration import Regression
from surgery.calibration.moments import Scatter
from surgery.calibration.unfolding import unfold, weight_matrix
from surgery.captured import CapturedModel, capture, relative_error
from surgery.context import Context
from surgery.data import Data
from surgery.errors import InputError, RecipeError
from surgery.graph import layers
from surgery.measurement import measure
from surgery.passes import PassReport

SHARED = Path(__file__).resolve().parents[2] / "shared"


def task_of(module: nn.Module, x: Tensor) -> Regression:
    scatter = Scatter(full=True)
    for rows in unfold(module, x, 2**20):
        scatter.add(rows)
    return scatter.finish().regression(weight_matrix(module), None if module.bias is None else module.bias[None])


def rewrite(
    model: nn.Module, example: Tensor, data: Any = None, **options: Any
) -> tuple[CapturedModel, CapturedModel, PassReport]:
    before = capture(model.eval(), example)
    after, report = DepthwiseSeparable(**options)(before, Context(before, Data.of(data)))
    return before, after, report


# --- the maths ---


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor, int]:
    """A convolution that is exactly separable with a multiplier, an input for it, and the multiplier."""
    rank, channels, outputs = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    kernel = [draw(st.integers(2, 3)), *(draw(st.integers(1, 3)) for _ in range(rank - 1))]
    padding: Any = draw(st.sampled_from([0, 1, 2, "valid", "same"]))
    stride = 1 if padding == "same" else [draw(st.integers(1, 2)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    torch.manual_seed(draw(st.integers(0, 1000)))
    module = getattr(nn, f"Conv{rank}d")(channels, outputs, kernel, stride, padding, dilation, bias=draw(st.booleans()))
    multiplier = draw(st.integers(1, min(outputs, module.weight[0, 0].numel())))
    pointwise, depthwise = (
        torch.randn(outputs, channels, multiplier),
        torch.randn(channels, multiplier, module.weight[0, 0].numel()),
    )
    module.weight = nn.Parameter(Factors(pointwise, depthwise).product.view_as(module.weight))
    return module, torch.randn(2, channels, *[8] * rank), multiplier


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=60, deadline=None)
@given(convolutions(), st.booleans())
def test_an_exactly_separable_convolution_is_rewritten_without_error(
    case: tuple[nn.Module, Tensor, int], data: bool
) -> None:
    module, x, multiplier = case
    task = task_of(module, x) if data else None
    parts, errors = factored(module, multiplier, task, 10 if data else None)
    assert relative_error(nn.Sequential(*parts.values())(x).detach(), module(x).detach()) < 2e-5
    assert errors["weight_error"] < 1e-5
    assert errors.get("output_error", 0) < 1e-5
    count = sum(p.numel() for part in parts.values() for p in part.parameters())
    gained = module.out_channels if data and module.bias is None else 0
    assert count == parameters_after(module, multiplier, norm_activation=False) + gained


def test_the_nearest_factors_are_as_near_as_eckart_and_young_say() -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 5, 9)
    lost = [torch.linalg.svdvals(weight[:, c].double()) for c in range(5)]
    for multiplier in range(1, 8):
        bound = torch.cat([values[multiplier:] for values in lost]).square().sum().sqrt() / weight.double().norm()
        assert weight_error(weight, nearest(weight, multiplier).product) == pytest.approx(float(bound), abs=1e-7)


def error_on(weight: Tensor, factors: Factors, covariance: Tensor) -> float:
    rest = (weight - factors.product).flatten(1)
    return float(((rest @ covariance) * rest).sum())


def correlated(channels: int, kernel: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    weight = torch.randn(6, channels, kernel, dtype=torch.float64)
    rows = torch.randn(400, channels * kernel, dtype=torch.float64).cumsum(1)
    return weight, rows.T.cov()


@pytest.mark.parametrize("multiplier", [1, 2])
def test_each_round_of_the_fit_lowers_the_error_of_the_outputs(multiplier: int) -> None:
    weight, covariance = correlated(4, 9)
    start = nearest(weight, multiplier)
    errors = [error_on(weight, fit(weight, covariance, start, rounds), covariance) for rounds in range(12)]
    assert errors[0] < error_on(weight, start, covariance)
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(errors))


@pytest.mark.parametrize("multiplier", [1, 2])
def test_the_fit_ends_where_no_direction_lowers_the_error(multiplier: int) -> None:
    weight, covariance = correlated(4, 9)
    result = fit(weight, covariance, nearest(weight, multiplier), 300)
    p, d = result.pointwise.requires_grad_(), result.depthwise.requires_grad_()
    rest = (weight - Factors(p, d).product).flatten(1)
    error = ((rest @ covariance) * rest).sum()
    error.backward()
    slopes = [float(v.grad.norm() * v.detach().norm() / error.detach()) for v in (p, d)]  # 1.4 to 5 at the start
    assert max(slopes) < 0.1


@pytest.mark.parametrize("dead", ["inputs", "weights", "everything"])
def test_dead_channels_do_no_harm(dead: str) -> None:
    weight, covariance = correlated(3, 4)
    if dead != "inputs":
        weight[:, 1] = 0
    if dead != "weights":
        covariance[4:8] = covariance[:, 4:8] = 0
    if dead == "everything":
        weight, covariance = weight * 0, covariance * 0
    result = fit(weight, covariance, nearest(weight, 2), 5)
    assert result.product.isfinite().all()
    assert error_on(weight, result, covariance) <= error_on(weight, nearest(weight, 2), covariance) + 1e-9


# --- the pass ---


class Net(nn.Module):
    """`conv` is called twice; `wide` and `last` once."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.conv = nn.Conv2d(8, 8, 3, padding="same", bias=bias)
        self.wide = nn.Conv2d(8, 12, (3, 5), stride=2, dilation=(2, 1), padding=2, bias=bias)
        self.head = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.conv(torch.relu(self.conv(x)) + 0.5))
        return self.head(self.wide(x).mean((2, 3)))


def images(count: int = 24) -> Tensor:
    torch.manual_seed(1)
    return F.avg_pool2d(torch.randn(count, 3, 20, 20), 3, 2)


def calls(model: CapturedModel, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of every call of a module, one after the other."""
    seen: list[tuple[Tensor, Tensor]] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(x)
    handle.remove()
    inputs, outputs = zip(*seen, strict=True)
    return torch.cat(inputs), torch.cat(outputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("calibrate", [None, False])
def test_reported_errors_are_those_measured_by_hand(bias: bool, calibrate: bool | None) -> None:
    torch.manual_seed(0)
    before, after, report = rewrite(Net(bias), images(2), list(images().split(7)), calibrate=calibrate)
    assert [edit.layer for edit in report.edits] == ["conv", "wide"]
    for edit in report.edits:
        x, y = calls(before, edit.layer, images())
        with torch.no_grad():
            given = after.get_submodule(f"{edit.layer}.pointwise")(after.get_submodule(f"{edit.layer}.depthwise")(x))
        mean = y.mean((0, 2, 3), keepdim=True)
        by_hand = float((y - given).norm() / (y - mean).norm())
        assert edit.numbers["output_error"] == pytest.approx(by_hand, rel=1e-3)
        assert 0 < edit.numbers["output_error"] < (1 if calibrate is None else 2)
        own = before.get_submodule(edit.layer).weight
        d, p = (after.get_submodule(f"{edit.layer}.{part}").weight for part in ("depthwise", "pointwise"))
        product = torch.einsum("oc,cyx->ocyx", p[:, :, 0, 0], d[:, 0])
        assert edit.numbers["weight_error"] == pytest.approx(
            float((own - product).detach().norm() / own.detach().norm()), rel=1e-3
        )
        if calibrate is None:
            torch.testing.assert_close(given.mean((0, 2, 3)), mean.flatten(), rtol=1e-4, atol=1e-5)
        assert ("gains a bias" in edit.what) == (calibrate is None and not bias)


def test_a_convolution_called_twice_is_rewritten_at_both_calls() -> None:
    _, after, _ = rewrite(Net(), images(2), select=("conv",))
    targets = [str(node.target) for node in after.graph.nodes if node.op == "call_module"]
    assert targets == ["stem", *["conv.depthwise", "conv.pointwise"] * 2, "wide", "head"]
    conv = after.get_submodule("conv.depthwise")
    assert (conv.padding, conv.groups, conv.out_channels) == ("same", 8, 8)


def test_the_fit_beats_the_nearest_weights_on_every_layer_and_in_turn_it_beats_both() -> None:
    torch.manual_seed(0)
    model, data = Net(), list(images().split(8))
    results = {}
    for name, options in {"weights": {"calibrate": False}, "fit": {}, "turn": {"sequential": True}}.items():
        before, after, report = rewrite(model, images(2), data, **options)
        given = calls(after, "wide.pointwise", images())[1]
        error = float((given - calls(before, "wide", images())[1]).square().mean())
        results[name] = error, [edit.numbers["output_error"] for edit in report.edits]
    assert all(fitted < near for fitted, near in zip(results["fit"][1], results["weights"][1], strict=True))
    assert results["turn"][0] < results["fit"][0] < results["weights"][0]


def test_in_turn_a_layer_called_twice_comes_first_and_functions_are_layers_too() -> None:
    class Functions(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(torch.relu(self.conv(torch.relu(self.stem(x)))) + 0.5))
            x = F.conv2d(x, self.wide.weight, self.wide.bias, stride=2, dilation=(2, 1), padding=2)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    modules, functions = Net(), Functions()
    functions.load_state_dict(modules.state_dict())
    results = []
    for net in (modules, functions):
        _, after, report = rewrite(net, images(2), [images()], sequential=True)
        assert [(e.layer, e.what.partition("fitted to ")[2]) for e in report.edits] == [
            ("conv", "its outputs"),
            ("wide", "its outputs before the pass"),
        ]
        results.append(after(images()))
    assert relative_error(*results) < 1e-4


@pytest.mark.parametrize("multiplier", [1, 3])
def test_norm_and_activation_start_near_the_layer_when_there_is_data(multiplier: int) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"select": ("wide",), "multiplier": multiplier}
    before, plain, _ = rewrite(Net(), images(2), [images()], **options)
    _, after, report = rewrite(before, images(2), [images()], norm_activation=True, **options)
    parts = [name for name, _ in after.get_submodule("wide").named_children()]
    assert parts == ["depthwise", "norm", "activation", "pointwise"]
    assert relative_error(after(images()), plain(images())) < 0.02
    assert "output_error" not in report.edits[0].numbers


@pytest.mark.parametrize(
    ("layer", "options", "why"),
    [
        (nn.Conv2d(8, 8, 1), {}, "already pointwise"),
        (nn.Conv2d(8, 8, 3, groups=2), {}, "already grouped (2 groups)"),
        (nn.ConvTranspose2d(8, 8, 3), {}, "transposed"),
        (nn.Conv2d(8, 1, 3), {}, "would not shrink: 73 parameters, 89 afterwards"),
        (nn.Conv2d(8, 8, 2), {"multiplier": 3}, "would not shrink: 264 parameters, 320 afterwards"),
    ],
)
def test_what_gains_nothing_is_skipped_with_the_reason(layer: nn.Module, options: dict[str, Any], why: str) -> None:
    _, _, report = rewrite(nn.Sequential(nn.Conv2d(3, 8, 3), layer), images(2), **options)
    assert not report.edits
    assert report.skips[0].why.startswith("first convolution")
    assert why in report.skips[1].why


def test_the_first_convolution_is_rewritten_on_request() -> None:
    _, _, report = rewrite(Net(), images(2), include_first=True)
    assert [edit.layer for edit in report.edits] == ["stem", "conv", "wide"]


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(8, 8, 3)
        self.wide.weight = self.conv.weight
        self.head = nn.Linear(8, 4)


class Functional(Net):
    """One kernel, called with two geometries."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(self.stem(x), self.conv.weight, padding=1)
        return self.head(self.wide(F.conv2d(x, self.conv.weight, dilation=2)).mean((2, 3)))


def test_weights_that_belong_to_others_are_left_alone() -> None:
    _, _, report = rewrite(Tied(), images(2))
    assert not report.edits
    assert "shares its parameters with wide.weight" in {skip.layer: skip.why for skip in report.skips}["conv"]
    _, _, report = rewrite(Functional(), images(2))
    assert [edit.layer for edit in report.edits] == ["wide"]
    assert sum("shares its parameters with node" in skip.why for skip in report.skips) == 2


def test_functional_convolutions_are_rewritten_too() -> None:
    class One(Functional):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.wide(F.conv2d(self.stem(x), self.conv.weight, padding=1)).mean((2, 3)))

    _, after, report = rewrite(One(), images(2))
    assert [edit.layer for edit in report.edits] == ["conv", "wide"]
    assert not any(node.op == "get_attr" for node in after.graph.nodes)


def test_options_that_contradict_each_other_or_lack_data_are_refused() -> None:
    with pytest.raises(RecipeError, match="sequential"):
        DepthwiseSeparable(sequential=True, calibrate=False)
    for options in ({"calibrate": True}, {"sequential": True}):
        with pytest.raises(InputError, match="depthwise_separable needs calibration data"):
            rewrite(Net(), images(2), **options)


def test_a_second_application_makes_no_edit() -> None:
    _, after, _ = rewrite(Net(), images(2))
    again, report = DepthwiseSeparable()(after, Context(after))
    assert not report.edits
    assert [layer.name for layer in layers(again)] == [layer.name for layer in layers(after)]


# --- known networks ---


def vgg16(norm: bool) -> nn.Sequential:
    channels, parts = 3, []
    for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
        if not width:
            parts.append(nn.MaxPool2d(2))
            continue
        parts += [nn.Conv2d(channels, width, 3, padding=1), *[nn.BatchNorm2d(width)] * norm, nn.ReLU()]
        channels = width
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(512, 10))


@pytest.mark.parametrize(("norm", "before", "after"), [(True, 14_728_266, 1_698_378), (False, 14_719_818, 1_682_506)])
def test_vgg16_has_the_parameters_and_macs_of_the_closed_formulas(norm: bool, before: int, after: int) -> None:
    original, result, report = rewrite(vgg16(norm), torch.randn(2, 3, 32, 32), norm_activation=norm)
    old, new = measure(original, original.inputs), measure(result, result.inputs)
    assert (old.parameters, new.parameters) == (before, after)
    assert (old.macs, new.macs) == (313_201_664, 38_018_048)
    second = "3" if norm else "2"
    numbers = {edit.layer: edit.numbers for edit in report.edits}[second]
    assert (numbers["parameters_before"], numbers["parameters_after"] - 128 * norm) == (36_928, 4_800)
    assert old.by_module[second] == 37_748_736
    assert sum(new.by_module[f"{second}.{part}"] for part in ("depthwise", "pointwise")) == 4_784_128


@pytest.fixture
def shared() -> Iterator[None]:
    if not (SHARED / "models").exists():
        pytest.skip("trained weights are not here")
    folders = [str(SHARED / "models"), str(SHARED / "data")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


@pytest.mark.usefixtures("shared")
def test_on_a_trained_network_the_fit_to_data_keeps_more_accuracy() -> None:
    import cifar10
    import resnet_cifar

    train, (pictures, labels) = cifar10.lossless("train")[0], cifar10.lossless("test")
    data = list(resnet_cifar.normalise(torch.from_numpy(train[:256])).split(64))
    test, labels = resnet_cifar.normalise(torch.from_numpy(pictures)), torch.from_numpy(labels)
    original = capture(resnet_cifar.resnet20(), data[0][:2])
    context = Context(original, Data.of(data))
    accuracy, errors = {}, {}
    for calibrate in (False, True):
        step = DepthwiseSeparable(select=("layer3.1", "layer3.2"), multiplier=2, calibrate=calibrate)
        result, report = step(original, context)
        with torch.no_grad():
            accuracy[calibrate] = float((result(test).argmax(1) == labels).float().mean())
        errors[calibrate] = [edit.numbers["output_error"] for edit in report.edits]
    assert len(errors[True]) == 4
    assert all(fitted < near for fitted, near in zip(errors[True], errors[False], strict=True))
    assert accuracy[True] > accuracy[False] + 0.05
    assert accuracy[True] > 0.87
