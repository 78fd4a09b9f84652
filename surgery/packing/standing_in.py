"""A pack in the place of the weights file that an exported source reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .reading import Pack


class Fresh(Tensor):
    """A tensor nobody else holds: a copy of it is itself, so that a model is never in memory twice."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def clone(self, *, memory_format: torch.memory_format | None = None) -> Tensor:
        plain = self.as_subclass(Tensor)
        return plain if memory_format is None else plain.clone(memory_format=memory_format)


class Weights(Mapping[str, Tensor]):
    """The tensors of a pack by name, each decoded when it is asked for and not kept."""

    def __init__(self, content: Pack) -> None:
        self._content = content

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._content.entries:
            raise KeyError(name)
        return self._content.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._content.entries)

    def __len__(self) -> int:
        return len(self._content.entries)

    def items(self) -> Any:
        return ((name, tensor.as_subclass(Fresh)) for name, tensor in self._content.tensors())


class _InPack(type(Path())):  # type: ignore[misc]
    """A path inside of a pack: what is looked for there is there."""

    def is_file(self, **_: Any) -> bool:
        return True


def standing_in(content: Pack) -> dict[str, Any]:
    """What the source's own `Path` and `load_file` are replaced by."""
    return {"Path": _InPack, "load_file": lambda path: Weights(content)}
