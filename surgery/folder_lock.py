"""One run in a folder at a time: a lock of the operating system, which ends with the process that holds it.

The lock is on a file in the folder, whose text says who is at work. It is gone when the run ends; that of a killed run
stays behind and locks nothing.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What file systems say that have no locks; runs there are on their own."""


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Runs the body with `file` locked; it does not wait.

    Raises:
        RunError: another process or thread holds it.
    """
    descriptor = _open(file)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield
    finally:
        with suppress(OSError):  # Windows keeps files that are open
            file.unlink()
        _unlock(descriptor)


def _open(file: Path) -> int:
    """A descriptor of the locked file, the one that lies there and not one that its last owner has removed since."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _lock(descriptor)
        except OSError as error:
            owner = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            if error.errno not in _TAKEN:
                raise
            raise RunError(
                f"another run is at work in this folder: {owner or 'a process that has just begun'}",
                at=str(file.parent),
                fix="wait until it ends, or choose another folder",
            ) from error
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(file)):
                return descriptor
        _unlock(descriptor)


def _lock(descriptor: int) -> None:
    if fcntl is None:
        _windows(descriptor, "LK_NBLCK")
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _unlock(descriptor: int) -> None:
    with suppress(OSError):
        if fcntl is None:
            _windows(descriptor, "LK_UNLCK")
        else:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a forked child has it open too
    os.close(descriptor)


def _windows(descriptor: int, how: str) -> None:
    import msvcrt

    os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # behind the text, which others may read
    msvcrt.locking(descriptor, getattr(msvcrt, how), 1)  # type: ignore[attr-defined]
    os.lseek(descriptor, 0, os.SEEK_SET)
