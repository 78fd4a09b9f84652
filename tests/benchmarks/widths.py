"""How long ONNX Runtime takes for convolutions by their channels, in float and in integers.

    make widths
    make widths WIDTHS="--rounds 300"

Three pairs of 3×3 convolutions, C → w and w → C, with a ReLU behind each; microseconds of one convolution: the whole
file's time over six, which has the quantisation of the input in it. One thread, batch of 1, medians of calls in turn.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

import torch
from surgery_plugins.quantize import Quantize
from torch import nn

import surgery
from surgery import Context, Data
from surgery.export.checked import export_onnx
from surgery.export.runtime import runtime_session
from surgery.measurement import latency

SHAPES = [
    (16, 32, (4, 6, 8, 10, 12, 14, 16)),
    (32, 16, (8, 12, 16, 20, 24, 28, 32)),
    (64, 8, (16, 24, 32, 40, 48, 56, 64)),
    (128, 14, (32, 48, 56, 64, 80, 96, 112, 128)),
]
"""Channels C, height and width, and the w."""
PAIRS = 3


def chain(channels: int, width: int) -> nn.Sequential:
    ends = [(channels, width), (width, channels)] * PAIRS
    return nn.Sequential(*(m for a, b in ends for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU()))).eval()


def microseconds(channels: int, size: int, widths: tuple[int, ...], rounds: int) -> dict[tuple[str, int], float]:
    """Of one convolution, by kind of number and width."""
    x = torch.randn(1, channels, size, size)
    with tempfile.TemporaryDirectory() as folder:
        calls = {}
        for width in widths:
            captured = surgery.capture(chain(channels, width), x)
            integers, _ = Quantize()(captured, Context(captured, Data.of([x])))
            for kind, model in (("float", captured), ("int8", integers)):
                file = export_onnx(model, x, Path(folder) / f"{kind}_{width}.onnx")
                calls[kind, width] = partial(runtime_session(file, threads=1), x)
        found = latency({f"{kind} {width}": call for (kind, width), call in calls.items()}, rounds=rounds)
    return {(kind, width): 1e6 * found[f"{kind} {width}"].seconds / (2 * PAIRS) for kind, width in calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    torch.manual_seed(0)
    print("| C | plane | w: float | w: int8 |\n|---|---|---|---|")
    for channels, size, widths in SHAPES:
        found = microseconds(channels, size, widths, options.rounds)
        cells = [" ".join(f"{w}: {found[kind, w]:.0f}," for w in widths).rstrip(",") for kind in ("float", "int8")]
        print(f"| {channels} | {size}×{size} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
