"""Prunes 80 torchvision and 24 timm architectures at ratio 0.5, with Torch-Pruning on the same models beside it.

    make prune-zoo                                     all of them
    make prune-zoo PRUNE="resnet18 vit_b_16 --no-rival"
    make prune-zoo PRUNE="--rows rows.jsonl"           keeps what is measured, and measures only what is missing

No model has code or lists of its own. Constant parameters are drawn anew first. `seconds` are analysis, choice and
removal on a snapshot, after capture; `left` is the share of the captured model's parameters and MACs; `error` is the
largest deviation of the pruned model from the one whose removed channels are zero, relative to the largest output;
`moved` is how far pruning moves the output, so that no error is small for want of a difference. `frozen` counts output
channels of layers that stay, with the main reason where it is not that a last layer's channels are the output.
Torch-Pruning's seconds are its dependency graph and pruning. Each model and each contestant has a process of its own,
with one thread; seconds are the processor's.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from models import TOOL, chosen, isolated, leaves, load_tool, onnx_parity, timed
from surgery_plugins.prune_filters import PruneFilters
from torch import Tensor, nn
from torch_pruning_worker import VERSION, Rival
from torch_pruning_worker import examine as examine_rival

from surgery.captured import CapturedModel, capture, relative_error
from surgery.channels import Channels, Frozen, find_channels
from surgery.channels.masking import masked_outputs
from surgery.context import Context
from surgery.contract import snapshot
from surgery.graph import propagate
from surgery.measurement import measure
from surgery.registry import Registry
from surgery.testing import randomise

RATIO = 0.5
TARGET = 0.45
BOUND = 1e-5
OUTPUT = "an output of the model"
HEADER = ("model", "parameters", "seconds", "left", "MACs", "error", "moved", "parity", "groups", "frozen")
RIVAL_HEADER = ("seconds", "left", "runs")
LINE = "{:34} {:>11} {:>7} {:>5} {:>5} {:>7} {:>7} {:>7} {:>6} {:>6}  | {:>7} {:>5} {:4}  {}"


@dataclass
class Pruned:
    """What became of one model. None = not measured."""

    parameters: int
    nodes: int
    capture_seconds: float
    seconds: float
    parameters_left: float
    macs_left: float
    groups: int
    frozen: int
    reason: str
    error: float | None
    moved: float | None
    parity: float | None
    parity_bound: float | None

    @property
    def right(self) -> bool:
        return (self.error is None or self.error <= BOUND) and (self.parity or 0) <= (self.parity_bound or 0)


@dataclass
class Row:
    name: str
    ours: Pruned | None = None
    failure: str = ""
    rival: Rival | None = None

    def cells(self) -> list[str]:
        head = [self.name.removeprefix("torchvision/")]
        o, r = self.ours, self.rival
        if o is None:
            head += ["FAILED" if self.failure else "-", *[""] * 8]
        else:
            shares = [f"{o.seconds:.2f}", f"{o.parameters_left:.3f}", f"{o.macs_left:.3f}"]
            errors = ["-" if e is None else f"{e:.1e}" for e in (o.error, o.moved, o.parity)]
            head += [f"{o.parameters:,}", *shares, *errors, str(o.groups), str(o.frozen)]
        if r is None:
            return [*head, "", "", ""]
        numbers = [(r.seconds, ".2f"), (r.parameters_left, ".3f")]
        return [*head, *("-" if n is None else format(n, form) for n, form in numbers), "no" if r.failure else "yes"]

    def notes(self) -> str:
        own = self.failure or (self.ours.reason if self.ours else "")
        return "; ".join(filter(None, [own, self.rival and self.rival.failure and f"rival: {self.rival.failure}"]))

    def __str__(self) -> str:
        return LINE.format(*self.cells(), self.notes())


class Watched(Channels):
    """Remembers what was removed."""

    removed: Sequence[Tensor] = ()

    def remove(self, removed: Sequence[Tensor]) -> None:
        self.removed = removed
        super().remove(removed)


class Watching(Context):
    """Remembers the channels that a pass first asked for."""

    first: Watched | None = None

    def channels(self, model: CapturedModel, *, heads: bool = False) -> Channels:
        found = super().channels(model, heads=heads)
        if self.first is None:
            found = self.first = Watched(found.model, found.walk, found.units)
        return found


def build(tool: ModuleType, name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = tool.build(name)
    return randomise(model), inputs


def examine(tool: ModuleType, name: str, masked_limit: int, onnx_limit: int) -> Pruned:
    model, inputs = build(tool, name)
    capture_seconds, captured = timed(lambda: capture(model, inputs), time.process_time)
    context = Watching(captured, registry=Registry.load())
    seconds, pruned = timed(lambda: prune(captured, context), time.process_time)
    found = context.first
    assert found is not None
    parameters, size = sum(p.numel() for p in captured.parameters()), len(captured.graph.nodes)
    before, after = measure(captured, captured.inputs), measure(pruned, pruned.inputs)
    error, moved = removal_error(captured, pruned, found.removed) if parameters <= masked_limit else (None, None)
    parity, bound = onnx_parity(pruned) if parameters <= onnx_limit else (None, None)
    return Pruned(
        parameters,
        size,
        capture_seconds,
        seconds,
        after.parameters / before.parameters,
        after.macs / before.macs,
        len(found.groups),
        sum(f.channels for f in found.frozen),
        main_reason(found.frozen),
        error,
        moved,
        parity,
        bound,
    )


def prune(captured: CapturedModel, context: Context) -> CapturedModel:
    model = snapshot(captured)
    PruneFilters(ratio=RATIO, criterion="l1").apply(model, context)
    return model


def main_reason(frozen: Sequence[Frozen]) -> str:
    """Why most of the channels stay, with their number, apart from a last layer's that are the output."""
    counts: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    for entry in frozen:
        why = entry.why.partition(": ")[2] or entry.why
        counts[why] += entry.channels
        layers[why] += 1
    if layers[OUTPUT] == 1:
        del counts[OUTPUT]
    return "; ".join(f"{number} {why}" for why, number in counts.most_common(1))


