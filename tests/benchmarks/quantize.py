"""Quantisation measured: accuracy, agreement and speed in ONNX Runtime, beside its own tool, and the zoo.

    make quantize BENCH="accuracy --depth 20 56 --methods own own7 rival rival7"
    make quantize BENCH="speed --models resnet18 mobilenet_v2 vgg16_bn"
    make quantize BENCH="zoo resnet18 --rows rows.jsonl"

`accuracy`: CIFAR-10 with the weights for JPEG images, 256 training images without labels calibrate, top-1 on the first
`--images` of the 10,000 test images. `agreement` is the share of images to which PyTorch's simulation and ONNX Runtime
give the same class. `rival` is `onnxruntime.quantization.quantize_static` with QDQ, uint8 activations, int8 weights per
channel, after its own preprocessing; the 7 stands for weights of 7 bits (`vnni: false`, `reduce_range`).
`speed`: random weights, float32, this pass and the rival paired and interleaved. `zoo`: random weights; every model is
quantised, exported, loaded and compared; `integer` and `float` count kernels of layers and products.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort
import torch
from accuracy import SHARED, load, note
from models import TOOL, drop_auxiliary_heads, load_tool, onnx_parity, zoo_rows, zoo_subject
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quant_pre_process, quantize_static
from surgery_plugins.quantize import Quantize
from surgery_plugins.quantize.counting import kernels
from surgery_plugins.quantize.targets import has_vnni
from torch import Tensor

from surgery import CapturedModel, Context, Data, capture, export_onnx
from surgery.export.runtime import runtime_session
from surgery.measurement import latency
from surgery.testing import randomise

METHODS: dict[str, dict[str, Any]] = {
    "own": {"vnni": True},
    "own7": {"vnni": False},
    "own_uncorrected": {"vnni": True, "bias_correction": False},
    "own7_uncorrected": {"vnni": False, "bias_correction": False},
    "own_mse": {"vnni": True, "observer": "mse"},
    "own_entropy": {"vnni": True, "observer": "entropy"},
    "own_percentile": {"vnni": True, "observer": "percentile"},
    "own7_gptq": {"vnni": False, "rounding": "gptq"},
    "w4": {"weight_bits": 4},
    "w4_gptq": {"weight_bits": 4, "rounding": "gptq"},
    "w4_adaround": {"weight_bits": 4, "rounding": "adaround"},
}
RIVALS = {"rival": False, "rival7": True}
IMAGES = 256


class Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, batches: Sequence[Tensor]) -> None:
        self._left = iter([{name: batch.numpy()} for batch in batches])

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


def rival(source: Path, target: Path, batches: Sequence[Tensor], reduce_range: bool) -> None:
    """The file `source` quantised by ONNX Runtime's own tool."""
    name = ort.InferenceSession(str(source), providers=["CPUExecutionProvider"]).get_inputs()[0].name
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared))
    quantize_static(
        str(prepared),
        str(target),
        Batches(name, batches),
        quant_format=QuantFormat.QDQ,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        reduce_range=reduce_range,
    )


def answers(path: Path, batches: Sequence[Tensor]) -> Tensor:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return torch.cat([torch.from_numpy(session.run(None, {name: batch.numpy()})[0]) for batch in batches])


# --- accuracy ---


def accuracy(options: argparse.Namespace) -> None:
    networks, images = load(options.shared / "models/resnet_cifar.py"), load(options.shared / "data/cifar10.py")
    (train, _), (test, labels) = (map(torch.from_numpy, images.jpeg(split)) for split in ("train", "test"))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:IMAGES]
    batches = list(networks.normalise(train[order]).split(64))
    test, labels = networks.normalise(test[: options.images]).split(250), labels[: options.images]
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    for depth in options.depth:
        model = capture(networks.resnet(depth, f"resnet{depth}_jpeg"), batches[0][:2])
        for method in ["float", *options.methods]:
            row = {"depth": depth, "method": method, "images": options.images}
            if not any(row.items() <= known.items() for known in done):
                with tempfile.TemporaryDirectory() as folder:
                    note(options.rows, done, row | judged(model, method, batches, test, labels, Path(folder)))


