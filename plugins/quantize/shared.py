"""Weights made of few values, such as a codebook's: the values become integers, and the graph looks those up.

    W = g f(v)    →    W = s |g| W₈,   W₈ = sign(g) f(v₈),   v = s v₈

f picks, moves and negates values; g (outputs,) comes from a BatchNorm that was folded. Outputs that read the same
values share s. The file holds v₈ and what f reads beside it, which is less than W₈; the runtime computes W₈ when it
loads the file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import surgery
from surgery import CapturedModel, Layer

from .scheme import Grid
from .weights import WeightObserver, weight_scheme

EXACT = 2**24
"""Up to it every integer is a float32."""
SAME = 1e-5
"""Relative error of weights that are g f(v) up to rounding."""
TINY = 2.0**-60


@dataclass(frozen=True)
class Lookup:
    """How a weight is looked up, and which values that picks."""

    function: Callable[..., Tensor]
    """f, of the tensors by name."""
    tensors: Mapping[str, Tensor]
    values: str
    places: Tensor
    """In the shape of the weight, int32: ± (number of the value + 1), 0 where the weight is zero whatever they are."""

    @classmethod
    def of(cls, model: CapturedModel, layer: Layer) -> Lookup | None:
        """How the weight of `layer` is made of few values; None where it is not, or is no smaller for it."""
        if not layer.computed or layer.weight_node is None:
            return None
        function, tensors = surgery.weight_function(model, layer)
        floats = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
        weight = surgery.weight_of(layer)
        others = sum(t.nbytes for t in tensors.values() if not t.is_floating_point())
        if len(floats) != 1 or tensors[floats[0]].numel() + others >= weight.numel():
            return None
        made = cls(function, tensors, floats[0], torch.empty(0))
        places = made._places(weight)
        return None if places is None else replace(made, places=places)

    def __call__(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """f of `tensors`, by name; others among them are left out."""
        return self.function(**{name: tensors[name] for name in self.tensors})

    def _places(self, weight: Tensor) -> Tensor | None:
        """None where f does anything else than picking, moving and negating."""
        values = self.tensors[self.values].detach()
        if values.numel() >= EXACT:
            return None
        numbers = torch.arange(1, values.numel() + 1, dtype=values.dtype).view(values.shape)
        found = self(self._with(numbers))
        places = found.to(torch.int32)
        if not torch.equal(places.to(found), found) or int(places.abs().max()) > values.numel():
            return None
        return places if torch.equal(picked(values, places), weight) else None

    def _with(self, values: Tensor) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in self.tensors.items()} | {self.values: values}

    def rounded(self, weight: Tensor, grid: Grid, observer: WeightObserver) -> Rounded | None:
        """v₈ and the scales for the `weight` g f(v); None where it is no such multiple."""
        values = self.tensors[self.values].detach().double()
        plain, rows = picked(values, self.places).flatten(1), weight.double().flatten(1)
        gain = (plain * rows).sum(1) / plain.square().sum(1).clamp_min(TINY)
        if (rows - gain.unsqueeze(1) * plain).norm() > SAME * rows.norm():
            return None
        integers, scale = self._quantised(values, grid, observer)
        sign, size = torch.where(gain < 0, -1, 1), gain.abs() * scale
        size = torch.where(size > TINY, size, size.max().clamp_min(TINY))
        looked = picked(integers, self.places) * sign.view(-1, *[1] * (weight.ndim - 1))
        off = (looked.flatten(1) * size.unsqueeze(1) - rows).norm(dim=1) / rows.norm(dim=1).clamp_min(TINY)
        return Rounded(self, integers.to(torch.int8), sign.to(torch.int32), looked, size, float(off.mean()))

    def _quantised(self, values: Tensor, grid: Grid, observer: WeightObserver) -> tuple[Tensor, Tensor]:
        """v₈ and s (outputs,)."""
        of_value, of_output = self._parts()
        scale, integers = torch.ones(len(of_output), dtype=torch.float64), torch.zeros_like(values)
        for part in of_value.unique().tolist():
            own = (of_value == part).view(values.shape)
            found = weight_scheme(values[own], grid, False, observer)
            integers[own] = found.quantise(values[own])
            scale[of_output == part] = found.scale
        return integers, scale

    def _parts(self) -> tuple[Tensor, Tensor]:
        """A number for every value (n,) and every output (O,), the same for those that depend on each other."""
        outputs, count = len(self.places), self.tensors[self.values].numel()
        places = self.places.flatten(1).abs().long()
        pairs = (torch.arange(outputs).unsqueeze(1) * count + places - 1)[places > 0].unique()
        output, value = pairs // count, pairs % count
        of_output, of_value = torch.arange(outputs), torch.full((count,), outputs)
        while True:
            of_value = of_value.scatter_reduce(0, value, of_output[output], "amin")
            found = of_output.scatter_reduce(0, output, of_value[value], "amin")
            if torch.equal(found, of_output):
                return of_value, of_output
            of_output = found


@dataclass(frozen=True)
class Rounded:
    """v₈ of `lookup`, sign(g) (outputs,), W₈ (float64) and its scale (outputs,)."""

    lookup: Lookup
    values: Tensor
    sign: Tensor
    integers: Tensor
    scale: Tensor
    error: float
    """Mean of ‖w - ŵ‖ / ‖w‖ over the outputs."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What W₈ is computed from, by name."""
        found = {name: tensor.detach() for name, tensor in self.lookup.tensors.items()}
        found[self.lookup.values] = self.values
        return found if bool((self.sign > 0).all()) else {**found, "sign": self.sign}

    def looked_up(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """W₈ of `tensors`."""
        found = self.lookup(tensors)
        if "sign" in tensors:  # ONNX Runtime multiplies no int8
            sign = tensors["sign"].view(-1, *[1] * (found.ndim - 1))
            found = (found.to(torch.int32) * sign).to(torch.int8)
        return found


def picked(values: Tensor, places: Tensor) -> Tensor:
    """The weight that has `values` at `places`."""
    flat = torch.cat([values.new_zeros(1), values.flatten()])
    return flat[places.abs()] * places.sign().to(values.dtype)
