"""Accuracy after pruning without training: every criterion with and without reconstruction, on CIFAR-10 ResNets.

    make prune-accuracy                                        ResNet-20 and ResNet-56 at 1.5, 2 and 3 times fewer MACs
    make prune-accuracy ACCURACY="--depth 20 --criteria l2 reconstruction --table table.md --plot plot.png"
    make prune-accuracy ACCURACY="--depth 56 --rival"          beside Torch-Pruning, half of the channels within blocks

1,024 of the lossless training images calibrate, without labels; criteria that need labels get those of the same images,
`oracle`, which masks every unit in turn, those of 128. Accuracy is top-1 on the 846 lossless test images. Rows are
appended to `--rows` as they come, and those that stand there already are not run again.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch
from surgery_plugins.prune_filters import PruneFilters
from torch import Tensor
from torch_pruning_worker import VERSION
from torch_pruning_worker import prune as prune_with_rival

from surgery import CapturedModel, Channels, Context, Criterion, Data, capture, measure
from surgery.registry import Registry

SHARED = Path(__file__).resolve().parents[2].parent / "shared"
CRITERIA = ["reconstruction", "l1", "l2", "thinet", "geometric_median", "batchnorm_scale", "activation_mean", "apoz"]
CRITERIA += ["mutual_information", "taylor", "oracle", "random"]
SHARES = {"1.5x": 1 / 1.5, "2x": 1 / 2, "3x": 1 / 3}
IMAGES = 1024


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.exists():
        sys.exit(f"{path} is not there; give the folder with --shared")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Remembered(Criterion):
    """A criterion that judges the unpruned network once."""

    def __init__(self, criterion: Criterion, known: dict[str, list[Tensor]]) -> None:
        self._criterion, self._known, self.comparable = criterion, known, criterion.comparable  # type: ignore[misc]

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        name = self._criterion.name()
        if name not in self._known:
            self._known[name] = self._criterion.scores(found, context)
        return self._known[name]


class Judging(Context):
    known: ClassVar[dict[str, list[Tensor]]]

    def criterion(self, name: str) -> Criterion:
        return Remembered(super().criterion(name), self.known)


class Bench:
    """A trained network with its images."""

    def __init__(self, shared: Path, depth: int) -> None:
        networks, images = load(shared / "models/resnet_cifar.py"), load(shared / "data/cifar10.py")
        (train, labels), (test, self.labels) = (map(torch.from_numpy, images.lossless(s)) for s in ("train", "test"))
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:IMAGES]
        self.depth, self.test = depth, networks.normalise(test)
        self.batches = list(networks.normalise(train[chosen]).split(128))
        self.targets = list(labels[chosen].split(128))
        self.network = networks.resnet(depth, f"resnet{depth}_original")
        self.model = capture(self.network, self.test[:2])
        self.macs = measure(self.model, self.model.inputs).macs
        self.registry, Judging.known = Registry.load(), {}

    def context(self, criterion: str) -> Context:
        labelled = list(zip(self.batches, self.targets, strict=True))
        training = labelled[:1] if criterion == "oracle" else labelled
        return Judging(self.model, Data(calibration=self.batches, training=training), registry=self.registry)

    def accuracy(self, model: torch.nn.Module) -> float:
        with torch.no_grad():
            guesses: Tensor = torch.cat([model(part).argmax(1) for part in self.test.split(256)])
        return 100 * float((guesses == self.labels).float().mean())

    def run(self, step: PruneFilters) -> dict[str, Any]:
        start = time.perf_counter()
        model, _ = step(self.model, self.context(step.criterion or "reconstruction"))
        seconds = time.perf_counter() - start
        return self.judged(model) | {"seconds": seconds}

    def judged(self, model: CapturedModel) -> dict[str, Any]:
        after = measure(model, model.inputs)
        return {
            "fewer": self.macs / after.macs,
            "parameters": after.parameters,
            "accuracy": self.accuracy(model),
        }

    def beside_rival(self) -> Iterator[dict[str, Any]]:
        """Torch-Pruning's half of the channels within blocks; the same MACs by this library, there and anywhere."""
        network = copy.deepcopy(self.network)
        convolutions = [(n, m) for n, m in network.named_modules() if isinstance(m, torch.nn.Conv2d)]
        others = [module for name, module in convolutions if not name.endswith(".conv1")]
        start = time.perf_counter()
        prune_with_rival(network, (self.test[:1],), others)
        seconds = time.perf_counter() - start
        first = self.judged(capture(network, self.test[:2])) | {"seconds": seconds}
        yield {"contestant": f"Torch-Pruning {VERSION}, L1, within blocks"} | first
        plain = PruneFilters(macs=1 / first["fewer"], criterion="l1", reconstruct=False, select=("*.conv1",))
        yield {"contestant": "`criterion: l1`, `reconstruct: false`, within blocks"} | self.run(plain)
        yield {"contestant": "defaults"} | self.run(PruneFilters(macs=1 / first["fewer"]))


