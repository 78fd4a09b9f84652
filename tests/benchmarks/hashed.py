"""HashedNets measured: storage, accuracy without and with training, exported size, speed in PyTorch and ONNX Runtime.

make hashed-bench HASHED="mlp"         the setting of the paper, linear layers, on scikit-learn's digits
make hashed-bench HASHED="resnet"      ResNet-20 on CIFAR-10, 1,024 images without labels calibrate
make hashed-bench HASHED="linear"      4096×1024 at 1/64: file, load time, latency ratio, seconds per forward
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import onnxruntime
import torch
from accuracy import SHARED, Bench
from surgery_plugins.hashed import Hashed
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Context, Data, capture
from surgery.context import silent
from surgery.demo import TEST_SAMPLES, digits, train

HEAD = "| factor | metric | parameters and buffers, kB | ONNX, kB | accuracy, % | after training, % |"


def row(factor: str, metric: str, model: CapturedModel, accuracy: float, trained: float | None = None) -> None:
    size = sum(t.nbytes for t in model.state_dict().values()) / 1000
    after = "" if trained is None else f"{trained:.1f}"
    print(
        f"| {factor} | {metric} | {size:.1f} | {file_bytes(model) / 1000:.1f} | {accuracy:.1f} | {after} |", flush=True
    )


def file_bytes(model: CapturedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return surgery.export_onnx(model, model.inputs, Path(folder) / "model.onnx").stat().st_size


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return 100 * float((model(images).argmax(1) == labels).float().mean())


def mlp(epochs: int) -> None:
    torch.manual_seed(0)
    images, labels = digits()
    held_out, rest = (images[:TEST_SAMPLES], labels[:TEST_SAMPLES]), (images[TEST_SAMPLES:], labels[TEST_SAMPLES:])
    made = [nn.Flatten(), nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)]
    original = capture(train(nn.Sequential(*made), *rest, epochs, silent), images[:2])
    print(HEAD, "|---|---|---|---|---|---|", sep="\n")
    row("1", "", original, accuracy(original, *held_out))
    data = Data(calibration=rest[0].split(128))
    for name, factor in (("1/8", 1 / 8), ("1/64", 1 / 64)):
        for metric in ("weight", "output"):
            model, _ = Hashed(factor=factor, metric=metric)(original, Context(original, data))
            before = accuracy(model, *held_out)
            train(model, *rest, epochs, silent)
            row(name, metric, model, before, accuracy(model, *held_out))


def resnet(factors: list[float]) -> None:
    bench = Bench(SHARED, 20)
    print(HEAD, "|---|---|---|---|---|---|", sep="\n")
    row("1", "", bench.model, bench.accuracy(bench.model))
    for factor in factors:
        for metric in ("weight", "output"):
            start = time.perf_counter()
            model, _ = Hashed(factor=factor, metric=metric)(
                bench.model, Context(bench.model, Data(calibration=bench.batches))
            )
            seconds = time.perf_counter() - start
            row(f"1/{round(1 / factor)}", metric, model, bench.accuracy(model))
            print(f"pass: {seconds:.1f} s", file=sys.stderr)


def linear() -> None:
    torch.manual_seed(0)
    dense = capture(nn.Sequential(nn.Linear(1024, 4096)), torch.randn(2, 1024))
    result, _ = Hashed(factor=1 / 64)(dense, Context(dense))
    for name, model in (("dense", dense), ("hashed", result)):
        with tempfile.TemporaryDirectory() as folder:
            path = surgery.export_onnx(model, model.inputs, Path(folder) / "model.onnx")
            size, loads, forwards = path.stat().st_size, [], []
            for _ in range(5):
                start = time.perf_counter()
                onnxruntime.InferenceSession(path)
                loads.append(time.perf_counter() - start)
                start = time.perf_counter()
                model(*model.inputs.args)
                forwards.append(time.perf_counter() - start)
        print(f"{name}: {size:,} bytes, load {min(loads) * 1e3:.0f} ms, PyTorch forward {min(forwards) * 1e3:.1f} ms")
    found = surgery.onnx_latency({"dense": dense, "hashed": result}, dense.inputs, rounds=100)["hashed"]
    print(f"latency hashed / dense: {1 / found.ratio:.3f}, quartiles {found.quartiles}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("mlp", "resnet", "linear"))
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--factors", type=float, nargs="+", default=[1 / 2, 1 / 4, 1 / 8, 1 / 64])
    options = parser.parse_args()
    if options.kind == "mlp":
        mlp(options.epochs)
    elif options.kind == "resnet":
        resnet(options.factors)
    else:
        linear()


if __name__ == "__main__":
    main()
