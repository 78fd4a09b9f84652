"""The codec that comes with the SDK, as a plugin like any other. Array code is imported where it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..hooks import hookimpl
from .codec import Block, Codec

if TYPE_CHECKING:
    from .codec import Array


class Huffman(Codec):
    """Canonical Huffman codes of limited length, decoded in thousands of lanes at once.

    Huffman, "A method for the construction of minimum-redundancy codes" (1952); lengths by package-merge, at most 20
    bits. The symbols of a block are dealt to lanes in turn, so that one step of all lanes gives neighbours.
    """

    def encode(self, symbols: Array, alphabet: int) -> bytes:
        from .lanes import encoded

        return encoded(symbols, alphabet)

    def decode(self, data: bytes, count: int, alphabet: int) -> Array:
        return self.decode_all([Block(data, count, alphabet)])[0]

    def decode_all(self, blocks: Sequence[Block]) -> list[Array]:
        from .lockstep import decoded

        return decoded(blocks)

    def cost(self, counts: Array) -> float:
        from .lanes import predicted_bytes

        return predicted_bytes(counts)


@hookimpl
def surgery_codecs() -> list[type[Codec]]:
    return [Huffman]
