"""The oracle of channel removal: the model with the removed units' parameters set to zero computes the same.

Normalisation over channels takes its statistics over the channels that are left; everything else runs as it was.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..channels import Channels
from ..graph import Recorder
from ..inputs import Inputs
from ..names import tensors


def masked_outputs(found: Channels, alive: Tensor, inputs: Inputs) -> list[Any]:
    """Flat outputs of the model that `found` is about when positions that are not `alive` are zero, not gone."""
    masked = copy.deepcopy(found.model)
    originals = tensors(found.model)
    for name, tensor in tensors(masked).items():
        for dim in range(tensor.ndim):
            slot = found.walk.facts.positions.slots.get((id(originals[name]), dim))
            if slot is not None and tensor.is_floating_point():
                dead = torch.nonzero(~alive[slot.first : slot.first + slot.size]).reshape(-1)
                with torch.no_grad():
                    tensor.index_fill_(dim, dead.to(tensor.device), 0)
    return list(_Masked(masked, found, alive).run_inputs(inputs))


class _Masked(Recorder):
    """Runs the masked model; what normalises over channels sees those that are left."""

    def __init__(self, masked: fx.GraphModule, found: Channels, alive: Tensor) -> None:
        super().__init__(masked)
        self._values = {node.name: value for node, value in found.walk.values.items()}
        self._alive = alive

    def see(self, node: fx.Node, value: Any) -> None:
        pass

    def run_node(self, n: fx.Node) -> Any:
        kept = self._left(n)
        if not kept:
            return super().run_node(n)
        (x,) = self.fetch_args_kwargs_from_env(n)[0][:1]
        part = x
        for dim, index in kept:
            part = part.index_select(dim, index)
        result = self._statistics(n, part, kept, x)
        if result.ndim != x.ndim or result.shape != part.shape:
            return result
        whole = torch.zeros_like(x)
        grid = [torch.arange(size) for size in x.shape]
        for dim, index in kept:
            grid[dim] = index
        whole[torch.meshgrid(*grid, indexing="ij")] = result
        return whole

    def _left(self, node: fx.Node) -> list[tuple[int, Tensor]]:
        """Dimensions that the node normalises over and that lose positions, with the positions that are left."""
        if node.op == "call_module":
            module = self.submodules[str(node.target)]
            if not isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm):
                return []
        elif str(node.target).partition(".")[0] != "aten" or str(node.target).split(".")[1] not in _STATISTICS:
            return []
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axes = self._values[source.name].axes
        over = _normalised_over(node, len(axes))
        kept = [(d, torch.nonzero(self._alive[a.ids]).reshape(-1)) for d, a in enumerate(axes) if a is not None]
        lost = [(d, index) for d, index in kept if len(index) < len(axes[d].ids)]
        return lost if any(d in over for d, _ in lost) else []

    def _statistics(self, node: fx.Node, part: Tensor, kept: list[tuple[int, Tensor]], x: Tensor) -> Tensor:
        if node.op == "call_function":
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            result: Tensor = node.target(part, *args[1:], **kwargs)  # type: ignore[operator]
            return result
        module = copy.deepcopy(self.submodules[str(node.target)])
        first = x.ndim - len(module.normalized_shape) if hasattr(module, "normalized_shape") else 1
        for dim, index in kept:
            for name, tensor in list(module._parameters.items()):
                if tensor is not None and dim >= first and tensor.shape[dim - first] == x.shape[dim]:
                    module._parameters[name] = nn.Parameter(tensor.index_select(dim - first, index))
        if isinstance(module, nn.GroupNorm):
            module.num_groups = part.shape[1] if module.num_groups == x.shape[1] else module.num_groups
            module.num_channels = part.shape[1]
        else:
            module.normalized_shape = tuple(part.shape[first:])
        normalised: Tensor = module(part)
        return normalised


def _normalised_over(node: fx.Node, rank: int) -> set[int]:
    """Dimensions that a mean is over; all where a layer normalises."""
    dims = node.args[1] if "mean" in str(node.target) and len(node.args) > 1 else range(rank)
    assert isinstance(dims, list | tuple | range)
    return {int(d) % rank for d in dims}


_STATISTICS = ("mean", "layer_norm", "rms_norm", "group_norm")
