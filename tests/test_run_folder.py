from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_runs import Net, files, operate, small_inputs

import surgery
from surgery import (
    CaptureError,
    CrashError,
    PassError,
    RunError,
    hookimpl,
)
from surgery.errors import PathError
from surgery.folder_lock import locked
from surgery.paths import path_from
from surgery.runs import RunFolder


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def inputs():
    return small_inputs()


def test_a_run_without_a_folder_leaves_nothing_and_still_proves(net, inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    operation = operate(net, inputs, "damp")
    assert operation.folder is None
    assert operation.verification.parity
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_recipe_model_or_input_is_refused_and_kept(net, inputs, tmp_path):
    out = tmp_path / "run"
    operate(net, inputs, "damp", out=out)
    kept = files(out)
    with pytest.raises(RunError, match="other recipe"):
        operate(net, inputs, {"damp": {"factor": 0.25}}, out=out, resume=True)
    with torch.no_grad():
        net.head.bias[0] += 1
    with pytest.raises(RunError, match="other model"):
        operate(net, inputs, "damp", out=out)
    assert files(out) == kept


def test_a_folder_whose_run_failed_before_its_first_step_is_taken_over(net, inputs, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CaptureError):
        operate(net, {**inputs, "image": torch.rand(1, 7, 8, 8)}, "damp", out=out)
    assert operate(net, inputs, "damp", out=out).passed
    assert (out / "model.onnx").exists()


def test_no_file_names_a_place_on_this_machine(net, inputs, tmp_path):
    operate(net, inputs, "damp", out=tmp_path / "run")
    here = [str(Path(__file__).parent).encode(), str(tmp_path).encode()]
    assert not [name for name, data in files(tmp_path / "run").items() if any(place in data for place in here)]


def test_a_folder_with_other_things_is_refused_and_kept(net, inputs, tmp_path):
    (tmp_path / "model.py").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        operate(net, inputs, "damp", out=tmp_path)
    assert files(tmp_path) == {"model.py": b"mine"}


def test_a_file_in_the_place_of_the_folder_is_kept(net, inputs, tmp_path):
    (tmp_path / "net.py").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        operate(net, inputs, "damp", out=tmp_path / "net.py")
    assert files(tmp_path) == {"net.py": b"mine"}


def test_resuming_a_finished_run_changes_nothing(net, inputs, tmp_path):
    operate(net, inputs, "damp", "jitter", out=tmp_path / "run")
    first = files(tmp_path / "run")
    operate(net, inputs, "damp", "jitter", out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == first


@pytest.mark.parametrize("step", ["0-capture", "2-jitter"])
def test_a_state_that_is_not_as_it_was_written_is_run_again(step, net, inputs, tmp_path):
    operate(net, inputs, "damp", "jitter", out=tmp_path / "run")
    kept = files(tmp_path / "run")
    graph = tmp_path / "run" / "steps" / step / "graph.json"
    graph.write_text(graph.read_text().replace("aten.relu.default", "aten.tanh.default"))
    assert files(tmp_path / "run") != kept
    operate(net, inputs, "damp", "jitter", out=tmp_path / "run", resume=True)
    assert files(tmp_path / "run") == kept


def test_a_pass_that_fails_keeps_finished_steps_and_earlier_artifacts(net, inputs, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(PassError, match="ZeroDivisionError: by design") as caught:
        operate(net, inputs, "damp", "explode", out=out)
    assert "pass explode" in str(caught.value)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert {p.name for p in (out / "steps").iterdir()} == {"0-capture", "1-damp"}


def test_a_recipe_corrected_after_its_first_steps_is_resumed_behind_them(net, inputs, tmp_path):
    out = tmp_path / "run"
    for resume in (False, True):
        with pytest.raises(CrashError):
            operate(net, inputs, "damp", "explode", out=out, resume=resume)
    begun = (out / "steps/1-damp/report.json").stat().st_mtime_ns
    for other in ([{"damp": {"factor": 0.25}}, "jitter"], ["jitter", "damp"], ["jitter"]):
        with pytest.raises(RunError, match="other recipe") as caught:
            operate(net, inputs, *other, out=out, resume=True)
        assert "or resume" not in str(caught.value)
    with pytest.raises(RunError, match="or resume: the recipes are the same as far as it came"):
        operate(net, inputs, "damp", "jitter", out=out)
    operate(net, inputs, "damp", "jitter", out=out, resume=True)
    assert (out / "steps/1-damp/report.json").stat().st_mtime_ns == begun
    operate(net, inputs, "damp", "jitter", out=tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")
    with pytest.raises(RunError, match="other recipe"):  # what has ended stays
        operate(net, inputs, "damp", "jitter", "damp", out=out, resume=True)
    assert files(out) == files(tmp_path / "whole")


def test_a_folder_whose_first_step_failed_is_taken_over(net, inputs, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(CrashError):
        operate(net, inputs, "explode", out=out)
    with torch.no_grad():
        net.head.bias[0] += 1
    operate(net, inputs, "damp", out=out, resume=True)
    operate(net, inputs, "damp", out=tmp_path / "whole")
    assert files(out) == files(tmp_path / "whole")


def test_no_room_on_the_disk_is_an_error_that_keeps_what_was_there(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import resource, torch
from small_runs import Net, operate
from surgery import SurgeryError
torch.manual_seed(0)
net, inputs = Net(), {{"image": torch.rand(1, 3, 8, 8), "scale": torch.rand(1)}}
operate(net, inputs, "damp", out={str(tmp_path / "run")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    operate(net, inputs, "damp", out={str(tmp_path / "run")!r})
except SurgeryError as error:
    print(type(error).__name__, error)
""")
    good = tmp_path / "run"
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "RunError" in result.stdout, result.stdout + result.stderr
    assert "File too large" in result.stdout
    assert "kept" in result.stdout
    assert surgery.load(good)(torch.rand(1, 3, 8, 8), torch.rand(1)).keys() == {"logits", "features"}
    assert not list(good.rglob("*.partial"))


# One process imports everything, computes nothing, and forks: a child per kill, then one that resumes.
KILLS = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch, onnxruntime, safetensors.torch, pathlib, builtins
from small_runs import Net, operate
import surgery.pipeline

def inside(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(type(error), error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]

def run(out, resume=False):
    torch.manual_seed(0)
    inputs = {{"image": torch.rand(1, 3, 8, 8), "scale": torch.rand(1)}}
    operate(Net(), inputs, "damp", "jitter", out=out, resume=resume)

def run_and_kill(out, at):
    calls = 0
    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call
    os.replace, os.fsync = counted(os.replace), counted(os.fsync)
    pathlib.Path.mkdir, pathlib.Path.unlink = counted(pathlib.Path.mkdir), counted(pathlib.Path.unlink)
    run(out)

assert inside(lambda: run({out!r} + "/undisturbed")) == 0
for at in {points}:
    out = {out!r} + f"/killed-{{at}}"
    status = inside(lambda: run_and_kill(out, at))
    killed = os.WIFSIGNALED(status)
    print(at, "killed" if killed else "ended", inside(lambda: run(out, resume=True)))
    if not killed:
        break
"""


def test_a_run_killed_anywhere_and_resumed_is_the_same_bytes(tmp_path):
    points = [2, 10, 22, 38]
    code = KILLS.format(tests=str(Path(__file__).parent), out=str(tmp_path), points=points)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert sum("killed" in line for line in lines) >= 3, result.stdout + result.stderr
    assert all(line.endswith(" 0") for line in lines), result.stdout + result.stderr
    expected = files(tmp_path / "undisturbed")
    for folder in sorted(tmp_path.glob("killed-*")):
        assert files(folder) == expected, folder.name


MODULE = """
from dataclasses import dataclass
import surgery
from torch import nn

@dataclass(frozen=True, kw_only=True)
class {name}(surgery.Pass):
    "Multiplies the head."
    idempotent = False

    def apply(self, model, context):
        {crash}
        layer = next(layer for layer in surgery.layers(model) if layer.name == "head")
        layer.module.weight = nn.Parameter(layer.module.weight.detach() * {factor})
        return surgery.PassReport((surgery.Edit("head", "scaled"),))
"""


def test_steps_of_a_plugin_that_was_changed_are_not_taken_over(net, inputs, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    out = tmp_path / "run"

    def run(first, second, crash="", **options):
        classes = []
        for name, factor, line in (("First", first, ""), ("Second", second, crash)):
            file = f"{name.lower()}_of_mine"
            (tmp_path / f"{file}.py").write_text(MODULE.format(name=name, factor=factor, crash=line or "pass"))
            monkeypatch.delitem(sys.modules, file, raising=False)
            importlib.invalidate_caches()
            shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
            classes.append(getattr(importlib.import_module(file), name))
        plugin = type("Mine", (), {"surgery_passes": hookimpl(lambda self: classes)})()
        recipe = {"name": "t", "passes": ["first", "second"]}
        return surgery.operate(
            net, inputs, recipe, out=out, registry=surgery.Registry([plugin]), latency_rounds=0, **options
        )

    with pytest.raises(CrashError):
        run(2.0, 3.0, crash="raise ValueError('not yet')")
    with pytest.raises(RunError, match="other plugins"):
        run(5.0, 3.0, resume=True)
    mended = run(2.0, 4.0, resume=True)
    assert torch.equal(dict(mended.model.named_parameters())["head.weight"], net.head.weight * 2 * 4)
    with pytest.raises(RunError, match="other plugins"):
        run(2.0, 5.0, resume=True)


FOREIGN = {
    "hidden folders": [".models/weights", ".runrc", ".recipes/mine.yaml"],
    "a repository among steps": ["steps/.git/HEAD", "steps/1-damp/state"],
    "a marker of somebody else": ["run.json", "model.onnx"],
    "what we would make": [".surgery-work/mine", ".model.onnx.partial"],
}


def fill(folder, names, text="mine"):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.mark.parametrize("text", ["mine", "{}", '{"recipe": "0"}', "[" * 10_000])
@pytest.mark.parametrize("names", FOREIGN.values(), ids=FOREIGN)
def test_a_folder_that_is_not_ours_is_left_as_it_was(names, text, tmp_path):
    fill(tmp_path, names, text)
    before = files(tmp_path)
    for use in (lambda: RunFolder.clear(tmp_path), lambda: claim(tmp_path), lambda: claim(tmp_path, resume=True)):
        with pytest.raises(RunError, match="is not ours"):
            use()
    assert files(tmp_path) == before


def claim(folder, resume=False):
    key = {"recipe": "1", "plugins": "2", "model": "3", "inputs": "4", "steps": ["5"]}
    with RunFolder.claimed(folder, key, resume=resume) as run:
        assert run.work.is_dir()


def test_what_others_keep_in_our_folder_outlives_the_next_run(net, inputs, tmp_path):
    out, theirs = tmp_path / "run", [".models/a", ".runrc", "steps/.git/HEAD", "steps/2nd thoughts", "modelling.txt"]
    for resume in (False, True, False):
        operate(net, inputs, "damp", out=out, resume=resume)
        fill(out, theirs)
    assert {*theirs} <= files(out).keys()
    RunFolder.clear(out)
    assert files(out).keys() == {*theirs}


def test_a_foreign_file_inside_a_step_is_neither_deleted_nor_joined(net, inputs, tmp_path):
    operate(net, inputs, "damp", out=tmp_path)
    fill(tmp_path, ["steps/1-damp/notes.txt"])
    before = files(tmp_path)
    with pytest.raises(RunError, match=r"steps/1-damp/notes.txt is not of a run"):
        operate(net, inputs, "damp", out=tmp_path)
    assert files(tmp_path) == before


@pytest.mark.parametrize("name", ["steps", ".surgery-work"])
def test_links_out_of_the_folder_are_not_followed(name, tmp_path):
    claim(tmp_path / "run")
    fill(tmp_path / "elsewhere", ["0-capture/graph.json"])
    (tmp_path / "run/steps").rmdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=f"{name} is not of a run"):
        claim(tmp_path / "run")
    assert files(tmp_path / "elsewhere") == {"0-capture/graph.json": b"mine"}


@pytest.mark.parametrize("out", ["", "a\0b", "x" * 300, "\udcff" * 300, b"run", 7, "~nobody-of-this-name/run"])
def test_what_is_no_path_is_refused(out, net, inputs):
    with pytest.raises(PathError, match="no usable path"):
        operate(net, inputs, "damp", out=out)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_from("~/run", "out") == tmp_path / "run"


def test_a_path_below_a_file_is_refused(net, inputs, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(PathError, match="Not a directory"):
        operate(net, inputs, "damp", out=tmp_path / "file" / "run")


def test_a_folder_that_may_not_be_written_to_is_told(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunError, match="cannot be written: Permission denied"):
        claim(tmp_path / "run")


def test_a_second_run_in_a_folder_is_told_who_is_there(net, inputs, tmp_path):
    told = []

    def progress(what, done, total):
        if not told:
            with pytest.raises(RunError, match=f"another run is at work in this folder: process {os.getpid()} on"):
                operate(net, inputs, "damp", out=tmp_path)
            told.append(what)

    operate(net, inputs, "damp", out=tmp_path, progress=progress)
    assert told
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


HOLD = """
import sys, time, pathlib
from surgery.folder_lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print(flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "lock"], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(RunError, match=f"process {other.pid} on"), locked(tmp_path / "lock"):
            pass
        other.kill()
    assert (tmp_path / "lock").exists()
    with locked(tmp_path / "lock"):
        pass
    assert not (tmp_path / "lock").exists()
