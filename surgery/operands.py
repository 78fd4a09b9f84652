"""Functional calls on weights seen as layers, and layers written as functional calls.

conv2d(x, w, b, [1, 1], [1, 1])      ↔   nn.Conv2d with weight w and bias b, called on x
conv2d(x, f(codebook, indices), b)   →   the same, its weight computed from codebook and indices
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from .names import get_attribute
from .torch_private import OpOverload, make_subclass, tree_map_only, without_torch_function
from .vocabulary import DROPOUT_RULES, RULES, NotRaised, arguments

aten = torch.ops.aten


def stand_in(model: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module, tuple[str, ...]] | None:
    """Name and module view of a functional call with weights, and what its weight is computed from; None for every
    other call.

    Weights are `get_attr` operands. That of a convolution or linear layer may also be computed from such: see
    `ComputedWeight`.
    """
    rule = RULES.get(node.target)
    if rule is None or rule in DROPOUT_RULES:
        return None

    def value(ref: Any) -> Tensor:
        if not isinstance(ref, fx.Node):
            raise NotRaised
        return _computed(model, ref) if ref.op != "get_attr" else _attribute(model, ref)

    try:
        raised = rule(arguments(node), None, value)
        tensors = {role: value(ref) for role, ref in raised.roles.items() if ref is not None}
    except (NotRaised, StopIteration, KeyError):
        return None
    if not tensors:
        return None
    role, first = next((role, ref) for role, ref in raised.roles.items() if ref is not None)  # weight, if there is one
    if any(ref.op != "get_attr" for other, ref in raised.roles.items() if ref is not None and other != role):
        return None
    computed = sources(first) if first.op != "get_attr" else ()
    if computed is None or (computed and raised.cls not in _LOWERED):
        return None
    home = computed[0] if computed else str(first.target)
    if len(computed) > 1:
        home = home.rpartition(".")[0] or home
    name = home.removesuffix(".weight").removesuffix(".running_mean")
    return name, raised.build(tensors).train(model.training), computed


def _attribute(model: fx.GraphModule, ref: fx.Node) -> Tensor:
    tensor = get_attribute(model, str(ref.target))
    assert isinstance(tensor, Tensor)
    return tensor


class ComputedWeight(nn.Parameter):
    """A weight that the graph computes, as a parameter whose values are computed when they are first read.

    Shape and type are known at once. Any operation on it works on an ordinary tensor.
    """

    _nodes: list[fx.Node]
    _tensors: dict[fx.Node, Tensor]
    _known: Tensor | None

    @staticmethod
    def of(model: fx.GraphModule, node: fx.Node) -> ComputedWeight:
        """What `node` of `model`, which depends on weights alone, gives with the weights as they are now."""
        meta = node.meta["tensor_meta"]
        nodes = expression(node)
        tensors = {n: _attribute(model, n) for n in nodes if n.op == "get_attr"}
        trained = meta.dtype.is_floating_point and any(t.requires_grad for t in tensors.values())
        empty = torch.empty(meta.shape, dtype=meta.dtype, device="meta")
        made: ComputedWeight = make_subclass(ComputedWeight, empty, trained)
        made._nodes, made._tensors, made._known = nodes, tensors, None
        return made

    def evaluated(self) -> Tensor:
        """The weight as an ordinary tensor."""
        if self._known is None:
            self._known = evaluate(self._nodes, self._tensors)
        return self._known

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _KNOWN_WITHOUT_VALUES:
            with without_torch_function():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(cls, ComputedWeight.evaluated, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Parameter:
        return nn.Parameter(self.evaluated().clone(), self.requires_grad)


_KNOWN_WITHOUT_VALUES = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "ndim", "dtype", "requires_grad", "is_leaf")),
    *(Tensor.numel, Tensor.size, Tensor.dim, Tensor.is_floating_point, Tensor.element_size),
}


def evaluate(nodes: Sequence[fx.Node], known: Mapping[fx.Node, Any]) -> Any:
    """The value, detached, of the last of `nodes`, an `expression` of which the values of some are `known`."""
    values = dict(known)
    with torch.no_grad():
        for node in nodes:
            if node not in values:
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                function: Any = node.target
                values[node] = function(*args, **kwargs)
    return tree_map_only(Tensor, Tensor.detach, values[nodes[-1]])


def _computed(model: fx.GraphModule, ref: fx.Node) -> Tensor:
    if not isinstance(ref.meta.get("tensor_meta"), TensorMetadata) or sources(ref) is None:
        raise NotRaised
    return ComputedWeight.of(model, ref)


def expression(node: fx.Node) -> list[fx.Node]:
    """`node` and all that it is computed from, in order of execution."""
    found, todo = {node}, [node]
    while todo:
        new = set(todo.pop().all_input_nodes) - found
        found |= new
        todo += new
    return sorted(found)


def sources(node: fx.Node) -> tuple[str, ...] | None:
    """Names of the parameters and buffers that `node` is computed from; None where it also depends on an input, on a
    layer or on chance."""
    names = []
    for part in expression(node):
        if part.op == "get_attr":
            names.append(str(part.target))
        elif part.op != "call_function" or _is_random(part.target):
            return None
    return tuple(dict.fromkeys(names)) or None


def constants(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose value no input decides: weights, and what is computed from weights alone."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        computes = node.op == "call_function" and not _is_random(node.target)
        if node.op == "get_attr" or (computes and found.issuperset(node.all_input_nodes)):
            found.add(node)
    return found


def _is_random(target: Any) -> bool:
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


@dataclass(frozen=True)
class Lowered:
    """`target(x, weight, bias, *args)`: the call of an operator that computes what a module computes."""

    target: OpOverload
    args: tuple[Any, ...]


_LOWERED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def lowered(module: nn.Module) -> Lowered | None:
    """The call that equals a convolution or linear layer, the inverse of raising; None for other modules."""
    if type(module) not in _LOWERED:
        return None
    if isinstance(module, nn.Linear):
        return Lowered(aten.linear.default, ())
    m: Any = module
    rank = len(m.kernel_size)
    if m.padding_mode != "zeros":
        return None
    if m.transposed:
        target = getattr(aten, f"conv_transpose{rank}d")
        overload = target.default if rank == 1 else target.input
        args: tuple[Any, ...] = (m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    else:
        target = getattr(aten, f"conv{rank}d")
        overload = target.padding if isinstance(m.padding, str) else target.default
        args = (m.stride, m.padding, m.dilation, m.groups)
    return Lowered(overload, tuple(list(a) if isinstance(a, tuple) else a for a in args))
