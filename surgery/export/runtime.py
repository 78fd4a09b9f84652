"""An ONNX file as a callable from tensors to tensors, run by ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import onnxruntime
import torch
from torch import Tensor

from ..errors import ExportError, InputError, ModelError
from ..inputs import Inputs
from ..tracing import first_line
from .session_process import LARGE_FILE, SessionProcess, file_bytes
from .session_worker import options_of

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
_OPTIONS = {CUDA: {"use_tf32": "0"}}  # TF32 keeps 10 of float32's 23 mantissa bits
Session: TypeAlias = onnxruntime.InferenceSession | SessionProcess


class OnnxModel:
    """A session of ONNX Runtime, called with `Inputs` or flat tensors, by order or name; returns flat CPU tensors."""

    def __init__(self, session: Session, path: Path) -> None:
        self.session, self.path = session, path
        self.input_names = [value.name for value in session.get_inputs()]
        self.output_names = [value.name for value in session.get_outputs()]

    def __call__(self, *values: Inputs | Tensor, **named: Tensor) -> list[Tensor]:
        """Raises InputError where number, names, types or shapes are not the file's."""
        flat = [t for value in values for t in (value.tensors if isinstance(value, Inputs) else [value])]
        feed = dict(zip(self.input_names, flat, strict=False)) | named
        if len(flat) + len(named) != len(self.input_names) or feed.keys() != set(self.input_names):
            raise InputError(
                f"{len(flat)} tensors and {sorted(named)} for the inputs {self.input_names}", at=str(self.path)
            )
        arrays = {name: tensor.detach().cpu().numpy() for name, tensor in feed.items()}
        try:
            outputs = self.session.run(None, arrays)
        except Exception as error:  # ONNX Runtime's classes derive from Exception alone
            raise InputError(
                f"ONNX Runtime refuses the inputs: {first_line(error)}", at=str(self.path), fix=self._signature()
            ) from error
        return [torch.from_numpy(output) for output in outputs]

    def _signature(self) -> str:
        expected = ", ".join(f"{value.name}: {value.type} {value.shape}" for value in self.session.get_inputs())
        return f"give {expected}"


def runtime_session(
    path: str | os.PathLike[str] | bytes, providers: Sequence[str] | None = None, threads: int | None = None
) -> OnnxModel:
    """Loads an ONNX file, or one held in memory, for `providers` (default: the CPU) with `threads` per operator.

    A large file runs in a process of its own, see `session_process`.

    Raises:
        ModelError: there is no such file, or it is no ONNX model.
        ExportError: this ONNX Runtime has no such provider, or cannot run the model on it.
    """
    name = Path("model.onnx" if isinstance(path, bytes) else path)
    if not isinstance(path, bytes) and not name.is_file():
        raise ModelError(f"there is no file {name}", fix="check the path; a run that was stopped goes on with --resume")
    wanted = list(providers or [CPU])
    missing = set(wanted) - set(onnxruntime.get_available_providers())
    if missing:
        raise ExportError(
            f"ONNX Runtime has no {', '.join(sorted(missing))}", fix=f"one of {onnxruntime.get_available_providers()}"
        )
    try:
        session = _session(path, [(provider, _OPTIONS.get(provider, {})) for provider in wanted], threads)
    except Exception as error:  # ONNX Runtime's classes derive from Exception alone
        raise _refused(name, error) from error
    if session.get_providers()[0] != wanted[0]:
        raise ExportError(f"{wanted[0]} could not start, ONNX Runtime fell back to {session.get_providers()[0]}")
    return OnnxModel(session, name)


def _session(
    path: str | os.PathLike[str] | bytes, providers: list[tuple[str, dict[str, str]]], threads: int | None
) -> Session:
    if not isinstance(path, bytes) and file_bytes(Path(path)) >= LARGE_FILE:
        return SessionProcess(Path(path), providers, threads)
    file = path if isinstance(path, bytes) else str(path)
    return onnxruntime.InferenceSession(file, options_of(threads), providers=providers)


def _refused(path: Path, error: Exception) -> ModelError | ExportError:
    broken = type(error).__name__ in {"InvalidProtobuf", "InvalidArgument", "NoModel", "NoSuchFile"}
    if broken:
        return ModelError(f"{path} is no ONNX model: {first_line(error)}", fix="export it again")
    no_kernel = type(error).__name__ == "NotImplemented" or "Could not find an implementation" in str(error)
    remedy = "it has no kernels for this number type; `model.float()`" if no_kernel else "try another opset or provider"
    return ExportError(f"ONNX Runtime cannot run {path}: {first_line(error)}", fix=remedy)
