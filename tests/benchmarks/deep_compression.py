"""Deep Compression step by step: prune weights, cluster what is left, code it. Size and accuracy after each step.

    make deep-compression                                     ResNet-20 and ResNet-56 at several sparsities and bits
    make deep-compression DEEP="--depth 20 --sparsity 0.5 --bits 4"
    make deep-compression DEEP="--depth 20 --sparsity 0.9 --bits 3 4 --epochs 5"    trained after each step
    make deep-compression DEEP="--vgg --sparsity 0.9 --bits 4"    VGG-16 at 224×224, random weights: sizes and times

As in accuracy.py, 1,024 images without labels calibrate, top-1 on the 846 lossless test images; nothing is trained, but
with `--epochs` on the 4,660 lossless training images, with labels and towards the original's outputs.
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
from accuracy import SHARED, Bench, load
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


class Chain:
    """The recipe on one model; what several settings begin with is done once."""

    def __init__(self, model: CapturedModel, context: Context, training: dict[str, Any]) -> None:
        self.model, self.context, self.training = model, context, training
        self.registry, self.known = Registry.load(), dict[float, list[tuple[str, CapturedModel, float]]]()

    def steps(self, sparsity: float, bits: int) -> Iterator[tuple[str, CapturedModel, float]]:
        """What was done, the model after it, and the seconds it took."""
        if sparsity and sparsity not in self.known:
            zero = f"{sparsity:.0%} of the weights zero"
            self.known[sparsity] = list(self._step(zero, self.model, "prune_weights", sparsity=sparsity))
            yield from self.known[sparsity]
        start = self.known[sparsity][-1][1] if sparsity else self.model
        yield from self._step(f"{f'{sparsity:.0%} zero, ' if sparsity else ''}{bits} bits", start, "kmeans", bits=bits)

    def _step(
        self, what: str, model: CapturedModel, name: str, **options: Any
    ) -> Iterator[tuple[str, CapturedModel, float]]:
        """The pass, and training behind it."""
        model, seconds = self._applied(model, name, **options)
        yield what, model, seconds
        if self.training["epochs"]:
            model, seconds = self._applied(model, "finetune", **self.training)
            yield f"{what}, trained", model, seconds

    def _applied(self, model: CapturedModel, name: str, **options: Any) -> tuple[CapturedModel, float]:
        start = time.perf_counter()
        result, _ = self.registry.find_pass(name)(**options)(model, self.context)
        return result, time.perf_counter() - start


def rows(
    name: str, bench: Any, grid: Sequence[tuple[float, int]], data: Data, training: dict[str, Any]
) -> Iterator[str]:
    model, chain = bench.model, Chain(bench.model, Context(bench.model, data), training)
    yield row(name, "original", model, bench.accuracy(model), 0.0, base := sizes(model)["safetensors"])
    for sparsity, bits in grid:
        for step, result, seconds in chain.steps(sparsity, bits):
            yield row(name, step, result, bench.accuracy(result), seconds, base)


def labelled(shared: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """All lossless training images."""
    networks, images = load(shared / "models/resnet_cifar.py"), load(shared / "data/cifar10.py")
    train, labels = map(torch.from_numpy, images.lossless("train"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
    return list(zip(networks.normalise(train[order]).split(128), labels[order].split(128), strict=True))


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
        data = Data(calibration=bench.batches, training=labelled(options.shared) if options.epochs else None)
        for line in rows(name, bench, grid, data, {"epochs": options.epochs, "learning_rate": options.rate}):
            print(line, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 5])
    parser.add_argument("--epochs", type=int, default=0, help="of training after each step; 0 = none")
    parser.add_argument("--rate", type=float, default=1e-3, help="of learning")
    parser.add_argument("--vgg", action="store_true")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
