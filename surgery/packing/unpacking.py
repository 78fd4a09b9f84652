"""What is in a pack, as files again."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..errors import ExportError
from ..paths import path_from
from ..process import memory_told
from ..registry import Registry
from ..state.form import with_source
from .reading import Pack


@memory_told()
def unpack(
    path: str | Path, folder: str | Path, *, limit_bytes: int | None = None, registry: Registry | None = None
) -> tuple[Path, ...]:
    """Write the files of a pack into `folder`: the source, written anew from the graph and not run, the graph, the
    weights, and the recipe where there is one.

    The weights are the very tensors that were packed, bit for bit. `limit_bytes`: see `surgery.Pack`. On failure the
    folder stays as it was.

    Raises:
        ModelError: no pack, one of a newer format, a damaged one, or one above the limit.
        ExportError: the files cannot be written.
    """
    target = path_from(folder, "the folder")
    with Pack(path, limit_bytes=limit_bytes, registry=registry) as content:
        source, tensors = content.source.encode(), dict(content.tensors())
        files = {"model.py": source, "model.graph.json": with_source(content.document, source).to_bytes()}
        if content.recipe is not None:
            files["recipe.lock.yaml"] = content.recipe.encode()
    try:
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unpack-", dir=target) as scratch:
            save_file(tensors, str(Path(scratch) / "model.safetensors"))
            (Path(scratch) / "model.safetensors").chmod(0o666 & ~_umask())  # safetensors lets nobody else read
            for name, data in files.items():
                (Path(scratch) / name).write_bytes(data)
            return tuple(_moved(file, target) for file in sorted(Path(scratch).iterdir()))
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{target} cannot be written: {getattr(error, 'strerror', None) or error}",
            fix="check that the folder is writable and has room",
        ) from error


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _moved(file: Path, folder: Path) -> Path:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
    os.replace(file, folder / file.name)
    return folder / file.name
