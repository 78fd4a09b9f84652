from __future__ import annotations

import json

import pytest
import torch
from small_runs import REGISTRY, Net, files, operate, small_inputs
from torch import nn

import surgery
from surgery import (
    CaptureError,
    CrashError,
    Data,
    ExportError,
    InputError,
    ModelError,
    PassError,
    RecipeError,
    report,
)
from surgery.pipeline import SOFTENINGS


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def inputs():
    return small_inputs()


def test_a_run_leaves_every_artifact_and_the_callers_model_alone(net, inputs, tmp_path):
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    net.train()
    operation = operate(net, inputs, "damp", "jitter", out=tmp_path / "run")
    assert net.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {
        "model.onnx",
        "model.py",
        "model.graph.json",
        "model.safetensors",
        "original.onnx",
        "recipe.lock.yaml",
        "report.html",
        "report.json",
        "report.md",
        "run.json",
        "steps",
        "timings.json",
    }
    assert [len(report.edits) for report in operation.reports] == [1, 1]
    assert operation.passed
    assert operation.verification.parity[0].relative_error < 1e-5


def test_the_reloaded_model_gives_the_same_bits(net, inputs, tmp_path):
    operation = operate(net, inputs, "damp", out=tmp_path / "run")
    loaded = surgery.load(tmp_path / "run")
    with torch.no_grad():
        expected, actual = operation.model(**inputs), loaded(**inputs)
    assert actual.keys() == expected.keys() == {"logits", "features"}
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_two_runs_in_two_folders_are_the_same_bytes(net, inputs, tmp_path):
    for name in ("a", "b"):
        operate(net, inputs, "jitter", out=tmp_path / name)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_another_seed_gives_another_model(net, inputs):
    outputs = []
    for seed in (0, 1):
        recipe = {"name": "test", "seed": seed, "passes": ["jitter"]}
        operation = surgery.operate(net, inputs, recipe, registry=REGISTRY, latency_rounds=0)
        outputs.append(operation.model(**inputs)["logits"])
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("how", ["undo", "stop"])
def test_a_pass_that_crashes_ends_the_run_whatever_a_broken_budget_does(net, inputs, tmp_path, how):
    with pytest.raises(CrashError, match="ZeroDivisionError: by design") as caught:
        operate(net, inputs, "damp", {"explode": None, "on_break": how}, "damp", out=tmp_path / "run")
    assert "on_break" not in str(caught.value)
    assert {p.name for p in (tmp_path / "run/steps").iterdir()} == {"0-capture", "1-damp"}


@pytest.mark.parametrize("device", ["cuda:99", "meta", "tpu9"])
def test_a_device_that_is_not_here_is_missed_before_anything_runs(net, inputs, tmp_path, device):
    with pytest.raises(InputError, match=f"device '{device}' is not here") as caught:
        operate(net, inputs, "damp", out=tmp_path / "run", device=device)
    assert "cpu" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_a_wrong_step_five_is_found_before_anything_runs(net, inputs, tmp_path):
    with pytest.raises(RecipeError, match=r"passes\.4"):
        operate(net, inputs, "damp", "damp", "damp", "damp", {"damp": {"factr": 1}}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"quantize": {}}, "pass quantize needs calibration data"),
        ({"prune_filters": {"criterion": "taylor"}}, "criterion taylor needs training data"),
        ({"hashed": {"metric": "output"}}, "pass hashed needs calibration data"),
        ({"finetune": {"loss": "labels"}}, "pass finetune with loss: labels needs labels"),
    ],
)
def test_data_that_the_last_step_needs_is_missed_before_anything_runs(net, inputs, tmp_path, last, message):
    begun = []
    with pytest.raises(InputError, match=message):
        surgery.operate(
            net,
            inputs,
            {"name": "late", "passes": ["fold_batchnorm", last]},
            out=tmp_path / "run",
            progress=lambda what, done, total: begun.append(what),
        )
    assert not begun
    assert not (tmp_path / "run").exists()


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name(net, inputs):
    with pytest.raises(RecipeError, match="did you mean stem"):
        operate(net, inputs, {"damp": {"exclude": ["sten"]}})


def test_select_and_exclude_go_by_name_and_type(net, inputs):
    assert operate(net, inputs, {"damp": {"select": ["Conv2d"]}}).reports[0].edits
    assert not operate(net, inputs, {"damp": {"exclude": ["st*"]}}).reports[0].edits


def test_a_broken_budget_is_reported_and_the_files_are_kept(net, inputs, tmp_path):
    operation = operate(net, inputs, "damp", budget={"sqnr_db": 60.0}, out=tmp_path / "run")
    assert not operation.passed
    assert "SQNR" in operation.verification.shortfalls[0]
    assert (tmp_path / "run" / "model.onnx").exists()
    assert json.loads((tmp_path / "run" / "report.json").read_text())["passed"] is False


