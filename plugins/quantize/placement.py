"""Which values of a graph become integers, so that the runtime fuses what stands between them.

    conv ─ relu ─┬─ slice ─ pad ─┐          conv: a kernel; its output with the relu's range
                 └─ conv ────────┴─ add     slice, pad: moves, with the scale of what they move; add: a join

A *kernel* (layer or product) reads integers. A *join* is an integer operator only between integers: everything that it
reads comes out of integer operators, and what it gives goes into a kernel. Anything else stays in float, and reads
what it read before where that was not rounded anyway.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import fx

    from surgery import CapturedModel, Target


HARDSIGMOID = "aten.hardsigmoid.default"
"""The join that is written as a sum."""


def kind(model: CapturedModel, node: fx.Node) -> str:
    """Class of a layer, or name of an operator."""
    if node.op == "call_module":
        return type(model.get_submodule(str(node.target))).__name__
    return "getitem" if node.target is operator.getitem else str(node.target)


@dataclass
class Placement:
    """Where integers begin and end. `kernels` are the calls of layers that shall read integers."""

    model: CapturedModel
    target: Target
    kernels: Collection[fx.Node]
    joins: set[fx.Node] = field(default_factory=set)
    """Operators between integers."""

    def __post_init__(self) -> None:
        self.joins = {node for node in self.model.graph.nodes if self._may_join(node)}
        while lost := [node for node in self.joins if not (self._is_fed(node) and self._is_wanted(node))]:
            self.joins -= set(lost)

    @cached_property
    def products(self) -> set[fx.Node]:
        """Products of two activations."""
        found = (node for node in self.model.graph.nodes if self.kind(node) in self.target.products)
        return {node for node in found if len(node.all_input_nodes) == 2 and all(map(_is_float, node.all_input_nodes))}

    @cached_property
    def values(self) -> dict[fx.Node, fx.Node]:
        """Every value that is rounded to integers, in order, with the one that decides its scale (often itself).

        What comes out of an integer operator is integers at every step of its way; a float is rounded where it is read.
        """
        wanted: set[fx.Node] = set()
        for node in (*self.kernels, *self.products, *self.joins):
            for source in self.reads(node):
                wanted.update(self._way(source) if self.is_rounded(source) else (source,))
        born = {self.result(node) for node in (*self.kernels, *self.products) if self._needs_output(node)}
        order = [node for node in self.model.graph.nodes if node in wanted | born]
        return {node: self.root(node) for node in order}

    def reads(self, node: fx.Node) -> list[fx.Node]:
        """The activations that an integer operator reads."""
        inputs = node.all_input_nodes
        return inputs[:1] if node in self.kernels else inputs

    def is_integer(self, node: fx.Node) -> bool:
        """Whether `node` is computed from integers."""
        return node in self.kernels or node in self.products or node in self.joins

    def is_rounded(self, value: fx.Node) -> bool:
        """Whether every reader gets the rounded value, because the runtime has no other."""
        return self.is_integer(self.producer(self.root(value)))

    def result(self, node: fx.Node) -> fx.Node:
        """What an integer operator gives: the activation behind it, if it takes that in."""
        users = list(node.users)
        alone = len(users) == 1 and self.kind(users[0]) in self.target.merged and users[0].args[0] is node
        return users[0] if alone and _spans_zero(users[0]) else node

    def root(self, value: fx.Node) -> fx.Node:
        """The value whose numbers `value` holds, moved about."""
        while self._is_move(value):
            value = _first(value)
        return value

    def kind(self, node: fx.Node) -> str:
        return kind(self.model, node)

    def _way(self, value: fx.Node) -> Iterable[fx.Node]:
        """`value` and what it was moved from; lists of pieces are no values."""
        while True:
            if _is_float(value):
                yield value
            if not self._is_move(value):
                return
            value = _first(value)

    def _is_move(self, node: fx.Node) -> bool:
        name = self.kind(node)
        if name == "getitem":
            return self.kind(_first(node)) in self.target.moves and self._is_move(_first(node))
        return name in self.target.moves and _keeps_zero(node)

    def producer(self, value: fx.Node) -> fx.Node:
        """The operator in front of a merged activation, or the value itself."""
        if self.kind(value) in self.target.merged and self.result(_first(value)) is value:
            value = _first(value)
        return value

    def _may_join(self, node: fx.Node) -> bool:
        if self.kind(node) not in self.target.joins or not _is_float(node) or node.kwargs:
            return False
        return all(map(_is_float, node.all_input_nodes)) and _operands(node) == len(node.all_input_nodes)

    def _is_fed(self, node: fx.Node) -> bool:
        roots = [self.root(source) for source in node.all_input_nodes]
        return all(root.op == "placeholder" or self.is_integer(self.producer(root)) for root in roots)

    def _is_wanted(self, node: fx.Node) -> bool:
        return any(map(self.is_integer, self._readers(self.result(node))))

    def _readers(self, value: fx.Node) -> Iterable[fx.Node]:
        """What reads `value`, moved or not."""
        for user in value.users:
            yield user
            if self._is_move(user) and _first(user) is value:
                yield from self._readers(user)

    def _needs_output(self, node: fx.Node) -> bool:
        return self.kind(node) not in self.target.float_outputs


def _spans_zero(node: fx.Node) -> bool:
    """Whether an activation cuts at fixed ends on both sides of zero, as the ends of a grid do that spans its range."""
    bounds: dict[str, Any] = dict(zip(("min", "max"), node.args[1:], strict=False)) | dict(node.kwargs)
    low, high = bounds.pop("min", bounds.pop("min_val", -1)), bounds.pop("max", bounds.pop("max_val", 1))
    low, high = (default if b is None else b for b, default in ((low, -1), (high, 1)))
    if bounds or not all(isinstance(b, int | float) for b in (low, high)):
        return False
    return bool(low <= 0 <= high)


def _first(node: fx.Node) -> Any:
    return node.args[0]


def _is_float(node: fx.Node) -> bool:
    import torch

    return getattr(node.meta.get("tensor_meta"), "dtype", None) is torch.float32


def _operands(node: fx.Node) -> int:
    """How many tensors an operator takes; -1 where a number stands in their place."""
    if str(node.target) in ("aten.add.Tensor", "aten.mul.Tensor"):
        return 2
    return len(node.all_input_nodes)


def _keeps_zero(node: fx.Node) -> bool:
    """Whether `node` adds no other number than zero, such as a padding."""
    if str(node.target) in ("aten.pad.default", "aten.constant_pad_nd.default"):
        rest: list[Any] = [a for a in (*node.args[2:], *node.kwargs.values()) if a not in (None, "constant")]
        return all(a == 0 for a in rest)
    return True
