from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from surgery_plugins.fold_batchnorm import FoldBatchnorm, scale_and_shift
from torch import Tensor, nn

from surgery import Context, PassReport
from surgery.captured import CapturedModel, capture, relative_error

ZOO = Path(__file__).resolve().parents[2] / "shared" / "tools" / "zoo.py"


def randomise(model: nn.Module) -> nn.Module:
    """Running statistics and affine values that show every mistake."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.normal_(module.bias)
    return model.eval()


def fold(model: nn.Module, example: Tensor, **options: object) -> tuple[CapturedModel, CapturedModel, PassReport]:
    before = capture(randomise(model), example)
    after, report = FoldBatchnorm(**options)(before, Context(before))
    return before, after, report


def assert_folded(model: nn.Module, example: Tensor, count: int = 1) -> CapturedModel:
    before, after, report = fold(model, example)
    assert len(report.edits) == count
    assert not report.skips
    assert not any("BatchNorm" in type(m).__name__ for m in after.modules())
    other = torch.randn(3, *example.shape[1:])
    assert relative_error(after(other), before(other)) < 1e-5
    return after


def why_not(model: nn.Module, example: Tensor) -> str:
    before, after, report = fold(model, example)
    assert not report.edits
    assert torch.equal(before(example), after(example))
    (skip,) = report.skips
    return skip.why


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(4, 6, 3, groups=2), (4, 9)),
        (nn.Conv2d(3, 6, 3, padding=1, bias=False), (3, 8, 8)),
        (nn.Conv2d(4, 6, (3, 1), stride=2, groups=2, padding_mode="reflect", padding=1), (4, 8, 8)),
        (nn.Conv3d(2, 6, 2), (2, 4, 4, 4)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2), (4, 5)),
        (nn.ConvTranspose2d(6, 6, 3, stride=2, groups=3, output_padding=1, bias=False), (6, 5, 5)),
        (nn.ConvTranspose3d(4, 6, 2, groups=2), (4, 3, 3, 3)),
        (nn.Linear(5, 6), (5,)),
        (nn.Linear(5, 6, bias=False), (5,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("affine", [True, False])
def test_batchnorm_folds_into_the_layer_before_it(layer: nn.Module, size: tuple[int, ...], affine: bool) -> None:
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(size) - 1]
    assert_folded(nn.Sequential(layer, norm(6, affine=affine), nn.ReLU()), torch.randn(2, *size))


def test_two_batchnorms_in_a_row_fold_into_the_same_convolution() -> None:
    after = assert_folded(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)), torch.randn(2, 3, 5, 5), 2
    )
    assert [name for name, _ in after.named_parameters()] == ["0.weight", "0.bias"]


def test_scale_and_shift_are_those_of_the_definition() -> None:
    norm = randomise(nn.BatchNorm1d(5, eps=0.1)).double()
    y = torch.randn(7, 5, dtype=torch.float64)
    scale, shift = scale_and_shift(norm)
    torch.testing.assert_close(scale * y + shift, norm(y))


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("variance", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.kernel, stride=2)
        return F.relu(F.batch_norm(y, self.mean, self.variance))


def test_functional_calls_on_bare_parameters_fold_too() -> None:
    after = assert_folded(Functional(), torch.randn(2, 3, 9, 9))
    assert not any(node.op == "get_attr" for node in after.graph.nodes)


class Twice(nn.Module):
    """torch's own fusion helper folds this wrongly: the convolution has one user per call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(torch.relu(self.conv(x))))


def test_a_convolution_called_twice_is_left_alone() -> None:
    assert why_not(Twice(), torch.randn(2, 3, 5, 5)) == "conv cannot change alone: called 2 times"


class Tied(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Conv2d(3, 3, 3)
        self.other.weight = self.conv.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.other(x)))


def test_a_convolution_with_a_tied_weight_is_left_alone() -> None:
    assert (
        why_not(Tied(), torch.randn(2, 3, 5, 5)) == "conv cannot change alone: shares its parameters with other.weight"
    )


class Branching(Twice):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y


def test_a_convolution_whose_output_is_used_elsewhere_is_left_alone() -> None:
    assert "conv has 2 users" in why_not(Branching(), torch.randn(2, 3, 5, 5))


class SharedNorm(Twice):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(self.bn(self.first(x))))


def test_a_batchnorm_called_twice_folds_into_both_convolutions() -> None:
    assert_folded(SharedNorm(), torch.randn(2, 3, 5, 5), 2)


@pytest.mark.parametrize(
    ("model", "example", "reason"),
    [
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)), torch.randn(2, 3, 4, 4), "follows no convolution"),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)),
            torch.randn(2, 3, 4, 4),
            "follows no convolution",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)),
            torch.randn(2, 3, 4, 4),
            "no running statistics",
        ),
        (nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)), torch.randn(2, 4, 5), "not the output channels of 0"),
    ],
)
def test_what_cannot_be_folded_exactly_is_skipped_with_the_reason(
    model: nn.Module, example: Tensor, reason: str
) -> None:
    assert reason in why_not(model, example)


def test_select_names_batchnorm_layers() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    _, after, report = fold(net, torch.randn(2, 3, 4, 4), select=("3",))
    assert [edit.layer for edit in report.edits] == ["3"]
    assert isinstance(after.get_submodule("1"), nn.BatchNorm2d)
    _, _, other = fold(net, torch.randn(2, 3, 4, 4), select=("Conv2d",))
    assert [skip.layer for skip in other.skips] == ["0", "2"]


def test_frozen_weights_stay_frozen() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)).requires_grad_(False)
    _, after, _ = fold(net, torch.randn(2, 3, 4, 4))
    assert not any(p.requires_grad for p in after.parameters())


def test_low_precision_models_keep_their_type() -> None:
    before = capture(
        randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).double(), torch.randn(2, 3, 4, 4).double()
    )
    after, _ = FoldBatchnorm()(before, Context(before))
    assert {p.dtype for p in after.parameters()} == {torch.float64}


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_every_batchnorm_of_a_real_architecture_folds(name: str) -> None:
    if not ZOO.exists() or importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision or its loader is not here")
    spec = importlib.util.spec_from_file_location("zoo", ZOO)
    assert spec
    assert spec.loader
    zoo = sys.modules.get("zoo") or importlib.util.module_from_spec(spec)
    if "zoo" not in sys.modules:
        sys.modules["zoo"] = zoo
        spec.loader.exec_module(zoo)
    model, _ = zoo.build(f"torchvision/{name}")
    unused = 2 if name == "googlenet" else 0  # in heads that are left out in eval mode
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert_folded(model, torch.rand(2, 3, 64, 64), count - unused)
