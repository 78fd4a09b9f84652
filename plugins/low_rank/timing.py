"""Whether ONNX Runtime computes a chain faster than the layer whose place it would take."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import surgery
from surgery import Layer

from .cost import Rung
from .method import Method

ROUNDS = 25


class Stopwatch:
    """Times layers of the same form once."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self._known: dict[Any, float] = {}

    def gain(self, layer: Layer, rung: Rung) -> float:
        """The layer's time / the chain's, on the sizes of the layer's first call, with random weights."""
        module: Any = layer.module
        sizes = surgery.shape(layer.nodes[0].args[0])  # type: ignore[arg-type]
        key = (type(module), module.extra_repr(), sizes, rung.ranks)
        if key not in self._known:
            self._known[key] = self._measured(module, sizes, rung)
        return self._known[key]

    def _measured(self, module: Any, sizes: tuple[int, ...], rung: Rung) -> float:
        factors = self.method.random(tuple(module.weight.shape), rung.ranks)
        chain = nn.Sequential(*factors.parts(module, module.bias).values())
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(sizes, generator=generator)
        found = surgery.onnx_latency({"layer": nn.Sequential(module), "chain": chain}, example, rounds=ROUNDS)
        return found["chain"].ratio
