"""Models and weights from disk, never through pickle that runs code."""

from __future__ import annotations

import difflib
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .captured import CapturedModel
from .errors import ModelError
from .packing.container import is_pack
from .paths import path_from
from .process import memory_told
from .state.allowed import Known
from .state.build import build_model
from .state.files import read_tensors
from .state.form import Document, read_document, with_source

_SHOWN = 5


SUFFIX, GRAPH_SUFFIX = ".surgery", ".graph.json"
_TRUST = "if you would import it, let it run: `surgery.load(path, trust=True)`, `--trust` on the command line"


@memory_told()
def load(path: str | Path, *, trust: bool = False, limit_bytes: int | None = None) -> nn.Module:
    """The model of a pack (`.surgery`), of a run folder, or of a `model.py` with its graph and weights beside it; in
    eval mode, ready to train further.

    It is built from the graph, which is data: operators and layers of torch and of installed plugins, and nothing of
    the file is run. With `trust` the source of a run folder or `model.py` is run instead, as Python runs what it
    imports; the outputs are the same bit for bit, and an edited source is heeded. A pack holds no source.
    `limit_bytes`: of a pack, see `surgery.Pack`; from a pack nothing is written to disk.

    Raises:
        ModelError: nothing to load there, files are missing, damaged or do not fit, or only the source could tell what
            the model is.
    """
    file = path_from(path, "the model's path")
    if file.suffix == SUFFIX:
        from .packing.reading import Pack

        with Pack(file, limit_bytes=limit_bytes) as content:
            return content.model()
    source = model_file(file)
    if trust:
        return run_source(source.read_text(encoding="utf-8"), source)
    return read_model(source, Known())


def read_model(source: Path, known: Known) -> CapturedModel:
    """The model of the graph and the weights beside `source`; ModelError as `load` raises it."""
    document, weights = read_graph(source), weights_file(source)
    with reading(weights):
        tensors = read_tensors(weights)
    return checked_model(document, tensors, source, known)


def weights_file(source: Path) -> Path:
    return source.with_suffix(".safetensors")


def read_graph(source: Path) -> Document:
    """The graph beside `source`, which must be the one that was written with it.

    Raises:
        ModelError: it is missing or damaged, or the source is another one.
    """
    graph = source.with_suffix(GRAPH_SUFFIX)
    if not graph.is_file():
        raise ModelError(
            f"beside {source.name} there is no {graph.name}, which tells without running it what the model is",
            at=str(source),
            fix=f"{_TRUST}; or export the model again",
        )
    with reading(graph):
        document = read_document(graph.read_bytes())
    if document != with_source(document, source.read_bytes()):
        raise ModelError(
            f"{source.name} has been edited: it is not the one that was written with {graph.name}",
            at=str(source),
            fix=f"{_TRUST}, and `surgery.export_source(surgery.capture(model, example), folder)` writes both anew",
        )
    return document


