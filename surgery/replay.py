"""What a layer of the model computed is not computed again by the same layer of the graph on the same input.

    model   conv(x) → y     recorded
    graph   conv(x')        gives y where x' is x bit for bit, and is computed otherwise

A comparison loses nothing by it: the graph runs all its nodes on their true inputs; left out is only the arithmetic of
a convolution or matrix product with the same weights, the same options and the same input. The recording holds copies,
so that no later write reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .torch_private import is_compiled, version_of

LIMIT = 512 * 2**20
"""Bytes a recording may hold; what comes later is not recorded, and computed by the graph as well."""

_COSTLY = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Compute = Callable[[Tensor], Tensor]
Given = Callable[[nn.Module, Compute, Tensor], Tensor]


@dataclass(frozen=True)
class _Call:
    given: Tensor
    result: Tensor


class Recording:
    """Inputs and outputs of the layers of one forward."""

    def __init__(self) -> None:
        self._calls: dict[Any, list[_Call]] = {}
        self._room = LIMIT

    @contextmanager
    def records(self, model: nn.Module) -> Iterator[None]:
        """In the body, the layers of `model` note what they compute."""
        compiled = any(is_compiled(m) or type(m).__name__ == "OptimizedModule" for m in model.modules())
        with _in_place_of_forward(nn.Module() if compiled else model, self._note):
            yield

    @contextmanager
    def replays(self, graph: nn.Module) -> Iterator[None]:
        """In the body, the layers of `graph` give what was noted, where it was."""
        with _in_place_of_forward(graph, self._look_up):
            yield

    def _note(self, layer: nn.Module, compute: Compute, x: Tensor) -> Tensor:
        size = x.numel() * x.element_size() if _plain(x) else self._room
        given = x.clone() if size < self._room else None
        result = compute(x)
        if given is not None and _plain(result):
            self._calls.setdefault(_identity(layer), []).append(_Call(given, result.clone()))
            self._room -= size + result.numel() * result.element_size()
        return result

    def _look_up(self, layer: nn.Module, compute: Compute, x: Tensor) -> Tensor:
        calls = self._calls.get(_identity(layer), [])
        at = next((i for i, call in enumerate(calls) if _identical(call.given, x)), None)
        return compute(x) if at is None else calls.pop(at).result


@contextmanager
def _in_place_of_forward(model: nn.Module, given: Given) -> Iterator[None]:
    layers = [m for m in model.modules() if type(m) in _COSTLY and "forward" not in vars(m)]
    try:
        for layer in layers:
            vars(layer)["forward"] = _wrapped(layer, given)
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _wrapped(layer: nn.Module, given: Given) -> Callable[..., Tensor]:
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        simple = len(args) == 1 and not kwargs and type(args[0]) is Tensor
        result: Tensor = given(layer, compute, args[0]) if simple else compute(*args, **kwargs)
        return result

    return forward


def _identity(layer: nn.Module) -> Any:
    """The same for two layers that compute the same: class, options, and the very weights as they are now."""
    return type(layer), layer.extra_repr(), *map(_state, layer.parameters(recurse=False))


def _state(weight: Tensor) -> tuple[int, int, int, float]:
    """Changes with the weight; what was written past the counter, through `.data`, shows in a sample."""
    some = weight.detach().reshape(-1)[:: max(1, weight.numel() // 1024)]
    return id(weight), version_of(weight), weight.data_ptr(), float(some.double().sum())


def _plain(tensor: Tensor) -> bool:
    """Whether the tensor has memory to compare, unlike a sparse one or one inside `vmap`."""
    try:
        return type(tensor) is Tensor and tensor.layout is torch.strided and tensor.data_ptr() is not None
    except RuntimeError:
        return False


def _identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same bits in the same layout; a NaN equals itself."""
    if not _plain(b) or (a.shape, a.stride(), a.dtype, a.device) != (b.shape, b.stride(), b.dtype, b.device):
        return False
    words = _WORDS.get(a.element_size())
    if words is None or not a.numel():
        return not a.numel()
    low, high = torch.aminmax(a.view(words) ^ b.view(words))
    return not bool(low) and not bool(high)
