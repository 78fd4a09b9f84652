"""What a runtime computes in integers: plain data that passes read and plugins give by the hook `surgery_targets`.

Layers are named by their class in `torch.nn`, operators by what a captured graph calls them (`aten.add.Tensor`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where an exported file will run. Whatever stands in none of the sets is computed in float there."""

    name: str
    """What a recipe's `runtime:` says."""
    layers: frozenset[str]
    """Layers with an integer kernel: int8 weights, int32 bias."""
    products: frozenset[str]
    """Matrix products of two activations with an integer kernel."""
    joins: frozenset[str]
    """Other operators with an integer kernel that is worth it where what they read and what they give is quantised."""
    moves: frozenset[str]
    """Operators that move values, and run on integers as they are where both sides have the same scale."""
    merged: frozenset[str]
    """Activations that a quantised output takes in: its range is theirs."""
    float_outputs: frozenset[str]
    """Layers and products whose integer kernel can also give floats."""
    least_group: int = 1
    """Channels that a group of a convolution must read and give for its integer kernel to be worth it. Depthwise
    convolutions, which read one channel and give one, always are."""
    saturates_without_vnni: bool = False
    """Weights keep to 7 bits where the processor adds products of 8 bits in 16."""