def checked_model(document: Document, tensors: Mapping[str, Tensor], file: Path, known: Known) -> CapturedModel:
    """The model in eval mode, with `tensors` as its own; ModelError where graph and weights do not fit."""
    try:
        return build_model(document, tensors, known)
    except ValueError as error:
        raise ModelError(
            f"graph and weights do not make a model: {_short(error)}", at=str(file), fix="export both again, together"
        ) from error


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Whatever goes wrong inside is wrong with this file."""
    try:
        yield
    except FileNotFoundError as error:
        raise ModelError(f"there is no {file.name}", at=str(file), fix="put it back beside the source") from error
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{file.name} is damaged: {_short(error)}", at=str(file), fix="export the model again"
        ) from error


def run_source(text: str, file: Path, make: Callable[[Any], Any] = lambda module: module.load()) -> nn.Module:
    """The model that `make` has the source `text` make, which is run, without being left in `sys.modules`."""
    module = ModuleType(f"surgery_model_{file.stem}_{abs(hash(file.resolve())):x}")
    module.__file__ = str(file.resolve())
    sys.modules[module.__name__] = module
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
        loaded = make(module)
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(str(error), at=str(file), fix="put the weights file back beside the source") from error
    except (RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(
            f"the weights do not fit the source: {_short(error)}", at=str(file), fix="export both again, together"
        ) from error
    except Exception as error:
        raise ModelError(
            f"the source fails: {type(error).__name__}: {_short(error)}", at=str(file), fix="export the model again"
        ) from error
    finally:
        del sys.modules[module.__name__]
    if not isinstance(loaded, nn.Module):
        raise ModelError(f"its source makes a {type(loaded).__name__}, not a model", at=str(file))
    return loaded


def model_file(path: Path) -> Path:
    """The source in a run folder, or at `path`; ModelError where there is none."""
    file = path / "model.py" if path.is_dir() else path
    if is_pack(file):
        raise ModelError(
            f"{file.name} is a pack by its content and not by its name",
            at=str(file),
            fix=f"rename it to {file.stem}{SUFFIX} if that is what you expect it to be",
        )
    if not file.is_file():
        looked = (
            f"a file {file}"
            if path.is_dir() or path.suffix == ".py"
            else f"a folder with model.py, or a file, at {path}"
        )
        raise ModelError(
            f"there is no model to load: looked for {looked}",
            fix="give the folder of a finished run, or the path of a model.py",
        )
    text = file.read_bytes()
    if file.suffix != ".py" or b"def load(" not in text:
        raise ModelError(
            f"{file.name} is no exported model: it has no load()",
            at=str(file),
            fix="give the folder of a finished run; for weights alone use load_weights(model, path)",
        )
    return file


@memory_told()
def load_weights(model: nn.Module, path: str | Path) -> None:
    """Put the weights at `path` into `model`; on any error the model stays as it was.

    `.safetensors`, or `.pt`, `.pth`, `.bin` read without running code; a state_dict, or one under the key `state_dict`
    or `model`. A prefix `module.` common to all names is removed.

    Raises:
        ModelError: the file is missing, damaged or needs code to be read, names or shapes differ, or a weight is NaN.
    """
    file = path_from(path, "the path of the weights")
    weights = _without_prefix(_state_dict(_read(file), file))
    _check_fit(model, weights, file)
    nan = [name for name, tensor in weights.items() if tensor.is_floating_point() and bool(tensor.isnan().any())]
    if nan:
        raise ModelError(f"{_listed(nan)} hold NaN", at=str(file), fix="use a checkpoint from before training diverged")
    model.load_state_dict(weights)


def _read(file: Path) -> Any:
    if not file.is_file():
        raise ModelError(f"there is no weights file {file}", fix="check the path")
    try:
        if file.suffix == ".safetensors":
            return load_file(str(file))
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(file, error):
            raise ModelError(
                f"{file.name} can only be read by running code that it contains",
                at=str(file),
                fix="if you trust it: load it yourself, then safetensors.torch.save_file(model.state_dict(), path)",
            ) from error
        raise ModelError(
            f"{file.name} is damaged or no weights file", at=str(file), fix="fetch or save it again"
        ) from error


def _is_pickle(file: Path, error: Exception) -> bool:
    """Whether the file is a sound pickle that names something to call."""
    with file.open("rb") as stream:
        return "global" in str(error).lower() or stream.read(1) == b"\x80"


def _state_dict(content: Any, file: Path) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return {str(name): tensor for name, tensor in content.items()}
    found = (
        f"keys {_listed([str(k) for k in content])}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
    )
    raise ModelError(
        f"{file.name} holds no state_dict but {found}", at=str(file), fix="save model.state_dict() and nothing else"
    )


def _without_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith("module.") for name in weights):
        return {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _check_fit(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    own = model.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(weights[name].shape)}, the model has {tuple(own[name].shape)}"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    problems = [f"{len(missing)} missing ({_listed(missing)})"] if missing else []
    problems += [f"{len(unexpected)} unexpected ({_listed(unexpected)})"] if unexpected else []
    problems += [f"{len(shapes)} of another shape ({_listed(shapes)})"] if shapes else []
    if not problems:
        return
    close = difflib.get_close_matches(missing[0], unexpected, n=1) if missing else []
    hint = f"; did the file's {close[0]} mean {missing[0]}?" if close else ""
    raise ModelError(
        f"{file.name} does not fit {type(model).__name__}: {', '.join(problems)}{hint}",
        at=str(file),
        fix="build the model with the options (classes, width) that these weights were trained with",
    )


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
