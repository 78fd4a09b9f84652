"""The way through a model.

fold BatchNorm → place → observe → insert the pairs → round the weights, layer by layer → integer weights
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

import surgery
from surgery import CapturedModel, Context, Edit, Layer, PassError, PassReport, Skip

from .aware import trained
from .equalisation import equalise, pairs
from .fitting import Fitted, fit, weight_options
from .forms import rewrite
from .insertion import insert_pairs, integer_layer, is_quantised
from .observers import OBSERVERS
from .placement import HARDSIGMOID, Placement
from .scheme import Grid, Scheme, affine, hardsigmoid_terms
from .sensitivity import Rounding, Sensitivity
from .shared import Lookup
from .targets import has_vnni
from .ties import untied_sum
from .weights import weight_scheme

if TYPE_CHECKING:
    from torch import fx

    from . import Quantize


class Quantisation:
    """One application of the pass."""

    def __init__(self, step: Quantize, model: CapturedModel, context: Context) -> None:
        self.step, self.model, self.context = step, model, context
        self.target = context.target(step.runtime)
        self.skips: list[Skip] = []
        self.first: list[Edit] = []
        self.alone: Mapping[str, float] = {}
        """SQNR of the outputs in dB with a layer rounded alone, where it was measured."""
        self.measured: tuple[str, ...] = ()
        self.bits = step.weight_bits
        if self.bits == 8 and self.target.saturates_without_vnni and not self._vnni():
            self.bits = 7

    def run(self) -> PassReport:
        layers = surgery.layers(self.model)
        selected = self.step.selected(layers)
        if is_quantised(self.model):
            return PassReport(skips=tuple(Skip(layer.name, "the model is quantised already") for layer in selected))
        names = self._quantisable(selected)
        if not names:
            return PassReport(skips=tuple(self.skips))
        lookups = self._open(names)
        notes = self._fold(layers)
        rewrite(self.model, names)
        if self.step.equalise:
            self.first += equalise(self.model, pairs(self.model, _named(self.model, names)))
        reference = surgery.snapshot(self.model)
        if self.step.sqnr_db is not None:
            names -= self._kept_float(names, reference, lookups, self.step.sqnr_db)
        edits, left = self._quantise(self.model, names, reference, lookups, train=self.step.training is not None)
        return PassReport((*edits, *self._only_prepared(edits)), tuple(self.skips), (*notes, *left, *self.measured))

    def _only_prepared(self, edits: Sequence[Edit]) -> list[Edit]:
        """What was done to layers that stay float after all: folded into, trained."""
        untold = {layer.name for layer in surgery.layers(self.model)} - {edit.layer for edit in edits}
        return [edit for edit in self.first if untold.intersection((edit.layer, *edit.also))]

    def _quantise(
        self,
        model: CapturedModel,
        names: Collection[str],
        reference: CapturedModel,
        lookups: Mapping[str, Lookup],
        train: bool = False,
    ) -> tuple[tuple[Edit, ...], tuple[str, ...]]:
        """Integers in `model`; what was edited, and notes on what was not."""
        chosen = _named(model, names)
        placement = Placement(model, self.target, {node for layer in chosen for node in layer.nodes})
        left = self._left(placement)
        insert_pairs(placement, self._observe(placement))
        start = surgery.snapshot(model) if train else model  # fitting has each layer see those before it rounded
        fitted = fit(self.step, self.bits, start, reference, _named(start, names), lookups, self.context)
        if train:
            fitted, report = trained(self.step, model, chosen, fitted, self.context)
            self.first += report.edits
            left = (*left, *(f"trained through the integers: {note}" for note in report.notes))
        return tuple(self._write(model, chosen, fitted, lookups)), left

    def _kept_float(
        self, names: Collection[str], reference: CapturedModel, lookups: Mapping[str, Lookup], bound: float
    ) -> set[str]:
        """The fewest layers without which the outputs keep `bound` dB."""
        layers = _named(reference, names)
        placement = Placement(reference, self.target, {node for layer in layers for node in layer.nodes})
        scheme = partial(weight_scheme, **weight_options(self.step, Grid.signed(self.bits)))
        run = Rounding(placement, layers, self._observe(placement), scheme)
        sensitivity = Sensitivity(self.context, reference)
        self.alone = sensitivity.alone(run, [layer.name for layer in layers])
        order = list(self.alone)
        count = sensitivity.fewest(run, order, bound)
        while count < len(order):  # what was judged with weights to the nearest may lack a little when all is done
            trial = surgery.snapshot(reference)
            self._quantise(trial, order[count:], reference, lookups)
            if (reached := sensitivity.of(trial)) >= bound:
                break
            count += 1
        else:
            raise self._out_of_reach(bound)
        self.measured = (f"outputs at {reached:.1f} dB on calibration data, {count} layers in float for it",)
        why = f"float, for the outputs to keep {bound:g} dB: rounded alone, it leaves them at"
        self.skips += [Skip(name, f"{why} {self.alone[name]:.1f} dB") for name in order[:count]]
        return set(order[:count])

    def _out_of_reach(self, bound: float) -> PassError:
        name, best = list(self.alone.items())[-1]
        return PassError(
            f"no layer can be rounded with the outputs at {bound:g} dB: even {name} alone leaves them at {best:.1f} dB",
            at=f"pass {self.step.name()}",
            fix="ask for a smaller sqnr_db, or for more bits",
        )

    def _vnni(self) -> bool:
        return has_vnni() if self.step.vnni == "auto" else self.step.vnni

    def _quantisable(self, selected: list[Layer]) -> set[str]:
        found = set()
        for layer in selected:
            reason = self._obstacle(layer)
            if reason:
                self.skips.append(Skip(layer.name, reason))
            elif reason is None:
                found.add(layer.name)
        return found

    def _obstacle(self, layer: Layer) -> str | None:
        """Why the layer stays float; "" where that goes without saying: a BatchNorm, which may be folded."""
        if layer.type.startswith("BatchNorm"):
            return ""
        if layer.type not in self.target.layers:
            return f"{self.target.name} has no integer kernel for {layer.type}"
        module = layer.module
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"{self.target.name} has no integer kernel that pads by {module.padding_mode}"
        if narrow := self._narrow(module):
            return f"{self.target.name} is slower in integers where {narrow}"
        weight = surgery.weight_of(layer)
        if weight.dtype != torch.float32:
            return f"its weight is {weight.dtype}, integers are made of float32"
        if not weight.numel():
            return "it has no weights"
        if not bool(weight.isfinite().all()):
            return "its weight holds NaN or infinity"
        return surgery.tied(self.model, layer, computed=True)

    def _narrow(self, module: Any) -> str | None:
        """What is too little for an integer kernel in the groups of a convolution."""
        groups = getattr(module, "groups", 1)
        if groups == 1:
            return None
        read, given = module.in_channels // groups, module.out_channels // groups
        if read == given == 1 or min(read, given) >= self.target.least_group:
            return None
        return f"a group has less than {self.target.least_group} channels ({read} read, {given} given)"

    def _open(self, names: set[str]) -> dict[str, Lookup]:
        """Make computed weights ordinary ones; those that were looked up in few values, by layer."""
        found = {}
        for layer in surgery.layers(self.model):
            if layer.name in names and layer.computed:
                if lookup := Lookup.of(self.model, layer):
                    found[layer.name] = lookup
                surgery.make_dense(self.model, layer)
                self.first.append(Edit(layer.name, "its weight is no longer computed"))
        return found

    def _fold(self, layers: list[Layer]) -> tuple[str, ...]:
        left = {layer.name for layer in layers} - {layer.name for layer in self.step.selected(layers)}
        norms = [layer.name for layer in layers if layer.type.startswith("BatchNorm")]
        excluded = tuple(name for name in norms if name in left) if not self.step.select else ()
        report = self.context.find_pass("fold_batchnorm")(exclude=excluded).apply(self.model, self.context)
        self.skips += [Skip(skip.layer, f"stays float, as it cannot be folded: {skip.why}") for skip in report.skips]
        self.first += report.edits
        return (f"{len(report.edits)} BatchNorm folded first",) if report.edits else ()

    def _observe(self, placement: Placement) -> dict[fx.Node, Scheme]:
        """The scheme of every value that decides a scale."""
        roots = list(dict.fromkeys(placement.values.values()))
        want: list[Literal["ranges", "histograms"]] = ["ranges"]
        if self.step.observer != "minmax":
            want.append("histograms")
        grid = Grid.unsigned(self.step.activation_bits)
        found = {}
        for node, seen in self.context.calibration.stream(placement.model, roots, want):
            assert seen.output_range is not None
            low, high = OBSERVERS[self.step.observer](seen.output_range, seen.output_histogram, grid)
            scheme = affine(low, high, grid)
            found[node] = replace(scheme, scale=scheme.scale.float().double())  # as the exported file has it
        for node in roots:  # in the order of the graph: what is added comes before the sum
            added = placement.producer(node)
            if added in placement.joins and (terms := self._terms(placement, added, found)):
                found[node] = untied_sum(found[node], terms)
        return found

    def _terms(self, placement: Placement, node: fx.Node, schemes: Mapping[fx.Node, Scheme]) -> Sequence[Scheme] | None:
        """Of a sum."""
        read = [schemes[placement.values[source]] for source in placement.reads(node)]
        if placement.kind(node) == HARDSIGMOID:
            return hardsigmoid_terms(*read)
        return read if placement.kind(node) == "aten.add.Tensor" else None

    def _write(
        self, model: CapturedModel, chosen: list[Layer], fitted: Mapping[str, Fitted], lookups: Mapping[str, Lookup]
    ) -> Iterator[Edit]:
        for layer in chosen:
            own = fitted[layer.name]
            integer_layer(model, layer, own)
            shared = ", looked up as before" if own.shared else ", no longer shared" if layer.name in lookups else ""
            alone = {"sqnr_alone_db": self.alone[layer.name]} if layer.name in self.alone else {}
            yield Edit(layer.name, f"{self.bits}-bit weights{shared}", {"weight_error": own.error, **alone})

    def _left(self, placement: Placement) -> tuple[str, ...]:
        """Operators that stay float between what the target computes in integers, by kind."""
        count: Counter[str] = Counter()
        for node in placement.model.graph.nodes:
            name = placement.kind(node)
            if name in self.target.products | self.target.joins and not placement.is_integer(node) and _computes(node):
                count[name.removeprefix("aten.").partition(".")[0]] += 1
        listed = ", ".join(f"{n} × {name}" for name, n in sorted(count.items()))
        return (f"float, as they do not stand between integers: {listed}",) if listed else ()


def _named(model: CapturedModel, names: Collection[str]) -> list[Layer]:
    return [layer for layer in surgery.layers(model) if layer.name in names]


def _computes(node: fx.Node) -> bool:
    """On a floating-point tensor that an input decides."""
    return bool(node.op == "call_function" and any(source.op != "get_attr" for source in node.all_input_nodes))
