"""Several convolutions or linear layers in a row that take one layer's place.

The stages have no bias but the last, and no two of them reach along the same axis, so that zero padding between them
changes nothing: the chain computes exactly what a single layer with its `product` for a weight computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Factors(Protocol):
    """A decomposed weight. `product` (O, I, *k) is what it amounts to."""

    @property
    def product(self) -> Tensor: ...

    def parts(self, module: nn.Module, bias: Tensor | None) -> dict[str, nn.Module]:
        """What takes the place of `module`, in its type and on its device, with a bias (O,)."""


@dataclass(frozen=True)
class Norm:
    """A BatchNorm that is an identity for these statistics (out,) of its input."""

    mean: Tensor
    variance: Tensor

    @classmethod
    def unknown(cls, size: int) -> Norm:
        return cls(torch.zeros(size, dtype=torch.float64), torch.ones(size, dtype=torch.float64))

    def module(self, like: Any) -> nn.Module:
        """Behind a convolution like `like`."""
        made: Any = getattr(nn, f"BatchNorm{like.weight.ndim - 2}d")(len(self.mean), device=like.weight.device)
        made = made.to(like.weight.dtype)
        made.running_mean, made.running_var = self.mean.to(made.running_mean), self.variance.to(made.running_var)
        made.weight = parameter(like, torch.sqrt(made.running_var.double() + made.eps))
        made.bias = parameter(like, made.running_mean)
        return made  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Stage:
    """One convolution: weight (out, in / groups, *k), and a BatchNorm behind it."""

    name: str
    weight: Tensor
    groups: int = 1
    norm: Norm | None = None


@dataclass(frozen=True)
class Chain:
    """Stages in order of execution; the last one has one group."""

    stages: tuple[Stage, ...]

    @cached_property
    def product(self) -> Tensor:
        return composed(self.stages)

    @cached_property
    def features(self) -> Tensor:
        """(F, I·k), `product` = `last` @ `features`: what the last stage's unfolded input is of the layer's."""
        last = self.stages[-1]
        size = last.weight[0].numel()
        each = torch.eye(size, dtype=last.weight.dtype).view(size, *last.weight.shape[1:])
        return composed((*self.stages[:-1], replace(last, weight=each))).flatten(1)

    @property
    def last(self) -> Tensor:
        return self.stages[-1].weight.flatten(1)

    def with_last(self, last: Tensor) -> Chain:
        end = self.stages[-1]
        return Chain((*self.stages[:-1], replace(end, weight=last.view(len(last), *end.weight.shape[1:]))))

    def observed(self, mean: Tensor, covariance: Tensor) -> Chain:
        """With BatchNorms for the statistics (I·k,), (I·k, I·k) of the layer's unfolded input."""
        stages, kernel = list(self.stages), self.product.shape[2:]
        for number, stage in enumerate(stages):
            if stage.norm is not None:
                seen = _centred(composed(stages[: number + 1]), kernel).flatten(1)
                norm = Norm(seen @ mean, ((seen @ covariance) * seen).sum(1).clamp_min(0))
                stages[number] = replace(stage, norm=norm)
        return Chain(tuple(stages))

    def parts(self, module: nn.Module, bias: Tensor | None) -> dict[str, nn.Module]:
        kernels = [stage.weight.shape[2:] for stage in self.stages]
        made = {}
        for number, (stage, axes) in enumerate(zip(self.stages, owned_axes(kernels), strict=True)):
            own = bias if number == len(self.stages) - 1 else None
            made[stage.name] = _module(module, stage, axes, own)
            if stage.norm is not None:
                made[f"{stage.name}_norm"] = stage.norm.module(module)
        return made


def _centred(weight: Tensor, kernel: Sequence[int]) -> Tensor:
    """(out, in, *k) in the middle of zeros (out, in, *kernel): what the middle of the unfolded input gives."""
    full = weight.new_zeros(*weight.shape[:2], *kernel)
    places = [slice(None), slice(None)]
    for size, own in zip(kernel, weight.shape[2:], strict=True):
        places.append(slice((size - own) // 2, (size - own) // 2 + own))
    full[tuple(places)] = weight
    return full


def random_chain(shapes: Sequence[tuple[int, ...]]) -> Chain:
    """A chain of stages with weights (out, in / groups, *k) of these shapes."""
    generator, width = torch.Generator().manual_seed(0), 0
    stages: list[Stage] = []
    for number, shape in enumerate(shapes):
        weight = torch.randn(shape, generator=generator) / prod(shape[1:]) ** 0.5
        stages.append(Stage(str(number), weight, width // shape[1] if stages else 1))
        width = shape[0]
    return Chain(tuple(stages))


def composed(stages: Sequence[Stage]) -> Tensor:
    """(out, in, *k) of stages in a row. A stage of several groups is depthwise."""
    product = _dense(stages[0])
    for stage in stages[1:]:
        weight = stage.weight
        axes = list(range(3, 1 + weight.ndim))
        product = (
            torch.einsum(weight, [0, 1, *axes], product, [1, 2, *axes], [0, 2, *axes])
            if stage.groups == 1
            else weight[:, :1] * product
        )
    return product


def _dense(stage: Stage) -> Tensor:
    if stage.groups == 1:
        return stage.weight
    return torch.diag_embed(stage.weight[:, 0].movedim(0, -1)).movedim((-2, -1), (0, 1))


def owned_axes(kernels: Sequence[Sequence[int]]) -> list[set[int]]:
    """Axes along which each stage strides and pads: where its kernel reaches; those of no stage are the first one's."""
    owned = [{axis for axis, size in enumerate(kernel) if size > 1} for kernel in kernels]
    owned[0] |= set(range(len(kernels[0]))) - set().union(*owned)
    return owned


def _module(like: Any, stage: Stage, axes: set[int], bias: Tensor | None) -> nn.Module:
    """A layer like `like` with this stage's weight, which strides and pads along `axes` only."""
    outputs, inputs = len(stage.weight), stage.weight.shape[1] * stage.groups
    kind: Any = nn.Linear
    options: dict[str, Any] = {}
    if stage.weight.ndim > 2:
        kind = getattr(nn, f"Conv{stage.weight.ndim - 2}d")
        own = [axis in axes for axis in range(stage.weight.ndim - 2)]
        named = isinstance(like.padding, str)
        options = {
            "kernel_size": tuple(stage.weight.shape[2:]),
            "stride": _along(own, like.stride, 1),
            "padding": like.padding if named else _along(own, like.padding, 0),
            "dilation": _along(own, like.dilation, 1),
            "groups": stage.groups,
            "padding_mode": like.padding_mode,
        }
    made = kind(inputs, outputs, bias=bias is not None, device="meta", **options)
    made.weight = parameter(like, stage.weight)
    if bias is not None:
        made.bias = parameter(like, bias)
    return made  # type: ignore[no-any-return]


def _along(own: Sequence[bool], values: Sequence[int], other: int) -> tuple[int, ...]:
    return tuple(value if mine else other for mine, value in zip(own, values, strict=True))


def parameter(like: Any, value: Tensor) -> nn.Parameter:
    """`value` as a parameter of the type, device and trainability of `like`'s weight."""
    weight = like.weight
    return nn.Parameter(value.detach().to(weight.device, weight.dtype).contiguous(), weight.requires_grad)
