"""One application of the pass.

plan    jobs: layers with the number of weights that go
open    layers that an earlier application has masked become ordinary ones
step    counts by layer → masks by score, or chosen where the layer is solved on data → weights
close   every weight is computed as W * (W != 0)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Context, Edit, Layer, PassReport

from . import PruneWeights
from .patterns import counts_over
from .planning import Job, planned
from .scores import Scores, magnitudes, matrix_of, of_loss, of_outputs
from .solving import Quadratic, pruned, refitted

RIDGE = 1e-4
"""Pull to the present weights of layers solved alone, in parts of the mean power of their features."""


def masked(weight: Tensor) -> Tensor:
    """The weight itself, whose zeros no gradient reaches."""
    return weight * (weight != 0)


class Pruning:
    def __init__(self, options: PruneWeights, model: CapturedModel, context: Context) -> None:
        self.options, self.model, self.context = options, model, context
        self.criterion = options.criterion or self._default()
        given = options.reconstruct
        self.reconstructs = self.criterion == "obs" if given is None else given
        self.maps: dict[str, surgery.Affine] = {}
        self.reference = model

    def _default(self) -> str:
        return "obs" if self.context.has_calibration and self.options.sensitivity is None else "magnitude"

    def run(self) -> PassReport:
        jobs, skips = planned(self.options, self.model)
        if jobs:
            self._open(jobs)
            self.reference = surgery.snapshot(self.model)
            for step in range(1, self.options.steps + 1):
                self.context.progress("pruning", step - 1, self.options.steps)
                self._step(jobs, 1 - (1 - step / self.options.steps) ** 3)  # Zhu and Gupta 2017, equation 1
            self._replace({job.name: None for job in jobs})
        edits = tuple(self._edit(job) for job in jobs)
        return PassReport(edits, tuple(skips))

    def _open(self, jobs: Sequence[Job]) -> None:
        names = {job.name for job in jobs}
        for layer in surgery.layers(self.model):
            own = len(layer.nodes) == 1 and layer.computed == (f"{layer.name}.weight",)
            if layer.name in names and own:
                surgery.make_dense(self.model, layer)

    def _layers(self, jobs: Sequence[Job]) -> dict[str, Layer]:
        names = {job.name for job in jobs}
        return {layer.name: layer for layer in surgery.layers(self.model) if layer.name in names}

    def _step(self, jobs: Sequence[Job], share: float) -> None:
        self.maps = {affine.layer.name: affine for affine in surgery.affine_maps(self.model)}
        layers = self._layers(jobs)
        solved = [job for job in jobs if self.reconstructs and self._fits(layers[job.name])]
        all_judged = self.options.scope == "global" or self.criterion != "obs"
        judged = [job for job in jobs if all_judged or job not in solved]
        scores = self._scores([layers[job.name] for job in judged]) if judged else {}
        counts = self._counts(jobs, scores, share)
        masks = {job.name: job.pattern.mask(scores[job.name], counts[job.name]) for job in judged}
        weights = {job.name: matrix_of(layers[job.name]) * masks[job.name] for job in jobs if job not in solved}
        for job in jobs:
            stays = self.reconstructs and job not in solved
            job.how = ", the others stay: its Gram matrix is too large" if stays else ""
        chosen = {} if self.criterion == "obs" else masks
        alone = [job for job in solved if job.name not in self.maps]
        weights |= self._solved_alone(alone, layers, counts, chosen)
        self._replace(weights)
        self._sweep([job for job in solved if job.name in self.maps], counts, chosen)

    def _fits(self, layer: Layer) -> bool:
        return surgery.gram_bytes(layer) <= self.context.calibration.gram_bytes

    def _scores(self, layers: Sequence[Layer]) -> Scores:
        """Below 0 where a weight is zero."""
        if self.criterion == "magnitude":
            scores = magnitudes(layers)
        elif self.criterion == "obd" and self.context.data.training is not None:
            scores = of_loss(self.model, layers, self.context)
        else:
            relative = self.options.scope == "global"
            scores = of_outputs(self.model, layers, self.context, self.maps, relative)
        return {layer.name: scores[layer.name].masked_fill(matrix_of(layer) == 0, -1.0) for layer in layers}

    def _counts(self, jobs: Sequence[Job], scores: Scores, share: float) -> dict[str, int]:
        """How many units of each layer are gone after this step."""
        if self.options.scope == "global":
            total = round(share * self.options.share * sum(job.units for job in jobs))
            found = counts_over([job.pattern.scores(scores[job.name]) for job in jobs], total)
            return {job.name: count for job, count in zip(jobs, found, strict=True)}
        return {job.name: round(share * job.target) for job in jobs}

    def _solved_alone(
        self, jobs: Sequence[Job], layers: dict[str, Layer], counts: dict[str, int], masks: Scores
    ) -> dict[str, Tensor]:
        """Layers that are called twice or are no modules of their own: their outputs on the present inputs."""
        found, by_name = {}, {job.name: job for job in jobs}
        wanted = [layers[job.name] for job in jobs]
        for layer, statistics in self.context.calibration.stream(self.model, wanted, ("gram",)) if wanted else ():
            job, weight, moments = by_name[layer.name], matrix_of(layer).double(), statistics.unfolded.gram
            damping = (RIDGE * moments.diagonal(dim1=1, dim2=2).mean(1)).clamp_min(1e-100)
            task = Quadratic.of(moments, weight @ moments, weight, damping)
            found[job.name] = self._solution(task, job, weight, counts, masks)
            change, whole = found[job.name] - weight, float((weight @ moments * weight).sum())
            lost = float((change @ moments * change).sum())
            job.numbers["output_error"] = (max(lost, 0) / whole) ** 0.5 if whole > 0 else 0.0
        return found

    def _sweep(self, jobs: Sequence[Job], counts: dict[str, int], masks: Scores) -> None:
        by_name = {job.name: job for job in jobs}
        steps = [self.maps[job.name].step() for job in jobs]
        for number, task in enumerate(self._tasks(steps)):
            self.context.progress("solving", number, len(steps))
            job, affine, regression = by_name[task.layer.name], self.maps[task.layer.name], task.regression
            present = affine.scaled(task.matrix).cpu()
            matrix = self._solution(_quadratic(regression, present), job, present, counts, masks)
            mask, current = matrix != 0, regression
            for _ in range(task.rounds):
                current = task.rectified(matrix, current.bias(matrix))
                matrix = refitted(_quadratic(current, present), matrix, mask)
            job.numbers["output_error"] = regression.error(matrix, regression.bias(matrix))
            affine.put(matrix, current.bias(matrix), regression)

    def _tasks(self, steps: Sequence[surgery.Step]) -> Iterable[surgery.Task]:
        return self.context.calibration.sweep(self.model, steps, self.reference) if steps else ()

    def _solution(self, task: Quadratic, job: Job, present: Tensor, counts: dict[str, int], masks: Scores) -> Tensor:
        if job.name in masks:
            return refitted(task, present, masks[job.name] & (present != 0))
        return pruned(task, job.pattern, present == 0, counts[job.name])

    def _replace(self, weights: Mapping[str, Tensor | None]) -> None:
        """Give the layers these weights, or those they have (None), zeros in them for good."""
        for layer in surgery.layers(self.model):
            if layer.name not in weights:
                continue
            module: Any = layer.module
            matrix, trained = weights[layer.name], module.weight.requires_grad
            old = surgery.weight_of(layer)
            value = old if matrix is None else surgery.weight_from_matrix(layer.module, matrix).to(old)
            if matrix is None or layer.functional:
                surgery.replace_weight(self.model, layer, masked, {"weight": nn.Parameter(value, trained)})
            else:
                module.weight = nn.Parameter(value, trained)

    def _edit(self, job: Job) -> Edit:
        layer = self._layers([job])[job.name]
        after = matrix_of(layer)
        zeros, n = int((after == 0).sum()), after.numel()
        numbers = {"sparsity": zeros / n, **job.numbers}
        if "output_error" not in numbers:
            lost = float((after.double() - job.before.double()).norm())
            numbers["weight_error"] = lost / (float(job.before.double().norm()) or 1.0)
        how = ", the others solved anew" if "output_error" in numbers else job.how
        return Edit(job.name, f"{zeros:,} of {n:,} weights are zero{how}", numbers)


def _quadratic(regression: surgery.Regression, towards: Tensor) -> Quadratic:
    return Quadratic.of(regression.xx, regression.yx, towards, regression.damping())
