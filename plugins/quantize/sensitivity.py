"""Which layers stay float so that the outputs keep a ratio of signal to quantisation noise.

    SQNR = 10 log₁₀ Σ y² / Σ (y - ŷ)²  in dB, over the calibration samples, of the output y that has the least

Every layer is rounded alone, its input, weight and output; the noise of layers adds up (Lin et al. 2016,
arXiv:1511.06393, section 3), so that those which make most of it are the fewest that must stay float.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

import surgery
from surgery import CapturedModel, Context, Layer
from surgery.graph import tree_leaves

from .placement import Placement
from .scheme import Scheme

SAMPLES = 64


class Rounding(fx.Interpreter):
    """Runs the float model of `placement` with some of its `layers` rounded to the nearest."""

    def __init__(
        self,
        placement: Placement,
        layers: Sequence[Layer],
        schemes: Mapping[fx.Node, Scheme],
        weight_scheme: Callable[[Tensor], Scheme],
    ) -> None:
        super().__init__(placement.model)
        self._placement, self._schemes = placement, schemes
        self._layers = {node: layer for layer in layers for node in layer.nodes}
        weights = {layer.name: surgery.weight_of(layer) for layer in layers}
        self._weights = {name: weight_scheme(w).round(w) for name, w in weights.items()}
        self._results = {placement.result(node): layer.name for node, layer in self._layers.items()}
        self._active: Collection[str] = ()

    def outputs(self, tensors: Sequence[Tensor], active: Collection[str]) -> list[Tensor]:
        """What the model gives for the `tensors` of its inputs where the layers named `active` are rounded."""
        self._active = active
        with torch.no_grad():
            found = self.run(*tensors, enable_io_processing=False)
        return [t.double() for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]

    def run_node(self, n: fx.Node) -> Any:
        layer = self._layers.get(n)
        value = self._call(n, layer) if layer and layer.name in self._active else super().run_node(n)
        return self._rounded(n, value) if self._results.get(n) in self._active else value

    def _call(self, n: fx.Node, layer: Layer) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, weight = self._rounded(n.args[0], args[0]), self._weights[layer.name]
        if n.op == "call_module":
            return functional_call(self.fetch_attr(str(n.target)), {"weight": weight}, (x, *args[1:]), kwargs)
        read = layer.weight_node
        rest = [weight if node is read else value for node, value in zip(n.args[1:], args[1:], strict=True)]
        keyed = {key: weight if n.kwargs[key] is read else value for key, value in kwargs.items()}
        return n.target(x, *rest, **keyed)  # type: ignore[operator]

    def _rounded(self, node: Any, value: Any) -> Any:
        root = self._placement.values.get(node)
        return value if root is None else self._schemes[root].round(value)


class Sensitivity:
    """Measures on the first calibration samples."""

    def __init__(self, context: Context, reference: CapturedModel) -> None:
        self.samples = list(_samples(context, reference))
        self.wanted = [_outputs(reference, tensors) for tensors in self.samples]

    def alone(self, run: Rounding, names: Collection[str]) -> dict[str, float]:
        """SQNR with each layer rounded alone, the worst first."""
        found = {name: self.sqnr([run.outputs(tensors, {name}) for tensors in self.samples]) for name in names}
        return dict(sorted(found.items(), key=lambda item: item[1]))

    def fewest(self, run: Rounding, order: Sequence[str], bound: float) -> int:
        """How many of the first in `order` must stay float for the rest to reach `bound`, found by halving."""
        low, high = 0, len(order)
        while low < high:
            middle = (low + high) // 2
            rounded = set(order[middle:])
            if self.sqnr([run.outputs(tensors, rounded) for tensors in self.samples]) >= bound:
                high = middle
            else:
                low = middle + 1
        return low

    def of(self, model: CapturedModel) -> float:
        """SQNR of a quantised model."""
        return self.sqnr([_outputs(model, tensors) for tensors in self.samples])

    def sqnr(self, given: Sequence[Sequence[Tensor]]) -> float:
        """Of outputs for every batch."""
        worst = math.inf
        for wanted, found in zip(zip(*self.wanted, strict=True), zip(*given, strict=True), strict=True):
            signal = sum(float(w.square().sum()) for w in wanted)
            noise = sum(float((w - f).square().sum()) for w, f in zip(wanted, found, strict=True))
            worst = min(worst, 10 * math.log10(max(signal, 1e-300) / noise) if noise else math.inf)
        return worst


def _outputs(model: CapturedModel, tensors: Sequence[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        found = fx.Interpreter(model).run(*tensors, enable_io_processing=False)
    return [t.double() for t in tree_leaves(found) if isinstance(t, Tensor) and t.is_floating_point()]


def _samples(context: Context, model: CapturedModel) -> Iterator[list[Tensor]]:
    """Inputs in the order of the graph, `SAMPLES` samples of them where the batch is open."""
    left = SAMPLES
    for batch in context.data.calibration or ():
        inputs = surgery.Inputs.of(model, batch)
        if model.dynamic_batch and inputs.batch_size > left:
            inputs = inputs.with_batch(left)
        given = inputs.named_tensors
        yield [given[name] for name in model.inputs.named_tensors]
        left -= inputs.batch_size
        if left <= 0:
            return
