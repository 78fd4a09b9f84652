"""The way of the pass through a model: which layers, their values, and the graph that looks them up."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Context, Edit, Layer, PassReport, Skip, Statistics
from surgery.graph import parameters_of, set_parameters

from .fitting import Layout, Problem, fit_outputs
from .hashing import MOST_LINES, P, Q, constants, lines, looked_up, number_of_values, places

if TYPE_CHECKING:
    from . import Hashed

TENSORS = ("values", "hash")
"""What a hashed weight is computed from."""
HASH_BYTES = 28
"""Of its constants."""
TYPES = ("Linear", *(f"Conv{kind}{rank}d" for kind in ("", "Transpose") for rank in (1, 2, 3)))


@dataclass(frozen=True)
class Target:
    """A layer with its hash, before the pass. `count`: K."""

    layer: Layer
    constants: Tensor
    count: int

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def weight(self) -> Tensor:
        weight = self.layer.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    @property
    def matrix(self) -> Tensor:
        """W (groups, outputs, features)"""
        return surgery.weight_matrix(self.layer.module).detach().cpu().double()

    @property
    def bias(self) -> Tensor | None:
        """(groups, outputs)"""
        bias: Any = self.layer.module.bias
        return None if bias is None else bias.detach().cpu().double().view(self.matrix.shape[:2])

    @cached_property
    def layout(self) -> Layout:
        shape = tuple(self.weight.shape)
        found = _as_matrix(self.layer.module, places(self.constants, shape, self.count).view(shape))
        groups, outputs, features = found.shape
        return Layout(found.flatten(), (groups, outputs, features), self.count)

    def kept(self, values: Tensor) -> Tensor:
        """Values as the layer's type holds them."""
        return values.to(self.weight.dtype).double()


@dataclass(frozen=True)
class Found:
    """Values (K,) of a layer, as its type holds them, with their errors."""

    values: Tensor
    errors: dict[str, float]
    gains_bias: bool = False


