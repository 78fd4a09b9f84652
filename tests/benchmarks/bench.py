"""Every shipped recipe on trained CIFAR-10 ResNets, and on eight torchvision models: docs/benchmarks.md with its plots.

    make bench                          ResNet-20 and ResNet-56: 846 lossless and 10,000 JPEG-decoded test images
    make bench BENCH=quick              ResNet-20 and 846 images alone, calibrated on 256
    make bench BENCH=torchvision        eight families at 224×224, random weights: runs, parity, speed
    make bench BENCH="--recipes edge_int8 low_rank --depth 56"
    make bench BENCH=page               the page from the rows there are

1,024 training images without labels calibrate; nothing is trained, `dense_sparse_dense` excepted, which is run where
`--recipes` names it. Top-1 is that of the ONNX file in ONNX Runtime.
Latency: one thread, against the unchanged model's file in turn, medians. Every row is written to `--rows` when it is
done and not run again, unless the recipe has changed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from accuracy import SHARED, load, note
from bench_page import QUICK, write_page
from models import TOOL, drop_auxiliary_heads, in_a_line, isolated, load_tool
from torch import Tensor

import surgery
from surgery import Data, Operation, Registry, operate
from surgery.export.runtime import runtime_session
from surgery.measurement import latency
from surgery.recipe import resolve
from surgery.testing import randomise

MODELS = ["squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5", "regnet_y_400mf"]
MODELS += ["efficientnet_b0", "resnet18", "swin_t"]
OF_THE_DEMO = {"digits_edge"}
"""Recipes with a budget on the digits; `make demo` shows them."""
TRAINED = {"dense_sparse_dense"}
ROUNDS = {1: 40, 32: 10}
IMAGES = 8


@dataclass(frozen=True)
class Subject:
    """A trained network with the data it is judged on."""

    shared: Path
    depth: int
    weights: str
    calibration: int

    @property
    def data_name(self) -> str:
        version = "lossless" if self.weights == "original" else "jpeg"
        return f"cifar10:{self.shared}/data/cifar10_{version}?calibration={self.calibration}&batch=128"

    def network(self) -> torch.nn.Module:
        networks = load(self.shared / "models" / "resnet_cifar.py")
        network: torch.nn.Module = networks.resnet(self.depth, f"resnet{self.depth}_{self.weights}")
        return network

    def key(self, recipe: str, registry: Registry) -> dict[str, Any]:
        plan = "" if recipe == "original" else resolve(recipe, registry).hash[:12]
        own = {"depth": self.depth, "weights": self.weights, "calibration": self.calibration}
        return {"kind": "cifar10", **own, "recipe": recipe, "plan": plan}


@cache
def images(name: str) -> tuple[Data, Tensor, Tensor]:
    data = surgery.data_from(name)
    inputs, labels = zip(*data.evaluation or (), strict=True)
    return data, torch.cat(inputs), torch.cat(labels)


def top1(file: Path, inputs: Tensor, labels: Tensor) -> float:
    session = runtime_session(file)
    guesses = torch.cat([session(part)[0].argmax(1) for part in inputs.split(250)])
    return 100 * float((guesses == labels).double().mean())


def judged(subject: Subject, recipe: str) -> dict[str, Any]:
    """One row: the recipe applied to the subject, and its file measured."""
    data, inputs, labels = images(subject.data_name)
    chosen: Any = {"name": "original", "passes": ["densify"]} if recipe == "original" else recipe
    with tempfile.TemporaryDirectory() as out:
        operation, seconds = operated(subject.network(), inputs[:1], chosen, Data(data.calibration), out)
        accuracy = top1(Path(out) / "model.onnx", inputs, labels)
        return {"accuracy": accuracy, "images": len(labels), "seconds": seconds, **weighed(operation, inputs[:32])}


def operated(network: torch.nn.Module, example: Tensor, recipe: Any, data: Data, out: str) -> tuple[Operation, float]:
    start = time.perf_counter()
    operation = operate(network, example, recipe, data=data, out=out, latency_rounds=0)
    return operation, time.perf_counter() - start


def weighed(operation: Operation, inputs: Tensor) -> dict[str, Any]:
    """Sizes and speed of what a run has written."""
    folder, [parity, *_] = operation.folder, operation.verification.parity
    assert folder is not None
    packed = folder / "model.surgery"
    file = packed if packed.exists() else surgery.pack(folder)
    return {
        "macs": operation.after.macs,
        "parameters": operation.after.parameters,
        "onnx": operation.sizes["model.onnx"],
        "pack": file.stat().st_size,
        "parity": parity.relative_error,
        "parity_holds": parity.passed,
        "latency": {str(size): raced(folder, inputs[:size], rounds) for size, rounds in ROUNDS.items()},
    }


def raced(folder: Path, inputs: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds and, against the original, how many times faster, with quartiles."""
    names = ("original", "model")
    calls = {name: partial(runtime_session(folder / f"{name}.onnx", threads=1), inputs) for name in names}
    found = latency(calls, rounds=rounds)["model"]
    return {"ms": 1e3 * found.seconds, "faster": found.ratio, "quartiles": found.quartiles}


