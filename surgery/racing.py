"""Latency of modules in ONNX Runtime, paired."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from .captured import CapturedModel, capture
from .export.onnx import write_onnx
from .export.runtime import runtime_session
from .export.tensor_names import named_outputs
from .inputs import Inputs
from .measurement import Latency, latency
from .process import exclusive
from .torch_private import tree_map_only
from .tracing import evaluating


@exclusive()
def onnx_latency(
    contestants: Mapping[str, nn.Module], example_inputs: Any, *, rounds: int = 30, threads: int | None = None
) -> dict[str, Latency]:
    """Exports the modules and times them in ONNX Runtime on the CPU against the first of them; see `latency`.

    Raises:
        CaptureError, ExportError: a module does not go into an ONNX file.
        InputError: there are no contestants, or `rounds` is less than 1.
    """
    if not contestants:
        return latency({}, rounds=rounds)
    modules = list(contestants.values())
    together = capture(_Together(modules), Inputs.of(modules[0], example_inputs))
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        sessions = [runtime_session(file, threads=threads) for file in export_each(together, Path(folder))]
        calls = {name: partial(run, together.inputs) for name, run in zip(contestants, sessions, strict=True)}
        return latency(calls, rounds=rounds)


def export_each(together: CapturedModel, folder: Path) -> list[Path]:
    """A file for each result of `together`, cut out of one file: most of the time of a small export is the same for
    all models."""
    whole = write_onnx(together, together.inputs, folder / "whole.onnx")
    graph = onnx.load(whole, load_external_data=False).graph
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    files: list[Path] = []
    for count in _counts(together):
        files.append(folder / f"{len(files)}.onnx")
        onnx.utils.extract_model(str(whole), str(files[-1]), inputs, outputs[:count])
        outputs = outputs[count:]
    return files


def _counts(together: CapturedModel) -> list[int]:
    """How many tensors each result has."""
    with evaluating(together):
        return [len(named_outputs(result)) for result in together(*together.inputs.args, **together.inputs.kwargs)]


class _Together(nn.Module):
    """Every contestant on the same inputs."""

    def __init__(self, contestants: list[nn.Module]) -> None:
        super().__init__()
        self.contestants = nn.ModuleList(contestants)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [self._alone(contestant, args, kwargs) for contestant in self.contestants]

    def _alone(self, contestant: nn.Module, args: Any, kwargs: Any) -> Any:
        own_args, own_kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))  # another may write into them
        return contestant(*own_args, **own_kwargs)