def main() -> None:
    options = arguments()
    done = [json.loads(line) for line in options.rows.read_text().splitlines()] if options.rows.exists() else []
    for depth in options.depth:
        bench = Bench(options.shared, depth)
        note(options.rows, done, {"depth": depth, "criterion": "none", "accuracy": bench.accuracy(bench.model)})
        if options.rival:
            for row in bench.beside_rival():
                note(options.rows, done, {"depth": depth} | row)
            continue
        for name in options.shares:
            for criterion in options.criteria:
                for reconstruct in (True, False):
                    row = {"depth": depth, "share": name, "criterion": criterion, "reconstruct": reconstruct}
                    if not any(row.items() <= known.items() for known in done):
                        chosen = {"criterion": criterion, "reconstruct": reconstruct, "scope": options.scope}
                        note(options.rows, done, row | bench.run(PruneFilters(macs=SHARES[name], **chosen)))
    if options.table:
        options.table.write_text(table(done))
    if options.plot:
        plot(done, options.plot)


def note(path: Path, done: list[dict[str, Any]], row: dict[str, Any]) -> None:
    if row in done:
        return
    done.append(row)
    print(json.dumps(row), flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one line per criterion, with reconstruction / without, by network and share."""
    columns = sorted({(r["depth"], r["share"]) for r in rows if "share" in r})
    lines = ["| criterion | " + " | ".join(f"ResNet-{d}, {s} fewer MACs" for d, s in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for criterion in dict.fromkeys(r["criterion"] for r in rows if "share" in r):
        cells = [" / ".join(_cell(rows, d, s, criterion, on) for on in (True, False)) for d, s in columns]
        lines.append(f"| `{criterion}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]], depth: int, share: str, criterion: str, reconstruct: bool) -> str:
    wanted = {"depth": depth, "share": share, "criterion": criterion, "reconstruct": reconstruct}
    found = [row for row in rows if wanted.items() <= row.items()]
    return f"{found[-1]['accuracy']:.1f}" if found else "–"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against MACs, one panel per network; dashed without reconstruction."""
    from matplotlib import pyplot

    depths, colours = sorted({r["depth"] for r in rows}), pyplot.get_cmap("tab20")
    criteria = list(dict.fromkeys(r["criterion"] for r in rows if "share" in r))
    figure, axes = pyplot.subplots(1, len(depths), figsize=(6 * len(depths), 4.5), squeeze=False)
    for axis, depth in zip(axes[0], depths, strict=True):
        whole = next(r["accuracy"] for r in rows if r["depth"] == depth and r.get("criterion") == "none")
        axis.axhline(whole, color="grey", linewidth=0.8)
        own = [r for r in rows if r["depth"] == depth and "share" in r]
        for index, criterion in enumerate(criteria):
            for reconstruct, style in ((True, "-o"), (False, "--x")):
                line = sorted(
                    (1 / r["fewer"], r["accuracy"])
                    for r in own
                    if (r["criterion"], r["reconstruct"]) == (criterion, reconstruct)
                )
                label = criterion if reconstruct else None
                axis.plot(
                    [x for x, _ in line], [y for _, y in line], style, color=colours(index), markersize=4, label=label
                )
        axis.set(title=f"ResNet-{depth}, CIFAR-10", xlabel="share of the MACs that is left", ylabel="top-1, %")
    axes[0][-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, nargs="*", default=[20, 56])
    parser.add_argument("--criteria", nargs="*", default=CRITERIA)
    parser.add_argument("--shares", nargs="*", default=list(SHARES), choices=list(SHARES))
    parser.add_argument("--rival", action="store_true", help="compare with Torch-Pruning, and nothing else")
    parser.add_argument("--scope", choices=("group", "global"), help="default: the pass's own")
    parser.add_argument("--rows", type=Path, default=Path("runs/accuracy.jsonl"), help="results, one JSON a line")
    parser.add_argument("--table", type=Path, help="markdown table of everything in --rows")
    parser.add_argument("--plot", type=Path, help="PNG of everything in --rows")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder with models/ and data/")
    options = parser.parse_args()
    options.rows.parent.mkdir(parents=True, exist_ok=True)
    return options


if __name__ == "__main__":
    main()
