"""What a layer of the operated model should give, said in values of a reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Aim:
    """What one call of a layer should give: a node's value in the original, less values in the operated model.

    `minus` names nodes of the operated model, such as the shortcut of a residual block whose sum is the target; `keep`,
    by dimension, the places of the original's value that the operated model still has; all where it has none.
    """

    target: str
    minus: tuple[str, ...] = ()
    keep: Mapping[int, Tensor] = field(default_factory=dict)


def target_of(aim: Aim, own: Mapping[str, Tensor], wanted: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a call should give, from the reference's value `wanted`; and what was taken off it, None = nothing."""
    value = wanted
    for dim, places in aim.keep.items():
        value = value.index_select(dim, places.to(value.device))
    if not aim.minus:
        return value, None
    offset = own[aim.minus[0]]
    for name in aim.minus[1:]:
        offset = offset + own[name]
    return value - offset, offset
