"""The script for a CUDA device does all it would do there, in small, on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def dry_run(out: Path) -> tuple[list[dict], str]:
    command = [sys.executable, str(SCRIPT), "--out", str(out), "--dry-run", "--device", "cpu"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return [json.loads(line) for line in (out / "gpu.jsonl").read_text().splitlines()], ended.stdout


def test_a_dry_run_has_a_row_of_every_kind_and_a_second_one_has_nothing_to_do(tmp_path):
    rows, _ = dry_run(tmp_path)
    assert [row["kind"] for row in rows] == ["test", "tests", "recipe", "pass"]
    assert rows[0]["outcome"] == "passed"
    for row in rows:
        assert {"commit", "hardware", "versions", "seconds"} <= row.keys()
    for row in rows[2:]:
        assert [step["outcome"] for step in row["steps"]] == ["kept"]
        assert all(error <= bound for error, bound in row["parity"].values())
    again, told = dry_run(tmp_path)
    assert again == rows
    assert "all done" in told


WORKER = """
import json, os, sys, time
folder = sys.argv[-1]
seen = os.path.join(folder, "seen")
if os.path.exists(seen):
    sys.exit(0)
open(seen, "w").close()
with open(os.path.join(folder, "next"), "w") as file:
    json.dump([{"kind": "pass", "name": "slow"}, time.time()], file)
os.replace(file.name, os.path.join(folder, "current.json"))
"""


@pytest.mark.parametrize(("end", "failure"), [("sys.exit(3)", "the process died: 3"), ("time.sleep(60)", "over 1 s")])
def test_a_job_that_dies_or_hangs_is_a_failure_and_the_next_worker_goes_on(tmp_path, monkeypatch, script, end, failure):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER + end)
    monkeypatch.setattr(script, "__file__", str(worker))
    monkeypatch.setattr(script, "LIMIT", 1)
    rows = script.Rows(tmp_path / "rows.jsonl", {"commit": "c"}, [])
    assert script.supervised([], rows, tmp_path, time.monotonic() + 60) == "all done"
    rows.read()
    assert rows.known == [{"commit": "c", "kind": "pass", "name": "slow", "failure": failure}]


def test_when_the_time_is_over_the_job_has_no_row_and_can_be_done_another_day(tmp_path, monkeypatch, script):
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER + "time.sleep(60)")
    monkeypatch.setattr(script, "__file__", str(worker))
    rows = script.Rows(tmp_path / "rows.jsonl", {}, [])
    assert script.supervised([], rows, tmp_path, time.monotonic() + 1) == "no time left"
    assert not rows.path.exists()


def test_the_project_is_laid_out_with_its_entry_points_and_wheels_come_last(tmp_path, script):
    bundle, site = tmp_path / "bundle", tmp_path / "site"
    (bundle / "wheels").mkdir(parents=True)
    with zipfile.ZipFile(bundle / "wheels" / "lacking-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("lacking_module.py", "VALUE = 3")
    script.lay(site, bundle)
    code = "import lacking_module, surgery, surgery_plugins; from surgery import Registry; print(surgery.__file__, "
    code += "lacking_module.VALUE, 'prune_filters' in Registry.load().passes)"
    path = os.pathsep.join(str(site / name) for name in ("project", "wheels"))
    command, env = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": path}
    found = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(site / "project/surgery/__init__.py"), "3", "True"]