class Application:
    """One application of the pass to `model`, which it edits."""

    def __init__(self, options: Hashed, model: CapturedModel, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.in_outputs = context.has_calibration and options.metric != "weight"
        self.before = surgery.snapshot(model)

    def run(self) -> PassReport:
        targets, skips = self._targets()
        edits: dict[str, Edit] = {}
        if self.in_outputs:
            swept = {a.layer.name for a in surgery.affine_maps(self.before) if self._fits_memory(a.layer)}
            alone = [t for t in targets if t.name not in swept]
            found = dict(self._by_statistics(alone))
            for target in alone:
                edits[target.name] = self._put(target, found[target.name])
            found = dict(self._in_turn([t for t in targets if t.name in swept]))
        else:
            found = {target.name: self._nearest(target) for target in targets}
        edits |= {t.name: self._put(t, found[t.name]) for t in targets if t.name not in edits}
        return PassReport(tuple(edits[t.name] for t in targets), tuple(skips))

    # --- which layers ---

    def _targets(self) -> tuple[list[Target], list[Skip]]:
        """Layers to hash, and why not the others."""
        targets, skips = [], []
        for layer in self.options.selected(surgery.layers(self.before)):
            if not layer.type.startswith(("Conv", "Linear")):
                continue
            if why := self._obstacle(layer):
                skips.append(Skip(layer.name, why))
                continue
            shape = _shape(layer)
            drawn = constants(self.options.seed, layer.name)
            targets.append(Target(layer, drawn, number_of_values(self.options.factor, prod(shape))))
        return targets, skips

    def _obstacle(self, layer: Layer) -> str | None:
        if tuple(name.rpartition(".")[2] for name in layer.computed) == TENSORS:
            return "already hashed"
        if layer.computed:
            return f"its weight is computed from {', '.join(layer.computed)}, which hashed values would undo"
        if layer.type not in TYPES:
            return f"the weight of {layer.type} cannot be computed in the graph"
        return surgery.tied(self.before, layer) or self._too_small(layer) or self._degenerate(layer)

    def _too_small(self, layer: Layer) -> str | None:
        """The constants of the hash count as well."""
        shape = _shape(layer)
        size, itemsize = prod(shape), layer.module.weight.element_size()  # type: ignore[operator]
        if size < self.options.min_weights:
            return f"{size} weights, fewer than min_weights: {self.options.min_weights}"
        count = number_of_values(self.options.factor, size)
        if count * itemsize + HASH_BYTES >= size * itemsize:
            return f"too small to gain: {count} values and the hash take no less than {size} weights"
        if lines(shape) >= MOST_LINES or 2 * count >= P * Q:
            return f"too large for the hash: {size} weights"
        return None

    def _degenerate(self, layer: Layer) -> str | None:
        return None if bool(self.options.finite_weight(layer).any()) else "its weight is zero"

    def _fits_memory(self, layer: Layer) -> bool:
        return surgery.gram_bytes(layer) <= self.context.calibration.gram_bytes

    # --- values ---

    def _nearest(self, target: Target) -> Found:
        """The values nearest to the weight."""
        values = target.kept(target.layout.mean(target.matrix))
        return Found(values, {"weight_error": _distance(target.matrix, target.layout.spread(values))})

    def _by_statistics(self, targets: list[Target]) -> Iterator[tuple[str, Found]]:
        """Layers that are no affine map of their own, or too large for a covariance: from the inputs that they had."""
        by_layer = {t.layer: t for t in targets}
        small = [layer for layer in by_layer if self._fits_memory(layer)]
        large = [layer for layer in by_layer if not self._fits_memory(layer)]
        for layer, found in self.context.calibration.stream(self.before, small, ("gram",)):
            yield layer.name, _by_gram(by_layer[layer], found)
        for layer, found in self.context.calibration.stream(self.before, large, ("mean",)):
            yield layer.name, _by_power(by_layer[layer], found)

    def _in_turn(self, targets: list[Target]) -> Iterator[tuple[str, Found]]:
        """Layer by layer, each from the inputs that the layers before it give by now."""
        known = {t.name: t for t in targets}
        maps = {a.layer.name: a for a in surgery.affine_maps(self.model) if a.layer.name in known}
        steps = [affine.step() for affine in maps.values()]
        for number, task in enumerate(self.context.calibration.sweep(self.model, steps, self.before)):
            self.context.progress(self.options.name(), number, len(steps))
            target, affine, regression = known[task.layer.name], maps[task.layer.name], task.regression
            present = affine.scaled(task.matrix).cpu()
            problem = Problem(target.layout, regression, present)
            fit = fit_outputs(problem, None if affine.norm is None else problem.spread, target.weight.dtype, task)
            affine.put(fit.matrix, fit.bias, regression, fit.gain)
            errors = {"weight_error": _distance(present, fit.map), "output_error": regression.error(fit.map, fit.bias)}
            yield target.name, Found(fit.values, errors, target.bias is None and affine.norm is None)

    # --- the graph ---

    def _put(self, target: Target, found: Found) -> Edit:
        """Have the weight looked up in the values."""
        layer = next(layer for layer in surgery.layers(self.model) if layer.name == target.name)
        old: Any = target.layer.module.weight
        shape = _shape(layer)

        def weight(values: Tensor, hash: Tensor) -> Tensor:
            return looked_up(values, places(hash, shape, target.count), shape)

        values = nn.Parameter(found.values.to(old), old.requires_grad)
        surgery.replace_weight(self.model, layer, weight, {"values": values, "hash": target.constants.to(old.device)})
        near = "outputs" if "output_error" in found.errors else "weights"
        what = f"{target.count} values shared by {old.numel()} weights, fitted to its {near}"
        bits = (target.count * old.element_size() + HASH_BYTES) * 8 / old.numel()
        numbers = {"values": target.count, "bits_per_weight": bits, **found.errors}
        return Edit(layer.name, what + (", which gains a bias" if found.gains_bias else ""), numbers)


def _by_gram(target: Target, statistics: Statistics) -> Found:
    """The least squared error of the output, means included, as the bias stays."""
    moments = statistics.unfolded
    regression = moments.regression(target.matrix, target.bias)
    uncentred = replace(regression, xx=moments.gram, yx=target.matrix @ moments.gram)
    fit = fit_outputs(Problem(target.layout, uncentred, target.matrix), None, target.weight.dtype, None)
    errors = {"weight_error": _distance(target.matrix, fit.map), "output_error": regression.error(fit.map, target.bias)}
    return Found(fit.values, errors)


def _by_power(target: Target, statistics: Statistics) -> Found:
    """The same as if the features were uncorrelated."""
    values = target.kept(target.layout.weighted_mean(target.matrix, statistics.unfolded.power.unsqueeze(1)))
    return Found(values, {"weight_error": _distance(target.matrix, target.layout.spread(values))})


def _distance(matrix: Tensor, other: Tensor) -> float:
    """‖W - V‖ / ‖W‖"""
    return float((matrix - other).norm() / matrix.norm())


def _shape(layer: Layer) -> tuple[int, ...]:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return tuple(weight.shape)


def _as_matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """What stands in the place of the module's weight, as (groups, outputs, features)."""
    other: Any = copy.copy(module)
    set_parameters(other, {**parameters_of(module), "weight": nn.Parameter(weight, requires_grad=False)})
    return surgery.weight_matrix(other)