def judged(
    model: CapturedModel, method: str, batches: Sequence[Tensor], test: Sequence[Tensor], labels: Tensor, folder: Path
) -> dict[str, Any]:
    start, path, after = time.process_time(), folder / "model.onnx", model
    if method in RIVALS:
        export_onnx(model, model.inputs, folder / "float.onnx")
        rival(folder / "float.onnx", path, batches, RIVALS[method])
    else:
        if method != "float":
            after, _ = Quantize(**METHODS[method])(model, Context(model, Data(calibration=batches)))
        export_onnx(after, after.inputs, path)
    seconds, given = time.process_time() - start, answers(path, test)
    row = {"accuracy": 100 * float((given.argmax(1) == labels).double().mean()), "seconds": seconds}
    if method not in RIVALS:
        with torch.no_grad():
            simulated = torch.cat([after(batch) for batch in test])
        row["simulated"] = 100 * float((simulated.argmax(1) == labels).double().mean())
        row["agreement"] = float((simulated.argmax(1) == given.argmax(1)).double().mean())
    return row | {"bytes": path.stat().st_size}


# --- speed ---


def speed(options: argparse.Namespace) -> None:
    tool = load_tool(options.tool)
    print(f"VNNI here: {has_vnni()}; {options.threads} threads; ratios against float32, medians with quartiles")
    for name in options.models:
        torch.manual_seed(0)
        model, inputs = tool.build(f"torchvision/{name}")
        model.eval()
        drop_auxiliary_heads(model)
        captured = capture(randomise(model), inputs)
        batches = [torch.randn(2, *captured.inputs.tensors[0].shape[1:]) for _ in range(2)]
        with tempfile.TemporaryDirectory() as folder:
            files = {kind: Path(folder) / f"{kind}.onnx" for kind in ("float", "own", "rival")}
            export_onnx(captured, captured.inputs, files["float"])
            after, _ = Quantize(vnni="auto")(captured, Context(captured, Data(calibration=batches)))
            export_onnx(after, after.inputs, files["own"])
            rival(files["float"], files["rival"], batches, not has_vnni())
            sample = captured.inputs.with_batch(1)
            calls = {k: partial(runtime_session(f, threads=options.threads), sample) for k, f in files.items()}
            raced = latency(calls, rounds=options.rounds)
            whole = files["float"].stat().st_size
            for kind in ("own", "rival"):
                found, share = raced[kind], files[kind].stat().st_size / whole
                low, high = found.quartiles
                print(f"{name:14} {kind:6} {found.ratio:5.2f}x {low:.2f}-{high:.2f} size {share:.3f}", flush=True)
            print(f"{'':14} {dict(kernels(files['own']).count)}", flush=True)


# --- the zoo ---


@dataclass
class Row:
    name: str
    parameters: int = 0
    seconds: float = 0.0
    edits: int = 0
    skips: int = 0
    integer: int = 0
    float: int = 0
    stranded: int = 0
    parity: Any = None
    parity_bound: Any = None
    reason: str = ""
    failure: str = ""

    @property
    def right(self) -> bool:
        agrees = self.parity is None or self.parity <= self.parity_bound
        return not self.failure and not self.stranded and agrees

    def __str__(self) -> str:
        numbers = (
            f"{self.parameters:>11,} {self.seconds:7.1f} {self.edits:4} {self.skips:4} {self.integer:4} {self.float:4}"
        )
        parity = "      -" if self.parity is None else f"{self.parity:7.1e}"
        return f"{self.name:40} {numbers} {self.stranded:3} {parity}  {self.failure or self.reason}"


