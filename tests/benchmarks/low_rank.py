"""Decompositions measured: accuracy without training, speed in ONNX Runtime, time, and the zoo.

    make low-rank BENCH="accuracy --depth 20 --table table.md --plot plot.png"
    make low-rank BENCH="speed"                        ResNet-18 and VGG-16 at 224×224 in ONNX Runtime, paired
    make low-rank BENCH="time"                         seconds for VGG-16-BN and ViT-B/16
    make low-rank BENCH="zoo --rows rows.jsonl"        80 torchvision and 24 timm architectures

`accuracy`: as in accuracy.py, 1,024 images without labels calibrate, top-1 on the 846 lossless test images. `metric`
weight is the plain decomposition of the weights; output minimises each layer's output error on its own; sequential
also makes up for the layers before. `speed`: random weights, the ranks that the pass chooses. `zoo`: random weights, a
pass for convolutions and then `svd`; `error` is the largest deviation of the result from the model whose layers have
the product of the factors for weights, `parity` that of ONNX Runtime from PyTorch; both relative.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accuracy import SHARED, Bench, note
from models import TOOL, drop_auxiliary_heads, in_a_line, leaves, load_tool, onnx_parity, zoo_rows, zoo_subject
from surgery_plugins.low_rank import surgery_passes
from surgery_plugins.low_rank.chain import Stage, composed
from torch import nn

import surgery
from surgery import CapturedModel, Context, Data, PassReport, capture, measure, onnx_latency
from surgery.captured import relative_error

PASSES = {step.name(): step for step in surgery_passes()}
ON_CONVOLUTIONS = ("channel_svd", "tucker", "spatial_svd", "cp")
SHARES = {"1.5x": 1 / 1.5, "2x": 1 / 2, "3x": 1 / 3, "4x": 1 / 4}
METRICS = {
    "weight": {"metric": "weight"},
    "output": {"metric": "output", "sequential": False},
    "sequential": {"metric": "output", "sequential": True},
}


# --- accuracy ---


def accuracy(options: argparse.Namespace) -> None:
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    for depth in options.depth:
        bench = Bench(options.shared, depth)
        note(options.rows, done, {"depth": depth, "method": "none", "accuracy": bench.accuracy(bench.model)})
        context = Context(bench.model, Data(calibration=bench.batches))
        for method in options.methods:
            for share in options.shares:
                for metric in options.metrics:
                    row = {"depth": depth, "share": share, "method": method, "metric": metric}
                    if not any(row.items() <= known.items() for known in done):
                        step = PASSES[method](macs=SHARES[share], **METRICS[metric])
                        start = time.perf_counter()
                        try:
                            model, _ = step(bench.model, context)
                        except surgery.SurgeryError as error:
                            note(options.rows, done, row | {"failure": in_a_line(error, 200)})
                            continue
                        seconds = time.perf_counter() - start
                        note(options.rows, done, row | bench.judged(model) | {"seconds": seconds})
    if options.table:
        options.table.write_text(accuracy_table(done))
    if options.plot:
        accuracy_plot(done, options.plot)


def accuracy_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: a line per method and metric, a column per network and share."""
    shown = [row for row in rows if "share" in row]
    columns = sorted({(row["depth"], row["share"]) for row in shown})
    lines = ["| method | metric | " + " | ".join(f"ResNet-{d}, {s} fewer MACs" for d, s in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for method, metric in dict.fromkeys((row["method"], row["metric"]) for row in shown):
        cells = []
        for depth, share in columns:
            wanted = {"depth": depth, "share": share, "method": method, "metric": metric}
            found = [row for row in shown if wanted.items() <= row.items()]
            cells.append(f"{found[-1]['accuracy']:.1f}" if found and "accuracy" in found[-1] else "–")
        lines.append(f"| `{method}` | {metric} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def accuracy_plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Accuracy against MACs, one panel per network; dotted for the weight's metric, dashed for each layer alone."""
    from matplotlib import pyplot

    shown = [row for row in rows if "share" in row and "accuracy" in row]
    depths, methods = sorted({r["depth"] for r in shown}), list(dict.fromkeys(r["method"] for r in shown))
    colours, styles = pyplot.get_cmap("tab10"), {"weight": ":x", "output": "--s", "sequential": "-o"}
    figure, axes = pyplot.subplots(1, len(depths), figsize=(6 * len(depths), 4.5), squeeze=False)
    for axis, depth in zip(axes[0], depths, strict=True):
        whole = next(r["accuracy"] for r in rows if r["depth"] == depth and r["method"] == "none")
        axis.axhline(whole, color="grey", linewidth=0.8)
        for index, method in enumerate(methods):
            for metric, style in styles.items():
                own = [r for r in shown if (r["depth"], r["method"], r["metric"]) == (depth, method, metric)]
                own.sort(key=lambda r: r["fewer"])
                label = f"{method}, {metric}"
                points = [r["fewer"] for r in own], [r["accuracy"] for r in own]
                axis.plot(*points, style, color=colours(index), label=label, markersize=4)
        axis.set(title=f"ResNet-{depth} without training", xlabel="times fewer MACs", ylabel="top-1 accuracy, %")
    axes[0][-1].legend(fontsize="x-small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# --- speed ---


def speed(options: argparse.Namespace) -> None:
    """Whole models in ONNX Runtime, original against result, for budgets on MACs."""
    tool = load_tool(options.tool)
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{'model':12} {'pass':12} {'options':34} {'MACs':>7} {'faster':>7} {'quartiles':>13} {'seconds':>8} layers")
    for name in options.models:
        model, inputs = built(tool, name)
        original = capture(model, inputs)
        for method in options.methods:
            for share in options.shares:
                chosen_options = {"macs": share, "only_if_faster": options.only_if_faster}
                start = time.perf_counter()
                result, report = PASSES[method](**chosen_options)(original, Context(original))
                seconds = time.perf_counter() - start
                raced = onnx_latency(
                    {"original": original, "result": result}, inputs, rounds=options.rounds, threads=options.threads
                )["result"]
                fewer = measure(original, inputs).macs / measure(result, inputs).macs
                low, high = raced.quartiles
                said = f"macs {share:.3g}" + (" only_if_faster" if options.only_if_faster else "")
                line = f"{name:12} {method:12} {said:34} {fewer:6.2f}x {raced.ratio:6.2f}x {low:6.2f}-{high:.2f}"
                print(f"{line} {seconds:8.1f} {len(report.edits)} done, {len(report.skips)} left", flush=True)


def built(tool: ModuleType, name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    model, inputs = tool.build(f"torchvision/{name}")
    model.eval()
    drop_auxiliary_heads(model)
    return model, inputs


# --- time ---


def duration(options: argparse.Namespace) -> None:
    """Seconds of the pass alone, weights as their metric."""
    tool = load_tool(options.tool)
    print(f"{torch.get_num_threads()} threads")
    for name, method in (("vgg16_bn", "tucker"), ("vgg16_bn", "spatial_svd"), ("vgg16_bn", "cp"), ("vit_b_16", "svd")):
        if options.methods and method not in options.methods:
            continue
        model, inputs = built(tool, name)
        captured = capture(model, inputs)
        start, busy = time.perf_counter(), time.process_time()
        _, report = PASSES[method](layer_macs=0.5)(captured, Context(captured))
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        print(f"{name} {method}: {seconds:.1f} s, {busy:.1f} s of processors, {len(report.edits)} layers", flush=True)


# --- the zoo ---


@dataclass
class Row:
    name: str
    parameters: int = 0
    seconds: float = 0.0
    edits: int = 0
    skips: int = 0
    parameters_left: float = 1.0
    macs_left: float = 1.0
    error: float | None = None
    parity: float | None = None
    parity_bound: float | None = None
    reason: str = ""
    failure: str = ""

    @property
    def right(self) -> bool:
        return not self.failure and (self.error or 0) <= 1e-5 and (self.parity or 0) <= (self.parity_bound or 0)

    def __str__(self) -> str:
        numbers = f"{self.parameters:>11,} {self.seconds:7.1f} {self.edits:4} {self.skips:4} {self.parameters_left:.3f}"
        errors = " ".join("      -" if e is None else f"{e:7.1e}" for e in (self.error, self.parity))
        return f"{self.name:40} {numbers} {self.macs_left:.3f} {errors}  {self.failure or self.reason}"


def zoo(options: argparse.Namespace) -> None:
    print(*zoo_summary(zoo_rows(options, Row, examined)), sep="\n")


def zoo_summary(rows: Sequence[Row]) -> Iterable[str]:
    compared = [row.error for row in rows if row.error is not None]
    parities = [row.parity for row in rows if row.parity is not None]
    yield f"{sum(row.right for row in rows)} of {len(rows)} right; {sum(row.edits > 0 for row in rows)} with edits"
    yield f"factors = their product: {len(compared)} compared, largest error {max(compared, default=0):.1e}"
    yield f"ONNX Runtime: {len(parities)} compared, largest deviation {max(parities, default=0):.1e}"
    yield f"seconds: {sum(row.seconds for row in rows):.0f} in all, largest {max(r.seconds for r in rows):.1f}"


def examined(tool: ModuleType, name: str, options: argparse.Namespace) -> Row:
    captured = zoo_subject(tool, name)
    row = Row(name, sum(p.numel() for p in captured.parameters()))
    if row.parameters > options.limit:
        row.reason = f"over {options.limit:,} parameters"
        return row
    start, reports, result = time.process_time(), [], captured
    for method in (options.method, "svd"):
        result, report = PASSES[method](layer_macs=0.5)(result, Context(captured))
        reports.append(report)
    row.seconds = time.process_time() - start
    row.edits, row.skips = (sum(len(getattr(report, kind)) for report in reports) for kind in ("edits", "skips"))
    row.reason = main_reason(reports)
    before, after = measure(captured, captured.inputs), measure(result, result.inputs)
    row.parameters_left, row.macs_left = after.parameters / before.parameters, after.macs / before.macs
    row.error = product_error(captured, result, reports)
    if row.parameters <= options.onnx_limit:
        row.parity, row.parity_bound = onnx_parity(result)
    return row


def main_reason(reports: Sequence[PassReport]) -> str:
    counts = Counter(skip.why for report in reports for skip in report.skips)
    return "; ".join(f"{number} {why}" for why, number in counts.most_common(1))[:120]


def product_error(captured: CapturedModel, result: CapturedModel, reports: Sequence[PassReport]) -> float | None:
    """How far the result is from the captured model whose weights are the products of the factors."""
    names = {edit.layer for report in reports for edit in report.edits}
    if not names:
        return None
    dense = surgery.snapshot(captured)
    for layer in [layer for layer in surgery.layers(dense) if layer.name in names]:
        surgery.replace_layer(dense, layer, {"dense": merged(layer, result)})
    dense.recompile()
    with torch.no_grad():
        outputs = [leaves(model.eval()(*captured.inputs.args, **captured.inputs.kwargs)) for model in (dense, result)]
    return max(relative_error(a, b) for a, b in zip(*outputs, strict=True))


def merged(layer: surgery.Layer, result: CapturedModel) -> nn.Module:
    """The layer with the product of the factors that stand in its place."""
    place: Any = result
    for part in layer.name.replace("@", "_").split("."):
        place = getattr(place, part)
    parts = list(place.children())
    stages = [Stage(str(n), part.weight.detach(), getattr(part, "groups", 1)) for n, part in enumerate(parts)]
    module: Any = copy.deepcopy(layer.module)
    module.weight = nn.Parameter(composed(stages))
    module.bias = parts[-1].bias
    return module  # type: ignore[no-any-return]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    on_accuracy = kinds.add_parser("accuracy")
    on_accuracy.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    on_accuracy.add_argument("--methods", nargs="+", default=ON_CONVOLUTIONS, choices=sorted(PASSES))
    on_accuracy.add_argument("--shares", nargs="+", default=list(SHARES), choices=list(SHARES))
    on_accuracy.add_argument("--metrics", nargs="+", default=list(METRICS), choices=list(METRICS))
    on_accuracy.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    on_accuracy.add_argument("--rows", type=Path, default=Path("low-rank-accuracy.jsonl"), help="read first, added to")
    on_accuracy.add_argument("--table", type=Path, help="markdown file to write")
    on_accuracy.add_argument("--plot", type=Path, help="image to write")
    on_speed = kinds.add_parser("speed")
    on_speed.add_argument("--models", nargs="+", default=["resnet18", "vgg16"])
    on_speed.add_argument("--methods", nargs="+", default=["tucker", "spatial_svd"], choices=sorted(PASSES))
    on_speed.add_argument("--shares", type=float, nargs="+", default=[0.48, 0.29])
    on_speed.add_argument("--only-if-faster", action="store_true")
    on_speed.add_argument("--rounds", type=int, default=30)
    on_speed.add_argument("--threads", type=int, help="of ONNX Runtime; default as it chooses")
    on_time = kinds.add_parser("time")
    on_time.add_argument("--methods", nargs="*", default=[])
    on_zoo = kinds.add_parser("zoo")
    on_zoo.add_argument("names", nargs="*", help="such as resnet18; all without one")
    on_zoo.add_argument("--method", default="tucker", choices=ON_CONVOLUTIONS)
    million = {"type": int, "default": 150_000_000}
    on_zoo.add_argument("--limit", **million, help="parameters above which a model is left out")
    on_zoo.add_argument("--onnx-limit", **million, help="parameters above which no file is written")
    on_zoo.add_argument("--rows", type=Path, default=Path("low-rank-zoo.jsonl"), help="read first, added to")
    for kind in (on_speed, on_time, on_zoo):
        kind.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit({"accuracy": accuracy, "speed": speed, "time": duration, "zoo": zoo}[given.kind](given))
