"""What an entropy coder of a pack is: symbols to bytes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from ..named import Named

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array: TypeAlias = NDArray[Any]

BLOCK = 1 << 18
"""Symbols a block holds; only the last of a stream holds fewer."""


@dataclass(frozen=True)
class Block:
    """What `Codec.decode` is asked for."""

    data: bytes
    count: int
    alphabet: int


class Codec(Named, ABC):
    """An entropy coder. The first line of the class docstring is its summary; its name in files is the class name in
    snake case. Each block of symbols is coded by itself, so a codec needs no state."""

    @abstractmethod
    def encode(self, symbols: Array, alphabet: int) -> bytes:
        """Bytes for 1 to 2^18 symbols, each in [0, alphabet), alphabet at most 65,536; uint8 up to an alphabet of 256,
        else uint16. The same symbols always give the same bytes."""

    @abstractmethod
    def decode(self, data: bytes, count: int, alphabet: int) -> Array:
        """The `count` symbols of `data`, which may be hostile: take no more memory than they need.

        Raises:
            ValueError: the bytes are no such symbols; the text says why. (Other errors are taken for the same.)
        """

    def decode_all(self, blocks: Sequence[Block]) -> list[Array]:
        """The symbols of several blocks; worth overriding where they are decoded faster together."""
        return [self.decode(block.data, block.count, block.alphabet) for block in blocks]

    def cost(self, counts: Array) -> float:
        """Bytes that one block would take whose symbol i occurs `counts[i]` times; an estimate, by which
        representations are chosen. By default the entropy."""
        import numpy as np

        used = counts[counts > 0].astype(np.float64)
        return float((used * np.log2(used.sum() / used)).sum()) / 8 if used.size else 0.0
