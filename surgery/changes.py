"""What a pass has changed, layer by layer, and whether its report says so: no more, no less.

What changes several layers at once, such as removing channels, notes which (`note_reach`); the runner writes them into
the edit that names one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .names import get_attribute, tensors

if TYPE_CHECKING:
    from torch import fx

    from .captured import CapturedModel
    from .graph import Layer
    from .passes import Edit

REACHED = "reached"
"""Where a model keeps, while a pass is at work, what `note_reach` is told."""


def note_reach(model: fx.GraphModule, layer: str, other: str) -> None:
    """For the report of the pass at work: what changed `layer` has changed `other` with it; names are from before."""
    noted: dict[str, dict[str, None]] = model.meta.get(REACHED, {})
    for one, two in ((layer, other), (other, layer)):
        noted.setdefault(one, {})[two] = None


@contextmanager
def reaches_noted(model: fx.GraphModule) -> Iterator[dict[str, dict[str, None]]]:
    """What `note_reach` is told of `model` inside, by layer."""
    outer = model.meta.get(REACHED)
    noted: dict[str, dict[str, None]] = {}
    model.meta[REACHED] = noted
    try:
        yield noted
    finally:
        del model.meta[REACHED]
        if outer is not None:
            model.meta[REACHED] = outer


def with_reached(edits: tuple[Edit, ...], noted: Mapping[str, Iterable[str]]) -> tuple[Edit, ...]:
    """The edits, each with the layers that it reached, unless an edit before it has named them."""
    named = {edit.layer for edit in edits}
    found = []
    for edit in edits:
        new = [name for name in dict.fromkeys((*edit.also, *noted.get(edit.layer, ()))) if name not in named]
        named |= {*new}
        found.append(replace(edit, also=tuple(new)))
    return tuple(found)


class Changes:
    """What differs between the model before a pass and after it, by names before it."""

    def __init__(self, before: CapturedModel, after: CapturedModel) -> None:
        from .graph import layers

        now = {layer.name: _content(after, layer) for layer in layers(after)}
        then = {layer.name: _content(before, layer) for layer in layers(before)}
        self.layers = [name for name, content in then.items() if not _alike(content, now.get(name))]
        """Those that are gone or have another kind, options, weights or statistics."""
        self._touched = {*self.layers, *_tensors(before, after), *_modules(before, after), *_nodes(before, after)}

    def unnamed(self, edits: Iterable[Edit]) -> list[str]:
        """Changed layers that no edit names, itself, by a part of it or by a module around it."""
        named = {name for edit in edits for name in (edit.layer, *edit.also)}
        return [layer for layer in self.layers if not _covered(layer, named)]

    def untouched(self, names: Iterable[str]) -> list[str]:
        """Those under whose name no layer, module, tensor or node was changed, or replaced by its equal."""
        return [name for name in names if not _covered(name, self._touched)]


def _covered(name: str, names: Iterable[str]) -> bool:
    """Whether `name` is among `names`, lies in one of them, or holds one."""
    return any(name == other or name.startswith(f"{other}.") or other.startswith(f"{name}.") for other in names)


Content = tuple[Any, dict[str, Tensor]]


def _content(model: CapturedModel, layer: Layer) -> Content:
    form = type(layer.module), layer.module.extra_repr(), layer.functional, layer.computed
    own = {} if layer.computed else tensors(layer.module)  # a computed weight is known by what it is computed from
    return form, {**own, **{name: get_attribute(model, name) for name in layer.computed}}


def _alike(then: Content, now: Content | None) -> bool:
    if now is None or then[0] != now[0] or then[1].keys() != now[1].keys():
        return False
    return all(same(tensor, now[1][name]) for name, tensor in then[1].items())


def same(old: Tensor, new: Tensor) -> bool:
    """Whether the two are one tensor, or have equal values, shape and type."""
    return old is new or (old.shape == new.shape and old.dtype == new.dtype and bool(torch.equal(old, new)))


def _tensors(before: CapturedModel, after: CapturedModel) -> list[str]:
    new = tensors(after)
    return [name for name, tensor in tensors(before).items() if new.get(name) is not tensor]


def _modules(before: CapturedModel, after: CapturedModel) -> list[str]:
    new = {name: form(module) for name, module in after.named_modules()}
    return [name for name, module in before.named_modules() if name and new.get(name) != form(module)]


def form(module: nn.Module) -> tuple[type[nn.Module], str]:
    """Kind and options."""
    return type(module), module.extra_repr()


def _nodes(before: CapturedModel, after: CapturedModel) -> list[str]:
    """Nodes that are gone, take something else, or are read by others, by their own name and by that of the module they
    call."""
    new = {node.name: (skeleton(node), {*map(str, node.users)}) for node in after.graph.nodes}
    found = [node for node in before.graph.nodes if new.get(node.name) != (skeleton(node), {*map(str, node.users)})]
    return [name for n in found for name in ((n.name, str(n.target)) if n.op == "call_module" else (n.name,))]


def skeleton(node: fx.Node) -> tuple[str, str, str, str]:
    """What a node does, without what is noted on it."""
    return node.op, str(node.target), str(node.args), str(node.kwargs)
