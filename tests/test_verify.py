"""Fidelity and parity report what is there: agreement exactly, noise as computed by hand, damage at its layer."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from surgery.captured import capture
from surgery.deviation import Deviation
from surgery.divergence import first_divergence
from surgery.errors import InputError, ModelError
from surgery.export.checked import export_onnx
from surgery.export.runtime import runtime_session
from surgery.fidelity import fidelity
from surgery.parity import BOUNDS, parity
from surgery.recipe import Budget
from surgery.report import proof
from surgery.verification import Verification, verify

BOUND = BOUNDS[torch.float32]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 5)
        nn.init.normal_(self.attend.in_proj_bias)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.middle(torch.relu(self.stem(image))))
        tokens = x.flatten(2).transpose(1, 2)
        return self.head(self.attend(tokens, tokens, tokens)[0].mean(1))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def file(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(net, torch.randn(2, 3, 6, 6), tmp_path_factory.mktemp("onnx") / "net.onnx")


def batches(count: int = 3, size: int = 4) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 3, 6, 6, generator=generator)


def logits(*rows: list[float]) -> nn.Module:
    """A model that returns these rows whatever its input."""

    class Constant(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor(rows)[: len(x)].clone()

    return Constant()


def test_a_model_is_identical_to_itself(net: nn.Module) -> None:
    measured = fidelity(net, copy.deepcopy(net), batches())
    assert (measured.samples, measured.max_error, measured.sqnr_db, measured.top1_agreement) == (12, 0, math.inf, 1)


def test_known_noise_gives_the_sqnr_of_the_formula() -> None:
    reference, candidate = logits([3.0, 4.0], [0.0, 5.0]), logits([3.0, 4.0], [0.5, 5.0])
    measured = fidelity(reference, candidate, torch.zeros(2, 1))
    assert (measured.max_error, measured.relative_error) == (0.5, 0.1)
    assert measured.sqnr_db == pytest.approx(10 * math.log10(50 / 0.25), rel=1e-15)


def test_labels_give_accuracies_and_a_metric_replaces_them() -> None:
    reference, candidate = logits([0.0, 1.0], [1.0, 0.0], [0.0, 1.0]), logits([0.0, 1.0], [0.0, 1.0], [1.0, 0.0])
    data = [(torch.zeros(3, 1), torch.tensor([1, 0, 0])), (torch.zeros(1, 1), torch.tensor([1]))]
    measured = fidelity(reference, candidate, data, labelled=True)
    assert (measured.accuracy_reference, measured.accuracy_candidate) == (0.75, 0.75)
    assert measured.top1_agreement == 0.5
    mean = fidelity(reference, candidate, data, labelled=True, metric=lambda output, _: float(output[:, 0].mean()))
    assert (mean.accuracy_reference, mean.accuracy_candidate) == pytest.approx((0.25, 0.25))


def test_nan_is_a_failure_and_never_agreement() -> None:
    broken, whole = logits([math.nan, 0.0], [0.0, 1.0]), logits([1.0, 0.0], [0.0, 1.0])
    data = [(torch.zeros(2, 1), torch.tensor([0, 1]))]
    for reference in (broken, whole):
        measured = fidelity(reference, broken, data, labelled=True)
        assert (measured.max_error, measured.sqnr_db) == (math.inf, -math.inf)
        assert (measured.top1_agreement, measured.accuracy_candidate) == (0.5, 0.5)
    result = verify(broken, broken, data, labelled=True)
    assert not result.passed
    assert "NaN" in result.shortfalls[0]
    assert not result.parity[0].passed


def test_equal_infinities_agree_and_others_do_not() -> None:
    for value, expected in ((-math.inf, 0.0), (math.inf, math.inf), (0.0, math.inf)):
        deviation = Deviation()
        deviation.add([torch.tensor([1.0, -math.inf])], [torch.tensor([1.0, value])])
        assert deviation.max_error == expected


def test_outputs_that_are_no_logits_have_no_top1() -> None:
    assert fidelity(nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1), torch.randn(2, 2, 4)).top1_agreement is None


def test_outputs_of_other_shape_are_a_model_error() -> None:
    with pytest.raises(ModelError, match=r"\(2, 4\).*\(2, 3\)"):
        fidelity(nn.Linear(5, 3), nn.Linear(5, 4), torch.randn(2, 5))


@pytest.mark.parametrize(
    ("data", "labelled", "problem"),
    [([], False, "no batches"), (3, False, "int, not an iterable"), ([torch.zeros(2, 5)], True, "labelled batch")],
)
def test_bad_data_is_an_input_error(data: Any, labelled: bool, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        fidelity(nn.Linear(5, 3), nn.Linear(5, 3), data, labelled=labelled)


def test_an_exported_model_passes_far_below_the_bound(net: nn.Module, file: Path) -> None:
    result = parity(net, file, batches())
    assert result.passed
    assert 0 < result.relative_error < BOUND / 5
    assert result.first_divergence is None


LAYERS = [
    ("middle.weight", "middle"),
    ("attend.out_proj.weight", "attend.out_proj"),
    ("head.weight", "head"),
]


@pytest.mark.parametrize(("weight", "layer"), LAYERS)
def test_a_damaged_weight_is_found_at_its_layer(
    weight: str, layer: str, net: nn.Module, file: Path, tmp_path: Path
) -> None:
    damaged = damage(file, weight, tmp_path / "damaged.onnx")
    result = parity(net, damaged, batches())
    assert not result.passed
    assert result.first_divergence is not None
    assert result.first_divergence.module == layer
    assert result.first_divergence.error > BOUND


def damage(file: Path, weight: str, target: Path) -> Path:
    """Adds 0.1 to one number of one weight."""
    model = onnx.load(file)
    tensor = next(i for i in model.graph.initializer if i.name == weight)
    array = numpy_helper.to_array(tensor).copy()
    array.flat[0] += 0.1
    tensor.CopyFrom(numpy_helper.from_array(array, weight))
    onnx.save(model, target)
    return target


def test_damage_to_a_fused_layer_names_the_layers_it_was_fused_from(net: nn.Module, tmp_path: Path) -> None:
    captured = capture(net, torch.randn(2, 3, 6, 6))
    file = export_onnx(captured, captured.inputs, tmp_path / "net.onnx")
    other = copy.deepcopy(captured)
    other.get_submodule("stem.0").weight.data[0] *= 1.1
    divergence = first_divergence(other, file, next(batches()), BOUND)
    assert divergence is not None
    assert divergence.module == "stem.0, stem.1"


def test_verify_answers_both_questions_in_one_pass_and_mutates_nothing(net: nn.Module) -> None:
    candidate = copy.deepcopy(net).train()
    candidate.head.weight.data *= 1.01
    before = copy.deepcopy(candidate.state_dict())
    result = verify(net, candidate, batches())
    assert result.passed
    assert result.fidelity.samples == 12
    assert 30 < result.fidelity.sqnr_db < 50  # one per cent of the weights is 40 dB, the bias is as it was
    assert [run.runtime for run in result.parity] == onnx_providers()
    assert all(module.training for module in candidate.modules())
    assert all(torch.equal(before[key], value) for key, value in candidate.state_dict().items())


def onnx_providers() -> list[str]:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    return [p for p in ("CPUExecutionProvider", "CUDAExecutionProvider") if p in available]


def test_a_budget_that_is_missed_is_said(net: nn.Module, file: Path) -> None:
    candidate = copy.deepcopy(net)
    candidate.head.weight.data *= -1
    budget = Budget(accuracy_drop=0.01, top1_agreement=0.99, sqnr_db=20, parity=1e-3)
    result = verify(net, candidate, batches(), onnx=file, budget=budget)
    assert not result.passed
    assert [line.split()[0] for line in result.shortfalls] == ["top-1", "SQNR", "CPUExecutionProvider"]
    assert result.unmeasured == ("change of accuracy (no labels)",)
    assert Verification.from_dict(json.loads(json.dumps(result.to_dict()))) == result
    assert result.broken == ("fidelity", "parity")


def test_a_budget_of_which_nothing_can_be_measured_is_not_kept(net: nn.Module, file: Path) -> None:
    result = verify(net, net, batches(), onnx=file, budget=Budget(accuracy_drop=0.01))
    assert result.shortfalls == ("change of accuracy was not measured (no labels)",)


@pytest.mark.parametrize(
    ("budget", "changed", "verdict"),
    [
        (Budget(sqnr_db=20), False, "passed (parity holds, budget holds)"),
        (Budget(sqnr_db=20), True, "NOT passed (parity holds, budget BROKEN)"),
        (Budget(sqnr_db=20, parity=1e-12), False, "NOT passed (parity BROKEN, budget holds)"),
        (Budget(sqnr_db=20, parity=1e-12), True, "NOT passed (parity BROKEN, budget BROKEN)"),
        (None, True, "passed (parity holds, no budget bounds the fidelity)"),
    ],
)
def test_the_verdict_names_what_broke(net: nn.Module, budget: Budget | None, changed: bool, verdict: str) -> None:
    candidate = copy.deepcopy(net)
    if changed:
        candidate.head.weight.data *= -1
    result = verify(net, candidate, batches(), budget=budget)
    assert proof(result.to_dict(), budget is not None).rows[-1] == ("verdict", verdict)


def test_an_onnx_file_as_candidate_has_fidelity_alone(net: nn.Module, file: Path) -> None:
    result = verify(net, file, batches())
    assert result.parity == ()
    assert "parity not measured" in proof(result.to_dict()).rows[-1][1]
    assert result.fidelity.relative_error < BOUND
    assert fidelity(runtime_session(file), runtime_session(file), batches()).max_error == 0


def test_a_verification_is_plain_json(net: nn.Module, file: Path) -> None:
    plain = verify(net, copy.deepcopy(net), batches(), onnx=file).to_dict()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    assert plain["fidelity"]["sqnr_db"] == "inf"
    assert plain["parity"][0]["passed"] is True


def test_arguments_by_name_reach_the_file_whatever_their_order(tmp_path: Path) -> None:
    class Difference(nn.Module):
        def forward(self, x: dict[str, Tensor], *, scale: Tensor) -> Tensor:
            return (x["a"] - x["b"]) * scale

    batch = {"x": {"b": torch.randn(2, 3), "a": torch.randn(2, 3)}, "scale": torch.randn(2, 3)}
    file = export_onnx(Difference(), batch, tmp_path / "model.onnx")
    swapped = {"scale": batch["scale"], "x": dict(reversed(batch["x"].items()))}  # type: ignore[attr-defined]
    assert parity(Difference(), file, [batch, swapped]).passed


class Labelled(nn.Module):
    """Scores and the index of the largest, as segmenters return them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = x @ self.weight
        return scores, scores.argmax(1)


def test_indices_agree_or_differ_and_have_no_part_in_errors() -> None:
    x, weight = torch.eye(4), torch.eye(4) + 0.1 * torch.eye(4).roll(1, 1)
    other = weight.clone()
    other[0, 0], other[0, 3] = 0.9, 0.95
    measured = fidelity(Labelled(weight), Labelled(other), x)
    assert measured.integer_agreement == 0.75
    assert measured.max_error == pytest.approx(0.95)
    scores = [model(x)[0] for model in (Labelled(weight), Labelled(other))]
    noise = (scores[0] - scores[1]).square().sum()
    assert measured.sqnr_db == pytest.approx(10 * math.log10(scores[0].square().sum() / noise), rel=1e-6)


def test_outputs_of_integers_alone_are_compared_as_numbers() -> None:
    class Rounded(nn.Module):
        def __init__(self, factor: int) -> None:
            super().__init__()
            self.factor = factor

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.factor).long()

    measured = fidelity(Rounded(3), Rounded(4), torch.tensor([[0.0, 1.0]]))
    assert (measured.max_error, measured.integer_agreement) == (1, 0.5)
