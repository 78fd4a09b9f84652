"""Ranks in steps that kernels like."""

from __future__ import annotations


def raised(rank: int, step: int, limit: int) -> int:
    """To the next multiple of `step`, at least one and at most the limit."""
    return min(-(-max(1, rank) // step) * step, limit)


def multiples(limit: int, step: int, most: int) -> list[int]:
    """At most `most` multiples of `step` below `limit`, spread evenly, and `limit`."""
    every = list(range(step, limit, step))
    stride = max(1, -(-len(every) // most))
    return [*every[stride - 1 :: stride], limit]
