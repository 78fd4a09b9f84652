"""What is in a pack, in words and numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..report import Table
from .reading import Entry, Pack


@dataclass(frozen=True)
class Listing:
    """The tensors of a pack, and the file they are in."""

    codec: str
    versions: dict[str, str]
    file_bytes: int
    entries: tuple[Entry, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        tensors = [asdict(entry) | {"dtype": _short(entry), "shape": [*entry.shape]} for entry in self.entries]
        sizes = {"file_bytes": self.file_bytes, "bytes": self._bytes, "stored": self._stored}
        return {"codec": self.codec, "versions": self.versions, **sizes, "tensors": tensors}

    def table(self) -> Table:
        """A row per tensor, and the sum."""
        rows = [
            (
                entry.name,
                "×".join(map(str, entry.shape)),
                _short(entry),
                entry.representation,
                *_sizes(entry.bytes, entry.stored),
            )
            for entry in self.entries
        ]
        rows.append(("all, in the file", "", "", "", *_sizes(self._bytes, self.file_bytes)))
        columns = ("tensor", "shape", "dtype", "stored as", "bytes", "stored bytes", "ratio")
        return Table(f"Tensors, {self.codec}", columns, tuple(rows))

    def total(self) -> Table:
        """The sums alone."""
        rest = self.file_bytes - self._stored
        rows = (("tensors", *_sizes(self._bytes, self._stored)), ("header, graph and recipe", "", f"{rest:,}", ""))
        whole = ("file", *_sizes(self._bytes, self.file_bytes))
        return Table(f"Packed with {self.codec}", ("", "bytes", "stored bytes", "ratio"), (*rows, whole))

    @property
    def _bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries)

    @property
    def _stored(self) -> int:
        return sum(entry.stored for entry in self.entries)


def listing(pack: Pack) -> Listing:
    """What is in `pack`; no tensor is decoded."""
    return Listing(pack.codec, dict(pack.versions), pack.path.stat().st_size, tuple(pack.entries.values()))


def _short(entry: Entry) -> str:
    return str(entry.dtype).removeprefix("torch.")


def _sizes(plain: int, stored: int) -> tuple[str, str, str]:
    return f"{plain:,}", f"{stored:,}", f"{plain / stored:.2f}×" if stored else ""
