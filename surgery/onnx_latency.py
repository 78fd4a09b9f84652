"""Latency of modules in ONNX Runtime, paired."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from .captured import capture
from .export.onnx import export_onnx
from .export.runtime import runtime_session
from .measurement import Latency, latency


def onnx_latency(
    contestants: Mapping[str, nn.Module], example_inputs: Any, *, rounds: int = 30, threads: int | None = None
) -> dict[str, Latency]:
    """Exports the modules and times them in ONNX Runtime on the CPU against the first of them; see `latency`.

    Raises:
        CaptureError, ExportError: a module does not go into an ONNX file.
        InputError: there are no contestants, or `rounds` is less than 1.
    """
    calls = {}
    with tempfile.TemporaryDirectory(prefix="surgery-") as folder:
        for number, (name, module) in enumerate(contestants.items()):
            captured = capture(module, example_inputs)
            path = export_onnx(captured, captured.inputs, Path(folder) / f"{number}.onnx")
            calls[name] = partial(runtime_session(path, threads=threads), captured.inputs)
        return latency(calls, rounds=rounds)
