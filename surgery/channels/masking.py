"""The oracle of channel removal: the model with the removed units' parameters set to zero computes the same.

Normalisation over channels takes its statistics over the channels that are left; everything else runs as it was. The
rules say which parameters go and which sizes change with them, and the masked model keeps every size: where a rule is
wrong about what moves where, the two differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call

from ..captured import CapturedModel, relative_error
from ..graph import Recorder, leaf_inputs, shape
from ..inputs import Inputs
from ..names import tensors
from ..torch_private import tree_leaves
from ..tracing import evaluating
from ..vocabulary import arguments
from .values import Value

if TYPE_CHECKING:
    from .analysis import Channels


def remove_and_compare(found: Channels, removed: Sequence[Tensor], inputs: Inputs | None = None) -> float:
    """Shrink the model in place, and how far it then is from the masked one: the largest difference on `inputs` (None =
    the example), in parts of the largest output. `removed` as for `Channels.alive`."""
    inputs = inputs or found.model.inputs
    with _repeatable(found.model):
        expected = masked_outputs(found, found.alive(removed), inputs)
    found.remove(removed)
    with _repeatable(found.model):
        actual = fx.Interpreter(found.model).run(*leaf_inputs(inputs), enable_io_processing=False)
    pairs = zip(tree_leaves(actual), tree_leaves(expected), strict=True)
    return max((relative_error(a, e) for a, e in pairs if isinstance(e, Tensor)), default=0.0)


def masking_bytes(model: CapturedModel) -> int:
    """What a comparison holds beside two runs of the example: the masked outputs, and one layer's masked weights."""
    weights = [sum(t.nbytes for t in own.parameters(recurse=False)) for own in model.modules()]
    outputs = [node for node in model.graph.output_node().all_input_nodes if "tensor_meta" in node.meta]
    return max(weights, default=0) + sum(8 * torch.Size(shape(node)).numel() for node in outputs)


@contextmanager
def _repeatable(model: CapturedModel) -> Iterator[None]:
    """Eval mode, and the same random numbers each time."""
    with evaluating(model), torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def masked_outputs(found: Channels, alive: Tensor, inputs: Inputs) -> list[Any]:
    """Flat outputs of the model that `found` is about when positions that are not `alive` are zero, not gone."""
    return list(_Masked(found, alive).run_inputs(inputs))


class _Masked(Recorder):
    """Runs the model with masked parameters, one layer's at a time; what normalises over channels sees those that are
    left."""

    def __init__(self, found: Channels, alive: Tensor) -> None:
        super().__init__(found.model)
        self._values = {node.name: value for node, value in found.walk.values.items()}
        self._slots, self._alive = found.walk.facts.positions.slots, alive

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self._masked(value) if isinstance(value, Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.submodules[target]
        return functional_call(module, {name: self._masked(t) for name, t in tensors(module).items()}, args, kwargs)

    def _masked(self, tensor: Tensor) -> Tensor:
        """Itself where nothing of it goes."""
        value = tensor.detach()
        for dim in range(tensor.ndim if tensor.is_floating_point() else 0):
            slot = self._slots.get((id(tensor), dim))
            if slot is not None:
                dead = torch.nonzero(~self._alive[slot.first : slot.first + slot.size]).reshape(-1)
                value = value.index_fill(dim, dead.to(value.device), 0) if len(dead) else value
        return value

    def see(self, node: fx.Node, value: Any) -> None:
        pass

    def run_node(self, n: fx.Node) -> Any:
        value = self._run(n)
        known = self._values[n.name]
        return self._finite(value, known) if isinstance(value, Tensor) and isinstance(known, Value) else value

    def _finite(self, value: Tensor, known: Value) -> Tensor:
        """What an operator makes of removed zeros may be infinite, as a logarithm is: it is zero to those that read it,
        which have no weights there."""
        if not value.is_floating_point() or bool(value.sum().isfinite()):
            return value
        for dim, axis in enumerate(known.axes):
            if axis is not None:
                dead = torch.nonzero(~self._alive[axis.ids]).reshape(-1).to(value.device)
                value = value.index_copy(dim, dead, value.index_select(dim, dead).nan_to_num(0, 0, 0))
        return value

    def _run(self, n: fx.Node) -> Any:
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
            if not isinstance(module, tuple(_FUNCTIONS)):
                return []
        elif str(node.target).partition(".")[0] != "aten" or str(node.target).split(".")[1] not in _STATISTICS:
            return []
        source = node.args[0]
        assert isinstance(source, fx.Node)
        axes = self._values[source.name].axes
        over = _normalised_over(node, len(axes))
        kept = [(d, torch.nonzero(self._alive[a.ids]).reshape(-1)) for d, a in enumerate(axes) if a is not None]
        return [(d, index) for d, index in kept if d in over and len(index) < len(axes[d].ids)]

    def _statistics(self, node: fx.Node, part: Tensor, kept: list[tuple[int, Tensor]], x: Tensor) -> Tensor:
        """What the node makes of `part`: the places of its input `x` that are `kept`."""
        function, named = self._call(node)
        named[next(iter(named))] = part
        first = x.ndim - len(named["normalized_shape"]) if "normalized_shape" in named else 1
        for name in {"weight", "bias"} & named.keys():
            for dim, index in kept:
                if named[name] is not None and 0 <= dim - first < named[name].ndim:
                    named[name] = named[name].index_select(dim - first, index)
        if "normalized_shape" in named:
            named["normalized_shape"] = tuple(part.shape[first:])
        if named.get("num_groups") == x.shape[1]:
            named["num_groups"] = part.shape[1]
        result: Tensor = function(**named)
        return result

    def _call(self, node: fx.Node) -> tuple[Any, dict[str, Any]]:
        """A function and its arguments by name, the input first."""
        if node.op == "call_function":
            given: Any = arguments(node)
            known: Any = self.map_nodes_to_values(given, node)
            return node.target, dict(known)
        module = self.submodules[str(node.target)]
        names = ("normalized_shape", "num_groups", "weight", "bias", "eps")
        function = next(f for cls, f in _FUNCTIONS.items() if isinstance(module, cls))
        return function, {"input": None, **{name: getattr(module, name) for name in names if hasattr(module, name)}}


def _normalised_over(node: fx.Node, rank: int) -> set[int]:
    """Dimensions that a mean is over; all where a layer normalises."""
    dims = node.args[1] if "mean" in str(node.target) and len(node.args) > 1 else range(rank)
    assert isinstance(dims, list | tuple | range)
    return {int(d) % rank for d in dims}


_FUNCTIONS = {nn.LayerNorm: F.layer_norm, nn.RMSNorm: F.rms_norm, nn.GroupNorm: F.group_norm}
_STATISTICS = ("mean", "layer_norm", "rms_norm", "group_norm")
