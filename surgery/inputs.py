"""Example inputs and batches in one form: the arguments of one forward call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError
from .torch_private import keystr, tree_flatten_with_path, tree_map_only


@dataclass(frozen=True)
class Inputs:
    """Arguments of one forward call: `model(*args, **kwargs)`.

    Tensors carry the batch in dimension 0 where they carry it at all.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    names: tuple[str, ...] = field(default=(), compare=False)
    """Names of `args` in the forward's signature, for messages."""

    @classmethod
    def of(cls, model: nn.Module, value: Any) -> Inputs:
        """`value` as arguments for `model`: a tensor, a tuple or list of arguments, a dict by name, or `Inputs`.

        Arguments are bound by the signature, so that every form of the same call gives the same `Inputs`: positional
        as far as the signature allows, defaults left out. A dict whose keys are no parameter names is one argument.

        Raises:
            InputError: the arguments do not fit the signature of `model.forward`.
        """
        signature = inspect.signature(model.forward)
        if isinstance(value, Inputs):
            args, kwargs = value.args, value.kwargs
        elif isinstance(value, Mapping):
            args, kwargs = _from_mapping(signature, dict(value))
        else:
            args, kwargs = (tuple(value) if isinstance(value, tuple | list) else (value,)), {}
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the inputs do not fit {type(model).__name__}.forward{signature}: {error}{_keys(value)}",
                fix="give a tensor, a tuple of arguments, or a dict of arguments by name",
            ) from error
        names = [n for n, p in signature.parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        return cls(bound.args, dict(bound.kwargs), tuple(names))

    @property
    def named_leaves(self) -> dict[str, Any]:
        """Every tensor and constant by its place, such as `mask` or `batch['image']`, in the order of the graph."""
        names = [*self.names, *(f"[{i}]" for i in range(len(self.names), len(self.args)))]
        named = [*zip(names, self.args, strict=False), *self.kwargs.items()]
        return {f"{name}{keystr(path)}": leaf for name, value in named for path, leaf in _leaves(value)}

    @property
    def named_tensors(self) -> dict[str, Tensor]:
        """Every tensor by its place."""
        return {name: leaf for name, leaf in self.named_leaves.items() if isinstance(leaf, Tensor)}

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.named_tensors.values())

    @property
    def batch_size(self) -> int:
        """Leading size of the first tensor; 1 where there is none."""
        return next((int(t.shape[0]) for t in self.tensors if t.ndim), 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> Inputs:
        args, kwargs = tree_map_only(Tensor, function, (self.args, self.kwargs))
        return Inputs(args, kwargs, self.names)

    def to(self, device: torch.device | str) -> Inputs:
        return self.map(lambda t: t.to(device))

    def clone(self) -> Inputs:
        return self.map(lambda t: t.detach().clone())

    def with_batch(self, size: int) -> Inputs:
        """The same inputs repeated or cut to `size` samples, wherever the batch stands in dimension 0."""
        batch = self.batch_size
        return self.map(lambda t: _resize(t, size) if t.ndim and t.shape[0] == batch else t)

    def check_finite(self, place: str) -> None:
        """Raises InputError naming the tensor where a floating-point input holds NaN or infinity."""
        for name, tensor in self.named_tensors.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise InputError(f"input {name} holds NaN or infinity", at=place, fix="remove or repair these samples")


def ordinary(value: Any) -> Any:
    """`value`, with tensors of inference mode, which no gradient may read, as copies that are none."""
    return tree_map_only(Tensor, lambda t: t.clone() if t.is_inference() else t, value)


def _keys(value: Any) -> str:
    return f"; given {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""


def _leaves(value: Any) -> list[tuple[tuple[Any, ...], Any]]:
    leaves, _ = tree_flatten_with_path(value)
    return leaves


def _from_mapping(signature: inspect.Signature, value: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    parameters = signature.parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_any or value.keys() <= parameters.keys():
        return (), value
    required = [p for p in parameters.values() if p.default is p.empty]
    if len(required) == 1 and not value.keys() & parameters.keys():
        return (value,), {}
    return (), value


def _resize(tensor: Tensor, size: int) -> Tensor:
    repeats = -(-size // max(1, tensor.shape[0]))
    return tensor.repeat(repeats, *[1] * (tensor.ndim - 1))[:size].clone()
