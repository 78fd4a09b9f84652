"""What a captured model takes: the numbers of every input, and its sizes, each of them fixed or free.

    {"image": (torch.float32, {"batch": "batch", "channels": 3, "height": 32, "width": 32}), "scale": 2}

A number is fixed; a name stands for a free size, which is one and the same wherever it stands. What is no tensor is a
constant of the graph. `check_inputs` is written into the source of a model as it stands here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .inputs import Inputs

Expected = dict[str, Any]
"""By the input's name: (type, sizes by the dimension's name) of a tensor, or the constant."""


def expected_inputs(inputs: Inputs, *, free_batch: bool) -> Expected:
    """What a model takes that was captured with `inputs`."""
    batch = inputs.batch_size
    return {name: _expected(leaf, batch, free_batch) for name, leaf in inputs.named_leaves.items()}


def _expected(leaf: Any, batch: int, free_batch: bool) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    has_batch = leaf.ndim > 0 and leaf.shape[0] == batch
    sizes: dict[str, int | str] = dict(zip(_labels(leaf, has_batch), leaf.shape, strict=True))
    if has_batch and free_batch:
        sizes["batch"] = "batch"
    return leaf.dtype, sizes


_IMAGE = ("channels", "height", "width")
_VOLUME = ("channels", "depth", "height", "width")


def _labels(tensor: Tensor, has_batch: bool) -> list[str]:
    """What the dimensions are called: by their meaning where the number of dimensions tells it."""
    labels = [f"dimension {dim}" for dim in range(tensor.ndim)]
    if not has_batch:
        return labels
    pictures = tensor.is_floating_point() or tensor.dtype is torch.uint8
    known = {4: _IMAGE, 5: _VOLUME} if pictures else {2: ("length",)}
    return ["batch", *known.get(tensor.ndim, labels[1:])]


def check_inputs(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises ValueError, naming the size, where an input is not as `expected`: its type with its sizes, a number being
    fixed and a name free, or a constant."""
    free: dict[str, int] = {}
    for name, wanted in expected.items():
        value = given[name]
        dtype, sizes = wanted if isinstance(wanted, tuple) else (None, {})
        if dtype is None:
            if value is not wanted and (isinstance(value, Tensor) or value != wanted):
                raise ValueError(f"input {name} is fixed at {wanted!r}")
            continue
        if not isinstance(value, Tensor) or number_kind(value.dtype) != number_kind(dtype):
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"input {name} is fixed at {dtype}, and is {got}")
        if value.ndim != len(sizes):
            raise ValueError(f"input {name} is fixed at {len(sizes)} dimensions, and has {value.ndim}")
        for dim, (label, size) in enumerate(sizes.items()):
            known = free.setdefault(size, value.shape[dim]) if isinstance(size, str) else size
            if value.shape[dim] != known:
                what = f"is {known} in another input" if isinstance(size, str) else f"is fixed at {known}"
                raise ValueError(f"{label} {what}, and input {name} has {value.shape[dim]} in dimension {dim}")


def number_kind(dtype: torch.dtype) -> object:
    """What may stand for one another: real numbers, as a model may be moved to another type; indices."""
    plain = dtype.is_floating_point or dtype in (torch.int32, torch.int64)
    return dtype.is_floating_point if plain else dtype
