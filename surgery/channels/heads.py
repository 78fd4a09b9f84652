"""Which dimension of which value becomes the heads of an attention product: followed from the product back.

    (n, l, g·d) → view (n, l, g, d) → transpose (n, g, l, d) → repeat_interleave (n, h, l, d) → product

Keys and values may have fewer heads than queries, and a mask has heads too.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.shape_prop import TensorMetadata

from ..graph import shape
from ..torch_private import UNSAFE_VIEW, tree_leaves
from ..vocabulary import arguments

aten = torch.ops.aten
PRODUCTS: frozenset[Any] = frozenset(
    (aten.scaled_dot_product_attention.default, aten.matmul.default, aten.bmm.default, aten.baddbmm.default)
)
_MIXING: frozenset[Any] = frozenset((aten.linear, aten.addmm, aten.mm, aten.einsum, aten.embedding))
_VIEWS: frozenset[Any] = frozenset(
    (aten.view, aten.reshape, UNSAFE_VIEW, aten.flatten, aten.unflatten, aten.squeeze, aten.unsqueeze)
)


def heads_by_node(graph: fx.Graph, *, joined: bool) -> dict[fx.Node, frozenset[int]]:
    """Products and the nodes whose results go into them, with the dimensions that become heads: the one before the
    last two of queries, keys, values and mask. `joined`: also where they are one dimension with the batch."""
    found: dict[fx.Node, frozenset[int]] = {}
    for node in reversed(graph.nodes):
        if node.target in PRODUCTS:
            for value in (node, *node.all_input_nodes):
                if _has_shape(value) and len(shape(value)) > (2 if joined else 3):
                    found[value] = found.get(value, frozenset()) | {len(shape(value)) - 3}
        elif node in found and not _mixes(node):
            for source in node.all_input_nodes:
                if dims := _traced(node, found[node], source):
                    found[source] = found.get(source, frozenset()) | dims
    return found


def _mixes(node: fx.Node) -> bool:
    """Whether it is a layer whose outputs are not its inputs, or no operator at all."""
    if node.op == "call_module":
        assert node.graph.owning_module is not None
        module = node.graph.owning_module.get_submodule(str(node.target))
        return any(p.ndim > 1 for p in module.parameters())
    return node.op != "call_function" or _packet(node) in _MIXING


def _traced(node: fx.Node, dims: frozenset[int], source: fx.Node) -> frozenset[int]:
    """Dimensions of `source` that `dims` of the node's result come from."""
    if node.target is operator.getitem:
        return dims
    if not _has_shape(source):
        return frozenset()
    if _packet(node) in _VIEWS:
        return _viewed(shape(source), shape(node), dims)
    if node.op == "call_function":
        try:
            return frozenset(d for d in range(len(shape(source))) if _varying(_moved(node, source, d)) & dims)
        except Exception:  # no operator that moves one tensor, or one with sizes that the graph computes
            pass
    return _aligned(shape(source), shape(node), dims) if _has_shape(node) else frozenset()


def _viewed(before: tuple[int, ...], after: tuple[int, ...], dims: frozenset[int]) -> frozenset[int]:
    """Dimensions that lie in the same block: as many elements before it, and as many in it."""

    def blocks(sizes: tuple[int, ...]) -> list[int]:
        """Elements before each dimension's end."""
        ends = [1]
        for size in sizes:
            ends.append(ends[-1] * size)
        return ends

    first, second = blocks(before), blocks(after)
    cuts = sorted(set(first) & set(second))

    def block(ends: list[int], dim: int) -> int:
        return max(i for i, cut in enumerate(cuts) if cut <= ends[dim])

    wanted = {block(second, d) for d in dims if after[d] > 1}
    return frozenset(d for d, size in enumerate(before) if size > 1 and block(first, d) in wanted)


def _moved(node: fx.Node, source: fx.Node, dim: int) -> torch.Tensor:
    """The operator on the places along a dimension of `source`."""
    sizes = shape(source)
    places = torch.arange(sizes[dim]).view(-1, *[1] * (len(sizes) - dim - 1)).expand(sizes)
    if _packet(node) is aten.expand:
        return places.expand(shape(node))
    target: Any = node.target
    result = target(**{name: places if value is source else value for name, value in arguments(node).items()})
    first = next(leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
    if first.is_floating_point() or bool((first < 0).any()):
        raise ValueError("it computes")
    return first


def _varying(places: torch.Tensor) -> set[int]:
    return {d for d, size in enumerate(places.shape) if size > 1 and bool((places != places.narrow(d, 0, 1)).any())}


def _aligned(before: tuple[int, ...], after: tuple[int, ...], dims: frozenset[int]) -> frozenset[int]:
    """Dimensions of the same size, counted from the end, as elementwise operators pair them."""
    shift = len(after) - len(before)
    return frozenset(d - shift for d in dims if d >= shift and before[d - shift] == after[d] > 1)


def _has_shape(node: fx.Node) -> bool:
    return isinstance(node.meta.get("tensor_meta"), TensorMetadata)


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", node.target)