SPARE = {"sqnr_db": 15.0}
"""Which `damp` breaks at 0.5 (8 dB) and 0.75 (14 dB), and keeps at 0.875 (20 dB)."""


def same_outputs(first, second, inputs):
    with torch.no_grad():
        expected, actual = first(**inputs), second(**inputs)
    return all(torch.equal(actual[key], expected[key]) for key in expected)


def test_a_step_that_breaks_the_budget_is_undone_and_the_next_one_runs(net, inputs, tmp_path):
    steps = [{"damp": {"factor": 0.5}, "on_break": "undo"}, "jitter"]
    operation = operate(net, inputs, *steps, budget=SPARE, out=tmp_path / "run")
    damp, jitter = operation.steps[1:]
    assert (damp.outcome, jitter.outcome) == ("undone", "kept")
    assert [text.split(" is ")[0] for text in damp.attempts] == ["factor 0.5: SQNR in dB"]
    assert not damp.report.edits
    assert jitter.report.edits
    assert operation.passed
    alone = operate(net, inputs, {"jitter": {"exclude": ["head"]}})  # the same noise but for the seed of the step
    assert not same_outputs(operation.model, alone.model, inputs)
    assert same_outputs(operation.model, surgery.load(tmp_path / "run"), inputs)


def test_undoing_the_only_step_leaves_the_original(net, inputs, tmp_path):
    operation = operate(net, inputs, {"damp": {}, "on_break": "undo"}, budget=SPARE, out=tmp_path / "run")
    assert same_outputs(operation.original, operation.model, inputs)
    assert operation.verification.fidelity.max_error == 0
    assert (tmp_path / "run" / "model.onnx").exists()
    first = files(tmp_path / "run")
    operate(net, inputs, {"damp": {}, "on_break": "undo"}, budget=SPARE, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == first


def test_a_step_is_softened_until_the_budget_holds(net, inputs):
    operation = operate(net, inputs, {"damp": {"factor": 0.5}, "on_break": "soften"}, budget=SPARE)
    step = operation.steps[1]
    assert (step.outcome, step.options["factor"]) == ("softened", 0.875)
    assert [text.split(":")[0] for text in step.attempts] == ["factor 0.5", "factor 0.75"]
    assert operation.verification.fidelity.sqnr_db >= 15.0


def test_a_step_that_no_softening_saves_is_undone(net, inputs):
    operation = operate(net, inputs, {"damp": {"factor": 0.5}, "on_break": "soften"}, budget={"sqnr_db": 99.0})
    assert operation.steps[1].outcome == "undone"
    assert len(operation.steps[1].attempts) == 1 + SOFTENINGS
    assert operation.passed


def test_stopping_keeps_what_stood_before_and_runs_nothing_more(net, inputs, tmp_path):
    steps = ["jitter", {"damp": {}, "on_break": "stop"}, "explode"]
    operation = operate(net, inputs, *steps, budget=SPARE, out=tmp_path / "run")
    assert [step.outcome for step in operation.steps] == ["kept", "kept", "stopped"]
    assert same_outputs(operation.model, operate(net, inputs, "jitter").model, inputs)
    first = files(tmp_path / "run")
    operate(net, inputs, *steps, budget=SPARE, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == first


def test_a_step_that_cannot_be_done_as_asked_is_softened_until_it_can(net, inputs, tmp_path):
    steps = ["jitter", {"demand": {"factor": 0.5}, "on_break": "soften"}]
    operation = operate(net, inputs, *steps, out=tmp_path / "run")
    step = operation.steps[2]
    assert (step.outcome, step.options["factor"]) == ("softened", 0.875)
    assert step.attempts[1] == "factor 0.75: factor: 0.75 cannot be met, 0.8 is as far as it goes"
    assert "softened to factor 0.875" in (tmp_path / "run" / "report.md").read_text()
    first = files(tmp_path / "run")
    operate(net, inputs, *steps, out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == first


@pytest.mark.parametrize("how", ["undo", "stop"])
def test_a_step_that_fails_is_undone_where_the_recipe_says_what_then(net, inputs, how, tmp_path):
    steps = ["jitter", {"demand": {"factor": 0.5}, "on_break": how}, "damp"]
    operation = operate(net, inputs, *steps, out=tmp_path / "run")
    assert operation.steps[2].outcome == ("stopped" if how == "stop" else "undone")
    assert operation.steps[2].attempts == ("factor 0.5: factor: 0.5 cannot be met, 0.8 is as far as it goes",)
    assert not operation.steps[2].report.edits
    assert len(operation.steps) == (3 if how == "stop" else 4)
    assert ("stopped, not run: damp" in (tmp_path / "run" / "report.md").read_text()) == (how == "stop")
    rest = ["jitter"] if how == "stop" else ["jitter", "damp"]
    assert same_outputs(operation.model, operate(net, inputs, *rest).model, inputs)


def test_a_step_that_fails_is_named_with_its_number_and_what_would_go_on(net, inputs):
    with pytest.raises(PassError, match=r"cannot be met(.|\n)*step 2 of 2, pass demand(.|\n)*less; .*on_break: soften"):
        operate(net, inputs, "jitter", {"demand": {"factor": 0.5}})


def test_a_step_that_made_the_model_slower_is_marked(net, inputs):
    summary = report.summary(operate(net, inputs, "damp"))
    slow = {"seconds": 1.0, "ratio": 0.5, "quartiles": [0.4, 0.6]}
    times = {"steps": [{"original": slow, "result": slow, "step": slow}], "onnxruntime_latency": {}}
    shown = next(table for table in report.tables(summary, times) if table.title == "After each step")
    assert "SLOWER: 0.50× the speed before it" in shown.rows[0][-1].split("; ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": torch.ones(3)}, "batch is 2 in another input, and input scale has 3"),
        ({"image": torch.ones(2, 3, 8, 9)}, "width is fixed at 8, and input image has 9"),
        ({"image": torch.full((2, 3, 8, 8), torch.nan)}, "input image holds NaN"),
    ],
)
def test_data_that_does_not_fit_is_named_by_role_batch_and_input(net, inputs, change, words):
    good = {"image": torch.ones(2, 3, 8, 8), "scale": torch.ones(2)}
    with pytest.raises(InputError, match=rf"{words}(.|\n)*calibration batch 1"):
        operate(net, inputs, "damp", data=[good, good | change], budget=SPARE | {"accuracy_drop": 0.5})
    labels = torch.zeros(2, dtype=torch.long)
    data = Data(evaluation=[(good, labels), (good | change, labels)])
    with pytest.raises(InputError, match=rf"{words}(.|\n)*evaluation batch 1"):
        operate(net, inputs, "damp", data=data, budget=SPARE)


