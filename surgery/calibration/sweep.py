"""The operated model once through beside a reference, layer by layer, all calibration samples at a time.

    for task in calibration.sweep(model, steps, reference):
        regression = task.regression             the layer's present inputs with what it should give
        … replace the layer's weights …          the next layer sees what the new ones give

Every node of both graphs runs once per batch, so that solving all layers costs two forward passes and not one per
layer. Values are held until their last reader has run; `sweep_bytes` limits the samples that go through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from ..captured import CapturedModel
from ..errors import PluginError
from ..graph import Layer, held_bytes, leaf_inputs
from ..inputs import Inputs
from ..operands import constants
from ..tracing import evaluating
from .aims import Aim, target_of
from .moments import Moments, Regression, Scatter
from .unfolding import (
    can_unfold,
    channel_dim,
    groups_and_features,
    output_rows,
    unfold,
    weight_from_matrix,
    weight_matrix,
)


@dataclass(frozen=True)
class Step:
    """A layer that is called once, and what its call should give in the reference.

    `rectified`: a ReLU follows the target, so that below zero any value is as good as another.
    """

    layer: Layer
    aim: Aim
    rectified: bool = False

    @property
    def reads(self) -> set[str]:
        """Nodes of the operated model whose values it needs."""
        return {str(module_input(self.layer)), *self.aim.minus}


class Task:
    """The inputs that a layer gets by now, and its targets. Of very many rows every n-th is taken."""

    def __init__(self, step: Step, own: list[dict[str, Tensor]], wanted: list[Tensor], chunk_bytes: int) -> None:
        if not can_unfold(step.layer.module):
            raise PluginError(f"{step.layer.name}: the unfolded input of {step.layer.type} is not defined")
        self.step, self._own, self._wanted, self._chunk_bytes = step, own, wanted, chunk_bytes
        self._every = self._thinning()

    @property
    def layer(self) -> Layer:
        return self.step.layer

    @cached_property
    def regression(self) -> Regression:
        """Moments of the unfolded input with the target."""
        joint = Scatter(True)
        for rows, target, _ in self._rows():
            joint.add(torch.cat([rows, target], 2))
        return Regression.of(joint.finish(), groups_and_features(self.layer.module)[1])

    @property
    def rounds(self) -> int:
        """Of `rectified` that are worth it: none where no ReLU follows."""
        return RECTIFIED_ROUNDS if self.step.rectified else 0

    def rectified(self, weight: Tensor, bias: Tensor) -> Regression:
        """The same where a ReLU follows, next to a solution W (groups, outputs, features), b (groups, outputs).

        Targets y below zero move to the prediction p where that is below zero too: y ← min(p, 0). Solving again and
        again converges on the least E[(y - p)² where y > 0, relu(p)² elsewhere] (majorisation). That is never below
        E‖relu(y) - relu(p)‖², which Zhang et al. 2015 (arXiv:1505.06798, section 3.2) aim at, and convex.
        """
        plain = self.regression
        x_mean, y_mean = plain.x_mean.unsqueeze(1), plain.y_mean.unsqueeze(1)
        count, total = 0, torch.zeros_like(plain.y_mean)
        cross, square = torch.zeros_like(plain.yx), torch.zeros_like(plain.y_variance)
        for rows, target, offset in self._rows():
            target = _seen_through_relu(target, offset, rows @ weight.mT.to(rows) + bias.unsqueeze(1).to(rows))
            x, y = rows - x_mean.to(rows), target - y_mean.to(rows)
            cross += (y.mT @ x).cpu()
            total, square, count = total + y.sum(1).cpu(), square + y.square().sum(1).cpu(), count + rows.shape[1]
        shift = total / count
        variance = square / count - shift.square()
        return replace(plain, y_mean=plain.y_mean + shift, yx=cross / count, y_variance=variance)

    def inputs(self, full: bool = False) -> Moments:
        """Mean and variance of the unfolded input; with `full` its covariance too."""
        scatter = Scatter(full)
        for rows, _, _ in self._rows():
            scatter.add(rows)
        return scatter.finish()

    @property
    def spread(self) -> float:
        """Variance of the aim's target, summed over its channels, > 0; a shortcut that is taken off counts here."""
        scatter = Scatter(False)
        for _, target, offset in self._rows():
            scatter.add(target if offset is None else target + offset)
        return scatter.finish().spread

    def targets(self) -> Moments:
        """Mean and variance of what the layer should give."""
        scatter = Scatter(False)
        for _, target, _ in self._rows():
            scatter.add(target)
        return scatter.finish()

    @property
    def matrix(self) -> Tensor:
        """The layer's present W (groups, outputs, features)."""
        return weight_matrix(self.layer.module).detach()

    def weight(self, matrix: Tensor) -> Tensor:
        """W (groups, outputs, features) in the shape and type of the layer's weight."""
        weight = self.layer.module.weight
        assert isinstance(weight, Tensor)
        return weight_from_matrix(self.layer.module, matrix).to(weight)

    def _rows(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Inputs (groups, rows, features), targets and what was taken off them (groups, rows, outputs), in chunks."""
        module, every = self.layer.module, self._every
        for own, wanted in zip(self._own, self._wanted, strict=True):
            target, offset = target_of(self.step.aim, own, wanted)
            y, shift = output_rows(module, target), None if offset is None else output_rows(module, offset)
            start = 0
            for rows in unfold(module, own[str(module_input(self.layer))], self._chunk_bytes):
                part = slice(start + -start % every, start + rows.shape[1], every)
                start += rows.shape[1]
                taken = rows[:, part.start - start + rows.shape[1] :: every]
                if taken.shape[1]:
                    yield taken, y[:, part], None if shift is None else shift[:, part]

    def _thinning(self) -> int:
        """Odd, so that it does not fall in step with the width of an image."""
        module = self.layer.module
        features = groups_and_features(module)[1]
        rows = sum(wanted.numel() // wanted.shape[channel_dim(module)] for wanted in self._wanted)
        return max(1, rows // max(ROWS, 32 * features)) // 2 * 2 + 1


RECTIFIED_ROUNDS = 2
"""Of the fit through a ReLU."""
ROWS = 2**16
"""More rows than this (and 32 per feature) add time and no knowledge to a least squares task."""


def _seen_through_relu(target: Tensor, offset: Tensor | None, given: Tensor) -> Tensor:
    if offset is None:
        return torch.where(target > 0, target, given.clamp_max(0))
    wanted = target + offset
    return torch.where(wanted > 0, target, (given + offset).clamp_max(0) - offset)


def module_input(layer: Layer) -> fx.Node:
    source = layer.nodes[0].args[0]
    assert isinstance(source, fx.Node)
    return source


def sweep(
    model: CapturedModel, reference: CapturedModel, batches: Sequence[Inputs], steps: Iterable[Step], chunk_bytes: int
) -> Iterator[Task]:
    """See `Calibration.sweep`."""
    steps = sorted(steps, key=_place(model.graph))
    own = _Lockstep(model, batches, [name for step in steps for name in step.reads])
    theirs = _Lockstep(reference, batches, [step.aim.target for step in steps])
    for step in steps:
        with evaluating(model), evaluating(reference), torch.no_grad():
            own.run_to(step.layer.nodes[0].name, inclusive=False)
            theirs.run_to(step.aim.target, inclusive=True)
        given = [{name: env[own.nodes[name]] for name in step.reads} for env in own.values]
        wanted = [env[theirs.nodes[step.aim.target]] for env in theirs.values]
        yield Task(step, given, wanted, chunk_bytes)
        own.done_with(step.reads)
        theirs.done_with({step.aim.target})


def _place(graph: fx.Graph) -> Any:
    places = {node: place for place, node in enumerate(graph.nodes)}
    return lambda step: places[step.layer.nodes[0]]


class _Lockstep(fx.Interpreter):
    """Runs a graph node by node over several batches; `pinned` values stay until they are `done_with`, once each."""

    def __init__(self, model: CapturedModel, batches: Sequence[Inputs], pinned: Iterable[str]) -> None:
        super().__init__(model)
        self.nodes = {node.name: node for node in model.graph.nodes}
        self.values: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._leaves = [leaf_inputs(inputs) for inputs in batches]
        self._todo = list(model.graph.nodes)
        self._readers = {node: len(node.users) for node in model.graph.nodes}
        for name in pinned:
            self._readers[self.nodes[name]] += 1
        self._constants = constants(model.graph)
        self._placeholders = 0

    def run_to(self, name: str, *, inclusive: bool) -> None:
        goal = self.nodes[name]
        while self._todo and (goal not in self.values[0]):
            if self._todo[0] is goal and not inclusive:
                return
            self._run_next()

    def _run_next(self) -> None:
        node = self._todo.pop(0)
        for env, leaves in zip(self.values, self._leaves, strict=True):
            if node in self._constants and env is not self.values[0]:
                env[node] = self.values[0][node]
                continue
            self.env = env
            env[node] = leaves[self._placeholders] if node.op == "placeholder" else self.run_node(node)
        self._placeholders += node.op == "placeholder"
        for source in node.all_input_nodes:
            self._read(source)
        if not self._readers[node]:
            self._forget(node)

    def done_with(self, names: Iterable[str]) -> None:
        for name in names:
            self._read(self.nodes[name])

    def _read(self, node: fx.Node) -> None:
        self._readers[node] -= 1
        if not self._readers[node]:
            self._forget(node)

    def _forget(self, node: fx.Node) -> None:
        for env in self.values:
            env.pop(node, None)


def live_bytes(model: CapturedModel) -> int:
    """Most bytes of values that a run holds at a time, per sample of the example batch."""
    last = {source: node for node in model.graph.nodes for source in node.all_input_nodes}
    held, most = 0, 0
    ends: dict[fx.Node, list[fx.Node]] = {}
    for source, node in last.items():
        ends.setdefault(node, []).append(source)
    for node in model.graph.nodes:
        if node.op != "get_attr":
            held += held_bytes([node])
        most = max(most, held)
        held -= held_bytes(source for source in ends.get(node, ()) if source.op != "get_attr")
    return most // max(1, model.inputs.batch_size)
