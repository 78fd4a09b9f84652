"""float32 with all its bits, whatever PyTorch may put in its place.

TF32 keeps 10 of the 23 mantissa bits and bfloat16 7: statistics, least squares and comparisons would hold what the
hardware rounds off for what a pass has done. Convolutions on CUDA take TF32 unless told not to.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def full_precision() -> Iterator[None]:
    """Matrix products, convolutions and recurrences of float32 compute in float32; the settings come back afterwards.

    PyTorch keeps each setting twice, as `fp32_precision` and as `allow_tf32`, and refuses to read the latter, which
    torch.export does, where they differ. They agree in here, whichever the user has set.
    """
    import torch

    from .torch_private import writable_switches

    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    kinds = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
    before = [kind.fp32_precision for kind in kinds]
    with writable_switches():
        legacy = _legacy_switch()
        cudnn.allow_tf32 = False
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        with writable_switches():
            cudnn.allow_tf32 = legacy
        for kind, setting in zip(kinds, before, strict=True):
            kind.fp32_precision = setting


def _legacy_switch() -> bool:
    """`cudnn.allow_tf32`, which can be read only where the newer settings say the same; they are changed for it."""
    import torch

    cudnn: Any = torch.backends.cudnn
    cudnn.conv.fp32_precision = cudnn.rnn.fp32_precision = "tf32"
    try:
        return bool(cudnn.allow_tf32)
    except RuntimeError:  # it is off, which contradicts them
        return False
