"""Indices of b bits as bytes, and back by operators that ONNX Runtime has for uint8.

    b = Σ of widths w ∈ {8, 4, 2, 1}, largest first (7 = 4 + 2 + 1); for each width a part of ⌈n·w/8⌉ bytes

The part of width w holds w bits of every index: the first of them lowest in the index. Its byte j has those of the
indices j, j + B, j + 2B …, lowest first, B = ⌈n·w/8⌉ being its number of bytes: so that unpacking is 8/w lookups of the
whole part, one after the other, in a table of what those bits of any byte are. (Shifts of uint8 do not come through
torch's ONNX exporter, and ONNX Runtime divides no uint8.)
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WIDTHS = (8, 4, 2, 1)


def widths(bits: int) -> list[int]:
    """The widths of the parts of indices of `bits` bits, 1 to 8."""
    return [width for width in WIDTHS if bits & width]


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` indices of `bits` bits."""
    return sum(-(-count * width // 8) for width in widths(bits))


def pack(indices: Tensor, bits: int) -> Tensor:
    """`indices` (n,) uint8 below 2^bits as bytes (`packed_bytes`,) uint8."""
    parts, low = [], 0
    for width in widths(bits):
        size = packed_bytes(len(indices), width)
        part = (indices >> low) & (2**width - 1)
        rows = F.pad(part, (0, size * (8 // width) - len(part))).view(8 // width, size)
        byte = rows[0]
        for place in range(1, len(rows)):
            byte = byte | (rows[place] << (place * width))
        parts.append(byte)
        low += width
    return torch.cat(parts)


def unpack(packed: Tensor, count: int, bits: int) -> Tensor:
    """The `count` indices (n,) uint8 of `pack`."""
    found: Tensor | None = None
    start = low = 0
    for width in widths(bits):
        size = packed_bytes(count, width)
        part = _unpacked(packed[start : start + size], width, low)[:count]
        found = part if found is None else found | part
        start, low = start + size, low + width
    assert found is not None
    return found


def _unpacked(part: Tensor, width: int, low: int) -> Tensor:
    """What the bytes `part` (B,) hold, in the place that it has in an index: (8/w · B,) uint8."""
    if width == 8:
        return part
    byte = torch.arange(256, dtype=torch.int32, device=part.device)
    rows = [torch.div(byte, 2 ** (width * place), rounding_mode="floor") for place in range(8 // width)]
    table = (torch.stack(rows) % 2**width * 2**low).to(torch.uint8)
    return torch.index_select(table, 1, part.to(torch.int32)).reshape(-1)
