"""Which values of a graph become variables, for how long they live, and what they are called.

A variable takes over the name of a value that its own statement reads for the last time (`x = self.conv(x)`), so that
nothing lives longer than it is needed; names that are not taken over soon are deleted.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..operands import constants, sources
from ..state.write import ranks
from .subscripts import is_scalar, rank
from .tensor_names import fresh

# What a statement binds: one value, several of a tuple, nothing (None) at a place.
Pattern = fx.Node | tuple["Pattern", ...] | None

_POOL = ("x", "y", "z", "a", "b", "c", "d", "e", "g", "h")
_UNPACKED = 6  # a tuple of which more parts are used gets a name instead
_SOON = 10  # statements after which a name that nobody took over is deleted


@dataclass
class Statement:
    """`target = node's expression`, or with `index`, `target = expression[index]`."""

    node: fx.Node
    target: Pattern
    index: int | None = None
    reads: set[fx.Node] = field(default_factory=set)
    deleted: list[str] = field(default_factory=list)


class Values:
    """The statements of a graph in order, and for each node whether it is a variable or written where it is used."""

    def __init__(self, graph: fx.Graph) -> None:
        self.alive = _alive(graph)
        self.users = {node: [user for user in node.users if user in self.alive] for node in self.alive}
        self.alias: dict[fx.Node, fx.Node] = {}
        self.bound: set[fx.Node] = {node for node in self.alive if node.op == "placeholder"}
        self.output = graph.output_node()
        self.inline = {node for node in self.alive if node.op == "get_attr" or self._is_inline(node)}
        self.statements = [self._statement(node) for node in graph.nodes if self._is_statement(node)]
        for statement in self.statements:
            statement.reads = set(self._reads(statement.node))

    def canonical(self, node: fx.Node) -> fx.Node:
        """The node whose variable holds this value; two `getitem` of the same part share one."""
        return self.alias.get(node, node)

    def _is_inline(self, node: fx.Node) -> bool:
        if not is_scalar(node) or len(self.users[node]) != 1:
            return False
        if str(node.target).startswith("aten.sym"):
            return node.args[0] in self.users[node][0].all_input_nodes
        return True

    def _is_statement(self, node: fx.Node) -> bool:
        is_call = node.op in ("call_function", "call_module")
        is_part = node in self.bound  # of a tuple that an earlier statement took apart
        return is_call and node in self.alive and node not in self.inline and not is_part

    def _statement(self, node: fx.Node) -> Statement:
        parts = self._parts([node])
        if parts is not None and len(parts) == 1 and node.op == "call_function":
            ((index, items),) = parts.items()
            return Statement(node, self._bind(items), index)
        return Statement(node, self._pattern([node]) if self.users[node] else None)

    def _pattern(self, nodes: list[fx.Node]) -> Pattern:
        """What holds the value of `nodes`, which are the same part of a tuple: a name, or names for its own parts."""
        parts, count = self._parts(nodes), _tuple_length(nodes[0])
        if parts is None or count is None or len(parts) > _UNPACKED or max(parts) >= count:
            return self._bind(nodes)
        self.bound.update(nodes)
        return tuple(self._pattern(parts[i]) if i in parts else None for i in range(count))

    def _bind(self, nodes: list[fx.Node]) -> fx.Node:
        self.bound.update(nodes)
        self.alias |= dict.fromkeys(nodes[1:], nodes[0])
        return nodes[0]

    def _parts(self, nodes: list[fx.Node]) -> dict[int, list[fx.Node]] | None:
        """The `getitem` nodes by index, where nothing else reads the tuple."""
        parts: dict[int, list[fx.Node]] = {}
        for user in (user for node in nodes for user in self.users[node]):
            index = user.args[1] if user.target is operator.getitem else None
            if type(index) is not int or index < 0 or user.args[0] not in nodes:
                return None
            parts.setdefault(index, []).append(user)
        return parts if parts and _tuple_length(nodes[0]) is not None else None

    def _reads(self, node: fx.Node) -> Iterator[fx.Node]:
        for argument in node.all_input_nodes:
            if argument in self.inline:
                yield from self._reads(argument)
            else:
                yield self.canonical(argument)


def _alive(graph: fx.Graph) -> set[fx.Node]:
    """What the outputs need, and what changes state."""
    alive: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op in ("output", "placeholder") or node.is_impure() or alive.intersection(node.users):
            alive.add(node)
    return alive


def _tuple_length(node: fx.Node) -> int | None:
    parts = ranks(node)
    return len(parts) if isinstance(parts, list) else None


def bound_nodes(pattern: Pattern) -> list[fx.Node]:
    """The nodes a statement gives names to."""
    if isinstance(pattern, tuple):
        return [node for part in pattern for node in bound_nodes(part)]
    return [] if pattern is None else [pattern]


def name_values(values: Values, inputs: dict[fx.Node, str], reserved: set[str]) -> dict[fx.Node, str]:
    """A name for every variable; `inputs` are given. Statements learn which names to delete after them."""
    last_use = {node: len(values.statements) for node in values._reads(values.output)}
    for i, statement in reversed(list(enumerate(values.statements))):
        for node in statement.reads:
            last_use.setdefault(node, i)
    names = dict(inputs)
    taken = set(reserved) | {name for name in inputs.values() if name not in _POOL}
    holder = {name: node for node, name in inputs.items() if node in last_use}
    taken |= {name for node, name in inputs.items() if node not in last_use}
    wishes = _wishes(values)
    bindings: dict[str, list[int]] = {}
    for i, statement in enumerate(values.statements):
        dying = [name for name, node in holder.items() if last_use.get(node, -1) <= i]
        for name in dying:
            del holder[name]
        for node in bound_nodes(statement.target):
            name = _choose(node, wishes.get(node, ""), [n for n in dying if n not in holder], holder, taken)
            names[node] = name
            holder[name] = node
            bindings.setdefault(name, []).append(i)
            if is_scalar(node):
                taken.add(name)
        lost = [name for name in dying if name not in holder and name not in taken]
        statement.deleted = [name for name in lost if name not in inputs.values()]
    _keep_soon_reused(values, bindings)
    return names


def _choose(node: fx.Node, wish: str, dying: list[str], holder: dict[str, Any], taken: set[str]) -> str:
    if is_scalar(node):
        stem = _size_name(node)
        return fresh(stem, taken | holder.keys())
    if wish and wish not in holder and wish not in taken:
        return wish
    names = itertools.chain(_POOL, (f"x{i}" for i in itertools.count(1)))
    free = (name for name in names if name not in holder and name not in taken)
    return min((name for name in dying if name in _POOL), key=_POOL.index, default="") or next(free)


def _size_name(node: fx.Node) -> str:
    if not str(node.target).startswith("aten.sym_size"):
        return "size"
    dim = node.args[1]
    if dim == 0:
        return "batch"
    names = {(4, 2): "height", (4, 3): "width"}
    return names.get((rank(node.args[0]) or 0, dim), "size") if isinstance(dim, int) else "size"


def _keep_soon_reused(values: Values, bindings: dict[str, list[int]]) -> None:
    end = len(values.statements)
    for i, statement in enumerate(values.statements):
        next_binding = {n: next((j for j in bindings.get(n, []) if j > i), end) for n in statement.deleted}
        statement.deleted = [name for name in statement.deleted if next_binding[name] - i > _SOON]


# Names that say what a value is


def _wishes(values: Values) -> dict[fx.Node, str]:
    """`q`, `k`, `v` and `attn` around attention, `weight` for what is computed from weights alone."""
    wishes: dict[fx.Node, str] = {}
    weights = constants(values.output.graph)
    for statement in values.statements:
        node = statement.node
        if node in weights and sources(node):
            wishes[node] = "weight"
        if node.target is torch.ops.aten.scaled_dot_product_attention.default:
            for argument, name in zip(node.args, "qkv", strict=False):
                _wish(values, wishes, argument, name)
        elif node.target is torch.ops.aten.softmax.int:
            _explicit_attention(values, wishes, node)
    return wishes


def _explicit_attention(values: Values, wishes: dict[fx.Node, str], softmax: fx.Node) -> None:
    product: Any = softmax.args[0]
    chain = [softmax]
    while isinstance(product, fx.Node) and product.args and not _is_product(product) and len(chain) < 6:
        chain.append(product)
        product = product.args[0]
    after = softmax
    while len(values.users[after]) == 1 and not _is_product(after) and len(chain) < 12:
        after = values.users[after][0]
        chain.append(after)
    if not (isinstance(product, fx.Node) and _is_product(product) and _is_product(after)):
        return
    _wish(values, wishes, product.args[0], "q")
    _wish(values, wishes, product.args[1], "k")
    _wish(values, wishes, after.args[1], "v")
    wishes |= dict.fromkeys((node for node in (*chain, product) if node is not after), "attn")


def _is_product(node: fx.Node) -> bool:
    return node.target in (torch.ops.aten.matmul.default, torch.ops.aten.bmm.default)


def _wish(values: Values, wishes: dict[fx.Node, str], argument: Any, name: str) -> None:
    """Call `argument` and what leads only to it `name`."""
    while isinstance(argument, fx.Node) and argument.op in ("call_function", "call_module"):
        if len(values.users[argument]) != 1 or is_scalar(argument):
            return
        wishes.setdefault(values.canonical(argument), name)
        if argument.op == "call_module" or argument.target is operator.getitem or not argument.args:
            return
        argument = argument.args[0]
