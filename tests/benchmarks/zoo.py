"""Captures 80 torchvision and 24 timm architectures and compares each with eager PyTorch.

    make zoo                                   all of them
    make zoo ZOO="resnet18 vit_b_16 --export"  some of them, and their ONNX files as well

Seconds are `torch.export`'s own, then capture's, one after the other in the same process with the same dynamic batch;
capture also runs model and graph on two batches to compare them, which large models feel. Errors are
relative to the largest expected value: `output` on the example and on a batch of three, `gradient` over every parameter
and buffer after one training step from the same seed. What an eval graph does not have, stochastic depth and auxiliary
heads, is switched off in eager for that step. `lost` counts distinct tensors of the state dict that have no name left.
"""

from __future__ import annotations

import argparse
import copy
import gc
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from models import TOOL, batch, chosen, drop_auxiliary_heads, leaves, load_tool, plain_export, timed
from torch import Tensor, nn

from surgery.captured import CapturedModel, capture, relative_error
from surgery.names import tensors

STOCHASTIC_DEPTH = ("StochasticDepth", "DropPath")
HEADER = ("model", "parameters", "export", "capture", "ratio", "output", "gradient", "lost")
COLUMNS = "{:38} {:>12} {:>8} {:>8} {:>6} {:>8} {:>9} {:>5}".format(*HEADER)


@dataclass
class Result:
    """One row. None = not measured."""

    parameters: int
    export_seconds: float
    capture_seconds: float
    output: float
    gradient: float | None
    why_no_gradient: str
    lost: tuple[str, ...]
    dynamic: bool
    parity: float | None

    def __str__(self) -> str:
        ratio = self.capture_seconds / self.export_seconds
        gradient = "-" if self.gradient is None else f"{self.gradient:.1e}"
        row = (
            f"{self.parameters:>12,} {self.export_seconds:>7.2f}s {self.capture_seconds:>7.2f}s {ratio:>6.2f}"
            f" {self.output:>8.1e} {gradient:>9} {len(self.lost):>5}"
        )
        notes = [self.why_no_gradient, "" if self.dynamic else "batch fixed", ", ".join(self.lost[:2])]
        notes += [] if self.parity is None else [f"ONNX parity {self.parity:.1e}"]
        return "  ".join([row, *filter(None, notes)])


def examine(model: nn.Module, inputs: tuple[Tensor, ...], *, limit: int, export: bool) -> Result:
    parameters = sum(p.numel() for p in model.parameters())
    export_seconds = timed(lambda: plain_export(model, inputs))[0]
    capture_seconds, captured = timed(lambda: capture(model, inputs))
    gradient, why = (None, f"above {limit:,} parameters")
    output = max(output_error(model, captured, batch(inputs, size)) for size in (1, 3))
    lost = lost_tensors(model, captured)
    parity = None
    if parameters <= limit:
        parity = onnx_parity(captured) if export else None
        gradient, why = gradient_error(model, captured, batch(inputs, 2))
    return Result(
        parameters, export_seconds, capture_seconds, output, gradient, why, lost, captured.dynamic_batch, parity
    )


def output_error(model: nn.Module, captured: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        expected, actual = leaves(model(*inputs)), leaves(captured(*inputs))
    return max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))


def gradient_error(model: nn.Module, captured: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[float | None, str]:
    """Gradients and buffers after one training step, infinite where one is missing; or why eager cannot be compared."""
    eager, graph = copy.deepcopy(model).train(), captured.train()
    for module in eager.modules():
        if type(module).__name__ in STOCHASTIC_DEPTH:
            module.eval()
    drop_auxiliary_heads(eager)
    expected, actual = training_step(eager, inputs), training_step(graph, inputs)
    if expected is None:
        return None, "no gradient: other outputs in training"
    assert actual is not None
    lost = tensors(eager).keys() - tensors(graph).keys()
    missing = {name for name in expected.keys() - actual.keys() if name.removesuffix(".grad") not in lost}
    common = expected.keys() & actual.keys()
    return float("inf") if missing else max(relative_error(actual[name], expected[name]) for name in common), ""


def training_step(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor] | None:
    torch.manual_seed(0)
    output = leaves(model(*inputs))
    if len(output) != 1:
        return None
    output[0].square().mean().backward()
    named = model.named_parameters(remove_duplicate=False)
    gradients = {f"{name}.grad": p.grad for name, p in named if p.grad is not None}
    return gradients | {name: buffer.clone() for name, buffer in model.named_buffers(remove_duplicate=False)}


def lost_tensors(model: nn.Module, captured: nn.Module) -> tuple[str, ...]:
    names: dict[int, list[str]] = {}
    state = model.state_dict().keys()
    for name, tensor in tensors(model).items():
        if name in state:
            names.setdefault(id(tensor), []).append(name)
    kept = captured.state_dict().keys()
    return tuple(group[0] for group in names.values() if not kept & set(group))


def onnx_parity(captured: CapturedModel) -> float:
    from surgery.export.checked import export_onnx
    from surgery.parity import parity

    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(captured, captured.inputs, Path(folder) / "model.onnx")
        return parity(captured, path, [captured.inputs]).relative_error


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="such as resnet18 or timm/cait_xxs24_224; all without one")
    parser.add_argument("--tool", type=Path, default=TOOL, help="zoo.py, which builds the models")
    parser.add_argument("--export", action="store_true", help="compare the ONNX file in ONNX Runtime as well")
    parser.add_argument(
        "--limit", type=int, default=150_000_000, help="parameters above which no step is trained and no file written"
    )
    return parser.parse_args()


def main() -> int:
    options = arguments()
    tool = load_tool(options.tool)
    names = chosen(tool, options.names)
    warnings.simplefilter("ignore")
    examine(nn.Linear(2, 2), (torch.rand(1, 2),), limit=0, export=False)  # first-call costs of torch.export
    results: list[Result] = []
    print(COLUMNS, flush=True)
    for name in names:
        print(f"{name:38} ", end="", flush=True)
        torch.manual_seed(0)
        try:
            model, inputs = tool.build(name)
            results.append(examine(model, inputs, limit=options.limit, export=options.export))
            print(results[-1], flush=True)
        except Exception as error:
            print(f"FAILED {type(error).__name__}: {error}", flush=True)
        model = inputs = None
        gc.collect()
    print(*summary(results, len(names)), sep="\n")
    return int(len(results) < len(names))


def summary(results: list[Result], wanted: int) -> list[str]:
    if not results:
        return [f"0 of {wanted} captured"]
    ratios = sorted(r.capture_seconds / r.export_seconds for r in results)
    gradients = [r.gradient for r in results if r.gradient is not None]
    export, whole = sum(r.export_seconds for r in results), sum(r.capture_seconds for r in results)
    fixed, losing = sum(not r.dynamic for r in results), sum(bool(r.lost) for r in results)
    middle = ratios[len(ratios) // 2]
    return [
        f"largest output error {max(r.output for r in results):.1e}",
        f"largest gradient error {max(gradients, default=0.0):.1e} over {len(gradients)} models",
        f"seconds: export {export:.0f}, capture {whole:.0f}; ratio median {middle:.2f}, largest {ratios[-1]:.2f}",
        f"fixed batch: {fixed}; models with lost tensors: {losing}",
        f"{len(results)} of {wanted} captured",
    ]


if __name__ == "__main__":
    sys.exit(main())
