"""Names of torch that begin with an underscore stand in one file, so that a new version is met in one place."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import fx, nn

ROOT = Path(__file__).resolve().parents[1]
FILES = [file for top in ("surgery", "plugins") for file in (ROOT / top).rglob("*.py") if file.stem != "torch_private"]
GRAPH = fx.Graph()
THINGS = (torch, torch._C, torch.Tensor, torch.rand(1).untyped_storage(), torch.ops.aten.add.Tensor)
THINGS += (GRAPH, GRAPH._graph_namespace, GRAPH.output(None), fx.GraphModule(nn.Module(), GRAPH))
THINGS += (nn.Module(), nn.LSTM(1, 1), nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), torch.utils, fx.graph, nn.modules.conv)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


OF_TORCH = {name for thing in THINGS for name in dir(thing) if is_private(name)}


def private_names(tree: ast.AST) -> Iterator[str]:
    """Attributes that torch has, of anything but `self`; imports; strings given to `getattr` and its like."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name("self" | "cls") | ast.Call(func=ast.Name("super"))):
                pass
            case ast.Attribute(value=value, attr=name):
                if name in OF_TORCH or (is_private(name) and ast.unparse(value).endswith("aten")):
                    yield ast.unparse(node)
            case ast.ImportFrom(module=str(module), level=0) if module.split(".")[0] == "torch":
                if any(is_private(name) for name in [*module.split("."), *(alias.name for alias in node.names)]):
                    yield ast.unparse(node)
            case ast.Import(names=names) if any(is_private(part) for alias in names for part in alias.name.split(".")):
                yield ast.unparse(node)
            case ast.Call(func=ast.Name("getattr" | "hasattr" | "setattr"), args=[_, ast.Constant(str(name)), *_]):
                if name in OF_TORCH:
                    yield ast.unparse(node)


def test_private_names_of_torch_stand_in_one_file():
    found = {str(file.relative_to(ROOT)): list(private_names(ast.parse(file.read_text()))) for file in FILES}
    assert len(found) > 200
    assert not {file: names for file, names in found.items() if names}, "surgery/torch_private.py is their place"


@pytest.mark.parametrize(
    "code",
    [
        "from torch.utils._pytree import tree_map",
        "from torch.fx.graph import _PyTreeInfo",
        "import torch._ops",
        "x = torch._ops.OpOverload",
        "module._parameters.pop('a')",
        "getattr(node.target, '_schema', None)",
        "aten._to_copy.default",
    ],
)
def test_the_test_sees_every_way_to_a_private_name(code):
    assert list(private_names(ast.parse(code)))


def test_own_names_are_no_concern_of_it():
    assert not list(private_names(ast.parse("self._parameters = other._count; super()._apply(f)")))
