"""What the benchmarks have in common: the models, torch.export as anyone would call it, and processes of their own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.captured import CapturedModel, capture
from surgery.export.checked import export_onnx
from surgery.parity import parity
from surgery.testing import randomise

TOOL = Path(__file__).resolve().parents[2].parent / "shared" / "tools" / "zoo.py"
AUXILIARY_HEADS = ("aux1", "aux2", "AuxLogits")


def load_tool(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo_tool", path)
    if spec is None or spec.loader is None or not path.exists():
        sys.exit(f"no zoo tool at {path}; give its place with --tool")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(tool: ModuleType, wanted: list[str]) -> list[str]:
    known = [*tool.torchvision_names(), *tool.timm_names()]
    unknown = [name for name in wanted if not any(name in (k, k.partition("/")[2]) for k in known)]
    if unknown:
        sys.exit(f"unknown: {', '.join(unknown)}")
    return [k for k in known if not wanted or k in wanted or k.partition("/")[2] in wanted]


def drop_auxiliary_heads(model: nn.Module) -> None:
    """Heads that only training uses, in place."""
    for head in AUXILIARY_HEADS:
        if hasattr(model, head):
            setattr(model, head, None)
            model.aux_logits = False  # type: ignore[assignment]


def timed(action: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> tuple[float, Any]:
    """Seconds and result. `time.process_time` counts the processor's, which do not depend on the neighbours."""
    start = clock()
    result = action()
    return clock() - start, result


def leaves(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def batch(inputs: tuple[Tensor, ...], size: int) -> tuple[Tensor, ...]:
    """The example, then noise, so that samples differ."""
    generator = torch.Generator().manual_seed(size)
    return tuple(torch.cat([t, torch.rand(size - 1, *t.shape[1:], generator=generator)]) for t in inputs)


def plain_export(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    """What anyone would call; a batch of two, as export takes one for a constant."""
    dynamic = tuple({0: torch.export.Dim("batch", min=1)} for _ in inputs)
    try:
        torch.export.export(model, batch(inputs, 2), dynamic_shapes=dynamic)
    except Exception:
        automatic = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
        torch.export.export(model, batch(inputs, 2), dynamic_shapes=automatic)


def isolated(action: Callable[..., Any], *arguments: Any, limit: float | None = None) -> Any:
    """What `action` returns in a forked process of its own, so that its memory goes with it.

    Raises:
        RuntimeError: what the action raised, in one line; that the process died; or that it took over `limit` seconds.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, action, arguments), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limit):
            raise RuntimeError(f"over {limit:.0f} s")
        failure, value = receiver.recv()
    except EOFError:
        raise RuntimeError("its process died") from None
    finally:
        process.kill()
        process.join()
    if failure:
        raise RuntimeError(failure)
    return value


def zoo_rows(options: argparse.Namespace, form: Any, examined: Callable[..., Any]) -> list[Any]:
    """A row for each of `options.names`, `examined(tool, name, options)` in a process of its own, printed as it comes.
    Rows are of the dataclass `form`; those of the file `options.rows` are taken as they are, new ones added to it."""
    tool = load_tool(options.tool)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    lines = options.rows.read_text().splitlines() if options.rows.exists() else []
    known = {row.name: row for row in (form(**json.loads(line)) for line in lines)}
    names = chosen(tool, options.names)
    for name in names:
        if name not in known:
            try:
                known[name] = isolated(examined, tool, name, options)
            except RuntimeError as error:
                known[name] = form(name, failure=str(error))
            with options.rows.open("a") as file:
                file.write(json.dumps(asdict(known[name])) + "\n")
        print(known[name], flush=True)
    return [known[name] for name in names]


def zoo_subject(tool: ModuleType, name: str) -> CapturedModel:
    """The model with random weights and statistics, captured."""
    torch.manual_seed(0)
    model, inputs = tool.build(name)
    model.eval()
    drop_auxiliary_heads(model)
    return capture(randomise(model), inputs)


def _answer(sender: Connection, action: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = "", action(*arguments)
    except Exception as error:
        answer = in_a_line(error), None
    sender.send(answer)


def onnx_parity(model: CapturedModel) -> tuple[float, float]:
    """Largest deviation of ONNX Runtime from PyTorch on the example, relative, and its bound."""
    with tempfile.TemporaryDirectory() as folder:
        path = export_onnx(model, model.inputs, Path(folder) / "model.onnx")
        found = parity(model, path, [model.inputs])
    return found.relative_error, found.bound


def in_a_line(error: Exception, width: int = 110) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 1] + "…"
