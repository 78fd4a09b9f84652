"""What every trace of a model needs around it: eval mode, silence, and the user's line when it fails."""

from __future__ import annotations

import gc
import io
import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
from torch import nn

_LOGGERS = ("torch", "onnxscript", "onnx_ir")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the body with `model` in eval mode and without gradients; every module gets back the mode it had.

    Attention takes its plain path, the only one that can be exported and counted. The mode is set on each module
    and not through `model.eval()`, whose overrides may do more than can be undone.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with plain_attention(), torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def plain_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` must show its operators, not the fused inference kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps from the user's terminal what the exporters of torch and ONNX warn, log, and print when they fail."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def uncollected() -> Iterator[None]:
    """Runs the body without Python's cycle collector: export makes many small objects that live until its end."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def user_line(error: BaseException) -> str:
    """File and line of the last frame that is neither torch's nor ours; empty if there is none."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
