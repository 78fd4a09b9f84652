"""A convolution, transposed convolution or linear layer as one matrix product per group.

    y = W x + b,   W (groups, outputs, features),   x (groups, rows, features),   features = inputs per group · ∏ kernel

A row is one output position of one sample: the window of the input under the kernel, zero padding included, in the
order of the weight's own dimensions. A transposed convolution is the convolution of its input with zeros put between
the values, kernel mirrored; its rows are output positions too.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch_private import ConvNd, ConvTransposeNd, padding_of


def can_unfold(module: nn.Module) -> bool:
    """Whether `module` is a matrix product on its unfolded input."""
    return isinstance(module, nn.Linear | ConvNd)


def groups_and_features(module: nn.Module) -> tuple[int, int]:
    """Number of groups, and features of the unfolded input per group."""
    if isinstance(module, ConvNd):
        return module.groups, module.in_channels // module.groups * prod(module.kernel_size)
    assert isinstance(module, nn.Linear)
    return 1, module.in_features


def channel_dim(module: nn.Module) -> int:
    """Dimension of the channels in input and output, counted from the end."""
    return -1 - len(module.kernel_size) if isinstance(module, ConvNd) else -1


def weight_matrix(module: nn.Module) -> Tensor:
    """W (groups, outputs, features), a view of the weight where that is possible."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, ConvTransposeNd):
        grouped = weight.reshape(module.groups, -1, *weight.shape[1:])  # (groups, inputs, outputs, *kernel)
        return grouped.transpose(1, 2).flatten(2)
    groups, features = groups_and_features(module)
    return weight.reshape(groups, -1, features)


def weight_from_matrix(module: nn.Module, matrix: Tensor) -> Tensor:
    """A weight for `module` from W (groups, outputs, features); inverse of `weight_matrix`."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if isinstance(module, ConvTransposeNd):
        grouped = matrix.reshape(*matrix.shape[:2], -1, *module.kernel_size).transpose(1, 2)
        return grouped.flatten(0, 1).contiguous()
    return matrix.reshape(weight.shape).contiguous()


def output_rows(module: nn.Module, y: Tensor) -> Tensor:
    """Outputs of `module`, or values of the same shape, as (groups, rows, outputs), rows as `unfold` orders them."""
    if isinstance(module, nn.Linear):
        return y.reshape(1, -1, y.shape[-1])
    assert isinstance(module, ConvNd)
    y = _batched(y, len(module.kernel_size)).movedim(1, -1)  # (batch, *positions, channels)
    return y.reshape(-1, module.groups, y.shape[-1] // module.groups).transpose(0, 1)


def unfold(module: nn.Module, x: Tensor, limit: int) -> Iterator[Tensor]:
    """The unfolded input in chunks (groups, rows, features) of at most `limit` bytes, one line of outputs at least."""
    if isinstance(module, nn.Linear):
        rows = x.reshape(1, -1, x.shape[-1])
        yield from torch.split(rows, max(1, limit // (rows.shape[-1] * x.element_size())), dim=1)
        return
    assert isinstance(module, ConvNd)
    x, stride = _padded(module, _batched(x, len(module.kernel_size)))
    reach = [(k - 1) * d + 1 for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    positions = [(size - r) // s + 1 for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    slice_bytes = prod(positions[1:]) * x.shape[1] * prod(module.kernel_size) * x.element_size()
    samples = max(1, limit // (slice_bytes * positions[0]))
    lines = max(1, min(positions[0], limit // slice_bytes))
    for part in torch.split(x, samples):
        for start in range(0, positions[0], lines):
            stop = min(start + lines, positions[0])
            slab = part[:, :, start * stride[0] : (stop - 1) * stride[0] + reach[0]]
            yield _windows(module, slab, stride, [stop - start, *positions[1:]])


def _windows(module: ConvNd, x: Tensor, stride: tuple[int, ...], positions: list[int]) -> Tensor:
    """Rows of the padded input `x` for `positions` outputs per dimension; one copy per kernel offset keeps it fast."""
    groups, features = groups_and_features(module)
    offsets = list(product(*map(range, module.kernel_size)))
    if isinstance(module, ConvTransposeNd):
        offsets.reverse()
    windows = x.new_empty(x.shape[1], len(offsets), x.shape[0], *positions)
    for i, offset in enumerate(offsets):
        starts = [o * d for o, d in zip(offset, module.dilation, strict=True)]
        spans = [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, positions, stride, strict=True)]
        windows[:, i] = x[(slice(None), slice(None), *spans)].transpose(0, 1)
    return windows.view(groups, features, -1).mT


def _every(x: Tensor, steps: tuple[int, ...]) -> Tensor:
    """Every `steps`-th value along the last dimensions."""
    index: tuple[Any, ...] = (..., *(slice(None, None, step) for step in steps))
    return x[index]


def _batched(x: Tensor, rank: int) -> Tensor:
    return x if x.ndim == rank + 2 else x.unsqueeze(0)


def _padded(module: ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The input with its padding in place, and the stride at which windows are then taken."""
    rank = len(module.kernel_size)
    if isinstance(module, ConvTransposeNd):
        ends = []
        for axis in reversed(range(rank)):
            assert not isinstance(module.padding, str)
            full = (module.kernel_size[axis] - 1) * module.dilation[axis] - module.padding[axis]
            ends += [full, full + module.output_padding[axis]]
        return F.pad(_spread(x, module.stride), ends), (1,) * rank
    return F.pad(x, padding_of(module)), module.stride


def _spread(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """`stride - 1` zeros between neighbouring values."""
    size = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros((*x.shape[:2], *size))
    _every(spread, stride).copy_(x)
    return spread
