"""The way of `kmeans` through a model: which layers, codebooks and indices, weights that are looked up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import surgery
from surgery import Affine, CapturedModel, Context, Edit, Layer, PassReport, Skip, Task

from . import Kmeans
from .fitting import How, Shared, compensated, gains, nearest
from .lookup import Lookup
from .packing import packed_bytes

ZEROS = 0.05
"""Share of zeros from which on a weight counts as pruned."""
SAMPLE = 4096
_LOSSLESS = {"weight_error": 0.0}


@dataclass(frozen=True)
class Target:
    """A layer to be clustered: how, and the bits of an index. `distinct`: its values, where they are so few that one
    codebook holds all."""

    layer: Layer
    how: How
    bits: int
    distinct: Tensor | None = None

    @property
    def name(self) -> str:
        return self.layer.name


@dataclass(frozen=True)
class Found:
    shared: Shared
    numbers: dict[str, float]


class Clustering:
    """One application of `kmeans` to `model`, which it edits."""

    def __init__(self, options: Kmeans, model: CapturedModel, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.in_outputs = context.has_calibration and options.metric != "weight"
        self.generator = context.generator()

    def run(self) -> PassReport:
        targets, skips = self._targets()
        found = {t.name: self._kept(t, t.distinct) for t in targets if t.distinct is not None}
        if self.in_outputs:
            found |= self._swept([t for t in targets if t.name not in found])
            found |= self._streamed([t for t in targets if t.name not in found])
        for number, target in enumerate(targets):
            if target.name not in found:
                self.context.progress(self.options.name(), number, len(targets))
                found[target.name] = self._plain(target, None)
        here = {layer.name: layer for layer in surgery.layers(self.model)}
        edits = [self._replaced(here[t.name], t, found[t.name]) for t in targets]
        notes = () if targets or skips else ("no convolution or linear layer is among those that are selected",)
        return PassReport(tuple(edits), tuple(skips), notes)

    # --- which layers ---

    def _targets(self) -> tuple[list[Target], list[Skip]]:
        targets, skips = [], []
        for layer in self.options.selected(surgery.layers(self.model)):
            if not layer.type.startswith(("Conv", "Linear")):
                continue
            found = self._obstacle(layer) or self._target(layer)
            if isinstance(found, str):
                skips.append(Skip(layer.name, found))
            else:
                targets.append(found)
        return targets, skips

    def _obstacle(self, layer: Layer) -> str | None:
        if {name.rpartition(".")[2] for name in layer.computed} == {"codebook", "indices"}:
            return "already looked up in a codebook"
        known = dict(self.model.named_parameters(remove_duplicate=False))
        own = [known.get(name) for name in layer.computed]
        if own and (len(own) > 1 or own[0] is None or own[0].shape != layer.module.weight.shape):
            return f"its weight is computed from {', '.join(layer.computed)}"
        return surgery.tied(self.model, layer, computed=True)

    def _target(self, layer: Layer) -> Target | str:
        """The layer as a target, or why it stays."""
        weight = self.options.finite_weight(layer)
        if not weight.numel():
            return "it has no weights"
        low, high = weight.aminmax()
        if low == high:
            return f"all its weights are {float(low):.6g}"
        zeros = float((weight == 0).float().mean())
        zero = zeros > 0 if layer.computed else zeros >= ZEROS
        distinct = _distinct(weight, 2**self.options.bits)
        bits = self.options.bits if distinct is None else max(1, (len(distinct) - 1).bit_length())
        features = surgery.weight_matrix(layer.module).shape[2]
        span = weight.numel() if distinct is not None else self.options.span(weight.numel(), features)
        how = How(2**bits, span, self.options.start, zero)
        size = packed_bytes(weight.numel(), bits) + _codebook_bytes(weight, how)
        if size >= weight.nbytes:
            return f"indices and codebook would take {size} bytes, its weight takes {weight.nbytes}"
        return Target(layer, how, bits, distinct)

    # --- codebooks and indices ---

    def _matrix(self, layer: Layer) -> Tensor:
        """(groups, outputs, features)"""
        return surgery.weight_matrix(layer.module).detach()

    def _kept(self, target: Target, distinct: Tensor) -> Found:
        """Every value as it is."""
        values = torch.cat([distinct, distinct[-1:].expand(target.how.k - len(distinct))]).cpu()
        flat = self._matrix(target.layer).reshape(-1).cpu()
        return Found(Shared(values.unsqueeze(0), torch.searchsorted(distinct.cpu(), flat).to(torch.uint8)), _LOSSLESS)

    def _plain(self, target: Target, power: Tensor | None) -> Found:
        """Near the weight; a value is worth the `power` E[x²] (groups, features) of its feature; None = 1."""
        matrix = self._matrix(target.layer).cpu()
        flat = matrix.flatten(0, 1).to(torch.promote_types(matrix.dtype, torch.float32))
        worth = power if power is None or len(power) == 1 else power.repeat_interleave(matrix.shape[1], 0)
        shared = nearest(flat, worth, target.how, matrix.dtype, self.generator)
        return Found(shared, {"weight_error": _error(shared.values(target.how.span).view(flat.shape), flat)})

    def _streamed(self, targets: list[Target]) -> dict[str, Found]:
        """Layers without a map of their own, towards their own outputs."""
        calibration, found = self.context.calibration, {}
        here = {layer.name: layer for layer in surgery.layers(self.model)}  # ordinary ones by now
        by_layer = {here[target.name]: target for target in targets}
        small = [layer for layer in by_layer if surgery.gram_bytes(layer) <= calibration.gram_bytes]
        for layer, statistics in calibration.stream(self.model, small, ("gram",)):
            target, matrix, dtype = by_layer[layer], self._matrix(layer).cpu().double(), layer.module.weight.dtype
            gram = statistics.unfolded.gram
            shared = compensated(matrix, gram, None, target.how, dtype, self.generator)  # type: ignore[arg-type]
            dense = shared.values(target.how.span).double().view(matrix.shape)
            numbers = {"weight_error": _error(dense, matrix), "output_error": _output_error(dense, matrix, gram)}
            found[layer.name] = Found(shared, numbers)
        large = [layer for layer in by_layer if layer.name not in found]
        for layer, statistics in calibration.stream(self.model, large, ("mean",)):
            found[layer.name] = self._plain(by_layer[layer], statistics.unfolded.power)
        return found

    def _swept(self, targets: list[Target]) -> dict[str, Found]:
        """Layers with their BatchNorm, one after the other, each from what those before give by now."""
        computed = {target.name for target in targets if target.layer.computed}
        for layer in [layer for layer in surgery.layers(self.model) if layer.name in computed]:
            surgery.make_dense(self.model, layer)  # an ordinary layer until its weight is looked up
        limit = self.context.calibration.gram_bytes
        maps = {a.layer.name: a for a in surgery.affine_maps(self.model) if surgery.gram_bytes(a.layer) <= limit}
        mine = {target.name: target for target in targets if target.name in maps}
        before = surgery.snapshot(self.model)
        steps = [maps[name].step() for name in mine]
        found = {}
        for number, task in enumerate(self.context.calibration.sweep(self.model, steps, before)):
            self.context.progress(self.options.name(), number, len(steps))
            found[task.layer.name] = self._solved(mine[task.layer.name], maps[task.layer.name], task)
        return found

    def _solved(self, target: Target, affine: Affine, task: Task) -> Found:
        regression, present = task.regression, affine.scaled(task.matrix)
        goal = present if target.how.zero else regression.solve(present)
        dtype = task.matrix.dtype
        scale = _scale(goal) if affine.norm else None
        raw = goal if scale is None else goal / scale.unsqueeze(2)
        shared = compensated(raw, regression.xx, scale, target.how, dtype, self.generator)
        dense = shared.values(target.how.span).double().view(raw.shape)
        gain = None if scale is None else gains(dense, regression.xx, regression.yx, scale)
        whole = dense if gain is None else dense * gain.unsqueeze(2)
        bias = regression.bias(whole)
        affine.put(dense, bias, regression, gain)
        numbers = {"weight_error": _error(whole, present), "output_error": regression.error(whole, bias)}
        return Found(shared, numbers)

    # --- new weights ---

    def _replaced(self, layer: Layer, target: Target, found: Found) -> Edit:
        weight, how = layer.module.weight, target.how
        assert isinstance(weight, Tensor)
        groups = layer.module.groups if "Transpose" in layer.type else 0
        lookup = Lookup(tuple(weight.shape), target.bits, how.span, how.zero, groups)  # type: ignore[arg-type]
        tensors = lookup.tensors(found.shared.codebook, found.shared.indices)
        size = sum(tensor.nbytes for tensor in tensors.values())
        surgery.replace_weight(self.model, layer, lookup, {name: _like(t, weight) for name, t in tensors.items()})
        numbers = {**found.numbers, "values": how.k, "bits_per_weight": 8 * size / weight.numel()}
        what = f"clustered to {how.k} values"
        if target.distinct is not None:
            what = f"its {len(target.distinct)} different values in a codebook, without loss"
        return Edit(layer.name, what, numbers)


def _distinct(weight: Tensor, k: int) -> Tensor | None:
    """The different values; None where there are more than k."""
    flat = weight.reshape(-1)
    if len(flat) > SAMPLE and len(flat[:: len(flat) // SAMPLE].unique()) > k:
        return None
    values = flat.unique()
    return values if len(values) <= k else None


def _like(tensor: Tensor, weight: Tensor) -> Tensor:
    """On the device of `weight`, and trained where that is."""
    moved = tensor.detach().to(weight.device)
    return torch.nn.Parameter(moved, weight.requires_grad) if isinstance(tensor, torch.nn.Parameter) else moved


def _codebook_bytes(weight: Tensor, how: How) -> int:
    groups = -(-weight.numel() // how.span)
    return groups * (how.k - how.zero) * weight.element_size()


def _scale(goal: Tensor) -> Tensor:
    """a (groups, outputs): root mean square of the rows."""
    spread = goal.square().mean(2).sqrt()
    return torch.where(spread > 0, spread, 1.0)


def _error(given: Tensor, wanted: Tensor) -> float:
    size = float(wanted.double().norm())
    return float((given.double() - wanted.double()).norm()) / size if size else 0.0


def _output_error(given: Tensor, wanted: Tensor, gram: Tensor) -> float:
    lost, whole = ((((m @ gram) * m).sum()) for m in (given - wanted, wanted))
    return float((lost / whole).clamp_min(0).sqrt()) if whole > 0 else 0.0