def removal_error(captured: CapturedModel, pruned: CapturedModel, removed: Sequence[Tensor]) -> tuple[float, float]:
    """How far removed is from masked, and masked from untouched."""
    found = find_channels(captured)
    with torch.no_grad():
        masked = leaves(masked_outputs(found, found.alive(removed), captured.inputs))
        actual = leaves(pruned(*pruned.inputs.args, **pruned.inputs.kwargs))
        untouched = leaves(propagate(snapshot(captured), captured.inputs))
    pairs = [(actual, masked), (masked, untouched)]
    error, moved = (max(relative_error(a, b) for a, b in zip(x, y, strict=True)) for x, y in pairs)
    return error, moved


def completed(row: Row, tool: ModuleType, options: argparse.Namespace) -> Row:
    """`row` with what it lacks of what is asked for."""
    onnx_limit = 0 if options.no_onnx else options.onnx_limit
    o = row.ours
    if o is None or (o.parity is None and o.parameters <= onnx_limit):
        try:
            row.ours = isolated(examine, tool, row.name, options.masked_limit, onnx_limit)
            row.failure = ""
        except RuntimeError as error:
            row.failure = str(error)
    if row.rival is None and not options.no_rival:
        try:
            row.rival = isolated(examine_rival, partial(build, tool, row.name), options.time)
        except RuntimeError as error:
            row.rival = Rival(failure=str(error))
    return row


def stored(path: Path | None) -> dict[str, Row]:
    """Rows by name; the last one of each counts."""
    rows = {}
    for line in path.read_text().splitlines() if path and path.exists() else []:
        entry = json.loads(line)
        ours, rival = entry.pop("ours"), entry.pop("rival")
        rows[entry["name"]] = Row(**entry, ours=ours and Pruned(**ours), rival=rival and Rival(**rival))
    return rows


