"""kmeans measured: accuracy without training, speed and distortion, and the ONNX file.

    make kmeans-bench KMEANS="accuracy --depth 20 --table table.md"      every number of bits, both metrics
    make kmeans-bench KMEANS="speed"        10 M weights: Lloyd against dynamic programming, gradients; VGG-16-BN whole
    make kmeans-bench KMEANS="onnx"         size, load time, paired latency and parity of the file against the dense one

`accuracy`: as in accuracy.py, 1,024 images without labels calibrate, top-1 on the 846 lossless test images. `speed` and
`onnx` need no trained weights: those of VGG-16-BN and ResNet-18 at 224×224 are as torchvision starts them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from accuracy import SHARED, Bench, note
from models import TOOL, load_tool, onnx_parity
from surgery_plugins.kmeans import Kmeans
from surgery_plugins.kmeans.codebooks import assign, codebooks
from surgery_plugins.kmeans.lookup import Lookup
from torch import Tensor

from surgery import Context, Data, capture, export_onnx, onnx_latency

OPTIONS = {"weight": {"metric": "weight"}, "output": {"metric": "output"}}


def timed(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[Any, float]:
    start = clock()
    result = function()
    return result, clock() - start


# --- accuracy ---


def accuracy(options: argparse.Namespace) -> None:
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    for depth in options.depth:
        bench = Bench(options.shared, depth)
        note(options.rows, done, {"depth": depth, "metric": "none", "accuracy": bench.accuracy(bench.model)})
        context = Context(bench.model, Data(calibration=bench.batches))
        for bits in options.bits:
            for metric in options.metrics:
                row = {"depth": depth, "bits": bits, "metric": metric, "per": options.per}
                if any(row.items() <= known.items() for known in done):
                    continue
                step = Kmeans(bits=bits, per=options.per, **OPTIONS[metric])
                (model, report), seconds = timed(partial(step, bench.model, context))
                sizes = [edit.numbers["bits_per_weight"] for edit in report.edits]
                numbers = {"accuracy": bench.accuracy(model), "layers": len(sizes), "skips": len(report.skips)}
                note(options.rows, done, row | numbers | {"seconds": seconds})
    if options.table:
        options.table.write_text(table(done))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per network and metric, a column per number of bits."""
    bits = sorted({row["bits"] for row in rows if "bits" in row})
    lines = ["| network | metric | " + " | ".join(f"{b} bits" for b in bits) + " |", "|---" * (len(bits) + 2) + "|"]
    shown = [(row["depth"], row["metric"], row["per"]) for row in rows if "bits" in row]
    for depth, metric, per in sorted(set(shown)):
        found = {
            r["bits"]: r["accuracy"]
            for r in rows
            if "bits" in r and (r["depth"], r["metric"], r["per"]) == (depth, metric, per)
        }
        whole = next(row["accuracy"] for row in rows if row["depth"] == depth and row["metric"] == "none")
        cells = [f"{found[b]:.1f}" if b in found else "–" for b in bits]
        where = "" if per == "layer" else f", per {per}"
        lines.append(f"| ResNet-{depth} ({whole:.1f}){where} | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# --- speed ---


def speed(options: argparse.Namespace) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads")
    if not options.only_model:
        beside_the_optimum(options.count, options.bits)
        gradients(options.count, options.bits)
    model, inputs = load_tool(options.tool).build("torchvision/vgg16_bn")
    captured = capture(model.eval(), inputs)
    busy = time.process_time()
    (_, report), seconds = timed(lambda: Kmeans(bits=options.bits)(captured, Context(captured)))
    busy = time.process_time() - busy
    print(f"vgg16_bn to {options.bits} bits: {seconds:.1f} s, {busy:.1f} s of processors, {len(report.edits)} layers")


def beside_the_optimum(count: int, bits: int) -> None:
    x = torch.randn(1, count, generator=torch.Generator().manual_seed(0))
    fast, quick = timed(lambda: codebooks(x, 2**bits), time.process_time)
    _, assigning = timed(lambda: assign(x, fast.float()), time.process_time)
    print(f"{count:,} normal weights to {2**bits} values: {quick:.2f} s, {assigning:.2f} s to assign", flush=True)
    best, slow = timed(lambda: codebooks(x, 2**bits, start="exact"), time.process_time)
    lost = [distortion(x, book) for book in (fast, best)]
    print(
        f"dynamic programming {slow:.1f} s: {slow / quick:.0f} times, {slow / (quick + assigning):.0f} with assigning"
    )
    print(f"distortion {lost[0] / lost[1]:.6f} of its optimum", flush=True)


def distortion(x: Tensor, book: Tensor) -> float:
    values = book[0].float()[assign(x, book.float()).int().view(-1)]
    return float((values - x[0]).double().square().sum())


def gradients(count: int, bits: int) -> None:
    indices = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    lookup = Lookup((count,), bits, count, False)
    tensors = lookup.tensors(torch.randn(1, 2**bits).sort(1).values, indices)
    for _ in range(2):
        weight, forward = timed(lambda: lookup(**tensors))
        _, backward = timed(lambda weight=weight: weight.backward(torch.ones_like(weight)))
    print(f"lookup of {count:,} weights: forward {1e3 * forward:.0f} ms, backward {1e3 * backward:.0f} ms", flush=True)


# --- ONNX ---


def onnx(options: argparse.Namespace) -> None:
    for name in options.models:
        model, inputs = load_tool(options.tool).build(f"torchvision/{name}")
        dense = capture(model.eval(), inputs)
        shared, report = Kmeans(bits=options.bits)(dense, Context(dense))
        weights = sum(b.nbytes for key, b in shared.named_buffers() if key.endswith(".indices"))
        sizes, loads = zip(*(file_of(m) for m in (dense, shared)), strict=True)
        raced = onnx_latency({"dense": dense, "shared": shared}, inputs, rounds=options.rounds)["shared"]
        deviation, bound = onnx_parity(shared)
        print(f"{name}, {options.bits} bits, {len(report.edits)} layers, {len(report.skips)} left")
        print(f"  file {sizes[1] / 2**20:.2f} MiB of {sizes[0] / 2**20:.1f}, indices alone {weights / 2**20:.2f}")
        print(f"  load {loads[1]:.2f} s, dense {loads[0]:.2f} s; latency {1 / raced.ratio:.3f} of the dense model's")
        print(f"  parity {deviation:.1e} (bound {bound:.1e})", flush=True)


def file_of(model: Any) -> tuple[int, float]:
    """Bytes of the file, and the seconds that ONNX Runtime takes to load it."""
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, model.inputs, Path(folder) / "model.onnx")
        _, seconds = timed(lambda: onnxruntime.InferenceSession(path))
        return sum(part.stat().st_size for part in Path(folder).iterdir()), seconds


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    on_accuracy = kinds.add_parser("accuracy")
    on_accuracy.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    on_accuracy.add_argument("--bits", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    on_accuracy.add_argument("--metrics", nargs="+", default=list(OPTIONS), choices=list(OPTIONS))
    on_accuracy.add_argument("--per", default="layer", choices=["layer", "channels"])
    on_accuracy.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    on_accuracy.add_argument("--rows", type=Path, default=Path("kmeans-accuracy.jsonl"), help="read first, added to")
    on_accuracy.add_argument("--table", type=Path, help="markdown file to write")
    on_speed = kinds.add_parser("speed")
    on_speed.add_argument("--count", type=int, default=10_000_000)
    on_speed.add_argument("--only-model", action="store_true")
    on_speed.add_argument("--threads", type=int)
    on_onnx = kinds.add_parser("onnx")
    on_onnx.add_argument("--models", nargs="+", default=["resnet18"])
    on_onnx.add_argument("--rounds", type=int, default=30)
    for kind in (on_speed, on_onnx):
        kind.add_argument("--bits", type=int, default=4)
        kind.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit({"accuracy": accuracy, "speed": speed, "onnx": onnx}[given.kind](given))
