"""Models and weights from disk, never through pickle that runs code."""

from __future__ import annotations

import difflib
import pickle
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .errors import ModelError
from .paths import path_from
from .process import memory_told

_SHOWN = 5


@memory_told()
def load(path: str | Path, *, limit_bytes: int | None = None) -> nn.Module:
    """The model of a run folder, of a `model.py` with its weights beside it, or of a pack; in eval mode, ready to train
    further.

    The source is run (it is a Python program: load only what you would import), without being left in `sys.modules`.
    `limit_bytes`: of a pack, see `surgery.Pack`; from a pack nothing is written to disk.

    Raises:
        ModelError: nothing to load there, the weights are missing, damaged or do not fit, or the source fails.
    """
    from .packing.container import is_pack

    place = path_from(path, "the model's path")
    if is_pack(place) or place.suffix == ".surgery":
        return _load_pack(place, limit_bytes)
    file = model_file(place)
    return run_source(file.read_text(encoding="utf-8"), file)


def _load_pack(path: Path, limit_bytes: int | None) -> nn.Module:
    from .packing.reading import Pack

    with Pack(path, limit_bytes=limit_bytes) as content:
        return run_source(content.source, path / "model.py", lambda module: module.build(dict(content.tensors())))


def run_source(text: str, file: Path, make: Callable[[Any], Any] = lambda module: module.load()) -> nn.Module:
    """The model that `make` has the source `text` make."""
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
