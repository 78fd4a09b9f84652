"""Codebook and indices of one weight, near to the weight itself or to what its output should be.

    y = g (Q x) + b,   Q = codebook[indices] (groups, outputs, features),  H = E[x xᵀ] (covariance where b is free)
    least  Σ over outputs o of  a_o² (q_o - w_o) H (q_o - w_o)ᵀ

1. codebook: k-means with each weight valued by a_o² H_ff (Hessian-weighted: Choi et al. 2017, arXiv:1612.01543)
2. indices: one column of W after the other to the nearest values, columns after it make up for it (`error_feedback`)
3. codebook: least squares for these indices, k unknowns; then 2. and 3. again
4. gain g and bias b: least squares of each output, where a BatchNorm takes them
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import surgery

from .codebooks import Start, assign, codebooks

ROUNDS = 2
"""Of indices and codebook in turn."""
REFIT_STEPS = 20
"""Most steps of conjugate gradients for a codebook; each costs as much as a round of indices."""


@dataclass(frozen=True)
class How:
    """k values for every `span` weights, of what start; `zero`: one of them is zero."""

    k: int
    span: int
    start: Start = "optimal"
    zero: bool = False

    def rows(self, flat: Tensor) -> list[Tensor]:
        """(n,) as the spans (groups, span) and, where the last one is shorter, that (1, rest)."""
        full = len(flat) // self.span
        cut = full * self.span
        parts = [flat[:cut].view(full, self.span), flat[cut:].unsqueeze(0)]
        return [part for part in parts if part.numel()]


@dataclass(frozen=True)
class Shared:
    """`codebook` (groups, k) ascending, in the type of the weight; `indices` (n,) uint8."""

    codebook: Tensor
    indices: Tensor

    def values(self, span: int) -> Tensor:
        """(n,)"""
        return torch.index_select(self.codebook.reshape(-1), 0, _places(self.indices, self.codebook, span))


def _places(indices: Tensor, codebook: Tensor, span: int) -> Tensor:
    """Where the values of `indices` (n,) stand in the flattened codebook."""
    places = indices.to(torch.int32)
    if len(codebook) > 1:
        places += torch.arange(len(places), dtype=torch.int32).div_(span, rounding_mode="floor") * codebook.shape[1]
    return places


def nearest(
    weight: Tensor, value: Tensor | None, how: How, dtype: torch.dtype, generator: torch.Generator | None = None
) -> Shared:
    """For `weight` (outputs, features), each worth `value` (broadcast to that shape), None = all the same."""
    heavy = None if value is None else value.expand(weight.shape)
    if how.span >= weight.numel():
        found = [_codebook(weight.unsqueeze(0), None if heavy is None else heavy.unsqueeze(0), how, generator)]
    else:
        every = how.rows(weight.reshape(-1))
        worth = [None] * len(every) if heavy is None else how.rows(heavy.reshape(-1))
        found = [_codebook(rows, own, how, generator) for rows, own in zip(every, worth, strict=True)]
    codebook = torch.cat(found).to(dtype)
    return Shared(codebook, _assigned(weight, codebook, how))


def _codebook(rows: Tensor, worth: Tensor | None, how: How, generator: torch.Generator | None) -> Tensor:
    return codebooks(rows, how.k, worth, start=how.start, zero=how.zero, generator=generator)


def _assigned(weight: Tensor, codebook: Tensor, how: How) -> Tensor:
    if len(codebook) == 1:
        return assign(weight.reshape(1, -1), codebook).view(-1)
    parts, first = [], 0
    for rows in how.rows(weight.reshape(-1)):
        parts.append(assign(rows, codebook[first : first + len(rows)]).view(-1))
        first += len(rows)
    return torch.cat(parts)


def compensated(
    matrix: Tensor,
    gram: Tensor,
    scale: Tensor | None,
    how: How,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
    rounds: int = ROUNDS,
) -> Shared:
    """For W (groups, outputs, features) with H (groups, features, features) and a (groups, outputs), None = 1."""
    square = matrix.new_ones(matrix.shape[:2]) if scale is None else scale.square()
    worth = square.unsqueeze(2) * gram.diagonal(dim1=1, dim2=2).unsqueeze(1)
    flat = matrix.flatten(0, 1)
    found = nearest(flat, worth.flatten(0, 1), how, dtype, generator)
    kept = flat == 0 if how.zero else None
    for _ in range(rounds):
        indices = _fed_back(matrix, gram, found.codebook, how, kept)
        found = refitted(matrix, gram, square, Shared(found.codebook, indices), how)
    return found


def _fed_back(matrix: Tensor, gram: Tensor, codebook: Tensor, how: How, kept: Tensor | None) -> Tensor:
    """Indices (n,) of the nearest values, each column after those before have been made up for; `kept` zero stay so."""
    groups, outputs, features = matrix.shape
    indices = torch.empty(groups * outputs, features, dtype=torch.uint8)
    for group in range(groups):
        own = slice(group * outputs, (group + 1) * outputs)
        chooser = _Chooser(codebook.double(), how, indices[own], own.start, None if kept is None else kept[own])
        surgery.error_feedback(matrix[group], gram[group], chooser.begin)
    return indices.view(-1)


class _Chooser:
    """Gives the nearest values of a column and notes their indices (outputs, features)."""

    def __init__(self, codebook: Tensor, how: How, indices: Tensor, row: int, kept: Tensor | None) -> None:
        self.codebook, self.how, self.indices, self.kept = codebook, how, indices, kept
        self.middle = (codebook[:, 1:] + codebook[:, :-1]) / 2
        self.zero = codebook.abs().argmin(1)
        self.first = (row + torch.arange(len(indices))) * indices.shape[1]

    def begin(self, columns: Tensor, curvature: Tensor, start: int) -> Callable[[Tensor, int], Tensor]:
        return lambda column, j: self._choose(column, start + j)

    def _choose(self, column: Tensor, place: int) -> Tensor:
        if len(self.codebook) == 1:
            index = torch.bucketize(column, self.middle[0])
            values, zero = self.codebook[0], self.zero
        else:
            group = torch.div(self.first + place, self.how.span, rounding_mode="floor")
            index = torch.searchsorted(self.middle[group], column.unsqueeze(1)).squeeze(1)
            values, zero = self.codebook[group], self.zero[group]
        if self.kept is not None:
            index = torch.where(self.kept[:, place], zero, index)
        self.indices[:, place] = index.to(torch.uint8)
        return values[index] if values.ndim == 1 else values.gather(1, index.unsqueeze(1)).squeeze(1)


def refitted(matrix: Tensor, gram: Tensor, square: Tensor, found: Shared, how: How) -> Shared:
    """The codebook that is best for the indices; zero stays zero. `square`: a² (groups, outputs)."""
    book = found.codebook.double()
    places = _places(found.indices, book, how.span)
    free = torch.ones_like(book)
    if how.zero:
        free.scatter_(1, book.abs().argmin(1, keepdim=True), 0.0)

    def summed(values: Tensor) -> Tensor:
        total = torch.zeros(book.numel(), dtype=torch.float64).index_add_(0, places, values.reshape(-1))
        return total.view(book.shape) * free

    def image(change: Tensor) -> Tensor:
        dense = torch.index_select(change.reshape(-1), 0, places).view(matrix.shape)
        return summed((dense @ gram) * square.unsqueeze(2))

    present = torch.index_select(book.reshape(-1), 0, places).view(matrix.shape)
    goal = summed(((matrix - present) @ gram) * square.unsqueeze(2))
    power = summed(square.unsqueeze(2) * gram.diagonal(dim1=1, dim2=2).unsqueeze(1).expand_as(matrix))
    inverse = torch.where(power > 0, 1 / power.clamp_min(1e-300), 0.0)
    change = surgery.conjugate_gradients(image, goal, None, lambda rest: rest * inverse, REFIT_STEPS, 1e-6)
    return _ascending(book + change, found, how)


def _ascending(book: Tensor, found: Shared, how: How) -> Shared:
    """With the values in order again."""
    values, order = book.to(found.codebook.dtype).sort(1)
    rank = order.argsort(1).to(torch.uint8)
    return Shared(values, torch.index_select(rank.reshape(-1), 0, _places(found.indices, book, how.span)))


def gains(matrix: Tensor, gram: Tensor, cross: Tensor, otherwise: Tensor) -> Tensor:
    """g (groups, outputs) with the least E‖y - g Q x‖²; `cross` E[y xᵀ], `otherwise` where Q x is zero."""
    power = ((matrix @ gram) * matrix).sum(2)
    shared = (matrix * cross).sum(2)
    return torch.where(power > 0, shared / power.clamp_min(1e-300), otherwise)
