"""What belongs to the whole process: one of us at a time changes it, and it is afterwards as it was before.

PyTorch's exporters, its switches for kernels, the levels of loggers, the filters of warnings and the random generators
are there once for all threads. `exclusive` lets one thread in, and puts them back when it leaves, also after an error.
What a pass or the user's data change, `ProcessState` puts back and names.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

from .errors import MemoryLimitError

T = TypeVar("T")

_LOCK = threading.RLock()
_thread = threading.local()


@contextmanager
def exclusive() -> Iterator[None]:
    """Runs the body while no other thread is in one of these, outside `torch.inference_mode` and autocast and with
    gradients; then everything that `ProcessState` knows is as before, warnings, loggers and streams included. It may be
    nested.

    Raises:
        MemoryLimitError: the body ran out of memory.
    """
    if getattr(_thread, "inside", False):
        yield
        return
    import torch

    with _LOCK, ExitStack() as stack:
        stack.callback(setattr, _thread, "inside", False)
        _thread.inside = True
        stack.callback(ProcessState().restore)
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(_streams_and_loggers())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(memory_told())
        yield


def lent(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Calls `function` in a thread that works for the one that is in `exclusive`, which waits for it."""
    before, _thread.inside = getattr(_thread, "inside", False), True
    try:
        return function(*args, **kwargs)
    finally:
        _thread.inside = before


@contextmanager
def _streams_and_loggers() -> Iterator[None]:
    streams = sys.stdout, sys.stderr
    known = [logger for logger in logging.root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    held = [(logger, dict(vars(logger)), [*logger.handlers]) for logger in (logging.root, *known)]
    disabled = logging.root.manager.disable
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams
        logging.disable(disabled)
        for logger, before, handlers in held:
            logger.setLevel(before["level"])
            logger.propagate, logger.disabled = before["propagate"], before["disabled"]
            logger.handlers[:] = handlers


class ProcessState:
    """PyTorch's switches and the random generators, as they are when this is made."""

    def __init__(self) -> None:
        self._held = [(setting, setting.read()) for setting in _settings()]

    def restore(self) -> tuple[str, ...]:
        """Puts back what differs, and names it."""
        changed = [(setting, value) for setting, value in self._held if setting.read() != value]
        for setting, value in changed:
            setting.write(value)
        return tuple(setting.name for setting, _ in changed)


RANDOM = "random state"


class _Setting(NamedTuple):
    name: str
    read: Callable[[], Any]
    write: Callable[[Any], object]


def _settings() -> Iterator[_Setting]:
    import torch

    backends = torch.backends
    yield _Setting("grad mode", torch.is_grad_enabled, torch.set_grad_enabled)
    yield _Setting("default dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield _Setting("thread count", torch.get_num_threads, torch.set_num_threads)
    yield _Setting("deterministic algorithms", torch.get_deterministic_debug_mode, torch.set_deterministic_debug_mode)
    yield _Setting("attention's fast path", backends.mha.get_fastpath_enabled, backends.mha.set_fastpath_enabled)
    yield _attribute("oneDNN", backends.mkldnn, "enabled")
    for name in ("enabled", "benchmark", "deterministic"):
        yield _attribute(f"cuDNN's {name}", backends.cudnn, name)
    yield _Setting(f"{RANDOM} of torch", _rng_state, _set_rng_state)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            name = f"{RANDOM} of cuda:{device}"
            yield _Setting(name, partial(_rng_state, device), partial(_set_rng_state, device=device))
    yield _Setting(f"{RANDOM} of Python", random.getstate, random.setstate)
    if (numpy := sys.modules.get("numpy")) is not None:
        yield _Setting(f"{RANDOM} of NumPy", lambda: _plain(numpy.random.get_state()), numpy.random.set_state)


def _attribute(name: str, owner: Any, attribute: str) -> _Setting:
    return _Setting(name, partial(getattr, owner, attribute), partial(_set_switch, owner, attribute))


def _set_switch(owner: Any, attribute: str, value: Any) -> None:
    from .torch_private import writable_switches

    with writable_switches():
        setattr(owner, attribute, value)


def _rng_state(device: int | None = None) -> bytes:
    import torch

    state = torch.get_rng_state() if device is None else torch.cuda.get_rng_state(device)
    return state.numpy().tobytes()


def _set_rng_state(content: bytes, device: int | None = None) -> None:
    import torch

    state = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    if device is None:
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def _plain(state: Any) -> tuple[Any, ...]:
    return tuple(part.tolist() if hasattr(part, "tolist") else part for part in state)


@contextmanager
def memory_told() -> Iterator[None]:
    """Turns what libraries say when memory ends into a MemoryLimitError, whatever was made of it on the way."""
    try:
        yield
    except MemoryLimitError:
        raise
    except Exception as error:
        if (cause := _out_of_memory(error)) is None:
            raise
        raise MemoryLimitError(
            f"there is not enough memory: {_first_line(cause)}",
            at=getattr(error, "at", ""),
            fix="give smaller batches or fewer of them, exclude large layers, or use a machine with more memory; "
            "finished steps of a run are kept",
        ) from error


_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "allocate memory for requested")
"""What the allocators of torch, CUDA, C++ and ONNX Runtime say, in errors of no class of their own."""


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The first error behind `error` that says so; None where there is none."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, MemoryError) or any(words in str(error) for words in _WORDS):
            return error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
