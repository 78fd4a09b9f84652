"""Rewrite an exported graph so that nothing in it writes in place and no region hides inside a higher-order operator.

    y = relu_(x); z = f(x)            →   y = relu(x); z = f(y)
    v = select(x, 1, 0); fill_(v, 1)  →   v' = fill(v, 1); x' = select_scatter(x, v', 1, 0); later uses of x read x'
    with no_grad(): y = f(x)          →   y = detach(f(x))

The second form runs the chain of views from the written value back to its base, one inverse per view, and derives the
other views of the same base anew where something still reads them. `torch.export`'s own functionalisation does the
same, but decomposes BatchNorm and drops dropout on the way.
"""

from __future__ import annotations

import operator
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from .errors import CaptureError
from .torch_private import OpOverload, higher_order_name, overload_name, schema_of
from .views import aliases, chain_to_base, put_back

aten = torch.ops.aten

# Regions whose body can be run where it stands: the position of the body among the operator's arguments.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4, "tag_activation_checkpoint": 0, "wrap": 0}


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
        if isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable:
            _replace_write(module.graph, node, position)
        elif node.op == "get_attr" and node.users:
            raise CaptureError(
                f"the model uses {next(iter(node.users)).target}, whose branches are graphs of their own",
                at=source_line(next(iter(node.users))),
                fix="compute every branch and choose with torch.where",
            )


def inline_regions(module: fx.GraphModule) -> None:
    """Replace no_grad, checkpoint and switched-off autocast regions by the nodes of their body."""
    for node in list(module.graph.nodes):
        name = higher_order_name(node.target) or getattr(node.target, "__name__", "")
        if node.op != "call_function" or name not in _REGIONS:
            continue
        body_node = node.args[_REGIONS[name]]
        assert isinstance(body_node, fx.Node)
        body = operator.attrgetter(str(body_node.target))(module)
        if name == "wrap_with_autocast" and node.args[2]:
            raise CaptureError(
                f"the model enters autocast ({node.args[0]}, {node.args[1]}) inside its forward",
                at=next((source_line(n) for n in body.graph.nodes if n.meta.get("stack_trace")), node.name),
                fix="call autocast outside the model, or cast explicitly with .to(dtype)",
            )
        inline_regions(body)
        _inline(module, node, body_node, body)


def _inline(module: fx.GraphModule, region: fx.Node, body_node: fx.Node, body: fx.GraphModule) -> None:
    body_at = region.args.index(body_node)
    operands = list(region.args[body_at + 1 :])
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, operands, strict=False))
    with module.graph.inserting_before(region):
        output = module.graph.graph_copy(body.graph, values)
        outputs: list[Any] = list(output) if isinstance(output, tuple | list) else [output]
        if _switches_gradients_off(region):
            outputs = [_detached(module.graph, value) for value in outputs]
    for user in list(region.users):
        index = user.args[1]
        assert isinstance(index, int)
        user.replace_all_uses_with(outputs[index])
        module.graph.erase_node(user)
    module.graph.erase_node(region)
    if not body_node.users:
        module.graph.erase_node(body_node)


def _switches_gradients_off(region: fx.Node) -> bool:
    return higher_order_name(region.target) == "wrap_with_set_grad_enabled" and region.args[0] is False


