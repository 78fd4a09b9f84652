"""One application of a pass to a network, and what the rules compare."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..captured import CapturedModel, relative_error
from ..context import Context
from ..data import Data
from ..names import tensors
from ..passes import Pass, PassReport
from ..torch_private import tree_flatten
from .network import Network


@dataclass(frozen=True)
class Trial:
    """`model` is the caller's, `before` its captured form, `after` and `report` what the pass gave back.

    `folder` is empty and is deleted afterwards.
    """

    step: Pass
    network: Network
    model: nn.Module
    before: CapturedModel
    after: CapturedModel
    report: PassReport
    calibration: Sequence[Any]
    seed: int
    folder: Path

    def context(self) -> Context:
        return Context(self.before, Data.of(list(self.calibration)), seed=self.seed)

    def batches(self) -> Iterator[Any]:
        """The example, and where the batch is free one of another size."""
        yield self.network.inputs()
        if self.before.dynamic_batch:
            yield self.network.inputs(batch=3, seed=3)


def flat_outputs(network: Network, model: nn.Module, value: Any) -> tuple[list[Tensor], str]:
    """Output tensors, and the structure around them as text."""
    leaves, structure = tree_flatten(network.call(model, value))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], str(structure)


def assert_same_outputs(trial: Trial, actual: nn.Module, expected: nn.Module) -> None:
    """Bit for bit, on every batch."""
    for value in trial.batches():
        (a, a_structure), (e, e_structure) = (flat_outputs(trial.network, m, value) for m in (actual, expected))
        assert a_structure == e_structure, f"outputs are {a_structure}, not {e_structure}"
        errors = [relative_error(x, y) for x, y in zip(a, e, strict=True) if not torch.equal(x, y)]
        assert not errors, f"outputs differ by {max(errors):.1e} of their largest value, not by nothing"


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer by name."""
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def first_difference(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """The name of a tensor that is not bit-identical, or that one side lacks."""
    if odd := sorted(actual.keys() ^ expected.keys()):
        return odd[0]
    return next((name for name in actual if not _identical(actual[name], expected[name])), None)


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def description(model: CapturedModel) -> list[str]:
    """The graph and the modules as text, by which two models can be compared."""
    nodes = [f"{n.op} {n.target} {n.args} {n.kwargs}" for n in model.graph.nodes]
    modules = [f"{name} {type(m).__name__} {m.extra_repr()} {m.training}" for name, m in model.named_modules()]
    return nodes + modules
