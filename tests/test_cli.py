from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from surgery.cli import main

MODELS = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(self.second(x)).mean((2, 3)))

def net():
    torch.manual_seed(0)
    return Net()

def net_with_inputs():
    return net(), torch.rand(1, 3, 8, 8)

def data():
    torch.manual_seed(1)
    return [torch.rand(8, 3, 8, 8) for _ in range(2)]

def empty():
    return []

def with_nan():
    return [torch.full((2, 3, 8, 8), float("nan"))]

def broken():
    raise OSError("no weights here")

def number():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch):
    (tmp_path / "cli_models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("cli_models", None)
    return tmp_path


@pytest.fixture
def surgery(here, monkeypatch, capsys):
    """Runs the command line; gives exit code, stdout and stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["surgery", *arguments])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


NET = ("--model", "cli_models:net", "--input", "1x3x8x8")


def test_run_writes_a_run_folder_that_loads_and_verifies(surgery, here):
    code, out, err = surgery("run", "fold_only", *NET, "--data", "cli_models:data", "--out", "run", "--json")
    assert code == 0, err
    summary = json.loads(out)
    assert summary["passed"] is True
    assert [e["layer"] for e in summary["steps"][0]["edits"]] == ["norm"]
    assert summary["after"]["parameters"] == summary["before"]["parameters"] - 16
    code, out, err = surgery("verify", "run/original.onnx", "run", "--input", "4x3x8x8", "--json")
    assert code == 0, err
    assert json.loads(out)["fidelity"]["relative_error"] < 1e-5


def test_run_shows_one_table_of_before_and_after(surgery):
    code, out, _ = surgery("run", "fold_only", *NET, "--out", "run")
    assert code == 0
    assert "before and after" in out
    assert "parameters" in out
    assert "ONNX Runtime latency" in out


@pytest.mark.parametrize("columns", ["", "40", "80", "200"])
def test_no_number_in_a_table_is_broken(surgery, here, columns, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    code, out, _ = surgery("run", "fold_only", *NET, "--out", "run")
    assert code == 0
    found = json.loads((here / "run/report.json").read_text())
    figures = [found[when]["macs"] for when in ("before", "after")]
    figures += [found["bytes"][name] for name in ("original.onnx", "model.onnx")]
    lines = out.splitlines()
    assert [line for line in lines if line.startswith("1. fold_batchnorm")]
    assert all(f"{figure:,}" in out for figure in figures)
    assert max(map(len, lines)) <= max(int(columns or 160), 120)


def test_verify_of_different_models_that_part_ends_with_their_figures(surgery, here):
    surgery("run", "fold_only", *NET, "--out", "one")
    recipe = here / "other.yaml"
    recipe.write_text("name: other\npasses:\n  - depthwise_separable: {}\n")
    surgery("run", str(recipe), *NET, "--out", "two")
    code, out, _ = surgery("verify", "one", "two", "--input", "4x3x8x8", "--json")
    assert code == 0
    assert json.loads(out)["fidelity"]["sqnr_db"] < 60


def test_a_broken_budget_ends_with_code_3_and_keeps_the_files(surgery, here):
    recipe = here / "strict.yaml"
    recipe.write_text("name: strict\npasses:\n  - depthwise_separable: {}\nbudget: {sqnr_db: 200}\n")
    code, _, err = surgery("run", str(recipe), *NET, "--out", "run")
    assert code == 3
    assert "budget" in err
    assert (here / "run" / "model.onnx").exists()


def test_a_factory_may_give_its_inputs_itself(surgery):
    code, out, err = surgery("inspect", "--model", "cli_models:net_with_inputs", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [layer["name"] for layer in found["layers"]] == ["first", "norm", "second", "head"]
    assert found["layers"][0]["macs"] == 8 * 3 * 9 * 64
    assert {"fold_batchnorm", "depthwise_separable"} <= found["passes"].keys()
    assert found["passes"]["depthwise_separable"]["skips"][0]["layer"] == "first"


def test_inspect_lists_groups_of_channels_and_what_has_to_stay(surgery):
    code, out, _ = surgery("inspect", *NET, "--pass", "prune_filters", "--json")
    found = json.loads(out)
    assert code == 0
    assert [(g["name"], g["units"], g["given"], g["read"]) for g in found["groups"]] == [
        ("first", 8, ["first"], ["second"]),
        ("second", 16, ["second"], ["head"]),
    ]
    assert found["frozen"] == [{"layer": "head", "channels": 4, "why": "an output of the model"}]
    _, out, _ = surgery("inspect", *NET, "--pass", "prune_filters")
    assert "24 removable units in 2 groups" in out
    assert "Channels that have to stay" in out


def test_inspect_with_data_tells_what_passes_would_do_that_need_some(surgery):
    _, out, _ = surgery("inspect", *NET, "--pass", "quantize", "--json")
    assert "calibration data" in json.loads(out)["passes"]["quantize"]
    code, out, err = surgery("inspect", *NET, "--pass", "quantize", "--data", "cli_models:data", "--json")
    assert code == 0, err
    assert {edit["layer"] for edit in json.loads(out)["passes"]["quantize"]["edits"]} >= {"first", "second", "head"}


def test_progress_is_in_lines_where_stderr_is_no_terminal(surgery):
    _, _, err = surgery("run", "fold_only", *NET, "--out", "run")
    lines = [line.split(" s  ") for line in err.splitlines()]
    assert [what for _, what in lines if "/" in what] == ["capture 0/2", "fold_batchnorm 1/2"]
    assert all(float(seconds) >= 0 for seconds, _ in lines)
    _, _, err = surgery("run", "fold_only", *NET, "--out", "other", "--json")
    assert err == ""


def test_criteria_are_listed_with_what_they_need(surgery):
    code, out, _ = surgery("criteria", "--json")
    needs = {row["criterion"]: row["needs"] for row in json.loads(out)}
    assert code == 0
    assert (needs["l2"], needs["reconstruction"], needs["taylor"]) == ("", "calibration data", "labelled data")


def test_quantisers_are_listed(surgery):
    code, out, _ = surgery("quantizers", "--json")
    assert code == 0
    assert {"xnor", "fixed_point"} <= {row["quantizer"] for row in json.loads(out)}


def test_inspect_names_layers_and_what_passes_would_do_in_tables(surgery):
    code, out, _ = surgery("inspect", *NET, "--pass", "fold_batchnorm")
    assert code == 0
    assert "fold_batchnorm alone would edit 1 and skip 0 layers" in " ".join(out.split())
    assert "depthwise" not in out


def test_show_explains_options_with_default_range_and_meaning(surgery):
    code, out, _ = surgery("show", "depthwise_separable")
    assert code == 0
    assert "multiplier" in out
    assert "≥ 1" in out
    assert "soften`): none" in out
    assert "soften`): weight_bits, activation_bits" in surgery("show", "quantize")[1]
    shared = surgery("show", "kmeans")[1]
    assert "Leaves the layers it edits: shared" in shared
    assert "Cannot run where something is: int8, shared" in shared
    code, out, _ = surgery("show", "depthwise_separable", "--json")
    assert json.loads(out[out.index("{") :])["options"]["properties"]["multiplier"]["minimum"] == 1


def test_schema_is_json_and_recipes_are_listed(surgery):
    code, out, _ = surgery("schema")
    assert code == 0
    assert json.loads(out)["properties"]["passes"]["minItems"] == 1
    code, out, _ = surgery("recipes", "--json")
    assert {"fold_only", "digits_edge"} <= {entry["recipe"] for entry in json.loads(out)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "fold_onyl", *NET, "--out", "run"), "did you mean fold_only"),
        (("run", "fold_only", "--model", "nowhere:net", "--input", "1x3x8x8", "--out", "run"), "nowhere"),
        (("run", "fold_only", "--model", "cli_models:nett", "--input", "1x3x8x8", "--out", "run"), "no 'nett'"),
        (("run", "fold_only", "--model", "cli_models:nett", "--out", "run"), "(did you mean net"),
        (
            ("run", "fold_only", "--model", "cli_models:zzz", "--out", "run"),
            "it defines Net, net, net_with_inputs, data,",
        ),
        (("run", "fold_only", "--model", "cli_models.py:net", "--out", "run"), "write cli_models:net"),
        (("run", "fold_only", *NET, "--device", "cuda:99", "--out", "run"), "device 'cuda:99' is not here"),
        (("run", "fold_only", "--model", "cli_models", "--input", "1x3x8x8", "--out", "run"), "module:name"),
        (("run", "fold_only", "--model", "cli_models:broken", "--input", "1x3x8x8", "--out", "run"), "no weights here"),
        (
            ("run", "fold_only", "--model", "cli_models:number", "--input", "1x3x8x8", "--out", "run"),
            "not an nn.Module",
        ),
        (("run", "fold_only", "--model", "cli_models:net", "--out", "run"), "no example input"),
        (("run", "fold_only", "--model", "cli_models:net", "--input", "1x3x8xq", "--out", "run"), "[NAME=]SHAPE"),
        (("run", "fold_only", "--model", "cli_models:net", "--input", "1x5x8x8", "--out", "run"), "expected input"),
        (("run", "fold_only", *NET, "--weights", "none.safetensors", "--out", "run"), "none.safetensors"),
        (("run", "digits_edge", *NET, "--data", "cli_models:empty", "--out", "run"), "no batch"),
        (("run", "digits_edge", *NET, "--data", "cli_models:with_nan", "--out", "run"), "NaN"),
        (("verify", "nothing", "nowhere", "--input", "1x3x8x8"), "nothing"),
        (("verify", "nothing", "nowhere"), "--input"),
        (("show", "fold_batchnrm"), "did you mean fold_batchnorm"),
        (("run", "fold_only"), "--model"),
        (("explode",), "No such command"),
    ],
)
def test_wrong_use_ends_with_code_2_and_one_clear_message(arguments, message, surgery, here):
    code, _, err = surgery(*arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not (here / "run" / "model.onnx").exists()


def test_weights_that_do_not_match_name_the_keys(surgery, here):
    save_file({"first.weight": torch.zeros(8, 3, 3, 3), "firts.bias": torch.zeros(8)}, "some.safetensors")
    code, _, err = surgery("run", "fold_only", *NET, "--weights", "some.safetensors", "--out", "run")
    assert code == 2
    assert "firts.bias" in err
    assert "first.bias" in err


def test_a_pickle_that_needs_code_is_not_opened(surgery, here):
    marker = here / "opened"
    code = f"""
import torch
class Evil:
    def __reduce__(self):
        return (open, ({str(marker)!r}, "w"))
torch.save({{"first.weight": Evil()}}, "evil.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True)
    code, _, err = surgery("run", "fold_only", *NET, "--weights", "evil.pt", "--out", "run")
    assert code == 2
    assert "safetensors" in err
    assert not marker.exists()


def test_help_and_the_list_of_passes_answer_without_torch():
    code = (
        "import sys; sys.argv = ['surgery', 'passes']; from surgery.cli import cli; cli(standalone_mode=False); "
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "fold_batchnorm" in result.stdout