def zoo(options: argparse.Namespace) -> None:
    rows = zoo_rows(options, Row, examined)
    print(*zoo_summary(rows), sep="\n")
    if options.table:
        options.table.write_text(zoo_table(rows))


def zoo_table(rows: Sequence[Row]) -> str:
    columns = ["model", "parameters", "seconds", "edits", "integer", "float", "deviation", "notes"]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        deviation = "-" if row.parity is None else f"{row.parity:.1e}"
        counts = map(str, (row.edits, row.integer, row.float))
        name, notes = row.name.partition("/")[2], (row.failure or row.reason).replace("|", "/")
        lines.append([name, f"{row.parameters:,}", f"{row.seconds:.1f}", *counts, deviation, notes])
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in zoo_summary(rows)), ""])


def zoo_summary(rows: Sequence[Row]) -> Iterable[str]:
    parities = [row.parity for row in rows if row.parity is not None]
    yield f"{sum(row.right for row in rows)} of {len(rows)} right; {sum(row.edits > 0 for row in rows)} with edits"
    yield f"kernels: {sum(row.integer for row in rows)} integer, {sum(row.float for row in rows)} float"
    yield f"ONNX Runtime: {len(parities)} compared, largest deviation {max(parities, default=0):.1e}"
    yield f"seconds: {sum(row.seconds for row in rows):.0f} in all, largest {max(r.seconds for r in rows):.1f}"


def examined(tool: Any, name: str, options: argparse.Namespace) -> Row:
    captured = zoo_subject(tool, name)
    row = Row(name, sum(p.numel() for p in captured.parameters()))
    if row.parameters > options.limit:
        row.reason = f"over {options.limit:,} parameters"
        return row
    batch = captured.inputs.map(lambda t: torch.randn_like(t) if t.is_floating_point() else t)
    start = time.process_time()
    after, report = Quantize()(captured, Context(captured, Data.of([batch.tensors[0]])))
    row.seconds, row.edits, row.skips = time.process_time() - start, len(report.edits), len(report.skips)
    counts = Counter(skip.why for skip in report.skips)
    row.reason = "; ".join((*(f"{n} {why}" for why, n in counts.most_common(2)), *report.notes))[:200]
    with tempfile.TemporaryDirectory() as folder:
        found = kernels(export_onnx(after, after.inputs, Path(folder) / "model.onnx"))
    narrow = sum("is slower in integers" in skip.why for skip in report.skips)
    row.integer, row.float = found.integer_layers, found.float_layers
    row.stranded = max(0, len(found.stranded) - narrow)  # narrow groups may also stand among float nodes
    row.parity, row.parity_bound = onnx_parity(after)
    return row


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    on_accuracy = kinds.add_parser("accuracy")
    on_accuracy.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    on_accuracy.add_argument("--methods", nargs="+", default=[*METHODS, *RIVALS], choices=[*METHODS, *RIVALS])
    on_accuracy.add_argument("--images", type=int, default=10_000)
    on_accuracy.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    on_accuracy.add_argument("--rows", type=Path, default=Path("quantize-accuracy.jsonl"), help="read first, added to")
    on_speed = kinds.add_parser("speed")
    on_speed.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2", "vgg16_bn"])
    on_speed.add_argument("--rounds", type=int, default=30)
    on_speed.add_argument("--threads", type=int, default=2)
    on_zoo = kinds.add_parser("zoo")
    on_zoo.add_argument("names", nargs="*", help="such as resnet18; all without one")
    on_zoo.add_argument("--limit", type=int, default=150_000_000, help="parameters above which a model is left out")
    on_zoo.add_argument("--rows", type=Path, default=Path("quantize-zoo.jsonl"), help="read first, added to")
    on_zoo.add_argument("--table", type=Path, help="markdown file to write")
    for kind in (on_speed, on_zoo):
        kind.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    sys.exit({"accuracy": accuracy, "speed": speed, "zoo": zoo}[given.kind](given))
