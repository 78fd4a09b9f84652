"""The frame of a pack file: what stands before the streams.

    8 bytes  89 53 55 52 47 45 52 59 ("\\x89SURGERY")
    u32      version of the format
    u32      stored bytes of the header
    u32      bytes of the header
    u32      CRC-32 of the 20 bytes before it and of the stored header
    header   JSON in UTF-8, compressed by LZMA (the format of .lzma files)
    streams  in the order of the header, without gaps, to the end of the file

All numbers little-endian.
"""

from __future__ import annotations

import lzma
import struct
import zlib
from pathlib import Path
from typing import IO

from ..errors import ExportError, ModelError
from .form import Header, read_header

MAGIC = b"\x89SURGERY"
VERSION = 2
_LZMA = {"dict_size": 1 << 20, "nice_len": 273, "depth": 1000}
_LZMA_MEMORY = 16 << 20
_UNBOUND, _DENSEST = 1 << 18, 64
"""Bytes that any header may have, and how many more for each that is stored: reading it takes a hundred times as long
as inflating it. The densest that we have written, of 300 layers alike, has 51."""
_FRAME = struct.Struct("<8sIII")
_CHECK = struct.Struct("<I")
FRAME = _FRAME.size + _CHECK.size
AGAIN = "fetch the file again, or pack the model again"


def frame(header: Header) -> bytes:
    """Everything before the streams."""
    plain = header.to_bytes()
    stored = lzma.compress(plain, format=lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, **_LZMA}])
    if len(plain) > _most(len(stored)):
        raise ExportError("the model's layers are too much alike for a header that readers accept", fix="report this")
    head = _FRAME.pack(MAGIC, VERSION, len(stored), len(plain))
    return head + _CHECK.pack(zlib.crc32(stored, zlib.crc32(head))) + stored


def _most(stored: int) -> int:
    """Bytes that a header of `stored` compressed bytes may have."""
    return _UNBOUND + _DENSEST * stored


def is_pack(path: Path) -> bool:
    """Whether a file begins as a pack does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_frame(file: IO[bytes], size: int, most: int, place: str) -> tuple[Header, int]:
    """The header, and where the streams begin, of a file of `size` bytes; a header above `most` bytes is refused.

    Raises:
        ModelError: no pack, one of a newer format, or a damaged one.
    """
    head = file.read(FRAME)
    if head[: len(MAGIC)] != MAGIC:
        raise ModelError("this is no pack", at=place, fix="give a file that `surgery pack` wrote")
    if len(head) < FRAME:
        raise _damaged("the file ends in its first bytes", place)
    _, version, stored, plain = _FRAME.unpack_from(head)
    if version != VERSION:
        raise ModelError(
            f"the pack has format version {version}; this SDK reads version {VERSION}",
            at=place,
            fix="install a newer model-surgery" if version > VERSION else "pack the model again, from its run folder",
        )
    if stored > size - FRAME:
        raise _damaged(f"the file ends in its header: {size} bytes", place)
    if plain > min(most, _most(stored)):
        raise ModelError(
            f"the header has {plain:,} bytes, the limit allows {min(most, _most(stored)):,}",
            at=place,
            fix="raise limit_bytes if you trust it" if plain > most else AGAIN,
        )
    data = file.read(stored)
    if zlib.crc32(data, zlib.crc32(head[: _FRAME.size])) != _CHECK.unpack_from(head, _FRAME.size)[0]:
        raise _damaged("the header has another checksum", place)
    try:
        return read_header(inflated(data, plain)), FRAME + stored
    except ValueError as error:
        raise _damaged(f"the header is not of the form: {error}", place) from error


def inflated(data: bytes, size: int) -> bytes:
    """The `size` bytes that an LZMA stream holds; ValueError where it holds others."""
    engine = lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY)
    try:
        plain = engine.decompress(data, size + 1)
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"no LZMA stream: {error}") from error
    if len(plain) != size or not engine.eof or engine.unused_data:
        raise ValueError(f"an LZMA stream of another size than {size} bytes")
    return plain


def _damaged(problem: str, place: str) -> ModelError:
    return ModelError(f"the pack is damaged: {problem}", at=place, fix=AGAIN)
