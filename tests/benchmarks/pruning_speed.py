"""Times pruning beside torch.export and Torch-Pruning, and against the depth of the network.

    make prune-speed                                   all three tables
    make prune-speed SPEED="models --names resnet50 --rounds 5"
    make prune-speed SPEED="ladder --plot speed.png"
    make prune-speed SPEED="memory"

`models`: medians of rounds in which every contestant has its turn: torch.export alone; capture; one run of the model on
one sample, the least that capture needs beside export; analysis, choice and removal on a snapshot, the snapshot
included; Torch-Pruning's dependency graph and pruning of a copy, the copy excluded.
`ladder`: `find_channels` with its groups, and removal of half of each, on two families of networks of growing depth.
`memory`: seconds and highest resident memory of analysis, choice and removal on a model of 630 M parameters.
Each model has a process of its own with one thread; seconds are the processor's, so that other work does not count.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType

import torch
from models import TOOL, chosen, isolated, load_tool, plain_export, timed
from surgery_plugins.prune_filters import PruneFilters
from torch import Tensor, nn
from torch_pruning_worker import VERSION
from torch_pruning_worker import prune as prune_with_rival

from surgery.captured import CapturedModel, capture
from surgery.channels import find_channels
from surgery.context import Context
from surgery.contract import snapshot
from surgery.registry import Registry
from surgery.testing import randomise

MODELS = ["resnet50", "convnext_tiny", "efficientnet_b0", "mobilenet_v2", "regnet_y_400mf", "vit_b_16"]
MODELS += ["densenet121", "densenet169", "densenet201", "vgg16_bn"]
LARGE = "torchvision/vit_h_14"
DEPTHS = {"ResNet": (1, 2, 4, 8, 16, 32, 64, 96), "DenseNet": (2, 4, 8, 16, 32, 64, 96)}
"""Blocks per stage, four stages."""
TURN = "{:16} {:>6} {:>8} {:>8} {:>8} {:>8} {:>9}  {:>15} {:>14} {:>14}"
RUNG = "{:9} {:>5} {:>6} {:>9} {:>9} {:>9} {:>9} {:>8}"


@dataclass
class Seconds:
    """Of one model; medians over the rounds."""

    export: float
    capture: float
    run: float
    ours: float
    rival: float


def race(tool: ModuleType, name: str, rounds: int) -> tuple[Seconds, int]:
    """Seconds, and the number of nodes."""
    model, inputs = build(tool, name)
    captured = capture(model, inputs)
    turns = []
    for _ in range(rounds):
        rival = copy.deepcopy(model)
        contestants: Sequence[Callable[[], object]] = (
            lambda: plain_export(model, inputs),
            lambda: capture(model, inputs),
            lambda: run(model, inputs),
            lambda: prune(captured),
            lambda: prune_with_rival(rival, inputs),  # noqa: B023
        )
        turns.append(Seconds(*map(collected, contestants)))
    medians = (statistics.median(getattr(turn, field.name) for turn in turns) for field in fields(Seconds))
    return Seconds(*medians), len(captured.graph.nodes)


def collected(action: Callable[[], object]) -> float:
    """Seconds, without the rubbish of whoever ran before."""
    gc.collect()
    return timed(action, time.process_time)[0]


def build(tool: ModuleType, name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model, inputs = tool.build(name)
    return randomise(model), inputs


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        model(*inputs)


def prune(captured: CapturedModel) -> CapturedModel:
    model = snapshot(captured)
    PruneFilters(ratio=0.5, criterion="l1").apply(model, Context(captured, registry=REGISTRY))
    return model


def models(tool: ModuleType, options: argparse.Namespace) -> None:
    ratios = ["capture/export", "one run/export", "rival/pruning"]
    print(TURN.format("model", "nodes", "export", "capture", "one run", "pruning", "rival", *ratios))
    rows = []
    for name in chosen(tool, [f"torchvision/{name}" for name in options.names or MODELS]):
        seconds, nodes = isolated(race, tool, name, options.rounds)
        times = [f"{getattr(seconds, field.name):.2f}s" for field in fields(seconds)]
        ratios = [f"{own / seconds.export:.2f}" for own in (seconds.capture, seconds.run)]
        ratios.append(f"{seconds.rival / seconds.ours:.1f}")
        rows.append([name.removeprefix("torchvision/"), str(nodes), *times, *ratios])
        print(TURN.format(*rows[-1]), flush=True)
    print(f"medians of {options.rounds} interleaved rounds; rival: Torch-Pruning {VERSION}", flush=True)


def network(family: str, depth: int) -> nn.Module:
    """Narrow, so that depth costs nodes and not arithmetic."""
    from torchvision.models.densenet import DenseNet
    from torchvision.models.resnet import Bottleneck, ResNet

    blocks = (depth,) * 4
    model = ResNet(Bottleneck, list(blocks), width_per_group=8) if family == "ResNet" else DenseNet(8, blocks, 16)
    return randomise(model)


@dataclass
class Rung:
    nodes: int
    positions: int
    """Along all dimensions of all parameters. They grow faster than nodes where layers read all layers before them."""
    analysis: float
    removal: float

    @property
    def seconds(self) -> float:
        return self.analysis + self.removal


def climb(family: str, depth: int, rounds: int) -> Rung:
    captured = capture(network(family, depth), (torch.rand(1, 3, 64, 64),))
    times = []
    for _ in range(rounds):
        gc.collect()
        model = snapshot(captured)
        analysis, found = timed(lambda: find_channels(model), time.process_time)  # noqa: B023
        grouping, groups = timed(lambda: found.groups, time.process_time)  # noqa: B023
        marks = [torch.arange(group.size) < group.size // 2 for group in groups]
        removal, _ = timed(lambda: found.remove(marks), time.process_time)  # noqa: B023
        times.append((analysis + grouping, removal))
    analysis, removal = (statistics.median(own) for own in zip(*times, strict=True))
    return Rung(len(captured.graph.nodes), found.walk.facts.positions.count, analysis, removal)


def ladder(tool: ModuleType, options: argparse.Namespace) -> None:
    del tool
    print(RUNG.format("family", "depth", "nodes", "positions", "analysis", "removal", "together", "µs/node"))
    climbed: dict[str, list[Rung]] = {}
    for family, depths in DEPTHS.items():
        for depth in depths:
            rung: Rung = isolated(climb, family, depth, options.rounds)
            climbed.setdefault(family, []).append(rung)
            times = [f"{value:.3f}s" for value in (rung.analysis, rung.removal, rung.seconds)]
            print(
                RUNG.format(
                    family, depth, rung.nodes, rung.positions, *times, f"{rung.seconds / rung.nodes * 1e6:.0f}"
                ),
                flush=True,
            )
        powers = [exponent(climbed[family], measure) for measure in ("nodes", "positions")]
        print(f"{family}: seconds ~ nodes^{powers[0]:.2f}, positions^{powers[1]:.2f}", flush=True)
    if options.plot:
        plot(climbed, options.plot)


def exponent(rungs: Sequence[Rung], measure: str) -> float:
    """Slope of the logarithms of seconds over those of `measure`, by least squares."""
    x, y = (torch.tensor([float(getattr(rung, name)) for rung in rungs]).log() for name in (measure, "seconds"))
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / x.square().sum())


def plot(climbed: dict[str, list[Rung]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, 2, figsize=(9, 4), sharey=True, constrained_layout=True)
    for axes, measure in zip(places, ("nodes", "positions"), strict=True):
        points = [(getattr(rung, measure), rung.seconds) for rungs in climbed.values() for rung in rungs]
        for family, rungs in climbed.items():
            sizes = [getattr(rung, measure) for rung in rungs]
            label = f"{family}: {measure}$^{{{exponent(rungs, measure):.2f}}}$"
            axes.loglog(sizes, [rung.seconds for rung in rungs], "o-", label=label)
        ends = [min(points)[0], max(points)[0]]
        axes.loglog(ends, [n * min(seconds / size for size, seconds in points) for n in ends], "k:", label="linear")
        axes.set_xlabel({"nodes": "nodes of the graph", "positions": "positions along all dimensions"}[measure])
        axes.grid(True, alpha=0.3)
        axes.legend()
    places[0].set_ylabel("seconds to find and remove channels")
    figure.savefig(path, dpi=130)


def memory(tool: ModuleType, options: argparse.Namespace) -> None:
    del options
    print(*isolated(weigh, tool), sep="\n", flush=True)


def weigh(tool: ModuleType) -> list[str]:
    """Highest resident memory while pruning, apart from the model's own weights: torch and its like are in it."""
    captured = capture(*build(tool, LARGE))
    size = sum(p.numel() * p.element_size() for p in captured.parameters())
    gc.collect()
    capturing, before = resident("VmHWM"), resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts anew
    seconds, pruned = timed(lambda: prune(captured), time.process_time)
    peak = resident("VmHWM")
    left = sum(p.numel() * p.element_size() for p in pruned.parameters())
    return [
        f"{LARGE}: {sum(p.numel() for p in captured.parameters()):,} parameters, {gigabytes(size)}",
        f"pruned in {seconds:.1f} s to {gigabytes(left)}",
        f"resident: {gigabytes(before)} before, at most {gigabytes(peak)} while pruning:"
        f" {(peak - size) / size:.2f} x the model beside it, {(peak - before) / size:.2f} x more than before",
        f"capturing took at most {gigabytes(capturing)}",
    ]


def resident(entry: str) -> int:
    """Bytes; VmRSS = now, VmHWM = highest."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(entry))


def gigabytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


TABLES = {"models": models, "ladder": ladder, "memory": memory}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(TABLES)}; all without one")
    parser.add_argument("--names", nargs="+", help="torchvision models to race, such as resnet50")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="picture of the ladder")
    options = parser.parse_args()
    if unknown := set(options.tables) - TABLES.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(TABLES)}")
    return options


def main() -> int:
    options = arguments()
    tool = load_tool(options.tool)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    warm_up()
    for name in options.tables or TABLES:
        TABLES[name](tool, options)
    return 0


def warm_up() -> None:
    """First-call costs of all contestants, which forked processes inherit."""
    model, inputs = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), (torch.rand(1, 3, 8, 8),)
    plain_export(model, inputs)
    prune(capture(model, inputs))
    prune_with_rival(model, inputs)


REGISTRY = Registry.load()


if __name__ == "__main__":
    sys.exit(main())
