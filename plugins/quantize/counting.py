"""What ONNX Runtime made of a file: the operators of the graph that it has optimised."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAYERS = frozenset({"QLinearConv", "QGemm", "QLinearMatMul", "MatMulIntegerToFloat"})
"""Kernels of layers and products that compute with integers."""
FLOAT_LAYERS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
"""Those that do not."""


@dataclass(frozen=True)
class Kernels:
    """The operators of an optimised graph."""

    count: Counter[str]
    stranded: tuple[str, ...]
    """Layers and products that compute in float what was dequantised before and is quantised after."""

    @property
    def integer_layers(self) -> int:
        return sum(self.count[kind] for kind in LAYERS)

    @property
    def float_layers(self) -> int:
        return sum(self.count[kind] for kind in FLOAT_LAYERS)


def kernels(path: str | Path) -> Kernels:
    """What is in the graph of `path` once ONNX Runtime has optimised it for this machine's CPU."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(options.optimized_model_filepath).graph.node
    return Kernels(Counter(node.op_type for node in nodes), tuple(_stranded(nodes)))


def _stranded(nodes: Any) -> list[str]:
    made_by = {name: node.op_type for node in nodes for name in node.output}
    readers: dict[str, set[str]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    return [
        node.name
        for node in nodes
        if node.op_type in FLOAT_LAYERS
        and any(made_by.get(name) == "DequantizeLinear" for name in node.input)
        and any("QuantizeLinear" in readers.get(name, ()) for name in node.output)
    ]
