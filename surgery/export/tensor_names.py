"""Names for the tensors that go into and come out of a model: those of its parameters, those of its result's keys."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import MappingKey, SequenceKey, tree_flatten_with_path

from ..inputs import Inputs


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


def fresh(name: str, taken: Collection[str]) -> str:
    """`name`, with as many underscores behind it as it takes to be new."""
    while name in taken:
        name += "_"
    return name
