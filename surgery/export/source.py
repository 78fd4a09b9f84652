"""A captured model as standalone Python: `model.py`, which needs only torch, beside `model.safetensors`.

The source calls the very operators of the graph, so its outputs are those of the captured model bit for bit, and its
`state_dict` has the same keys. It is plain code: read it, edit it, train it.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..captured import RELATIVE_BOUND, CapturedModel, relative_error
from ..constructors import builds_on_meta
from ..errors import ExportError, ModelError
from ..loading import GRAPH_SUFFIX, run_source
from ..paths import path_from
from ..process import exclusive
from ..sizes import check_inputs, number_kind
from ..state.files import write_tensors
from ..state.form import Document, with_source
from ..state.write import document_of, named_tensors, weights_of
from ..torch_private import tree_leaves
from .embed import embed
from .forward import Forward
from .layout import Layout, class_text
from .literals import literal, quoted, wrap

_LOAD = '''\
def load(folder: str | Path | None = None) -> Model:
    """The trained model in eval mode; `{file}` is read from `folder`, by default the folder of this file."""
    path = Path(folder or Path(__file__).parent) / {quoted}
    if not path.is_file():
        raise FileNotFoundError(f"{{path}} is missing: keep it beside the source, or give load() its folder")
    return build({{name: tensor.clone() for name, tensor in load_file(path).items()}})


def build(tensors: dict[str, Tensor]) -> Model:
    """The model in eval mode with these tensors, by the names of the weights file, as its own."""
'''


@exclusive()
def export_source(
    model: CapturedModel, folder: str | Path, *, name: str = "model", header: Mapping[str, str] | None = None
) -> tuple[Path, Path, Path]:
    """Write `<name>.py`, `<name>.safetensors` and `<name>.graph.json`, the same graph as data, into `folder` and check
    that source and weights reproduce `model` on its example.

    `header`: lines for the file's docstring, such as the recipe's hash and versions. The same model always gives the
    same bytes. On failure the folder stays as it was.

    Raises:
        ExportError: a layer or operator that cannot be written as plain source, or the result deviates; the message
            names the node or class and who must act. Or the files cannot be written.
    """
    target = path_from(folder, "the folder")
    paths = target / f"{name}.py", target / f"{name}.safetensors", target / f"{name}{GRAPH_SUFFIX}"
    text, document = source(model, name=name, header=header), document_of(model, provenance=dict(header or {}))
    try:
        _write(model, target, paths, text.encode(), document)
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"{paths[0]} and its weights cannot be written: {getattr(error, 'strerror', None) or error}",
            fix="check that the folder is writable and has room; older files there are untouched",
        ) from error
    return paths


def _write(model: CapturedModel, target: Path, paths: tuple[Path, ...], text: bytes, document: Document) -> None:
    target.mkdir(parents=True, exist_ok=True)
    name = paths[0].stem
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=target) as scratch:
        written = [Path(scratch) / path.name for path in paths]
        written[0].write_bytes(text)
        written[2].write_bytes(with_source(document, text).to_bytes())
        write_tensors(weights_of(model), written[1])
        shutil.copymode(written[0], written[1])  # safetensors lets nobody else read
        _check(model, written[0])
        for new, path in reversed([*zip(written, paths, strict=True)]):
            with new.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(new, path)


def source(model: CapturedModel, *, name: str = "model", header: Mapping[str, str] | None = None) -> str:
    """The text of `<name>.py`."""
    layout = Layout(model)
    embedded = embed({type(layer) for layer in layout.layers.values() if "." not in class_text(type(layer))})
    forward = Forward(model, layout)
    body = [
        *_input_lines(forward),
        *_class_lines(layout, forward),
        "",
        "",
        *_LOAD.format(file=f"{name}.safetensors", quoted=quoted(f"{name}.safetensors")).splitlines(),
        *_load_lines(model, layout),
    ]
    definitions: list[str] = []
    for text in (*_named_tuples(forward), *embedded):
        definitions += [*text.splitlines(), "", ""]
    imports = _imports(forward, "\n".join([*definitions, *body]))
    lines = [*_docstring(model, name, header or {}), "", *imports, "", "", *definitions, *body]
    return "\n".join(lines) + "\n"


def _docstring(model: CapturedModel, name: str, header: Mapping[str, str]) -> Iterator[str]:
    yield f'"""{_clean(name)}: a standalone PyTorch model with its weights in {_clean(name)}.safetensors.'
    yield ""
    yield f"    from {_clean(name)} import load"
    yield "    model = load()  # eval mode; model.train() to train further"
    yield ""
    for place, tensor in model.inputs.named_tensors.items():
        kind = str(tensor.dtype).removeprefix("torch.")
        size = [str(s) for s in tensor.shape]
        if model.dynamic_batch and tensor.ndim and tensor.shape[0] == model.inputs.batch_size:
            size[0] = "batch"
        yield f"Input {_clean(place)}: {kind} ({', '.join(size)})"
    yield from (f"{_clean(key)}: {_clean(value)}" for key, value in header.items())
    yield '"""'


def _clean(text: object) -> str:
    """`text` without what would end a docstring."""
    return str(text).replace("\\", "/").replace('"""', "'''").replace("\n", " ").rstrip('"')


