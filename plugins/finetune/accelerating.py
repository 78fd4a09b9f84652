"""An accelerator of one's own.

`accelerate` keeps its device and precision in the process, for all accelerators. They are put aside while a pass
trains, so that a run on the CPU and one on a GPU can follow each other, and a caller's own accelerator goes on as it
was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch

from surgery import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator


@contextmanager
def accelerator(device: str) -> Iterator[Accelerator]:
    """An `Accelerator` for `device`, in the precision that the model has.

    Raises:
        InputError: accelerate is not installed, or has another device than was asked for.
    """
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
    except ImportError as error:
        raise InputError(
            "training is done by accelerate, which is not installed",
            fix='install it: pip install "model-surgery[train]"',
        ) from error
    shared = [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    wanted = torch.device(device)
    try:
        for state in shared:
            state.clear()
        with torch.cuda.device(wanted) if wanted.type == "cuda" and wanted.index is not None else nullcontext():
            made = Accelerator(cpu=wanted.type == "cpu", mixed_precision="no")
            if made.device.type != wanted.type:
                raise InputError(
                    f"accelerate trains on {made.device}, not on {device}",
                    fix="is there such a device? If so, look at the ACCELERATE_… variables",
                )
            yield made
    finally:
        for state, known in zip(shared, before, strict=True):
            state.clear()
            state.update(known)
