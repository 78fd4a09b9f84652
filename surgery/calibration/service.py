"""The calibration service that `Context.calibration` gives to passes.

    calibration.collect(model, layers, ("gram",))   moments of each layer's unfolded input, and more, from one run
    calibration.sweep(model, steps)                 layer by layer, with what each should give in a reference

Memory: the covariances held at a time, cached ones included, keep to `gram_bytes`; layers are grouped to fit and the
data is streamed once per group. Unfolded inputs keep to `chunk_bytes`. Data whose order changes between iterations (a
shuffling loader) gives the same statistics up to rounding, unless `samples` cuts it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import torch

from ..captured import CapturedModel
from ..context import Progress, silent
from ..errors import PluginError
from ..graph import Layer, batch_dims
from ..inputs import Inputs
from ..names import tensors
from ..torch_private import version_of
from ..tracing import evaluating
from .batches import checked_batches
from .collect import Collector, Gatherer, Item, Statistics, Want, gram_bytes, placed
from .sweep import Step, Task, live_bytes, sweep

AnyItem = TypeVar("AnyItem", bound=Item)
_Known = dict[tuple[bool, str], Statistics]


class Calibration:
    """Statistics over `batches`, an iterable of model inputs that can be iterated more than once.

    `samples` limits how many samples are used, None = all. `device` is where the models run; results lie on the CPU.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        original: CapturedModel,
        device: str | torch.device = "cpu",
        progress: Progress = silent,
        samples: int | None = None,
        gram_bytes: int = 2**30,
        chunk_bytes: int = 2**23,
        sweep_bytes: int = 2**31,
    ) -> None:
        self.batches, self.original, self.device, self.progress = batches, original, torch.device(device), progress
        self.samples, self.gram_bytes, self.chunk_bytes = samples, gram_bytes, chunk_bytes
        self.sweep_bytes = sweep_bytes
        self._cache: list[tuple[_Version, _Known]] = []

    def collect(self, model: CapturedModel, items: Iterable[Item], want: Sequence[Want]) -> dict[str, Statistics]:
        """`stream` as a dict by name, for layers or for nodes. Holds all covariances, whatever `gram_bytes` says."""
        return {item.name: statistics for item, statistics in self.stream(model, items, want)}

    def stream(
        self, model: CapturedModel, items: Iterable[AnyItem], want: Sequence[Want]
    ) -> Iterator[tuple[AnyItem, Statistics]]:
        """Each layer or node of `model` with its statistics. Edit the model after the last one came, not before.

        `want`: `gram` (covariance and mean of the unfolded input), `mean` (mean and variance of it), `moments` (of the
        output per channel), `ranges` and `histograms` (of input and output; of a node's value). Channels are dimension
        1, the last dimension for linear layers and layer normalisation. Calls of one layer add up.

        Raises:
            InputError: the data is empty, does not fit the model or holds NaN, or the model gives NaN on it.
            PluginError: the unfolded input of another layer than a (transposed) convolution or linear layer was asked
                for, or the model was edited on the way.
        """
        version = _Version(model)
        for group in self._groups(items, want):
            if not version.matches(model):
                raise PluginError(
                    "the model was edited while its statistics were streamed", fix="edit after the last one"
                )
            known = self._known(model, version)
            found = {_key(item): known.get(_key(item), Statistics()) for item in group}
            missing = [item for item in group if not all(found[_key(item)].has(w) for w in want)]
            if missing:
                self._make_room(sum(map(gram_bytes, group)) if "gram" in want else 0, found)
                found |= {key: found[key].merged(new) for key, new in self._run(model, missing, want).items()}
                known |= found
            yield from ((item, found[_key(item)]) for item in group)

    def sweep(
        self, model: CapturedModel, steps: Iterable[Step], reference: CapturedModel | None = None
    ) -> Iterator[Task]:
        """One task per step in the order of execution: solve it and replace the layer's weights before the next one.

        `reference` (default: the original) is what the aims are about. All samples go through at a time; where their
        values would take more than `sweep_bytes`, only as many samples as fit are used. Runs where the models lie.

        Raises:
            InputError: as for `stream`.
        """
        there = reference or self.original
        fitting = max(1, self.sweep_bytes // max(1, live_bytes(model) + live_bytes(there)))
        limit = fitting if self.samples is None else min(fitting, self.samples)
        batches = list(checked_batches(model, self.batches, limit))
        yield from sweep(model, there, batches, steps, self.chunk_bytes)

    def _run(self, model: CapturedModel, items: Sequence[Item], want: Sequence[Want]) -> _Known:
        nodes = any(not isinstance(item, Layer) for item in items)
        where = batch_dims(model, model.inputs, free_batch=model.dynamic_batch) if nodes else {}
        collectors = {_key(item): Collector(item, want, self.chunk_bytes, where.get(item.name, (0,))) for item in items}
        here = placed(model, self.device)
        gatherer = Gatherer(here, collectors.values())
        for number, inputs in enumerate(self._inputs(model, f"calibrating {len(items)} layers")):
            with evaluating(here):
                gatherer.watch(inputs)
            for collector in collectors.values():
                collector.check(number)
        return {key: collector.finish() for key, collector in collectors.items()}

    def _inputs(self, model: CapturedModel, what: str) -> Iterator[Inputs]:
        total = len(self.batches) if isinstance(self.batches, Sized) else 0
        for number, inputs in enumerate(checked_batches(model, self.batches, self.samples)):
            self.progress(what, number, total)
            yield inputs.to(self.device)

    def _groups(self, items: Iterable[AnyItem], want: Sequence[Want]) -> Iterator[list[AnyItem]]:
        """The items in order, cut where their covariances would pass the limit; one alone may pass it."""
        group: list[AnyItem] = []
        held = 0
        for item in items:
            size = gram_bytes(item) if "gram" in want else 0
            if group and held + size > self.gram_bytes:
                yield group
                group, held = [], 0
            group.append(item)
            held += size
        if group:
            yield group

    def _known(self, model: CapturedModel, version: _Version) -> _Known:
        """What is cached about this state of this model; two states are remembered."""
        for cached, known in self._cache:
            if cached.matches(model):
                return known
        self._cache = [*self._cache[-1:], (version, {})]
        return self._cache[-1][1]

    def _make_room(self, needed: int, found: _Known) -> None:
        """Forget covariances other than those in `found`, oldest first, until `needed` bytes fit beside the rest."""
        kept = {id(statistics) for statistics in found.values()}
        others = [
            (known, key) for _, known in self._cache for key, s in known.items() if s.gram_bytes and id(s) not in kept
        ]
        excess = needed + sum(known[key].gram_bytes for known, key in others) - self.gram_bytes
        for known, key in others:
            if excess <= 0:
                return
            excess -= known.pop(key).gram_bytes


class _Version:
    """A model's graph, options and tensors at one time. Holds no tensor alive."""

    def __init__(self, model: CapturedModel) -> None:
        self._text = _text(model)
        self._tensors = {name: (weakref.ref(t), version_of(t)) for name, t in tensors(model).items()}

    def matches(self, model: CapturedModel) -> bool:
        now = tensors(model)
        same = now.keys() == self._tensors.keys() and self._text == _text(model)
        return same and all(ref() is now[n] and version_of(now[n]) == v for n, (ref, v) in self._tensors.items())


def _text(model: CapturedModel) -> tuple[str, ...]:
    nodes = (f"{n.name} {n.op} {n.target} {n.args} {n.kwargs}" for n in model.graph.nodes)
    modules = (f"{name} {type(m).__name__} {m.extra_repr()}" for name, m in model.named_modules())
    return (*nodes, *modules)


def _key(item: Item) -> tuple[bool, str]:
    return isinstance(item, Layer), item.name