def subjects(options: argparse.Namespace) -> Iterator[Subject]:
    for depth in options.depth:
        for weights in options.weights:
            yield Subject(options.shared, depth, weights, options.calibration)


def cifar10(options: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    registry = Registry.load()
    for subject in subjects(options):
        for recipe in ["original", *options.recipes]:
            key = subject.key(recipe, registry)
            if not any(key.items() <= row.items() for row in done):
                note(options.rows, done, key | tried(judged, subject, recipe))


def tried(action: Any, *arguments: Any) -> dict[str, Any]:
    try:
        row: dict[str, Any] = action(*arguments)
    except (surgery.SurgeryError, RuntimeError) as error:
        row = {"failure": in_a_line(error, 300)}
    return row


def torchvision(options: argparse.Namespace, done: list[dict[str, Any]]) -> None:
    registry, tool = Registry.load(), load_tool(options.tool)
    for name in options.models:
        for recipe in options.recipes:
            key = {"kind": "torchvision", "model": name, "recipe": recipe}
            key["plan"] = resolve(recipe, registry).hash[:12]
            if not any(key.items() <= row.items() for row in done):
                run = partial(isolated, examined, tool, name, recipe, limit=options.limit)
                note(options.rows, done, key | tried(run))


def examined(tool: Any, name: str, recipe: str) -> dict[str, Any]:
    """A recipe on a model with random weights: there is nothing to be right about but the file."""
    torch.manual_seed(0)
    model, (example,) = tool.build(f"torchvision/{name}")
    model.eval()
    drop_auxiliary_heads(model)
    batches = list(torch.randn(IMAGES, *example.shape[1:]).split(4))
    with tempfile.TemporaryDirectory() as out:
        operation, seconds = operated(randomise(model), example, recipe, Data(batches), out)
        [parity, *_] = operation.verification.parity
        before, after = operation.before, operation.after
        return {
            "edits": sum(len(report.edits) for report in operation.reports),
            "macs": after.macs / before.macs,
            "parameters": after.parameters / before.parameters,
            "onnx": operation.sizes["model.onnx"] / operation.sizes["original.onnx"],
            "parity": parity.relative_error,
            "parity_holds": parity.passed,
            "latency": {"1": raced(Path(out), example[:1], 20)},
            "seconds": seconds,
        }


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    if options.what == "torchvision":
        torchvision(options, done)
    elif options.what != "page":
        cifar10(options, done)
    plans = {name: resolve(name, Registry.load()) for name in Registry.load().recipes}
    write_page(options.page, done, plans)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["all", "quick", "torchvision", "page"], default="all")
    parser.add_argument("--depth", type=int, nargs="+")
    parser.add_argument("--weights", nargs="+", choices=["original", "jpeg"])
    parser.add_argument("--recipes", nargs="+", default=sorted(Registry.load().recipes.keys() - OF_THE_DEMO - TRAINED))
    parser.add_argument("--models", nargs="+", default=MODELS, help="of torchvision")
    parser.add_argument("--calibration", type=int, help="images to calibrate on")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds that a recipe may take on a torchvision model"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of PyTorch")
    parser.add_argument("--rows", type=Path, default=Path("runs/bench.jsonl"), help="results, one JSON a line")
    parser.add_argument("--page", type=Path, default=Path("docs/benchmarks.md"))
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the torchvision models")
    options = parser.parse_args()
    quick = options.what == "quick"
    options.depth = options.depth or ([20] if quick else [20, 56])
    options.weights = options.weights or (["original"] if quick else ["original", "jpeg"])
    options.calibration = options.calibration or (QUICK if quick else 1024)
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
