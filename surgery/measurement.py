"""Size and speed of a model: parameters, multiply-accumulates (MACs), bytes, and latency against another model.

One MAC is one multiplication with its addition, 2 FLOPs. Counted are convolutions and matrix products of every kind
(attention and recurrent layers included); elementwise work, normalisation and pooling are not.
"""

from __future__ import annotations

import copy
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .errors import InputError
from .inputs import Inputs
from .names import tensors
from .process import exclusive
from .torch_private import TRILINEAR, FakeTensorMode
from .tracing import evaluating


@dataclass(frozen=True)
class Measurement:
    """What a model weighs. A parameter that several modules share counts once."""

    parameters: int
    """Number of parameter values."""
    macs: int
    """Multiply-accumulates of one forward call with one sample."""
    parameter_bytes: int
    stored_bytes: int
    """Of parameters and of buffers that a state_dict holds, such as the indices of shared weights."""
    by_module: dict[str, int] = field(default_factory=dict)
    """MACs by qualified module name, those of its children included. A module called under two names has one entry."""


@dataclass(frozen=True)
class Latency:
    """Wall-clock time of one call, and how many times faster it is than the first contestant (1 = the same)."""

    seconds: float
    """Median over the rounds."""
    ratio: float
    """Median over the rounds of the first contestant's time / this one's time, both from the same round."""
    quartiles: tuple[float, float]
    """First and third quartile of that ratio."""

    @classmethod
    def of(cls, first: Sequence[float], own: Sequence[float]) -> Latency:
        """From the seconds of two contestants, round by round."""
        ratios = [a / b for a, b in zip(first, own, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
        return cls(statistics.median(own), statistics.median(ratios), (low, high))


@exclusive()
def measure(model: nn.Module, example_inputs: Any) -> Measurement:
    """Counts parameters, bytes and MACs of `model` on one sample of `example_inputs`.

    Nothing is computed where possible: the forward call runs on fake tensors, which have shapes and no values. A model
    whose control flow needs values runs for real. If it cannot run a single sample, it runs the example's batch, and
    the count is divided by the batch size.

    Raises:
        InputError: the model runs neither on one sample nor on the example itself.
    """
    example = Inputs.of(model, example_inputs)
    total, by_module, samples = _count_any(model, example)
    parameters = list(model.parameters())
    return Measurement(
        parameters=sum(p.numel() for p in parameters),
        macs=total // samples,
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        stored_bytes=_stored_bytes(model),
        by_module={name: macs // samples for name, macs in by_module.items()},
    )


def _stored_bytes(model: nn.Module) -> int:
    """Every tensor once."""
    kept = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def latency(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3
) -> dict[str, Latency]:
    """Times the contestants against the first of them; see `seconds`. Ratios are taken within a round.

    Raises:
        InputError: there are no contestants, or `rounds` is less than 1.
    """
    times = seconds(contestants, rounds=rounds, warmup=warmup)
    first = next(iter(times.values()))
    return {name: Latency.of(first, own) for name, own in times.items()}


def seconds(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 30, warmup: int = 3
) -> dict[str, list[float]]:
    """Wall-clock time of every call, interleaved so that a slow spell of the machine hits all alike.

    Each round calls every contestant once, in an order by chance (always the same): how warm the caches are depends on
    who was called before. A call that leaves work running on a GPU must wait for it itself.

    Raises:
        InputError: there are no contestants, or `rounds` is less than 1.
    """
    if not contestants or rounds < 1:
        raise InputError(
            f"latency of {len(contestants)} contestants in {rounds} rounds", fix="give at least one of each"
        )
    for call in contestants.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in contestants}
    names, generator = list(contestants), random.Random(0)
    for _ in range(rounds):
        for name in generator.sample(names, len(names)):
            start = time.perf_counter()
            contestants[name]()
            times[name].append(time.perf_counter() - start)
    return times


def _count_any(model: nn.Module, example: Inputs) -> tuple[int, dict[str, int], int]:
    """Total MACs, MACs by module, and the number of samples they are for, from the first way that works."""
    failure: Exception | None = None
    for inputs, samples in ((example.with_batch(1), 1), (example, example.batch_size)):
        for count in (_count_fake, _count_real):
            try:
                return *count(model, inputs), samples
            except Exception as error:  # whatever the user's forward raises
                failure = error
    raise InputError(
        f"{type(model).__name__} does not run on the example inputs: {failure}", fix="check their shapes and types"
    ) from failure


def _count_fake(model: nn.Module, inputs: Inputs) -> tuple[int, dict[str, int]]:
    with FakeTensorMode() as fake:
        example = getattr(model, "inputs", None)  # which a captured model holds
        held = [*tensors(model).values(), *(example.tensors if isinstance(example, Inputs) else ())]
        memo = {id(tensor): fake.from_tensor(tensor) for tensor in held}
        return _count(copy.deepcopy(model, memo), inputs.map(fake.from_tensor))


def _count_real(model: nn.Module, inputs: Inputs) -> tuple[int, dict[str, int]]:
    return _count(model, inputs.clone())


def _count(model: nn.Module, inputs: Inputs) -> tuple[int, dict[str, int]]:
    counter = FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)
    with evaluating(model), _countable(), counter:
        model(*inputs.args, **inputs.kwargs)
    flops = {name: sum(by_operator.values()) for name, by_operator in counter.get_flop_counts().items()}
    root = f"{type(model).__name__}."
    by_module = {name.removeprefix(root): n // 2 for name, n in flops.items() if name.startswith(root)}
    return counter.get_total_flops() // 2, by_module


@contextmanager
def _countable() -> Iterator[None]:
    """Has operators fall into parts that the counter knows: recurrent layers without oneDNN, attention as products."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _product(first: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of `mv` (n, m)·(m) and `dot` (n)·(n): the first operand's size times 2."""
    return 2 * prod(first)


def _trilinear(*arguments: Any, **_: Any) -> int:
    """FLOPs of nn.Bilinear, sum over i, j of x_i W_oij y_j: two multiplications and one addition, counted as 2 MACs.

    The arguments begin with three shapes and, for each, the dimensions to insert before they broadcast.
    """
    shapes = map(_expanded, arguments[:3], arguments[3:6])
    broadcast: list[int] = [max(sizes) for sizes in zip(*shapes, strict=True)]
    return 4 * prod(broadcast)


def _expanded(shape: Sequence[int], dims: Sequence[int]) -> list[int]:
    sizes = list(shape)
    for dim in sorted(dims):
        sizes.insert(dim, 1)
    return sizes


_UNCOUNTED = {
    torch.ops.aten.mv: _product,
    torch.ops.aten.dot: _product,
    TRILINEAR: _trilinear,
}
