"""Numbers that a graph takes out of its buffers are constants, too.

n = item(select(strides, 0, 0)),  full([4, 1, 1], n)   →   full([4, 1, 1], 8.0)
"""

from __future__ import annotations

from torch import fx, nn

from .graph import remove_unused
from .names import get_attribute
from .operands import constants, evaluate, expression
from .torch_private import OpOverload, schema_of


def fold_numbers(model: fx.GraphModule) -> None:
    """Put the numbers themselves in the place of the nodes that compute them from buffers alone.

    What is taken out of a parameter changes when the parameter is trained, and stays in the graph.
    """
    fixed = constants(model.graph)
    for node in [node for node in model.graph.nodes if node in fixed and _gives_number(node)]:
        nodes = expression(node)
        read = {n: get_attribute(model, str(n.target)) for n in nodes if n.op == "get_attr"}
        if not any(isinstance(tensor, nn.Parameter) for tensor in read.values()):
            value = evaluate(nodes, read)
            if isinstance(value, int | float | bool):
                _put(node, value)
    remove_unused(model)


def _put(node: fx.Node, value: float) -> None:
    for user in list(node.users):
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: value if n is node else n)


def _gives_number(node: fx.Node) -> bool:
    """Whether it takes a number out of a tensor, such as aten.item; arithmetic on such numbers is folded in turn."""
    target = node.target
    if isinstance(target, OpOverload):
        return [str(result.type) for result in schema_of(target).returns] in (["number"], ["int"], ["float"], ["bool"])
    return node.op == "call_function" and getattr(target, "__module__", "") in ("_operator", "math", "torch.sym_node")