def summary(rows: Sequence[Row]) -> list[str]:
    ours = [row.ours for row in rows if row.ours]
    checked = [o.error for o in ours if o.error is not None]
    parities = [o.parity for o in ours if o.parity is not None]
    left = [o.parameters_left for o in ours]
    small = sum(share < TARGET for share in left)
    lines = [
        f"{sum(o.right for o in ours)} of {len(rows)} pruned and right",
        f"removed = masked: {len(checked)} compared, largest error {max(checked, default=0):.1e}",
        f"ONNX Runtime: {len(parities)} compared, largest deviation {max(parities, default=0):.1e}",
        f"parameters left below {TARGET}: {small} of {len(ours)}; median {median(left):.3f}",
        f"seconds: {sum(o.seconds for o in ours):.1f} in all, largest {max((o.seconds for o in ours), default=0):.2f}",
    ]
    return lines + rival_summary(rows)


def rival_summary(rows: Sequence[Row]) -> list[str]:
    pairs = [(row.ours, row.rival) for row in rows if row.ours and row.rival]
    finished = [(o, r) for o, r in pairs if r.seconds is not None]
    running = [(o, r) for o, r in finished if not r.failure]
    if not pairs:
        return []
    ratios = [r.seconds / o.seconds for o, r in finished if r.seconds]
    slower, late = sum(ratio < 1 for ratio in ratios), sum(r.failure.startswith("over") for _, r in pairs)
    small = sum((r.parameters_left or 1) < TARGET for _, r in running)
    return [
        f"Torch-Pruning {VERSION}: {len(running)} of {len(pairs)} pruned and running, {small} of them below {TARGET};"
        f" {late} over time, {len(pairs) - len(running) - late} failed",
        f"its seconds / ours on the {len(ratios)} it finished: median {median(ratios):.1f}, largest"
        f" {max(ratios, default=0):.1f}; ours slower on {slower}",
    ]


def median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def markdown(rows: Sequence[Row]) -> str:
    heads = [*HEADER, *(f"rival {name}" for name in RIVAL_HEADER), "notes"]
    lines = [heads, ["---"] * len(heads), *([*row.cells(), row.notes()] for row in rows)]
    table = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    return "\n".join([*table, "", *(f"- {line}" for line in summary(rows)), ""])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as resnet18 or timm/cait_xxs24_224; all without one")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    parser.add_argument("--no-rival", action="store_true", help="without Torch-Pruning")
    parser.add_argument(
        "--time", type=float, default=60, help="processor seconds that Torch-Pruning may take on a model"
    )
    parser.add_argument("--no-onnx", action="store_true", help="without ONNX Runtime")
    million = {"type": int, "default": 150_000_000}
    parser.add_argument("--onnx-limit", **million, help="parameters above which no file is written")
    parser.add_argument("--masked-limit", **million, help="parameters above which removed = masked is not tried")
    parser.add_argument("--rows", type=Path, help="JSON lines, one per model, read first and added to")
    parser.add_argument("--table", type=Path, help="markdown file to write")
    parser.add_argument("--part", default="1/1", help="such as 2/3: every third model from the second on")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    tool = load_tool(options.tool)
    part, parts = map(int, options.part.split("/"))
    names = chosen(tool, options.names)[part - 1 :: parts]
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm_up()
    known, rows = stored(options.rows), []
    print(LINE.format(*HEADER, *RIVAL_HEADER, ""), flush=True)
    for name in names:
        before = json.dumps(asdict(known.get(name, Row(name))))
        rows.append(completed(known.get(name, Row(name)), tool, options))
        print(rows[-1], flush=True)
        if options.rows and (line := json.dumps(asdict(rows[-1]))) != before:
            with options.rows.open("a") as file:
                file.write(line + "\n")
    print(*summary(rows), sep="\n")
    if options.table:
        options.table.write_text(markdown(rows))
    return int(not all(row.ours and row.ours.right for row in rows))


def warm_up() -> None:
    """First-call costs, which forked processes inherit."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    captured = capture(small, (torch.rand(1, 3, 8, 8),))
    prune(captured, Context(captured, registry=Registry.load()))


if __name__ == "__main__":
    sys.exit(main())
