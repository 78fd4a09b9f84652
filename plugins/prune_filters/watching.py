"""Runs a captured model on data and shows the values that carry units of channels. Imports torch: import it late."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Carrier, Channels, Context, InputError, Inputs
from surgery.graph import tree_map_only

Samples = tuple[Inputs, Any]
"""Arguments of one call, on the device where the model runs, with their target (None without labels)."""


def calibration(found: Channels, context: Context) -> Iterator[Samples]:
    """The calibration batches, each checked before it is given.

    Raises:
        InputError: there are none, or one does not fit the model or holds NaN.
    """
    batches = context.data.calibration or ()
    yield from _checked(found, context, "calibration", ((batch, None) for batch in batches), batches)


def training(found: Channels, context: Context) -> Iterator[Samples]:
    """The training batches with their targets.

    Raises:
        InputError: there are none, or one is no pair `(inputs, target)`, does not fit the model or holds NaN.
    """
    batches = context.data.training or ()
    pairs = (surgery.pair_of(batch, f"training batch {number}") for number, batch in enumerate(batches))
    yield from _checked(found, context, "training", pairs, batches)


def _checked(
    found: Channels, context: Context, role: str, pairs: Iterable[tuple[Any, Any]], batches: Iterable[Any]
) -> Iterator[Samples]:
    total = len(batches) if isinstance(batches, Sized) else 0
    number = -1
    for number, (batch, target) in enumerate(pairs):
        context.progress("importance", number, total)
        inputs = surgery.checked_inputs(found.model, batch, f"{role} batch {number}")
        yield inputs.to(context.device), tree_map_only(Tensor, lambda t: t.to(context.device), target)
    if number < 0:
        raise InputError(f"the {role} data has no batches", fix="give at least one batch, in a list or a DataLoader")


def runnable(found: Channels, context: Context) -> CapturedModel:
    """The model in eval mode on the context's device, with a graph and modules of its own."""
    tensors = chain(found.model.parameters(), found.model.buffers())
    here = all(t.device.type == torch.device(context.device).type for t in tensors)
    model = surgery.snapshot(found.model) if here else copy.deepcopy(found.model).to(context.device)
    for module in model.modules():
        module.training = False
    return model


class _Tap(nn.Module):
    """Shows a value, and goes on with what it is given back."""

    def __init__(self, show: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._show = show

    def forward(self, value: Tensor) -> Tensor:
        return self._show(value)


def tapped(found: Channels, context: Context, show: Callable[[str, Tensor], Tensor]) -> CapturedModel:
    """`runnable` whose run hands every value that carries units to `show(node, value)` and goes on with the result."""
    model = runnable(found, context)
    names = {carrier.node.name for own in found.carriers for carrier in own}
    for node in [node for node in model.graph.nodes if node.name in names]:
        place = f"surgery_tap_{node.name}"
        model.add_submodule(place, _Tap(partial(show, node.name)))
        with model.graph.inserting_after(node):
            tap = model.graph.call_module(place)
        node.replace_all_uses_with(tap)
        tap.args = (node,)
    model.recompile()
    return model


def per_unit(batch: int | None, carrier: Carrier, size: int, value: Tensor, samples: int) -> Tensor:
    """(samples, size) mean of `value` over all positions of each unit; a single row where no dimension is the batch.

    `batch`: the dimension that grows with the batch: it lies in whole blocks per sample, as windows do. `size`: units
    of the group. Units that are not there have 0.
    """
    if batch is None or value.shape[batch] % samples:
        rows = value.movedim(carrier.dim, -1).reshape(1, -1, value.shape[carrier.dim])
    else:
        rows = value.movedim((batch, carrier.dim), (0, -1)).reshape(samples, -1, value.shape[carrier.dim])
    means = rows.mean(1, dtype=torch.float64).cpu()[:, carrier.positions]
    total = torch.zeros(len(means), size, dtype=torch.float64).index_add_(1, carrier.units, means)
    return total / torch.bincount(carrier.units, minlength=size).clamp_min(1)


def mean_per_unit(
    found: Channels, context: Context, batches: Iterable[Samples], measure: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """(size,) per group: mean of `measure(value)` over positions and samples, added over the places that are read."""
    totals = [torch.zeros(group.size, dtype=torch.float64) for group in found.groups]
    seen = 0

    def show(name: str, value: Tensor) -> Tensor:
        measured = measure(value)
        for number, carrier, batch in places[name]:
            means = per_unit(batch, carrier, len(totals[number]), measured, inputs.batch_size)
            totals[number] += means.mean(0) * inputs.batch_size
        return value

    places, model = places_by_node(found), tapped(found, context, show)
    for inputs, _ in batches:
        seen += inputs.batch_size
        with torch.no_grad():
            model(*inputs.args, **inputs.kwargs)
    return [total / seen for total in totals]


Place = tuple[int, Carrier, int | None]
"""Number of the group, the carrier, and the dimension of its value where the batch stands."""


def places_by_node(found: Channels) -> dict[str, list[Place]]:
    """All groups that stand at each node."""
    model, places = found.model, dict[str, list[Place]]()
    where = surgery.batch_dims(model, model.inputs, free_batch=model.dynamic_batch)
    for number, own in enumerate(found.carriers):
        for carrier in own:
            name = carrier.node.name
            batch = next((dim for dim in where.get(name, ()) if dim != carrier.dim), None)
            places.setdefault(name, []).append((number, carrier, batch))
    return places
