"""How much memory and time a run takes of a large model, and how time grows with depth.

    make scale                                  small rows, seconds each, then time by depth
    make scale SCALE="--models chain vit_h"     1.5 GB of linear layers, 2.5 GB of a ViT-H
    make scale SCALE="--models chain --passes quantize"

Every row is a process of its own. `peak`: resident memory above what torch, this SDK and the caller's model take, in
multiples of the model's bytes; `with children`: the same with the processes that ONNX Runtime runs in. A run that
writes files and measures everything but latency, on two samples. Rows go to docs/scale.md as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
PASSES: dict[str, dict[str, Any]] = {
    "fold_batchnorm": {},
    "prune_filters": {"ratio": 0.5},
    "svd": {"macs": 0.5},
    "kmeans": {"bits": 4},
    "quantize": {},
}


class Block(nn.Module):
    """Of a vision transformer: attention, then two linear layers, each on normalised values and added."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Vit(nn.Module):
    """A vision transformer; the sizes of ViT-H/14 (Dosovitskiy et al. 2021, table 1) by default: 632 M parameters."""

    def __init__(self, width: int = 1280, depth: int = 32, heads: int = 16, patch: int = 14, image: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.first = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.places = nn.Parameter(torch.randn(1, (image // patch) ** 2 + 1, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, 4 * width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).mT
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


def chain(width: int, depth: int) -> nn.Sequential:
    layers = (m for _ in range(depth) for m in (nn.Linear(width, width), nn.ReLU()))
    return nn.Sequential(*layers, nn.Linear(width, 10))


def convnet(channels: int, depth: int) -> nn.Sequential:
    stem = nn.Conv2d(3, channels, 3, padding=1)
    body = (
        m
        for _ in range(depth)
        for m in (nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
    )
    return nn.Sequential(stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "tiny_chain": lambda: (chain(32, 2), torch.randn(2, 32)),
    "tiny_vit": lambda: (Vit(32, 2, 2, 16, 32), torch.randn(2, 3, 32, 32)),
    "quick_chain": lambda: (chain(2048, 20), torch.randn(2, 2048)),
    "small_chain": lambda: (chain(2048, 6), torch.randn(2, 2048)),
    "quick_vit": lambda: (Vit(1280, 4, 16, 14, 112), torch.randn(2, 3, 112, 112)),
    "chain": lambda: (chain(4096, 24), torch.randn(2, 4096)),
    "vit_h": lambda: (Vit(), torch.randn(2, 3, 224, 224)),
}
DEEP = [f"{kind}_{count}" for kind in ("mlp", "conv") for count in (50, 100, 200, 400)]
for count in (50, 100, 200, 400):
    MODELS[f"mlp_{count}"] = lambda count=count: (chain(64, count), torch.randn(2, 64))  # type: ignore[misc]
    MODELS[f"conv_{count}"] = lambda count=count: (convnet(16, count), torch.randn(2, 3, 8, 8))  # type: ignore[misc]


def resident(process: int | str = "self") -> int:
    """Bytes in memory."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # a child that has ended
        return 0


def children() -> int:
    """Bytes in memory of the processes that this one has started."""
    found = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return sum(map(resident, found))


class Peak:
    """The most memory since it was made, and what the main thread was about then."""

    def __init__(self) -> None:
        self.base, self.own, self.together, self.phase = resident(), 0, 0, ""
        self.phases: dict[str, int] = {}
        self._main = threading.get_ident()

    def look(self) -> None:
        own = resident() - self.base
        self.together = max(self.together, own + children())
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        ours = [
            f"{Path(f.filename).stem}.{f.name}" for f in frames if "/surgery" in f.filename or "plugins" in f.filename
        ]
        place = " ".join(ours[1:])
        self.phases[place] = max(self.phases.get(place, 0), own)
        if own > self.own:
            self.own, self.phase = own, place


@contextmanager
def watched(seconds: float = 0.01) -> Iterator[Peak]:
    """Looks at the memory of this process all the while."""
    peak, done = Peak(), threading.Event()

    def look() -> None:
        while not done.wait(seconds):
            peak.look()

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


def row(name: str, step: str, rounds: int, count: int) -> dict[str, Any]:
    """One run, in this process."""
    import surgery

    torch.manual_seed(0)
    recipe = {"name": "scale", "passes": [{step: PASSES[step]}]}
    model, example = MODELS["tiny_vit" if "vit" in name else "tiny_chain"]()  # loads every library
    surgery.operate(model.eval(), example, recipe, data=[example] * 2, latency_rounds=rounds)
    model, example = MODELS[name]()
    model.eval()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with watched() as peak:
        start = time.perf_counter()
        operation = surgery.operate(model, example, recipe, data=[example] * 2, latency_rounds=rounds)
        seconds = time.perf_counter() - start
    top = sorted(peak.phases.items(), key=lambda item: -item[1])[:count]
    edits = sum(len(report.edits) for report in operation.reports)
    return {
        "model": name,
        "pass": step,
        "bytes": size,
        "peak": round(peak.own / size, 2),
        "with_children": round(peak.together / size, 2),
        "seconds": round(seconds, 2),
        "edits": edits,
        "at": peak.phase,
        **({"top": [(round(v / size, 2), k) for k, v in top]} if top else {}),
    }


def depth(name: str, step: str) -> dict[str, Any]:
    """Seconds of processor that the pass alone takes, in this process."""
    import surgery

    torch.manual_seed(0)
    registry = surgery.Registry.load()
    for warm in (True, False):
        model, example = MODELS["tiny_chain" if warm else name]()
        captured = surgery.capture(model.eval(), example)
        start = time.process_time()
        registry.find_pass(step)(**PASSES[step])(captured, surgery.Context(captured, surgery.Data.of([example] * 2)))
    return {"model": name, "pass": step, "cpu_seconds": round(time.process_time() - start, 2)}


def kept(found: dict[str, Any]) -> None:
    """Add the row to the page, with the machine and the command."""
    here = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    command = f'make scale SCALE="--models {found["model"]} --passes {found["pass"]}"'
    cells = [
        found.get(key, "") for key in ("model", "pass", "bytes", "peak", "with_children", "seconds", "cpu_seconds")
    ]
    with PAGE.open("a") as page:
        page.write(f"| {' | '.join(map(str, cells))} | {here} | `{command}` |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["quick_chain", "quick_vit", *DEEP], choices=MODELS)
    parser.add_argument("--passes", nargs="+", default=list(PASSES), choices=PASSES)
    parser.add_argument("--rounds", type=int, default=0, help="of timing in ONNX Runtime")
    parser.add_argument("--quick", action="store_true", help="one small row, which goes on no page")
    parser.add_argument("--top", type=int, default=0, help="of the places with the most memory")
    parser.add_argument("--row", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row or options.quick:
        name, step = options.models[0], options.passes[0]
        if options.quick:
            from surgery.export import runtime

            name, step, runtime.LARGE_FILE = "small_chain", "fold_batchnorm", 2**20  # sessions apart, as of large files
        print(json.dumps(depth(name, step) if name in DEEP else row(name, step, options.rounds, options.top)))
        return
    for name in options.models:
        for step in options.passes:
            command = [sys.executable, __file__, "--row", "--models", name, "--passes", step]
            command += ["--rounds", str(options.rounds), "--top", str(options.top)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode == 0:
                print(done.stdout.strip(), flush=True)
                kept(json.loads(done.stdout))
            else:
                print(f"{name}, {step}: ended with {done.returncode}", flush=True)


if __name__ == "__main__":
    main()