def _imports(forward: Forward, text: str) -> list[str]:
    standard = [line for line in ("import math",) if "math." in text]
    standard += ["from collections import OrderedDict"] if forward.result.ordered else []
    standard += ["from pathlib import Path"]
    standard += ["from typing import Any, NamedTuple" if forward.result.classes else "from typing import Any"]
    torch_lines = ["import torch"]
    torch_lines += ["import torch.nn.functional as F"] if "F." in text else []
    torch_lines.append("from safetensors.torch import load_file")
    torch_lines.append("from torch import Tensor, nn")
    if "torch.ops.quantized_decomposed" in text:
        torch_lines.append("from torch.ao.quantization.fx import _decomposed  # noqa: F401  (registers its operators)")
    return ["from __future__ import annotations", "", *standard, "", *torch_lines]


def _named_tuples(forward: Forward) -> Iterator[str]:
    for name, fields in forward.result.classes.items():
        yield "\n".join([f"class {name}(NamedTuple):", *(f"    {field}: Tensor" for field in fields)])


def _class_lines(layout: Layout, forward: Forward) -> Iterator[str]:
    yield f"class Model({layout.base_class}):"
    yield "    def __init__(self) -> None:"
    yield "        super().__init__()"
    yield from _indented(layout.lines())
    if layout.tied:
        yield ""
        yield "    def tie_weights(self) -> None:"
        yield from _indented(f"{layout.text(name)} = {layout.text(first)}" for name, first in layout.tied.items())
    yield ""
    definition, *body = forward.lines()
    yield from wrap(definition, 4, first=True)
    yield from _indented(body[1:] if body[0] == "" else body)


def _input_lines(forward: Forward) -> Iterator[str]:
    """What checks the inputs, and the table of what the model takes."""
    for function in (check_inputs, number_kind):
        yield from [*inspect.getsource(function).rstrip().splitlines(), "", ""]
    yield "# Type and sizes of every input: a number is fixed, a name is free and one size wherever it stands."
    yield "INPUTS = {"
    yield from (line for item in forward.expected.items() for line in wrap(f"{': '.join(map(literal, item))},", 4))
    yield from ["}", "", ""]


def _indented(lines: Any) -> Iterator[str]:
    for logical in lines:
        for line in logical.split("\n"):
            yield from wrap(line, 8) if line else [""]


def _load_lines(model: CapturedModel, layout: Layout) -> Iterator[str]:
    """The body of `build`: what the weights file does not say as a state_dict does."""
    first = {id(tensor): name for name, tensor in reversed([*named_tensors(model)])}
    stored = model.state_dict(keep_vars=True)
    shared = [(name, first[id(tensor)]) for name, tensor in stored.items() if first[id(tensor)] != name]
    if shared:
        pairs = ", ".join(f"{quoted(name)}: {quoted(source)}" for name, source in shared)
        yield from wrap(f"shared = {{{pairs}}}", 4)
        yield "    tensors |= {name: tensors[first] for name, first in shared.items()}"
    if all(builds_on_meta(layer) for layer in layout.layers.values()):
        yield '    with torch.device("meta"):'
        yield "        model = Model()"
    else:
        yield "    model = Model()"
    constants = [name for name in first.values() if name not in stored]
    if constants:
        yield from wrap(f"constants = [{', '.join(map(quoted, reversed(constants)))}]", 4)
        yield "    for name in constants:  # not in the state_dict"
        yield '        owner, _, key = name.rpartition(".")'
        yield "        setattr(model.get_submodule(owner), key, tensors.pop(name))"
    yield "    model.load_state_dict(tensors, assign=True)"
    if layout.tied:
        yield "    model.tie_weights()"
    if any(_is_channels_last(tensor) for tensor in stored.values()):
        yield "    model.to(memory_format=torch.channels_last)"
    yield "    return model.eval()"


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether the order in memory is channels last and not also row-major."""
    if tensor.ndim != 4 or tensor.is_contiguous():
        return False
    return tensor.is_contiguous(memory_format=torch.channels_last)


def _check(model: CapturedModel, path: Path) -> None:
    """Build what was written, on the model's own weights, and compare the two; raises ExportError where they differ."""
    remedy = "report this with the model"
    try:
        copy = run_source(path.read_text(encoding="utf-8"), path, lambda module: module.build(weights_of(model)))
        error = _deviation(model, copy)
    except (ModelError, RuntimeError, TypeError, NameError, AttributeError, IndexError) as problem:
        raise ExportError(f"the source written does not run: {problem}", fix=remedy) from problem
    if list(copy.state_dict()) != list(model.state_dict()):
        raise ExportError("the state_dict of the source written has other keys", fix=remedy)
    if not error <= RELATIVE_BOUND:
        raise ExportError(f"the source written deviates from the model by {error:.2e}", fix=remedy)


def _deviation(model: CapturedModel, copy: nn.Module) -> float:
    """Largest difference relative to the largest output on the example; 0 = bit-identical."""
    device = next((tensor.device for _, tensor in named_tensors(model)), torch.device("cpu"))
    inputs, copy = model.inputs.to(device), copy.to(device)
    training = [module for module in model.modules() if module.training]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            expected = tree_leaves(model.eval()(*inputs.args, **inputs.kwargs))
            actual = tree_leaves(copy(*inputs.args, **inputs.kwargs))
    finally:
        for module in training:
            module.training = True
    if [_kind(value) for value in actual] != [_kind(value) for value in expected]:
        return math.inf
    pairs = [(a, e) for a, e in zip(actual, expected, strict=True) if isinstance(e, Tensor)]
    return max((relative_error(a, e) for a, e in pairs), default=0.0)


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value
