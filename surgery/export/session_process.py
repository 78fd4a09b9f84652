"""A session of ONNX Runtime in a process of its own: what it takes for a large file is given back whole.

A session holds the file, the weights and the weights in the order that its kernels read; freed one by one, part of it
stays with the process that made it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import session_worker

LARGE_FILE = 256 * 2**20
"""Bytes, weights beside the file included, from which on a process of its own pays: starting one takes 0.5 s."""


@dataclass(frozen=True)
class Value:
    """An input or output, as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str | None]


class SessionProcess:
    """What is asked of an `onnxruntime.InferenceSession`, answered by another process, which ends with this object."""

    def __init__(self, path: Path, providers: Sequence[tuple[str, Mapping[str, str]]], threads: int | None) -> None:
        wanted = json.dumps({"path": str(path), "providers": providers, "threads": threads})
        command = [sys.executable, "-P", session_worker.__file__, wanted]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, start_new_session=True)  # Ctrl-C is for us
        self._ended = weakref.finalize(self, _end, self._process)
        try:
            about = json.loads(str(self._answer()["about"]))
        except BaseException:
            self._ended()
            raise
        self._providers = list(about["providers"])
        self._inputs, self._outputs = ([Value(*v) for v in about[side]] for side in ("inputs", "outputs"))

    def get_inputs(self) -> list[Value]:
        return self._inputs

    def get_outputs(self) -> list[Value]:
        return self._outputs

    def get_providers(self) -> list[str]:
        return self._providers

    def run(self, names: None, feed: Mapping[str, Any]) -> list[Any]:
        """All outputs. Raises what ONNX Runtime raises, a class of the same name."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer says that it is gone
            session_worker.send(self._process.stdin, feed)
        answer = self._answer()
        return [answer[str(i)] for i in range(len(answer))]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        try:
            answer = session_worker.receive(self._process.stdout)
        except EOFError:
            code = self._process.wait()
            raise MemoryError(f"its process ended with {code}; most often memory ran out") from None
        if "error" in answer:
            name, text = json.loads(str(answer["error"]))
            raise type(name, (Exception,), {})(text)
        return answer


def file_bytes(path: Path) -> int:
    """Of an ONNX file and the weights beside it."""
    data = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (data.stat().st_size if data.is_file() else 0)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()
    process.wait()
