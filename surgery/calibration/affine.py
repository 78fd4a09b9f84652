"""A layer with the BatchNorm right behind it as one affine map, and what it should give in a reference.

z = s (W x + b - μ) + β,  s = γ / √(σ² + ε)      one map  z = W' x + b',  W' = s W
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..captured import CapturedModel
from ..changes import note_reach
from ..graph import Layer, layers, shape, sharing
from .aims import Aim
from .moments import Regression
from .sweep import Step, Task
from .unfolding import weight_from_matrix

aten = torch.ops.aten
ALL: Mapping[int, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Affine:
    """`norm`: the BatchNorm that alone reads the layer, or None. `end`: the node that gives the map's value."""

    layer: Layer
    norm: Layer | None
    end: fx.Node

    def step(self, keep: Mapping[int, Tensor] = ALL) -> Step:
        """What the map should give: its value in the reference, at the places `keep` by dimension; or, where it is only
        added to something that is known by then, the reference's sum less that, so that it repairs both errors."""
        total, shortcut = self._sum()
        if total is None or shortcut is None:
            return Step(self.layer, Aim(self.end.name, (), keep), _rectified(self.end))
        return Step(self.layer, Aim(total.name, (shortcut.name,), keep), _rectified(total))

    def _sum(self) -> tuple[fx.Node | None, fx.Node | None]:
        users = list(self.end.users)
        if len(users) != 1 or users[0].target is not aten.add.Tensor or users[0].kwargs:
            return None, None
        others = [node for node in users[0].all_input_nodes if node is not self.end]
        if len(others) != 1 or shape(others[0]) != shape(self.end) or not others[0] < self.layer.nodes[0]:
            return None, None
        return users[0], others[0]

    def scaled(self, matrix: Tensor) -> Tensor:
        """W' (groups, outputs, features) of the layer's W."""
        if self.norm is None:
            return matrix.detach().double()
        norm: Any = self.norm.module
        scale: Tensor = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
        return matrix.detach().double() * scale.view(len(matrix), -1, 1)

    def solve(self, task: Task) -> tuple[float, float]:
        """Give the layer new weights, from its present inputs towards what it should give; where a ReLU follows, go on
        from the linear fit. The error of its output before and after the linear fit (1 = no better than the mean).
        """
        regression = task.regression
        present = self.scaled(task.matrix)
        image = present @ regression.xx
        matrix = regression.solve(present, image=image)
        error = regression.error(matrix, regression.bias(matrix))
        current = regression
        for _ in range(task.rounds):
            current = task.rectified(matrix, current.bias(matrix))
            matrix = current.solve(present, image=image)
        self.put(matrix, current.bias(matrix), regression)
        return regression.error(present, regression.bias(present), image), error

    def put(self, matrix: Tensor, bias: Tensor, regression: Regression, gain: Tensor | None = None) -> None:
        """Make the map g W' x + b', W' (groups, outputs, features), b' and the gain g (groups, outputs).

        A BatchNorm gets the statistics of its new input and undoes them, so that it stays one that can be trained on;
        it takes the gain. Without one the gain must be None, which is 1.
        """
        module: Any = self.layer.module
        module.weight = _like(module.weight, weight_from_matrix(module, matrix))
        flat = bias.reshape(-1)
        if self.norm is None:
            assert gain is None, "a gain needs a BatchNorm"
            module.bias = _like(module.bias if module.bias is not None else module.weight, flat)
            return
        if module.bias is not None:
            module.bias = _like(module.bias, torch.zeros_like(flat))
        model = self.end.graph.owning_module
        assert model is not None
        note_reach(model, self.layer.name, self.norm.name)
        norm: Any = self.norm.module
        mean = (matrix @ regression.x_mean.unsqueeze(2)).reshape(-1)
        variance = ((matrix @ regression.xx) * matrix).sum(2).reshape(-1).clamp_min(0)
        norm.running_mean, norm.running_var = mean.to(norm.running_mean), variance.to(norm.running_var)
        scale = torch.ones_like(mean) if gain is None else gain.reshape(-1).to(mean)
        norm.weight = _like(norm.weight, scale * torch.sqrt(norm.running_var.double() + norm.eps))
        norm.bias = _like(norm.bias, scale * mean + flat)


def _like(old: nn.Parameter, value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.to(old.device, old.dtype), old.requires_grad)


def _rectified(node: fx.Node) -> bool:
    users = list(node.users)
    return len(users) == 1 and users[0].target is aten.relu.default


def affine_maps(model: CapturedModel) -> list[Affine]:
    """Every convolution and linear layer that is a module of its own, called once, in order of execution; those
    without outputs or inputs left out."""
    every = layers(model)
    norms = {layer.nodes[0]: layer for layer in every if layer.type.startswith("BatchNorm") and _plain(model, layer)}
    found = []
    for layer in every:
        if layer.type.startswith(("Conv", "Linear")) and not layer.functional and _plain(model, layer) and _full(layer):
            users = list(layer.nodes[0].users)
            norm = norms.get(users[0]) if len(users) == 1 else None
            fits = norm is not None and _follows(layer, norm)
            found.append(Affine(layer, norm if fits else None, users[0] if fits else layer.nodes[0]))
    return found


def _plain(model: CapturedModel, layer: Layer) -> bool:
    return sharing(model, layer) is None


def _full(layer: Layer) -> bool:
    """Whether the layer has any outputs and inputs."""
    weight: Any = layer.module.weight
    return bool(weight.numel())


def _follows(layer: Layer, norm: Layer) -> bool:
    """Whether `norm` normalises the layer's output channels with statistics and factors of its own."""
    module: Any = norm.module
    dims = 2 if layer.type == "Linear" else 2 + len(layer.module.kernel_size)  # type: ignore[arg-type]
    return bool(module.running_var is not None and module.affine and len(shape(norm.nodes[0])) == dims)
