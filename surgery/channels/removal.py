"""Removes positions: slices parameters and adapts the sizes that stand in modules and in the graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from ..captured import CapturedModel
from ..torch_private import buffers_of, parameters_of
from .rules import find
from .shrinking import Shrinking
from .shuffling import replace_shuffle
from .values import Value
from .walk import Walk


def remove(model: CapturedModel, walk: Walk, alive: Tensor) -> None:
    """Keep only the `alive` positions (positions,), in place. Tensors are replaced, not written."""
    _slice_tensors(model, walk, alive)
    within = {node for shuffle in walk.shuffles for node in shuffle.nodes}
    for node in model.graph.nodes:
        if node not in within and node.op in ("call_module", "call_function") and "tensor_meta" in node.meta:
            call = Shrinking(model, walk.values, alive, node)
            rule = find(walk.rules, node, call.module)
            if rule is not None and rule.shrink is not None and call.shrinks:
                rule.shrink(call)
    for node, value in walk.values.items():
        if "tensor_meta" in node.meta:
            node.meta["tensor_meta"] = _shrunk(node.meta["tensor_meta"], value, alive)
    moved: dict[fx.Node, fx.Node] = {}
    for shuffle in walk.shuffles:
        before, after = (walk.values[n].axes[shuffle.dim].ids for n in (shuffle.source, shuffle.nodes[-1]))
        if not bool(alive[before].all()):
            source = moved.get(shuffle.source, shuffle.source)
            moved[shuffle.nodes[-1]] = replace_shuffle(model, shuffle, source, alive[before], alive[after])
    model.recompile()


def _shrunk(meta: Any, value: Any, alive: Tensor) -> Any:
    """The noted shapes with what is left of each dimension."""
    if isinstance(value, list | tuple):
        return type(meta)(_shrunk(m, v, alive) for m, v in zip(meta, value, strict=True))
    if not isinstance(value, Value):
        return meta
    sizes = [n if a is None else int(alive[a.ids].sum()) for n, a in zip(value.shape, value.axes, strict=True)]
    return meta._replace(shape=torch.Size(sizes))


def _slice_tensors(model: CapturedModel, walk: Walk, alive: Tensor) -> None:
    kept: dict[int, list[tuple[int, Tensor]]] = {}
    for (key, dim), slot in walk.facts.positions.slots.items():
        marks = alive[slot.first : slot.first + slot.size]
        if not bool(marks.all()):
            kept.setdefault(key, []).append((dim, torch.nonzero(marks).reshape(-1)))
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for store in (parameters_of(module), buffers_of(module)):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in kept:
                    if id(tensor) not in made:
                        made[id(tensor)] = sliced(tensor, kept[id(tensor)])
                    store[name] = made[id(tensor)]  # type: ignore[assignment]


def sliced(tensor: Tensor, kept: list[tuple[int, Tensor]]) -> Tensor:
    """`tensor` at the positions `kept` by dimension; a parameter stays one."""
    result = tensor.detach()
    for dim, index in kept:
        result = result.index_select(dim, index.to(result.device))
    return nn.Parameter(result, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else result
