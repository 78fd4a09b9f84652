"""Arguments and results of `forward` in their original nesting."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from ..captured import CapturedModel
from ..errors import ExportError
from ..state.structure import keys_of
from ..torch_private import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    TreeSpec,
    codegen_of,
    is_namedtuple_class,
    tree_flatten_with_path,
)
from .layout import plain_name
from .literals import literal
from .tensor_names import fresh

RESERVED = {"self", "torch", "nn", "F", "math", "Tensor", "OrderedDict", "check_inputs", "INPUTS"}


class Arguments:
    """The arguments of `forward`, the name of each tensor in them, and the lines that take nested ones apart."""

    def __init__(self, model: CapturedModel, used: set[fx.Node]) -> None:
        info = codegen_of(model.graph).pytree_info
        leaves, _ = tree_flatten_with_path((model.inputs.args, model.inputs.kwargs))
        placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
        self.names: list[str] = list(info.orig_args)
        if clash := RESERVED.intersection(self.names):
            raise ExportError(f"forward has an argument named {min(clash)!r}", fix="rename that argument")
        self.variables: dict[fx.Node, str] = {}
        self.unpacking: list[str] = []
        self.leaves: list[str] = []
        """The expression for each leaf in order, before they are unpacked."""
        self.first_tensor: fx.Node | None = None
        taken = RESERVED | set(self.names)
        for node, (path, leaf) in zip(placeholders, leaves, strict=True):
            if isinstance(leaf, Tensor) and self.first_tensor is None:
                self.first_tensor = node
            argument = self._argument(path)
            self.leaves.append(f"{argument}{''.join(map(_step, path[2:]))}")
            if len(path) == 2:
                self.variables[node] = argument
            elif node in used or node is self.first_tensor:
                name = _unused(path, node, taken)
                taken.add(name)
                self.variables[node] = name
                self.unpacking.append(f"{name} = {self.leaves[-1]}")
        self.annotations = dict(zip(self.names, _annotations(model), strict=True))

    def _argument(self, path: Sequence[Any]) -> str:
        """The argument that holds the leaf at `path` of (args, kwargs)."""
        where, key = path[0], path[1]
        return self.names[key.idx] if isinstance(where, SequenceKey) and where.idx == 0 else str(key.key)

    def definition(self, result: str) -> str:
        """`def forward(self, x: Tensor) -> Tensor:`."""
        texts = [f"{name}: {kind}" if kind else name for name, kind in self.annotations.items()]
        return f"def forward({', '.join(['self', *texts])}){f' -> {result}' if result else ''}:"


def _step(key: Any) -> str:
    if isinstance(key, SequenceKey):
        return f"[{key.idx}]"
    if isinstance(key, MappingKey):
        return f"[{literal(key.key)}]"
    if isinstance(key, GetAttrKey) and plain_name(key.name):
        return f".{key.name}"
    raise ExportError(f"an input is nested in a structure that cannot be written as source: {key!r}")


def _unused(path: Sequence[Any], node: fx.Node, taken: set[str]) -> str:
    """A variable's name for the leaf: its own key where that is a name."""
    key = path[-1]
    own = str(getattr(key, "key", getattr(key, "name", "")))
    stem = own if plain_name(own) else node.name
    return fresh(stem, taken)


def _annotations(model: CapturedModel) -> list[str]:
    return [_annotation(value) for value in (*model.inputs.args, *model.inputs.kwargs.values())]


def _annotation(value: Any) -> str:
    """The type of an example argument, "" where it is not plain."""
    if isinstance(value, Tensor):
        return "Tensor"
    if type(value) in (bool, int, float, str):
        return type(value).__name__
    if type(value) is dict and value and all(isinstance(v, Tensor) for v in value.values()):
        return "dict[str, Tensor]"
    if type(value) is list and value and all(isinstance(v, Tensor) for v in value):
        return "list[Tensor]"
    if type(value) is tuple and value and all(isinstance(v, Tensor) for v in value):
        return f"tuple[{', '.join('Tensor' for _ in value)}]"
    return ""


class Result:
    """The value that `forward` returns, and the definitions and imports it needs."""

    def __init__(self, spec: TreeSpec, values: Sequence[str]) -> None:
        self.classes: dict[str, tuple[str, ...]] = {}
        self.ordered = False
        self._values = iter(values)
        self.annotation = _result_annotation(spec)
        self.text = self._text(spec)

    def _text(self, spec: TreeSpec) -> str:
        if spec.is_leaf():
            return next(self._values)
        items = [self._text(child) for child in spec.children()]
        kind, context = spec.type, spec.context
        if is_namedtuple_class(context):
            self.classes[context.__name__] = context._fields
            return f"{context.__name__}({', '.join(items)})"
        if kind is list:
            return f"[{', '.join(items)}]"
        keys = keys_of(spec)
        if keys is None:
            return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
        if kind is OrderedDict:
            self.ordered = True
            pairs = [f"({literal(key)}, {item})" for key, item in zip(keys, items, strict=True)]
            return f"OrderedDict([{', '.join(pairs)}])"
        return f"{{{', '.join(f'{literal(key)}: {item}' for key, item in zip(keys, items, strict=True))}}}"


def _result_annotation(spec: TreeSpec) -> str:
    if spec.is_leaf():
        return "Tensor"
    leaves_only = all(child.is_leaf() for child in spec.children())
    if leaves_only and is_namedtuple_class(spec.context):
        return str(spec.context.__name__)
    if leaves_only and spec.type is tuple and spec.num_children:
        return f"tuple[{', '.join('Tensor' for _ in spec.children())}]"
    if leaves_only and spec.type is list:
        return "list[Tensor]"
    return "dict[str, Tensor]" if leaves_only and spec.type is dict else ""