def test_a_label_out_of_range_is_named_by_its_batch(net, inputs):
    good = {"image": torch.ones(2, 3, 8, 8), "scale": torch.ones(2)}
    data = Data(evaluation=[(good, torch.tensor([0, 1])), (good, torch.tensor([0, 5]))])
    with pytest.raises(InputError, match=r"label 5 in the evaluation data(.|\n)*batch 1"):
        operate(net, inputs, "damp", data=data, budget={"accuracy": 0.0})


def test_a_budget_that_cannot_be_measured_says_what_to_bound_instead(net, inputs):
    with pytest.raises(
        RecipeError, match=r"cannot be measured: accuracy \(no labels\)(.|\n)*budget.accuracy=null --set"
    ):
        operate(net, inputs, "damp", budget={"accuracy": 0.5})


def test_the_report_has_every_step_and_says_where_numbers_fell_and_time_did_not(net, inputs):
    operation = operate(net, inputs, {"damp": {}, "on_break": "undo"}, "jitter", budget=SPARE)
    summary = report.summary(operation)
    summary["steps"][1]["measurement"]["macs"] //= 2
    summary["steps"][1]["onnx_bytes"] *= 2
    slow = {"seconds": 1.0, "ratio": 1.0, "quartiles": [0.9, 1.1]}
    times = {"steps": [{}, {"original": slow, "result": slow, "step": slow}], "onnxruntime_latency": {}}
    shown = next(table for table in report.tables(summary, times) if table.title == "After each step")
    assert [row[0] for row in shown.rows] == ["1. damp", "2. jitter"]
    assert [row[-1] for row in shown.rows] == ["undone", "fewer MACs, NOT faster; the ONNX file GREW"]


def test_parameters_are_left_out_where_integers_or_indices_are_stored_instead(net, inputs):
    operation = operate(net, inputs, "damp", budget=SPARE)
    summary, times = report.summary(operation), report.timings(operation)
    whole = summary["after"]["parameter_bytes"]
    for stored, shown in ((whole, True), (1.1 * whole, False)):
        summary["after"]["stored_bytes"] = summary["steps"][0]["measurement"]["stored_bytes"] = stored
        tables = report.tables(summary, times)
        assert ("parameters" in [row[0] for row in tables[0].rows]) is shown
        assert (tables[2].rows[0][1] != "–") is shown


def test_notes_of_a_pass_stand_in_the_report(net, inputs):
    summary = report.summary(operation := operate(net, inputs, "damp", budget=SPARE))
    summary["steps"][0]["notes"] = ["a word"]
    assert ("note", "", "a word", "") in report.tables(summary, report.timings(operation))[3].rows


def test_a_budget_that_cannot_be_measured_is_refused_before_the_first_pass(net, inputs):
    with pytest.raises(RecipeError, match=r"the budget cannot be measured: change of accuracy \(no labels\)"):
        operate(net, inputs, "explode", budget={"accuracy_drop": 0.01})


