"""Which grouped convolutions ONNX Runtime's CPU kernels are fast with, in float and in integers.

    make grouped-bench                  both tables
    make grouped-bench GROUPED="--rounds 60 --batch 8"
    make grouped-bench GROUPED="--models torchvision/resnext50_32x4d timm/dpn48b timm/fastvit_t8"

First: a grouped convolution between two pointwise ones, int8 against float32. Second: m depthwise filters a channel,
as one convolution of C groups or as m copies of the input with a filter each (what `depthwise_separable` writes),
each with a pointwise convolution behind it, against the dense convolution. With `--models`, instead: whole networks
in integers as `quantize` has them and with every group in integers, against float32. One thread, paired, medians.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from models import TOOL, load_tool
from surgery_plugins.quantize import Quantize
from surgery_plugins.quantize.targets import ONNXRUNTIME_CPU
from torch import Tensor, nn

import surgery
from surgery import Context, Data, Registry, hookimpl
from surgery.export.checked import export_onnx
from surgery.export.runtime import runtime_session
from surgery.measurement import latency
from surgery.testing import randomise

GROUPED = [(128, 128, g, 28) for g in (128, 64, 32, 16, 8, 4)] + [(64, 64, 16, 56), (256, 256, 32, 14)]
GROUPED += [(512, 512, 32, 7), (64, 128, 64, 56), (128, 256, 128, 28)]
"""Channels read and given, groups, height and width."""
SEPARABLE = [(16, 32), (32, 16), (64, 8), (128, 28)]
"""Channels, height and width."""
MULTIPLIERS = (1, 2, 3, 4)


class Copies(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x] * self.count, 1)


def registry() -> Registry:
    """With a target that computes every convolution in integers."""
    every = replace(ONNXRUNTIME_CPU, name="every-group", least_group=1)
    return Registry.load([type("Plugin", (), {"surgery_targets": hookimpl(lambda self: [every])})()])


def timed(networks: Mapping[str, nn.Module], x: Tensor, rounds: int) -> dict[str, tuple[Any, Any]]:
    """Every network in float and in integers, against the first in float."""
    plugins = registry()
    step = Quantize(runtime="every-group", vnni=True)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for name, network in networks.items():
            captured = surgery.capture(network.eval(), x)
            integers, _ = step(captured, Context(captured, Data.of([x]), registry=plugins))
            for suffix, model in (("float", captured), ("int8", integers)):
                file = export_onnx(model, x, Path(folder) / f"{name}_{suffix}.onnx")
                calls[f"{name} {suffix}"] = partial(runtime_session(file, threads=1), x)
        found = latency(calls, rounds=rounds)
    return {name: (found[f"{name} float"], found[f"{name} int8"]) for name in networks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=[], help="of torchvision or timm, where these are installed")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds them")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.models:
        whole(options)
        return
    print("| channels | groups | read, given by a group | plane | int8 faster |\n|---|---|---|---|---|")
    for read, given, groups, size in GROUPED:
        network = nn.Sequential(
            nn.Conv2d(read, read, 1), nn.Conv2d(read, given, 3, 1, 1, groups=groups), nn.Conv2d(given, read, 1)
        )
        x = torch.randn(options.batch, read, size, size)
        plain, integers = timed({"grouped": network}, x, options.rounds)["grouped"]
        part = f"{read // groups}, {given // groups}"
        print(
            f"| {read} → {given} | {groups} | {part} | {size}×{size} | {integers.ratio / plain.ratio:.2f} |", flush=True
        )
    print("\n| channels | plane | m | one convolution: float, int8 | copies: float, int8 |\n|---|---|---|---|---|")
    for channels, size in SEPARABLE:
        x = torch.randn(options.batch, channels, size, size)
        for m in MULTIPLIERS:
            found = timed(separable(channels, m), x, options.rounds)
            figures = [f"{a.ratio:.2f}, {b.ratio:.2f}" for a, b in (found["one"], found["copies"])]
            print(f"| {channels} | {size}×{size} | {m} | {' | '.join(figures)} |", flush=True)


def whole(options: argparse.Namespace) -> None:
    tool, plugins = load_tool(options.tool), registry()
    print("| network | int8 faster | every group in int8 |\n|---|---|---|")
    for name in options.models:
        model, (example,) = tool.build(name)
        captured = surgery.capture(randomise(model.eval()), example)
        context = Context(captured, Data.of([torch.randn_like(example)]), registry=plugins)
        with tempfile.TemporaryDirectory() as folder:
            models = {"float": captured}
            for runtime in (ONNXRUNTIME_CPU.name, "every-group"):
                models[runtime], _ = Quantize(runtime=runtime, vnni=True)(captured, context)
            files = {key: export_onnx(m, m.inputs, Path(folder) / f"{key}.onnx") for key, m in models.items()}
            calls = {key: partial(runtime_session(file, threads=1), example) for key, file in files.items()}
            found = latency(calls, rounds=options.rounds)
        print(f"| {name} | {' | '.join(f'{found[key].ratio:.2f}' for key in list(found)[1:])} |", flush=True)


def separable(channels: int, multiplier: int) -> dict[str, nn.Module]:
    """Three layers each: dense, and the two forms of a separable one."""
    inner = channels * multiplier
    dense = [nn.Conv2d(channels, channels, 3, 1, 1) for _ in range(3)]
    one, copies = [], []
    for _ in range(3):
        one += [nn.Conv2d(channels, inner, 3, 1, 1, groups=channels), nn.Conv2d(inner, channels, 1)]
        copies += [Copies(multiplier), nn.Conv2d(inner, inner, 3, 1, 1, groups=inner), nn.Conv2d(inner, channels, 1)]
    return {"dense": nn.Sequential(*dense), "one": nn.Sequential(*one), "copies": nn.Sequential(*copies)}


if __name__ == "__main__":
    main()
