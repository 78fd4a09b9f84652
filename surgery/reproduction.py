"""Whether a graph gives what its model gives, on other numbers than the example's and in another batch size."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .errors import CaptureError
from .graph import propagate
from .inputs import Inputs
from .names import tensors
from .preparing import twin
from .replay import Recording
from .torch_private import tree_leaves, version_of
from .tracing import evaluating, first_line, user_line

# A captured graph calls the very operators of the model; rounding may differ only where a region was recomputed.
RELATIVE_BOUND = 1e-5


@dataclass(frozen=True)
class Known:
    """Inputs, the flat output tensors of the model itself, and what it computed on the way."""

    inputs: Inputs
    outputs: list[Tensor]
    recording: Recording


def known(model: nn.Module, inputs: Inputs) -> Known:
    """What `model` gives. Raises CaptureError as `forward` does."""
    recording = Recording()
    with recording.records(model):
        outputs = forward(model, inputs)
    return Known(inputs, outputs, recording)


def forward(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Flat output tensors of the model itself in eval mode.

    Raises:
        CaptureError: the model fails, or writes to its inputs or to its state. A buffer that is made on the first call
            and stays is no such write.
    """
    before = tensors(model)
    outputs, written = _call(model, inputs)
    if not written and _replaced(model, before):
        before = tensors(model)
        outputs, written = _call(model, inputs)
    written += _replaced(model, before)
    if written:
        raise CaptureError(
            f"the model writes to {', '.join(written)} in its forward",
            fix="work on a copy (x = x.clone()), and update state outside the forward or in training mode alone",
        )
    return outputs


def _call(model: nn.Module, inputs: Inputs) -> tuple[list[Tensor], list[str]]:
    """Output tensors, and the names of inputs, parameters and buffers that were written in place."""
    given = inputs.clone()
    watched = {**{f"input {k}": t for k, t in given.named_tensors.items()}, **tensors(model)}
    versions = {name: version_of(t) for name, t in watched.items()}
    try:
        with evaluating(model):
            output = model(*given.args, **given.kwargs)
    except Exception as error:
        raise CaptureError(
            f"the model itself fails on the example inputs: {type(error).__name__}: {first_line(error)}",
            at=user_line(error),
            fix=f"give inputs the model accepts; these are {_shapes(given)}",
        ) from error
    written = [name for name, t in watched.items() if version_of(t) != versions[name]]
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], written


def _replaced(model: nn.Module, before: dict[str, Tensor]) -> list[str]:
    now = tensors(model)
    return [name for name, tensor in before.items() if now.get(name) is not tensor]


def another_sample(model: nn.Module, inputs: Inputs) -> Known | None:
    """One sample of other numbers with the model's outputs; None where the example has more than one, or the model
    does not take it."""
    return next(iter(on_other_numbers(model, inputs)), None) if inputs.batch_size == 1 else None


def at_another_batch(model: nn.Module, inputs: Inputs) -> tuple[Known | None, str]:
    """Other numbers in another batch size with the model's outputs; or None and why the model takes none."""
    reason = ""
    for size in other_sizes(inputs.batch_size):
        for other in (varied(inputs.with_batch(size)), inputs.with_batch(size)):
            try:
                return known(twin(model), other), ""
            except CaptureError as error:
                reason = reason or f"at {size}, {error.problem}"
    return None, reason


def other_sizes(batch: int) -> list[int]:
    """Sizes of a batch to try: small first, as a forward costs by the sample; not one, at which models squeeze and
    broadcast."""
    small = 2 if batch != 2 else 3
    return list(dict.fromkeys((small, batch + 2, 2 * batch)))


def on_other_numbers(model: nn.Module, inputs: Inputs) -> list[Known]:
    """Other numbers in the example's batch size with the model's outputs, unless the model does not take them."""
    try:
        return [known(twin(model), varied(inputs))]
    except CaptureError:
        return []


def varied(inputs: Inputs) -> Inputs:
    """The same numbers mixed, and some up to halved; whole numbers may be indices or lengths and stay."""
    return inputs.map(lambda t: _varied(t) if t.is_floating_point() else t)


def _varied(tensor: Tensor) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)  # as its tensors, whatever the caller's default device is
    order = torch.randperm(tensor.numel(), generator=generator, device="cpu").to(tensor.device)
    factors = 0.5 + torch.rand(tensor.shape, generator=generator, device="cpu") / 2
    return tensor.flatten()[order].view(tensor.shape) * factors.to(tensor)


def compare(graph: fx.GraphModule, model: nn.Module, known: Known, *, note_shapes: bool) -> float:
    """Largest deviation relative to the largest expected value; on demand, shapes are noted on the nodes.

    Raises:
        CaptureError: the graph does not run, has other outputs, or deviates; or the model is random.
    """
    inputs, expected = known.inputs, known.outputs
    try:
        with known.recording.replays(graph), torch.no_grad():
            outputs = propagate(graph, inputs) if note_shapes else tree_leaves(graph(*inputs.args, **inputs.kwargs))
        actual = [v for v in outputs if isinstance(v, Tensor)]
    except Exception as error:
        raise CaptureError(
            f"the graph does not run: {type(error).__name__}: {first_line(error)}", fix=_CONSTANTS
        ) from error
    if [*map(_kind, actual)] != [*map(_kind, expected)]:
        raise CaptureError(
            f"the graph gives {[*map(_kind, actual)]}, the model {[*map(_kind, expected)]}", fix=_CONSTANTS
        )
    deviation = max((relative_error(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)
    if deviation:
        _refuse_randomness(model, inputs, expected)
    if not deviation <= RELATIVE_BOUND:
        raise CaptureError(
            f"the graph deviates from the model by {deviation:.2e} of its largest output (bound {RELATIVE_BOUND:g})",
            fix=_CONSTANTS,
        )
    return deviation


_CONSTANTS = (
    "Python state and what .tolist() or .numpy() take out of a tensor become constants in a graph;"
    " use tensor operators, and report the model if it has none of these"
)


def _refuse_randomness(model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> None:
    again = forward(twin(model), inputs)
    if any(relative_error(a, e) for a, e in zip(again, expected, strict=True)):
        raise CaptureError(
            "two calls of the model in eval mode with the same inputs differ",
            fix="make the forward deterministic in eval mode (dropout with training=self.training, no noise)",
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value; infinite where only one of the two is NaN."""
    if torch.equal(actual, expected) or not expected.numel():
        return 0.0
    same = torch.equal(actual.isnan(), expected.isnan())
    a, e = actual.detach().double().nan_to_num(), expected.detach().double().nan_to_num()
    return float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) if same else float("inf")


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def _shapes(inputs: Inputs) -> str:
    return ", ".join(f"{name} {_kind(t)}" for name, t in inputs.named_tensors.items())