def test_accuracy_is_measured_with_labels_and_its_budget_held(net, inputs):
    single = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    torch.manual_seed(2)
    images = torch.rand(40, 3, 8, 8)
    with torch.no_grad():
        labels = single.eval()(images).argmax(1)
    data = Data(evaluation=[(images[:20], labels[:20]), (images[20:], labels[20:])])
    operation = operate(single, images[:1], {"damp": {"factor": 1e-6}}, data=data, budget={"accuracy_drop": 0.0})
    assert operation.verification.fidelity.accuracy_reference == 1.0
    assert operation.verification.fidelity.samples == 40
    kept = operation.verification.fidelity.accuracy_candidate == 1.0
    assert operation.passed == kept


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"image": torch.rand(1, 4, 8, 8), "scale": torch.rand(1)}, CaptureError, "expected input"),
        ({"image": torch.rand(1, 3, 8, 8)}, InputError, "scale"),
        ({"picture": 1, "image": torch.rand(1, 3, 8, 8), "scale": torch.rand(1)}, InputError, "picture"),
        ({"image": torch.full((1, 3, 8, 8), float("nan")), "scale": torch.rand(1)}, InputError, "NaN"),
    ],
)
def test_wrong_example_inputs_are_named(net, bad, error, message):
    with pytest.raises(error, match=message):
        operate(net, bad, "damp")


def test_the_lock_beside_the_result_can_be_run(net, inputs, tmp_path):
    first = operate(net, inputs, {"damp": {"factor": 0.5}}, out=tmp_path / "one")
    lock = tmp_path / "one" / "recipe.lock.yaml"
    assert first.plan.hash in lock.read_text()
    again = surgery.operate(net, inputs, lock, registry=REGISTRY, latency_rounds=0, out=tmp_path / "two")
    assert again.plan.hash == first.plan.hash


def test_a_bound_on_parity_alone_does_not_speak_for_the_fidelity(net, inputs):
    operation = operate(net, inputs, "damp", budget={"parity": 1e-3})
    [proof] = [t for t in report.tables(report.summary(operation), report.timings(operation)) if t.title == "Proof"]
    assert "no budget bounds the fidelity" in dict(proof.rows)["verdict"]


def test_what_capture_has_fixed_stands_in_the_report(tmp_path):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.register_buffer("of_each", torch.ones(2, 1, 1, 1))

        def forward(self, x):
            return self.conv(x) + self.of_each

    operate(Fixed().eval(), torch.randn(2, 1, 5, 5), "damp", out=tmp_path / "run")
    assert "batch size fixed at 2" in (tmp_path / "run" / "report.md").read_text()


def test_a_lone_tensor_is_one_batch_of_data(net, inputs):
    conv = nn.Sequential(nn.Conv2d(1, 2, 3)).eval()
    operation = operate(conv, torch.randn(1, 1, 5, 5), "damp", data=torch.randn(7, 1, 5, 5))
    assert operation.verification.fidelity.samples == 7


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Linear, "the class Linear, no module"),
        (nn.Linear(2, 2).state_dict(), "OrderedDict"),
        (nn.Linear(2, 2, device="meta"), "weight is on the meta device"),
    ],
)
def test_what_is_no_model_with_weights_is_refused(model, words):
    with pytest.raises(ModelError, match=words) as caught:
        operate(model, torch.randn(1, 2), "damp")
    assert caught.value.fix


@pytest.mark.parametrize(("example", "words"), [(torch.randn(0, 2), "is empty"), ("two", "no tensor")])
def test_examples_without_a_sample_are_refused(example, words):
    with pytest.raises(InputError, match=words):
        operate(nn.Linear(2, 2), example, "damp")


def test_the_report_has_the_versions_of_the_packages_that_passes_come_from():
    from importlib.metadata import version

    operation = surgery.operate(nn.Conv2d(1, 2, 3), torch.randn(1, 1, 5, 5), "fold_only", latency_rounds=0)
    assert report.summary(operation)["versions"]["model-surgery"] == version("model-surgery")


def small(dtype):
    layers = nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3)
    return nn.Sequential(*layers).to(dtype).eval(), torch.randn(1, 16, 8, 8).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_number_type_without_kernels_says_what_to_convert_to(dtype):
    with pytest.raises(ExportError, match=r"model\.float\(\)"):
        operate(*small(dtype), "damp")


def test_a_bound_that_the_number_type_cannot_keep_says_which_it_can():
    with pytest.raises(RecipeError, match=r"--set budget\.parity=0\.01"):
        operate(*small(torch.float16), "damp", budget={"parity": 1e-9})
    assert operate(*small(torch.float16), "damp", budget={"parity": 0.01}).passed
