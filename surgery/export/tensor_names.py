"""Names for the tensors that go into and come out of a model: those of its parameters, those of its result's keys."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..inputs import Inputs
from ..torch_private import MappingKey, SequenceKey, tree_flatten_with_path

if TYPE_CHECKING:
    import onnx_ir as ir


def named_inputs(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """The tensors of a call by forward's parameter names, nested ones as `states_0` or `batch.mask`.

    They stand in the order of `Inputs.tensors`.
    """
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        names += _leaf_names("" if kind is inspect.Parameter.VAR_KEYWORD else name, value)
    return dict(zip(unique(names), inputs.tensors, strict=True))


def named_outputs(value: Any) -> dict[str, Tensor]:
    """The tensors of a result: `output` for a lone tensor, `output_0` … for a tuple or list, else its keys."""
    leaves, _ = tree_flatten_with_path(value)
    mapping = bool(leaves) and bool(leaves[0][0]) and isinstance(leaves[0][0][0], MappingKey)
    names = unique(_leaf_names("" if mapping else "output", value))
    return dict(zip(names, [leaf for _, leaf in leaves if isinstance(leaf, Tensor)], strict=True))


def _leaf_names(root: str, value: Any) -> list[str]:
    leaves, _ = tree_flatten_with_path(value)
    return [_leaf_name(root, path) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _leaf_name(root: str, path: Sequence[Any]) -> str:
    parts = [f"_{part.idx}" if isinstance(part, SequenceKey) else f".{_key(part)}" for part in path]
    return root + "".join(parts) if root else "".join(parts)[1:]


def _key(part: Any) -> str:
    return str(part.key) if isinstance(part, MappingKey) else str(part).strip(".")


def unique(names: Iterable[str]) -> list[str]:
    taken: list[str] = []
    for name in names:
        taken.append(fresh(name, taken))
    return taken


def fresh(stem: str, taken: Collection[str]) -> str:
    """`stem`, or `stem_2`, `stem_3` … where that is taken."""
    names = itertools.chain([stem], (f"{stem}_{i}" for i in itertools.count(2)))
    return next(name for name in names if name not in taken)


class ValueNames:
    """The names of all values of an ONNX graph: whoever names a value asks here, so that no two are alike."""

    def __init__(self, graph: ir.Graph) -> None:
        inside = [value for node in graph.all_nodes() for value in node.outputs]
        values = [*graph.inputs, *graph.initializers.values(), *inside]
        self._holders = {str(value.name): value for value in values}

    def give(self, value: ir.Value, stem: str) -> None:
        """Calls a new `value` by `stem`, or by `stem_2` … where that is taken."""
        self._hold(value, fresh(stem, self._holders))

    def claim(self, values: Sequence[ir.Value], names: Sequence[str]) -> None:
        """Gives each value its name, no two alike; another value that held it gives way."""
        for i, value in enumerate(values):
            self._holders.pop(str(value.name), None)
            value.name = f"\0{i}"  # a weight cannot be without a name, and another of `values` may still hold its own
        for name in names:
            if name in self._holders:
                other = self._holders.pop(name)
                self._hold(other, fresh(name, {*self._holders, *names}))
        for value, name in zip(values, names, strict=True):
            self._hold(value, name)

    def _hold(self, value: ir.Value, name: str) -> None:
        value.name = name
        self._holders[name] = value
