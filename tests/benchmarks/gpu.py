"""What a CUDA device does with the project, in jobs in order of worth, within minutes: docs/gpu.md.

    make gpu                                                      here
    python tests/benchmarks/gpu.py --out DIR --minutes 9          on a bare machine with PyTorch, beside a bundle
    python tests/benchmarks/gpu.py --dry-run --device cpu         one small job of each kind, without a device

1. The tests marked `gpu`.
2. Every recipe with `--device cuda` on a ResNet-20, judged on images: accuracy, and how far PyTorch on the device and
   ONNX Runtime are from PyTorch on the processor.
3. Every pass alone, likewise.
4. Both again with `--device cpu`, to compare.

`make gpu-bundle` makes the bundle. Each row goes to DIR/gpu.jsonl, a line of JSON with the device's name, versions and
commit; what stands there, or in `--known`, is not run again. A worker does one job after the other; one that takes too
long, or dies, is a failure, and another worker goes on behind it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from gpu_bundle import BUNDLE, ROOT, commit, lay

LIMIT = 90
"""Seconds for one recipe, pass or test."""
SPARE = 5
"""Seconds for ending."""


@dataclass
class Rows:
    """Rows of JSON, one a line; `base` is what they all begin with."""

    path: Path
    base: dict[str, Any]
    others: list[Path]
    known: list[dict[str, Any]] = field(default_factory=list)

    def read(self) -> None:
        texts = [path.read_text() for path in (self.path, *self.others) if path.exists()]
        self.known = [json.loads(line) for text in texts for line in text.splitlines()]

    def has(self, key: dict[str, Any]) -> bool:
        return any({**self.base, **key}.items() <= row.items() for row in self.known)

    def add(self, row: dict[str, Any]) -> None:
        row = {**self.base, **row}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        told = {name: row[name] for name in ("kind", "name", "device", "seconds", "accuracy", "failure") if name in row}
        print(told, flush=True)


@dataclass(frozen=True)
class Current:
    """A file in which the worker says what it is at and since when, for whoever watches it."""

    path: Path

    def tell(self, key: dict[str, Any] | None) -> None:
        partial_file = self.path.with_suffix(".partial")
        partial_file.write_text(json.dumps([key, time.time()]))
        os.replace(partial_file, self.path)

    def read(self) -> tuple[dict[str, Any] | None, float]:
        key, since = json.loads(self.path.read_text())
        return key, time.time() - since


@dataclass(frozen=True)
class Job:
    """`run` gives the rest of the row."""

    key: dict[str, Any]
    run: Callable[[], dict[str, Any]]


def jobs(options: argparse.Namespace, rows: Rows, current: Current) -> Iterator[Job]:
    yield Job({"kind": "tests", "device": options.device}, partial(tested, options, rows, current))
    recipes, passes = plans(options)
    for device in dict.fromkeys((options.device, "cpu")):
        for kind, plan in (*(("recipe", plan) for plan in recipes), *(("pass", plan) for plan in passes)):
            name = plan if isinstance(plan, str) else plan["name"]
            key = {"kind": kind, "name": name, "device": device}
            yield Job(key, partial(operated, plan, device, subject_of(options)))


def plans(options: argparse.Namespace) -> tuple[list[str], list[dict[str, Any]]]:
    """The recipes by name, and a recipe for each pass."""
    from surgery import Registry

    registry = Registry.load()
    recipes, passes = sorted(registry.recipes), sorted(registry.passes)
    if options.dry_run:
        recipes, passes = ["fold_only"], ["svd"]
    return recipes, [{"name": name, "passes": [name]} for name in passes]


# --- the tests ---


def tested(options: argparse.Namespace, rows: Rows, current: Current) -> dict[str, Any]:
    """The tests marked `gpu` that have no row yet; each writes its own."""
    import pytest

    files = sorted(str(path) for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
    words = [
        "-q",
        "-m",
        "gpu",
        "--device",
        options.device,
        "-p",
        "no:xdist",
        "-p",
        "no:cacheprovider",
        "--show-capture=no",
    ]
    chosen = ["-k", "comes_back"] if options.dry_run else []
    start = time.perf_counter()
    status = pytest.main([*words, *chosen, *files], plugins=[Recorder(rows, current, options.device)])
    return {"status": int(status), "seconds": time.perf_counter() - start} | hardware(options.device)


class Recorder:
    """Writes a row for each test, says which one is running, and leaves out those that have a row."""

    def __init__(self, rows: Rows, current: Current, device: str) -> None:
        self.rows, self.current, self.device = rows, current, device

    def key(self, test: str) -> dict[str, Any]:
        return {"kind": "test", "name": test, "device": self.device}

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if not self.rows.has(self.key(item.nodeid))]

    def pytest_runtest_setup(self, item: Any) -> None:
        self.current.tell(self.key(item.nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            failure = {"failure": str(report.longrepr)[-600:]} if report.failed else {}
            row = self.key(report.nodeid) | {"outcome": report.outcome, "seconds": report.duration} | failure
            self.rows.add(row | hardware(self.device))


# --- recipes and passes ---


@dataclass(frozen=True)
class Subject:
    """A model with images: trained, from the bundle; small and of random weights where there is none."""

    model: Any
    example: Any
    data: Any


def subject_of(options: argparse.Namespace) -> Callable[[], Subject]:
    trained = (options.bundle / "cifar10.npz").exists() and not options.dry_run
    return partial(resnet, options.bundle) if trained else small


def resnet(bundle: Path) -> Subject:
    import numpy as np
    import torch
    from accuracy import load

    from surgery import Data

    networks = load(bundle / "resnet_cifar.py")
    with np.load(bundle / "cifar10.npz") as archive:
        calibration, images, labels = (torch.from_numpy(archive[k]) for k in ("calibration", "images", "labels"))
    calibration, images = networks.normalise(calibration), networks.normalise(images)
    evaluation = list(zip(images.split(141), labels.long().split(141), strict=True))
    data = Data(calibration.split(64), evaluation)
    return Subject(networks.resnet20(), images[:2], data)


def small() -> Subject:
    import torch
    from torch import nn

    from surgery import Data

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    images = torch.rand(32, 3, 6, 6)
    return Subject(model.eval(), images[:2], Data(images.split(8)))


def operated(plan: Any, device: str, subject: Callable[[], Subject]) -> dict[str, Any]:
    import torch

    import surgery

    torch.set_num_threads(os.cpu_count() or 1)
    found = subject()
    start = time.perf_counter()
    operation = surgery.operate(found.model, found.example, plan, data=found.data, device=device, latency_rounds=0)
    proof = operation.verification
    return {
        "seconds": time.perf_counter() - start,
        "steps": [{"pass": s.name, "outcome": s.outcome, "edits": len(s.report.edits)} for s in operation.steps[1:]],
        "accuracy": proof.fidelity.accuracy_candidate,
        "original": proof.fidelity.accuracy_reference,
        "sqnr_db": min(proof.fidelity.sqnr_db, 999.0),
        "parity": {run.runtime: [run.relative_error, run.bound] for run in (*proof.parity, *proof.devices)},
        "shortfalls": list(proof.shortfalls),
    } | hardware(device)


def hardware(device: str) -> dict[str, Any]:
    import onnxruntime
    import torch

    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    return {"hardware": name, "versions": versions | {"onnxruntime": onnxruntime.__version__}}


# --- one after the other, while there is time ---


def work(options: argparse.Namespace, rows: Rows, folder: Path) -> None:
    """The jobs that have no row, in this process."""
    sys.path = [str(folder / "project"), str(ROOT), *sys.path, str(folder / "wheels")]  # carried last
    current = Current(folder / "current.json")
    for job in jobs(options, rows, current):
        if not rows.has(job.key):
            current.tell(job.key)
            try:
                row = job.run()
            except Exception as error:
                row = {"failure": " ".join(f"{type(error).__name__}: {error}".split())[:600]} | hardware(options.device)
            rows.add(job.key | row)


def supervised(words: list[str], rows: Rows, folder: Path, deadline: float) -> str:
    """Workers until nothing is left to do, or no time; says which."""
    current = Current(folder / "current.json")
    while True:
        current.tell(None)
        worker = subprocess.Popen([sys.executable, __file__, *words, "--worker", str(folder)])
        failure = _watched(worker, current, deadline)
        key, _ = current.read()
        if failure is None or time.monotonic() >= deadline or key is None:
            return "no time left" if time.monotonic() >= deadline else failure or "all done"
        rows.add(key | {"failure": failure})


def _watched(worker: subprocess.Popen[bytes], current: Current, deadline: float) -> str | None:
    """What ended the worker; None where it has done everything."""
    while worker.poll() is None:
        key, seconds = current.read()
        late = seconds > LIMIT and key is not None
        if late or time.monotonic() >= deadline:
            worker.kill()
            worker.wait()
            return f"over {LIMIT} s"
        time.sleep(0.1)
    return f"the process died: {worker.returncode}" if worker.returncode else None


def arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--known", type=Path, nargs="*", default=[], help="rows of earlier tries elsewhere")
    parser.add_argument("--minutes", type=float, default=9, help="all together")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--bundle", type=Path, default=BUNDLE, help="what `make gpu-bundle` has made")
    parser.add_argument("--dry-run", action="store_true", help="one small job of each kind")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: list[str]) -> int:
    deadline = time.monotonic() - SPARE
    options = arguments(words)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = Rows((options.out / "gpu.jsonl").resolve(), {"commit": commit(options.bundle)}, options.known)
    rows.read()
    if options.worker:
        work(options, rows, options.worker)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        lay(Path(folder), options.bundle.resolve())
        end = supervised(words, rows, Path(folder), deadline + 60 * options.minutes)
    rows.read()
    failures = sum("failure" in row for row in rows.known)
    print(f"{end}: {len(rows.known)} rows in {rows.path}, {failures} of them failures")
    return int(failures > 0 or end != "all done")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
