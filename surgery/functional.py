"""Rewrite an exported graph so that nothing in it writes in place and no region hides inside a higher-order operator.

    y = relu_(x); z = f(x)            →   y = relu(x); z = f(y)
    v = select(x, 1, 0); fill_(v, 1)  →   v' = fill(v, 1); x' = select_scatter(x, v', 1, 0); later uses of x read x'

The second form runs the chain of views from the written value back to its base, one inverse per view, and derives the
other views of the same base anew where something still reads them. `torch.export`'s own functionalisation does the
same, but decomposes BatchNorm and drops dropout on the way.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from .errors import CaptureError

aten = torch.ops.aten

# Regions whose body can be run where it stands: the position of the body among the operator's arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0, "wrap": 0}

_SCATTER: dict[Any, Callable[[fx.Graph, fx.Node, fx.Node, tuple[Any, ...]], fx.Node]] = {
    aten.select.int: lambda g, base, new, rest: g.call_function(aten.select_scatter.default, (base, new, *rest)),
    aten.slice.Tensor: lambda g, base, new, rest: g.call_function(aten.slice_scatter.default, (base, new, *rest)),
    aten.transpose.int: lambda g, base, new, rest: g.call_function(aten.transpose.int, (new, *rest)),
    aten.t.default: lambda g, base, new, rest: g.call_function(aten.t.default, (new,)),
    aten.unsqueeze.default: lambda g, base, new, rest: g.call_function(aten.squeeze.dim, (new, *rest)),
    aten.permute.default: lambda g, base, new, rest: g.call_function(aten.permute.default, (new, _inverse(rest[0]))),
    aten.view.default: lambda g, base, new, rest: g.call_function(aten.view_as.default, (new, base)),
    aten.reshape.default: lambda g, base, new, rest: g.call_function(aten.view_as.default, (new, base)),
    aten.flatten.using_ints: lambda g, base, new, rest: g.call_function(aten.view_as.default, (new, base)),
    **dict.fromkeys(
        (aten.alias.default, aten.detach.default, aten.dropout.default, aten.contiguous.default),
        lambda g, base, new, rest: new,
    ),
}


def _inverse(permutation: list[int]) -> list[int]:
    rank = len(permutation)
    positive = [d % rank for d in permutation]
    return [positive.index(d) for d in range(rank)]


def functionalise(module: fx.GraphModule) -> None:
    """Edit `module.graph` in place: inline regions, replace in-place operators by functional ones.

    Raises:
        CaptureError: a write through a kind of view whose inverse is not known, or an autocast region.
    """
    inline_regions(module)
    for node in list(module.graph.nodes):
        if is_full_slice(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    position = {node: i for i, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            _replace_write(module.graph, node, position)


def inline_regions(module: fx.GraphModule) -> None:
    """Replace no_grad, checkpoint and switched-off autocast regions by the nodes of their body."""
    for node in list(module.graph.nodes):
        name = getattr(node.target, "_name", getattr(node.target, "__name__", ""))
        if node.op != "call_function" or name not in _REGIONS:
            continue
        if name == "wrap_with_autocast" and node.args[2]:
            raise CaptureError(
                f"the model enters autocast ({node.args[0]}, {node.args[1]}) inside its forward",
                at=source_line(node),
                fix="call autocast outside the model, or cast explicitly with .to(dtype)",
            )
        _inline(module, node, _REGIONS[name])


def _inline(module: fx.GraphModule, region: fx.Node, body_at: int) -> None:
    body_node = region.args[body_at]
    assert isinstance(body_node, fx.Node)
    body = operator.attrgetter(str(body_node.target))(module)
    inline_regions(body)
    operands = list(region.args[body_at + 1 :])
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=False))
    with module.graph.inserting_before(region):
        output = module.graph.graph_copy(body.graph, values)
    outputs = output if isinstance(output, tuple | list) else (output,)
    for user in list(region.users):
        user.replace_all_uses_with(outputs[user.args[1]])
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not body_node.users:
        module.graph.erase_node(body_node)


def _replace_write(graph: fx.Graph, node: fx.Node, position: dict[fx.Node, int]) -> None:
    written = node.args[0]
    if not isinstance(written, fx.Node):
        raise _unsupported(node, str(node.target))
    with graph.inserting_before(node):
        target = _functional(node)
        name = str(target.overloadpacket).rpartition(".")[2]
        new = graph.create_node("call_function", target, node.args, node.kwargs, name=name)
        new.meta = dict(node.meta)
        if _result_dtype(node) != _promoted_dtype(node):
            new = graph.call_function(aten.to.dtype, (new, _result_dtype(node)))
            new.meta = dict(node.meta)
    position[new] = position[node]
    node.replace_all_uses_with(new)
    _propagate_write(graph, written, new, node, position)
    graph.erase_node(node)


def _propagate_write(
    graph: fx.Graph, written: fx.Node, new: fx.Node, at: fx.Node, position: dict[fx.Node, int]
) -> None:
    """Make everything after `at` that shares memory with `written` read the new value."""
    chain = list(_chain_to_base(written))
    family = _aliases(chain[-1])
    stale = [n for n in family if n is not written and any(position.get(u, -1) > position[at] for u in n.users)]
    current = {written: new}
    if stale:
        for view, base in pairwise(chain):
            inverse = _SCATTER.get(view.target)
            if inverse is None:
                raise _unsupported(at, str(view.target))
            with graph.inserting_before(at):
                current[base] = inverse(graph, base, current[view], view.args[1:])
            current[base].meta = {**at.meta, "val": base.meta.get("val")}
        for view in sorted(family, key=position.__getitem__):
            if view in current or position[view] > position[at]:
                continue
            with graph.inserting_before(at):
                current[view] = graph.node_copy(view, lambda n: current.get(n, n))
    for old, value in current.items():
        position.setdefault(value, position[at])
        _redirect(old, value, position, position[at])


def _redirect(old: fx.Node, new: fx.Node, position: dict[fx.Node, int], after: int) -> None:
    for user in list(old.users):
        if position.get(user, -1) > after:
            user.replace_input_with(old, new)


def _chain_to_base(node: fx.Node) -> Iterator[fx.Node]:
    yield node
    while _may_alias(node):
        base = node.args[0]
        assert isinstance(base, fx.Node)
        node = base
        yield node


def _aliases(base: fx.Node) -> list[fx.Node]:
    """`base` and every view of it, views of views included."""
    found = [base]
    for node in found:
        found += [user for user in node.users if _may_alias(user) and user.args[0] is node and user not in found]
    return found


def _may_alias(node: fx.Node) -> bool:
    """Whether the result may share memory with the first argument."""
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if node.target is operator.getitem:
        return _may_alias(node.args[0])
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return False
    returns = node.target._schema.returns
    return node.target in _SCATTER or any(r.alias_info is not None for r in returns) or node.target in _MAYBE


_MAYBE = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten.feature_dropout.default,
    aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.unflatten.int,
    aten.chunk.default,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.narrow.default,
    aten.unbind.int,
}


def _functional(node: fx.Node) -> Any:
    """`aten.relu_.default` → `aten.relu.default`."""
    assert isinstance(node.target, torch._ops.OpOverload)
    namespace, name = node.target._schema.name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_").replace("__i", "__"), None)
    overload = getattr(packet, node.target._overloadname, None) if name.endswith("_") else None
    if overload is None:
        raise _unsupported(node, name)
    return overload


def is_full_slice(node: fx.Node) -> bool:
    """`x[:]`, which indexing such as `x[:, 0]` leaves behind."""
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (*node.args[2:], *(None, 2**63 - 1, 1)[len(node.args) - 2 :])
    return start in (0, None) and end in (None, 2**63 - 1) and step == 1


def _result_dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


def _promoted_dtype(node: fx.Node) -> torch.dtype | None:
    """What the functional operator gives where the written tensor would have kept its own type."""
    operands = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    same = _result_dtype(node)
    if len(operands) < 2 or node.target in (aten.copy_.default, aten.masked_fill_.Tensor, aten.fill_.Tensor):
        return same
    first, second = operands[:2]
    return torch.result_type(
        torch.empty([1] * first.ndim, dtype=first.dtype), torch.empty([1] * second.ndim, dtype=second.dtype)
    )


def _unsupported(node: fx.Node, what: str) -> CaptureError:
    return CaptureError(
        f"the model writes in place through {what}, which cannot be expressed without the write",
        at=source_line(node),
        fix="write that line without the in-place operation (torch.where, torch.cat, or an out-of-place operator)",
    )


def source_line(node: fx.Node) -> str:
    """File and line of the user's code that made `node`, or its name where that is not known."""
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines() if line.strip().startswith("File")]
    return lines[-1].replace('File "', "").replace('", line ', ":").split(", in ")[0] if lines else node.name
