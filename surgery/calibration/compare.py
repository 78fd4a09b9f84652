"""The operated model beside the original: moments of a layer's input with what its output should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from ..errors import PluginError
from ..graph import Layer, shape
from .moments import Regression, Scatter
from .unfolding import can_unfold, groups_and_features, output_rows, unfold, weight_matrix


@dataclass(frozen=True)
class Aim:
    """What one call of a layer should give: a node's value in the original, less values in the operated model.

    `minus` names nodes of the operated model, such as the shortcut of a residual block whose sum is the target; `keep`,
    by dimension, the places of the original's value that the operated model still has; all where it has none.
    """

    target: str
    minus: tuple[str, ...] = ()
    keep: Mapping[int, Tensor] = field(default_factory=dict)


class Comparison:
    """Adds up `Regression` for one layer, one aim per call."""

    def __init__(self, layer: Layer, aims: Sequence[Aim]) -> None:
        if not can_unfold(layer.module):
            raise PluginError(f"{layer.name}: the unfolded input of {layer.type} is not defined")
        if len(aims) != len(layer.nodes):
            raise PluginError(f"{layer.name} is called {len(layer.nodes)} times and has {len(aims)} aims")
        self.layer, self.aims, self._joint = layer, aims, Scatter(True)

    @property
    def sources(self) -> set[str]:
        """Nodes of the operated model whose values are read."""
        return {str(node.args[0]) for node in self.layer.nodes} | {name for aim in self.aims for name in aim.minus}

    def add(self, own: Mapping[str, Tensor], wanted: Mapping[str, Tensor], chunk_bytes: int) -> None:
        """Values of the operated model's and of the original's nodes on the same batch."""
        module = self.layer.module
        for node, aim in zip(self.layer.nodes, self.aims, strict=True):
            target, _ = target_of(aim, own, wanted[aim.target])
            y = output_rows(module, target)
            self._check(y.shape[2] == weight_matrix(module).shape[1], aim, target)
            start = 0
            for rows in unfold(module, own[str(node.args[0])], chunk_bytes):
                stop = start + rows.shape[1]
                self._check(stop <= y.shape[1], aim, target)
                self._joint.add(torch.cat([rows, y[:, start:stop]], 2))
                start = stop
            self._check(start == y.shape[1], aim, target)

    def _check(self, fits: bool, aim: Aim, target: Tensor) -> None:
        if not fits:
            raise PluginError(
                f"{self.layer.name}: the target {aim.target} has another shape, {tuple(target.shape)}, than its output"
            )

    def finish(self) -> Regression:
        return Regression.of(self._joint.finish(), groups_and_features(self.layer.module)[1])


def target_of(aim: Aim, own: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a call should give, from the reference's value `wanted`; and what was taken off it, None = nothing."""
    value = wanted
    for dim, places in aim.keep.items():
        value = value.index_select(dim, places.to(value.device))
    if not aim.minus:
        return value, None
    offset = own[aim.minus[0]]
    for name in aim.minus[1:]:
        offset = offset + own[name]
    return value - offset, offset


def aim_of(original: fx.GraphModule, node: fx.Node) -> Aim | None:
    """See `Calibration.aim`."""
    target = counterpart(original, node)
    if target is None or ("tensor_meta" in node.meta and shape(node) != shape(target)):
        return None
    user = next(iter(node.users))
    if len(node.users) == 1 and user.target is torch.ops.aten.add.Tensor and not user.kwargs:
        shortcut = [value for value in user.all_input_nodes if value is not node]
        total = counterpart(original, user)
        if len(shortcut) == 1 and total and shape(total) == shape(target):
            return Aim(total.name, (shortcut[0].name,))
    return Aim(target.name)


def counterpart(original: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The original's node that `node` stands for: what a user of both reads at the same place; or None."""
    originals = {n.name: n for n in original.graph.nodes}
    for user in node.users:
        twin = originals.get(user.name)
        if twin is None or (twin.op, str(twin.target)) != (user.op, str(user.target)):
            continue
        for own, theirs in zip(tree_leaves(user.args), tree_leaves(twin.args), strict=False):
            if own is node and isinstance(theirs, fx.Node):
                return theirs
    return None
