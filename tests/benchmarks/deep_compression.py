"""Deep Compression step by step: prune weights, cluster what is left, code it. Size and accuracy after each step.

    make deep-compression                                     ResNet-20 and ResNet-56 at several sparsities and bits
    make deep-compression DEEP="--depth 20 --sparsity 0.5 --bits 4"
    make deep-compression DEEP="--vgg --sparsity 0.9 --bits 4"    VGG-16 at 224×224, random weights: sizes and times

As in accuracy.py, 1,024 images without labels calibrate, top-1 on the 846 lossless test images; nothing is trained.
Bytes are those of `model.safetensors`, `model.onnx` and `model.surgery`. `ratio` is the original's safetensors file
over the pack.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accuracy import SHARED, Bench
from models import TOOL, load_tool

import surgery
from surgery import CapturedModel, Context, Data, Registry

HEADER = "| network | step | accuracy, % | safetensors | ONNX | pack | ratio | s |\n|---|---|---|---|---|---|---|---|"


def sizes(model: CapturedModel) -> dict[str, int]:
    """Bytes of the three files of `model`."""
    with tempfile.TemporaryDirectory() as folder:
        weights = surgery.export_source(model, folder)[1]
        onnx = surgery.export_onnx(model, model.inputs, Path(folder) / "model.onnx")
        pack = surgery.pack(folder)
        return {path.suffix[1:]: path.stat().st_size for path in (weights, onnx, pack)}


def steps(model: CapturedModel, context: Context, sparsity: float, bits: int) -> Iterator[tuple[str, CapturedModel]]:
    """The model after each step of the recipe; a step that was done before is not done again."""
    registry = Registry.load()
    if sparsity:
        model, _ = registry.find_pass("prune_weights")(sparsity=sparsity)(model, context)  # type: ignore[call-arg]
        yield f"{sparsity:.0%} of the weights zero", model
    model, _ = registry.find_pass("kmeans")(bits=bits)(model, context)  # type: ignore[call-arg]
    yield f"{f'{sparsity:.0%} zero, ' if sparsity else ''}{bits} bits", model


def rows(name: str, bench: Any, grid: Sequence[tuple[float, int]]) -> Iterator[str]:
    start = time.perf_counter()
    model, context = bench.model, Context(bench.model, Data(calibration=bench.batches))
    yield row(name, "original", model, bench.accuracy(model), 0.0, base := sizes(model)["safetensors"])
    seen = set()
    for sparsity, bits in grid:
        for step, result in steps(model, context, sparsity, bits):
            if step not in seen:
                seen.add(step)
                yield row(name, step, result, bench.accuracy(result), time.perf_counter() - start, base)
        start = time.perf_counter()


def row(name: str, step: str, model: CapturedModel, accuracy: float | None, seconds: float, base: int) -> str:
    bytes_of = sizes(model)
    shown = "–" if accuracy is None else f"{accuracy:.1f}"
    files = " | ".join(f"{bytes_of[kind]:,}" for kind in ("safetensors", "onnx", "surgery"))
    return f"| {name} | {step} | {shown} | {files} | {base / bytes_of['surgery']:.1f} | {seconds:.0f} |"


class Vgg:
    """VGG-16 with random weights; nothing to be right about."""

    def __init__(self, tool: Path) -> None:
        torch.manual_seed(0)
        model, inputs = load_tool(tool).build("torchvision/vgg16")
        self.model = surgery.capture(model.eval(), inputs)
        self.batches = None

    def accuracy(self, model: CapturedModel) -> None:
        return None


def main() -> None:
    options = arguments()
    grid = list(product(options.sparsity, options.bits))
    print(HEADER, flush=True)
    benches = [("VGG-16", Vgg(options.tool))] if options.vgg else []
    for depth in [] if options.vgg else options.depth:
        benches.append((f"ResNet-{depth}", Bench(options.shared, depth)))  # type: ignore[arg-type]
    for name, bench in benches:
        for line in rows(name, bench, grid):
            print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--vgg", action="store_true")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
