"""Weight pruning measured: accuracy without training, and time.

    make prune-weights BENCH="accuracy --depth 20 --table table.md"
    make prune-weights BENCH="time --model vgg16_bn"     seconds per criterion at 224×224, random weights and images

`accuracy`: as in accuracy.py, 1,024 images without labels calibrate, top-1 on the 846 lossless test images; `obd loss`
has the labels of the same images. Rows are appended to `--rows`, and those that stand there are not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accuracy import SHARED, Bench, note
from models import TOOL, load_tool
from surgery_plugins.prune_weights import PruneWeights

from surgery import Context, Data, capture, gram_bytes, layers

WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"criterion": "magnitude"},
    "magnitude global": {"criterion": "magnitude", "scope": "global"},
    "magnitude reconstruct": {"criterion": "magnitude", "reconstruct": True},
    "obd": {"criterion": "obd"},
    "obd loss": {"criterion": "obd"},
    "obd loss global": {"criterion": "obd", "scope": "global"},
    "obs": {"criterion": "obs"},
    "obs global": {"criterion": "obs", "scope": "global"},
}
AMOUNTS: dict[str, dict[str, Any]] = {str(s): {"sparsity": s} for s in (0.5, 0.6, 0.7, 0.8, 0.9)}
AMOUNTS["2:4"] = {"pattern": "2:4"}


def accuracy(options: argparse.Namespace) -> None:
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    for depth in options.depth:
        bench = Bench(options.shared, depth)
        note(options.rows, done, {"depth": depth, "way": "none", "accuracy": bench.accuracy(bench.model)})
        for way in options.ways:
            for amount in options.amounts:
                row = {"depth": depth, "way": way, "amount": amount}
                known = any(row.items() <= old.items() for old in done)
                if not known and not (amount == "2:4" and "global" in way):
                    note(options.rows, done, row | _run(bench, way, amount))
    if options.table:
        options.table.write_text(table(done))


def _run(bench: Bench, way: str, amount: str) -> dict[str, Any]:
    labelled = list(zip(bench.batches, bench.targets, strict=True)) if "loss" in way else None
    context = Context(bench.model, Data(calibration=bench.batches, training=labelled))
    start = time.perf_counter()
    model, _ = PruneWeights(**WAYS[way], **AMOUNTS[amount])(bench.model, context)
    seconds = time.perf_counter() - start
    return {"accuracy": bench.accuracy(model), "seconds": seconds}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per way, a column per network and amount."""
    shown = [row for row in rows if "amount" in row]
    columns = sorted({(row["depth"], row["amount"]) for row in shown})
    lines = ["| | " + " | ".join(f"ResNet-{d}, {a}" for d, a in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for way in dict.fromkeys(row["way"] for row in shown):
        found = {(row["depth"], row["amount"]): row["accuracy"] for row in shown if row["way"] == way}
        lines.append(f"| {way} | " + " | ".join(f"{found[c]:.1f}" if c in found else "–" for c in columns) + " |")
    return "\n".join(lines) + "\n"


def duration(options: argparse.Namespace) -> None:
    """Seconds of each criterion on a network of ImageNet's size."""
    torch.manual_seed(0)
    model, inputs = load_tool(options.tool).build(f"torchvision/{options.model}")
    captured = capture(model.eval(), inputs)
    context = Context(captured, Data(calibration=list(torch.randn(options.images, 3, 224, 224).split(16))))
    limit = context.calibration.gram_bytes
    large = [layer.name for layer in layers(captured) if gram_bytes(layer) > limit]
    print(f"{torch.get_num_threads()} threads; Gram matrix above {limit:,} bytes: {', '.join(large) or 'none'}")
    clock = Clock()
    context.progress = context.calibration.progress = clock.note
    for criterion in options.criteria:
        start, busy = time.perf_counter(), time.process_time()
        _, report = PruneWeights(sparsity=0.9, criterion=criterion)(captured, context)
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        print(f"{criterion}: {seconds:.1f} s, {busy:.1f} s of processors, {len(report.edits)} layers", flush=True)
        clock.show(criterion == "obs")


class Clock:
    """Seconds between what a pass says of its progress."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last, self._since = "", time.perf_counter()

    def note(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[self._last] = self.seconds.get(self._last, 0) + now - self._since
        self._last, self._since = f"{what} {done}", now

    def show(self, wanted: bool) -> None:
        self.note("", 0, 0)
        longest = sorted(self.seconds.items(), key=lambda item: -item[1])[:6]
        if wanted:
            print("  longest: " + ", ".join(f"{what} {seconds:.1f} s" for what, seconds in longest if what.strip()))
        self.seconds = {}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    on_accuracy = kinds.add_parser("accuracy")
    on_accuracy.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    on_accuracy.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    on_accuracy.add_argument("--amounts", nargs="+", default=list(AMOUNTS), choices=list(AMOUNTS))
    on_accuracy.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    on_accuracy.add_argument("--rows", type=Path, default=Path("prune-weights.jsonl"), help="read first, added to")
    on_accuracy.add_argument("--table", type=Path, help="markdown file to write")
    on_time = kinds.add_parser("time")
    on_time.add_argument("--model", default="vgg16_bn")
    on_time.add_argument("--images", type=int, default=128)
    on_time.add_argument("--criteria", nargs="+", default=["magnitude", "obd", "obs"])
    on_time.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit({"accuracy": accuracy, "time": duration}[given.kind](given))
