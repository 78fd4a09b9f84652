"""What a model computes from constants alone, computed once: a twin to train.

    conv(x, values[places(constants)])   →   conv(x, values[b]),   b = places(constants), a buffer

`surgery.replace_weight` has weights computed at every forward, also what in them depends on no parameter, such as the
positions of shared values. A runtime folds that when it loads the file; training pays for it at every step.
"""

from __future__ import annotations

from torch import Tensor, fx

from .captured import CapturedModel
from .contract import snapshot
from .graph import remove_unused
from .names import get_attribute
from .operands import constants, evaluate, expression
from .replacement import add_buffer

PREFIX = "hoisted"
"""Of the buffers' names."""


def hoisted(model: CapturedModel) -> CapturedModel:
    """A twin that shares parameters and buffers with `model`, in which every tensor that depends neither on an input
    nor on a parameter that is trained, nor on chance, is a buffer. Outputs and gradients are the same bit for bit.

    `requires_grad` decides, as it is now. The buffers that it makes are not persistent; what only they were computed
    from is not in the twin.
    """
    twin = snapshot(model)
    fixed = _fixed(twin)
    for node in [node for node in twin.graph.nodes if node in fixed]:
        if node.op == "call_function" and any(user not in fixed for user in node.users):
            _keep(twin, node)
    remove_unused(twin)
    twin.recompile()
    return twin


def _fixed(model: CapturedModel) -> set[fx.Node]:
    """Nodes whose value stays what it is however long the model is trained."""
    moving = {id(p) for p in model.parameters() if p.requires_grad} | _written(model)
    found: set[fx.Node] = set()
    candidates = constants(model.graph)
    for node in [node for node in model.graph.nodes if node in candidates]:
        if node.op == "get_attr":
            fixed = id(get_attribute(model, str(node.target))) not in moving
        else:
            fixed = found.issuperset(node.all_input_nodes)
        if fixed:
            found.add(node)
    return found


def _written(model: CapturedModel) -> set[int]:
    """Buffers of called modules, which may renew them in training: BatchNorm's statistics."""
    called = {str(node.target) for node in model.graph.nodes if node.op == "call_module"}
    return {id(buffer) for name in called for buffer in model.get_submodule(name).buffers()}


def _keep(model: CapturedModel, node: fx.Node) -> None:
    """Have the value of `node` read from a buffer, if it is a tensor."""
    nodes = expression(node)
    value = evaluate(nodes, {n: get_attribute(model, str(n.target)) for n in nodes if n.op == "get_attr"})
    if not isinstance(value, Tensor):
        return
    with model.graph.inserting_before(node):
        reader = add_buffer(model, PREFIX, value, persistent=False)
    reader.meta = dict(node.meta)
    node.replace_all_uses_with(reader)