def _detached(graph: fx.Graph, value: Any) -> Any:
    """`value` without gradients, as it leaves a no_grad region."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    if not (isinstance(tensor, torch.Tensor) and tensor.is_floating_point()):
        return value
    detached = graph.call_function(aten.detach.default, (value,))
    detached.meta = dict(value.meta)
    return detached


def _replace_write(graph: fx.Graph, node: fx.Node, position: dict[fx.Node, int]) -> None:
    written = node.args[0]
    if not isinstance(written, fx.Node):
        raise _unsupported(node, str(node.target))
    with graph.inserting_before(node):
        target = _functional(node)
        if target is aten.copy.default:
            new = _copied(graph, written, node.args[1])
        else:
            name = str(target.overloadpacket).rpartition(".")[2]
            new = graph.create_node("call_function", target, node.args, node.kwargs, name=name)
        new.meta = {**node.meta, "fresh": True}
        if _result_dtype(node) != _promoted_dtype(node):
            new = graph.call_function(aten.to.dtype, (new, _result_dtype(node)))
            new.meta = {**node.meta, "fresh": True}
    position[new] = position[node]
    node.replace_all_uses_with(new)
    if schema_of(target).returns[0].alias_info is None:
        _propagate_write(graph, written, new, node, position)
    else:  # unsqueeze_ and its kind write no value: the result is a view
        del new.meta["fresh"]
    graph.erase_node(node)


def _copied(graph: fx.Graph, written: fx.Node, source: Any) -> fx.Node:
    """`written.copy_(source)` as a value; aten.copy itself has no gradient."""
    if _shape(source) != _shape(written):
        source = graph.call_function(aten.expand_as.default, (source, written))
    return graph.call_function(aten.clone.default, (source,), {"memory_format": torch.contiguous_format})


def _shape(value: Any) -> tuple[Any, ...] | None:
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
    return tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else None


def _propagate_write(
    graph: fx.Graph, written: fx.Node, new: fx.Node, at: fx.Node, position: dict[fx.Node, int]
) -> None:
    """Make everything after `at` that shares memory with `written` read the new value."""
    chain = list(chain_to_base(written))
    family = [n for n in aliases(chain[-1]) if position.get(n, -1) < position[at]]
    stale = [n for n in family if n is not written and any(position.get(u, -1) > position[at] for u in n.users)]
    current = {written: new}
    if stale:
        with graph.inserting_before(at):
            base, same = _written_back(graph, chain, new, at)
            current = {chain[-1]: base}
            for view in family[1:]:
                current[view] = (
                    current[same[view]] if view in same else graph.node_copy(view, lambda n: current.get(n, n))
                )
    for old, value in ((new, current[written]), *current.items()):
        position.setdefault(value, position[at])
        _redirect(old, value, position, position[at])


def _written_back(
    graph: fx.Graph, chain: list[fx.Node], new: fx.Node, at: fx.Node
) -> tuple[fx.Node, dict[fx.Node, fx.Node]]:
    """The new value of the base at the end of `chain`, and which views in it hold the very elements of their base."""
    value, same = new, {}
    for view, base in pairwise(chain):
        inverted = put_back(graph, view, base, value)
        if inverted is None:
            raise _unsupported(at, str(view.target))
        if inverted is value:
            same[view] = base
        elif not inverted.meta:
            inverted.meta = {**at.meta, "val": base.meta.get("val")}
        value = inverted
    return value, same


def _redirect(old: fx.Node, new: fx.Node, position: dict[fx.Node, int], after: int) -> None:
    for user in list(old.users):
        if position.get(user, -1) > after:
            user.replace_input_with(old, new)


def _functional(node: fx.Node) -> Any:
    """`aten.relu_.default` → `aten.relu.default`, `aten.transpose_.default` → `aten.transpose.int`."""
    assert isinstance(node.target, OpOverload)
    namespace, name = schema_of(node.target).name.split("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_").replace("__i", "__"), None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet and name.endswith("_") else []
    alike = [overload for overload in overloads if _takes(overload) == _takes(node.target)]
    if not alike:
        raise _unsupported(node, name)
    return next((o for o in alike if overload_name(o) == overload_name(node.target)), alike[0])


def _takes(target: OpOverload) -> list[str]:
    return [str(argument.type) for argument in schema_of(target).arguments]


def is_full_slice(node: fx.Node) -> bool:
    """`x[:]`, which indexing such as `x[:, 0]` leaves behind."""
    if node.target is not aten.slice.Tensor:
        return False
    given = node.args[2:]
    start, end, step = given + (None, 2**63 - 1, 1)[len(given) :]
    return bool(start in (0, None) and end in (None, 2**63 - 1) and step == 1)


def _result_dtype(node: fx.Node) -> torch.dtype | None:
    value = node.meta.get("val")
    return value.dtype if isinstance(value, torch.Tensor) else None


_BOOLEAN = {
    f"aten::{name}" for name in ("eq", "ne", "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not")
}


def _promoted_dtype(node: fx.Node) -> torch.dtype | None:
    """What the functional operator gives where the written tensor would have kept its own type."""
    operands = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    same = _result_dtype(node)
    if isinstance(node.target, OpOverload) and schema_of(node.target).name.removesuffix("_") in _BOOLEAN:
        return torch.bool
    if len(operands) < 2 or node.target in (aten.masked_fill_.Tensor, aten.fill_.Tensor):
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
    lines = [line.strip() for line in node.meta.get("stack_trace", "").splitlines()]
    places = [line for line in lines if line.startswith('File "') and not line.startswith('File "<')]
    return places[-1].removeprefix('File "').replace('", line ', ":").split(", in ")[0] if places else node.name
