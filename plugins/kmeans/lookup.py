"""The weight that the graph computes from a codebook and packed indices.

    weight[i] = codebook[span of i, index of i],   spans of `span` weights one after the other, the last may be shorter

`codebook` (groups, k), or (groups, k - 1) with a zero before them that is no parameter, so that a weight that is zero
stays zero when the codebook is trained. Its gradient is the sum of the gradients of the weights that share a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

from .packing import pack, unpack


@dataclass(frozen=True)
class Lookup:
    """`shape` of the weight; `transposed`: number of groups of a transposed convolution, whose weights are counted by
    outputs first; 0 for others, counted as they lie."""

    shape: tuple[int, ...]
    bits: int
    span: int
    zero: bool
    transposed: int = 0

    @property
    def count(self) -> int:
        return prod(self.shape)

    def __call__(self, codebook: Tensor, indices: Tensor) -> Tensor:
        values = F.pad(codebook, (1, 0)) if self.zero else codebook
        places = unpack(indices, self.count, self.bits).to(torch.int32)
        groups, k = values.shape
        if groups > 1:
            places = self._shifted(places, groups, k)
        return self._shaped(torch.index_select(values.reshape(-1), 0, places))

    def _shifted(self, places: Tensor, groups: int, k: int) -> Tensor:
        """Places in the flattened codebook."""
        full = self.count // self.span
        first = torch.arange(0, full * k, k, dtype=torch.int32, device=places.device).unsqueeze(1)
        shifted = (places[: full * self.span].view(full, self.span) + first).view(-1)
        return shifted if full == groups else torch.cat([shifted, places[full * self.span :] + full * k])

    def _shaped(self, values: Tensor) -> Tensor:
        if not self.transposed:
            return values.view(self.shape)
        inputs, outputs, *kernel = self.shape
        grouped = values.view(self.transposed, outputs, inputs // self.transposed, *kernel)
        return grouped.transpose(1, 2).reshape(self.shape)

    def tensors(self, codebook: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """What it is called with, from a `codebook` (groups, k), ascending, one of them zero where `zero` says so, and
        `indices` (n,) uint8 into it: the parameter and the packed indices."""
        if not self.zero:
            return {"codebook": torch.nn.Parameter(codebook.contiguous()), "indices": pack(indices, self.bits)}
        place, every = codebook.abs().argmin(1, keepdim=True), torch.arange(codebook.shape[1])
        values = codebook[every != place].view(len(codebook), -1)
        moved = torch.where(every < place, every + 1, every).masked_fill(codebook == 0, 0).to(torch.uint8)
        return {"codebook": torch.nn.Parameter(values), "indices": pack(self._translated(moved, indices), self.bits)}

    def _translated(self, table: Tensor, indices: Tensor) -> Tensor:
        """`table` (groups, k) at `indices` (n,)."""
        places = indices.to(torch.int32)
        if len(table) > 1:
            places = self._shifted(places, *table.shape)
        return torch.index_select(table.view(-1), 0, places)
