"""The header of a pack, the same for writing and for reading; every field is checked strictly.

A tensor is a tree of representations. A leaf says how many bytes of the file it takes for a number of elements of a
number of bytes each, any other what its `parts` are; the leaves' streams stand in the file in their order and without
gaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .codec import BLOCK

DTYPES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint64": 8,
    "uint32": 4,
    "uint16": 2,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
}
"""Names of element types as torch calls them, and their bytes."""

_DEEPEST = 4


class Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True)


Checksum = Annotated[int, Field(ge=0, lt=1 << 32)]


class Raw(Record):
    """The elements as they are, little-endian."""

    kind: Literal["raw"] = "raw"

    def stored(self, count: int, size: int) -> int:
        """Bytes in the file."""
        return count * size


class Symbols(Record):
    """The elements' bytes as a string of symbols of `width` bits, in blocks of an entropy coder.

    4: two symbols a byte, the low half first. 8: bytes. 16: two bytes, the first one low; an odd one is filled up.
    """

    kind: Literal["symbols"] = "symbols"
    width: Literal[4, 8, 16]
    blocks: list[Annotated[int, Field(ge=0)]]

    def stored(self, count: int, size: int) -> int:
        """Bytes in the file."""
        blocks = -(-self.symbols(count, size) // BLOCK)
        _check(len(self.blocks) == blocks, f"{len(self.blocks)} blocks instead of {blocks}")
        return sum(self.blocks)

    def symbols(self, count: int, size: int) -> int:
        return -(-count * size * 8 // self.width)


class Half(Record):
    """float32 elements that are all exactly of a 16-bit type."""

    kind: Literal["half"] = "half"
    to: Literal["float16", "bfloat16"]
    of: Representation

    def parts(self, count: int, size: int) -> list[Part]:
        _check(size == 4, "half of elements that are not 4 bytes")
        return [(self.of, count, 2)]


class Codebook(Record):
    """Elements from a table: `indices` has `bits` bits each, several to a byte where they are fewer than 8."""

    kind: Literal["codebook"] = "codebook"
    size: Annotated[int, Field(ge=1, le=1 << 16)]
    bits: Literal[1, 2, 4, 8, 16]
    table: Raw
    indices: Representation

    def parts(self, count: int, size: int) -> list[Part]:
        _check(self.size <= 1 << self.bits, f"{self.size} values for indices of {self.bits} bits")
        joined = max(1, 8 // self.bits)
        return [(self.table, self.size, size), (self.indices, -(-count // joined), max(1, self.bits // 8))]


class Sparse(Record):
    """Elements of which most are `background`: how far apart the others stand, and their values.

    With `bits` 4 the elements are half bytes, low half first. `gaps`: one number of `gap_bits` bits per step; the
    largest means that many of the background and nothing behind them, any other g that after g of them a value follows.
    """

    kind: Literal["sparse"] = "sparse"
    bits: Literal[4, 8, 16, 32, 64]
    background: Annotated[int, Field(ge=0)]
    gap_bits: Literal[8, 16]
    steps: Annotated[int, Field(ge=0)]
    others: Annotated[int, Field(ge=0)]
    gaps: Representation
    values: Representation

    def parts(self, count: int, size: int) -> list[Part]:
        _check(self.bits == size * 8 or (self.bits == 4 and size == 1), f"{self.bits} bits for {size} bytes")
        _check(self.background < 1 << self.bits, "the background does not fit the elements")
        places = count * size * 8 // self.bits
        _check(self.others <= self.steps and self.others <= places, "more values than elements")
        escapes = (self.steps - self.others) * ((1 << self.gap_bits) - 1)
        _check(escapes + self.others <= places, "more steps than elements")
        return [(self.gaps, self.steps, self.gap_bits // 8), (self.values, self.others, max(self.bits // 8, 1))]


class Planes(Record):
    """Each byte of the elements by itself, the lowest first; `rotate`: after rotating them left by one bit, which puts
    the sign lowest and the exponent of a float32 into one byte."""

    kind: Literal["planes"] = "planes"
    rotate: bool
    planes: list[Representation]

    def parts(self, count: int, size: int) -> list[Part]:
        _check(len(self.planes) == size > 1, f"{len(self.planes)} planes for {size} bytes")
        return [(plane, count, 1) for plane in self.planes]


Representation: TypeAlias = Annotated[Raw | Symbols | Half | Codebook | Sparse | Planes, Field(discriminator="kind")]
Part: TypeAlias = tuple[Representation, int, int]
"""A representation, its elements and their bytes."""

Name = Annotated[str, Field(max_length=4096)]


def leaves(part: Part, depth: int = 0) -> Iterator[tuple[Raw | Symbols, int, int]]:
    """(leaf, elements, their bytes) of everything in `part`, in the order of the file.

    Raises:
        ValueError: a record contradicts itself.
    """
    data, count, size = part
    if isinstance(data, Raw | Symbols):
        yield data, count, size
        return
    _check(depth < _DEEPEST, "representations within representations are nested too deeply")
    for child in data.parts(count, size):
        yield from leaves(child, depth + 1)


def extent(part: Part) -> int:
    """Bytes in the file; ValueError where a record contradicts itself."""
    return sum(leaf.stored(count, size) for leaf, count, size in leaves(part))


def _dtype(name: str) -> str:
    _check(name in DTYPES, f"{name!r} is no dtype of a pack")
    return name


class TensorRecord(Record):
    name: Name
    dtype: Annotated[str, AfterValidator(_dtype)]
    shape: Annotated[list[Annotated[int, Field(ge=0, lt=1 << 48)]], Field(max_length=64)]
    crc: Checksum
    """Of the elements."""
    data: Representation

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> Part:
        return self.data, self.count, DTYPES[self.dtype]

    @property
    def bytes(self) -> int:
        return self.count * DTYPES[self.dtype]

    def extent(self) -> int:
        """Bytes in the file; ValueError where the record contradicts itself."""
        _check(math.prod(max(n, 1) for n in self.shape) < 1 << 48, f"shape {self.shape}")
        return extent(self.part)


class Header(Record):
    format: Literal["surgery-pack"]
    codec: Name
    versions: dict[str, str]
    recipe: str | None = None
    """The text of `recipe.lock.yaml`."""
    graph: dict[str, Any]
    """The document of `surgery.state.form`; its fields are checked when a model is made of it."""
    tensors: list[TensorRecord]

    def to_bytes(self) -> bytes:
        return json.dumps(self.model_dump(mode="json"), separators=(",", ":"), ensure_ascii=False).encode()


def read_header(data: bytes) -> Header:
    """The checked header.

    Raises:
        ValueError: it is no JSON or not of this form; the text names the field.
    """
    try:
        return Header.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except RecursionError as error:
        raise ValueError("the header is nested too deeply") from error


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)
