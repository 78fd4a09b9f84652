"""Memory given back to the machine after work on large models.

Graphs and their modules refer to each other, so what was dropped stays until Python's cycle collector runs; and of what
is freed then, the C library keeps blocks below 32 MiB for itself.
"""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress

from torch import nn

LARGE = 64 * 2**20
"""Bytes of weights from which on the tenth of a second that this takes is worth it."""


def give_back(model: nn.Module) -> None:
    """Free what was dropped, where `model` is so large that it matters."""
    if sum(p.numel() * p.element_size() for p in (*model.parameters(), *model.buffers())) < LARGE:
        return
    gc.collect()
    with suppress(AttributeError, OSError):  # of the GNU C library alone
        ctypes.CDLL(None).malloc_trim(0)
