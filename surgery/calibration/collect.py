"""Gathers statistics of layers and nodes while a captured model runs."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..captured import CapturedModel
from ..errors import InputError, PluginError
from ..graph import Layer, Recorder
from ..inputs import Inputs
from .moments import Moments, Scatter
from .ranges import Histogram, Range, RunningHistogram, RunningRange
from .unfolding import can_unfold, groups_and_features, unfold

Want = Literal["gram", "mean", "moments", "ranges", "histograms"]
Item = Layer | fx.Node


@dataclass(frozen=True)
class Statistics:
    """What was asked for about one layer or node, over all its calls; None where it was not asked for."""

    input: Moments | None = None
    """Of the unfolded input: `mean` without, `gram` with the covariance."""
    output: Moments | None = None
    """`moments`: of the output per channel, (1, channels)."""
    input_range: Range | None = None
    output_range: Range | None = None
    input_histogram: Histogram | None = None
    output_histogram: Histogram | None = None

    def has(self, want: Want) -> bool:
        if want == "gram":
            return self.gram_bytes > 0
        held = {"mean": self.input, "moments": self.output, "ranges": self.output_range}
        return held.get(want, self.output_histogram) is not None

    @property
    def unfolded(self) -> Moments:
        """`input`, which must have been asked for."""
        assert self.input is not None, "ask for 'gram' or 'mean'"
        return self.input

    @property
    def gram_bytes(self) -> int:
        covariance = self.input.covariance if self.input else None
        return 0 if covariance is None else covariance.nbytes

    def merged(self, newer: Statistics) -> Statistics:
        """Both, `newer` where both have something."""
        values = {f.name: getattr(newer, f.name) for f in fields(self)}
        return Statistics(**{name: getattr(self, name) if v is None else v for name, v in values.items()})


def gram_bytes(item: Item) -> int:
    """Size of the layer's covariance; 0 where it has none."""
    if not isinstance(item, Layer) or not can_unfold(item.module):
        return 0
    groups, features = groups_and_features(item.module)
    return groups * features**2 * 8


class Collector:
    """Adds up what is wanted about one layer or node over its calls."""

    def __init__(self, item: Item, want: Sequence[Want], chunk_bytes: int, batch_dims: Sequence[int] = (0,)) -> None:
        """`batch_dims`: where the batch stands in the value of a node."""
        self.item, self.want, self._chunk_bytes, self._batch_dims = item, want, chunk_bytes, batch_dims
        self.module = item.module if isinstance(item, Layer) else None
        unfolds = "gram" in want or "mean" in want
        if unfolds and not (self.module and can_unfold(self.module)):
            kind = type(self.module).__name__ if self.module else "a node that is no layer"
            raise PluginError(
                f"{item.name}: the unfolded input of {kind} is not defined",
                fix="'gram' and 'mean' exist for convolutions, transposed convolutions and linear layers",
            )
        self._running: dict[str, Scatter | RunningRange | RunningHistogram] = {}  # by field of Statistics
        if unfolds:
            self._running["input"] = Scatter("gram" in want)
        if "moments" in want:
            self._running["output"] = Scatter(False)
        for side in ("output", "input") if self.module else ("output",):
            if "ranges" in want:
                self._running[f"{side}_range"] = RunningRange()
            if "histograms" in want:
                self._running[f"{side}_histogram"] = RunningHistogram()

    @property
    def calls(self) -> list[str]:
        """Names of the nodes to watch."""
        return [node.name for node in self.item.nodes] if isinstance(self.item, Layer) else [self.item.name]

    def add(self, x: Any, y: Any) -> None:
        """One call: first argument and result."""
        if not isinstance(y, Tensor):
            raise PluginError(f"{self.item.name} gives {type(y).__name__}; statistics exist for tensors only")
        for field, running in self._running.items():
            if field == "input" and self.module:
                for rows in unfold(self.module, x, self._chunk_bytes):
                    running.add(rows)
            else:
                values = _by_channel(x if field.startswith("input") else y, self.module, self._batch_dims)
                running.add(values.unsqueeze(0) if isinstance(running, Scatter) else values)

    def check(self, batch: int) -> None:
        """Raises InputError where the layer has seen values that are not finite."""
        if not all(running.finite for running in self._running.values() if isinstance(running, Scatter)):
            raise InputError(
                f"{self.item.name} computes with NaN or infinity on this batch",
                at=f"calibration batch {batch}",
                fix="the model overflows on these samples; remove them, or give a model in float32",
            )

    def finish(self) -> Statistics:
        results: dict[str, Any] = {field: running.finish() for field, running in self._running.items()}
        return Statistics(**results)


_CHANNELS_LAST = (nn.Linear, nn.Bilinear, nn.LayerNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)


def _by_channel(value: Tensor, module: nn.Module | None, batch_dims: Sequence[int]) -> Tensor:
    """As (rows, channels): the last dimension for layers that work along it, otherwise dimension 1; of a node the first
    of these where the batch does not stand, which has another size in every batch."""
    if isinstance(module, _CHANNELS_LAST):
        order = [value.ndim - 1]
    else:
        order = [dim for dim in (1, value.ndim - 1, *range(value.ndim)) if module or dim not in batch_dims]
    if value.ndim < 2 or not order:
        return value.reshape(-1, 1)
    value = value.movedim(order[0], -1)
    return value.reshape(-1, value.shape[-1])


class _Complete(Exception):
    """Every node that was asked for has been seen."""


class Watcher(Recorder):
    """Runs a model as far as the nodes in `watched` and hands each call's first argument and result to `see_call`."""

    def __init__(self, model: fx.GraphModule, watched: Iterable[str]) -> None:
        super().__init__(model)
        self.watched = set(watched)
        self._left = 0

    def see_call(self, name: str, first: Any, value: Any) -> None:
        raise NotImplementedError

    def see(self, node: fx.Node, value: Any) -> None:
        if node.name not in self.watched:
            return
        first = node.args[0] if node.args else None
        self.see_call(node.name, self.env[first] if isinstance(first, fx.Node) else first, value)
        self._left -= 1
        if not self._left:
            raise _Complete

    def watch(self, inputs: Inputs) -> None:
        self._left = len(self.watched)
        try:
            self.run_inputs(inputs)
        except _Complete:
            self.env.clear()


class Gatherer(Watcher):
    """Hands every call to its collectors."""

    def __init__(self, model: fx.GraphModule, collectors: Iterable[Collector]) -> None:
        self._by_call: dict[str, list[Collector]] = {}
        nodes = {node.name for node in model.graph.nodes}
        for collector in collectors:
            if not nodes.issuperset(collector.calls):
                name = collector.item.name
                raise PluginError(
                    f"{name} is no longer called in this model", fix="list its layers after the last edit"
                )
            for call in collector.calls:
                self._by_call.setdefault(call, []).append(collector)
        super().__init__(model, self._by_call)

    def see_call(self, name: str, first: Any, value: Any) -> None:
        for collector in self._by_call[name]:
            collector.add(first, value)


def placed(model: CapturedModel, device: torch.device) -> CapturedModel:
    """`model` itself where it lies on `device`, else a copy there. Its nodes have the same names."""
    tensor = next(chain(model.parameters(), model.buffers()), None)
    if tensor is None or tensor.device.type == device.type:
        return model
    return copy.deepcopy(model).to(device)
