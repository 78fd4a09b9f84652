"""The statements of `forward`: one call a line, a comment where a block begins."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from ..captured import CapturedModel
from ..torch_private import codegen_of, tree_leaves
from .layout import Layout
from .literals import WIDTH, literal, quoted
from .naming import Pattern, Statement, Values, bound_nodes, name_values
from .signature import RESERVED, Arguments, Result
from .spelling import spell
from .tensor_names import fresh


class Forward:
    """The source of `forward`, as logical lines without indentation."""

    def __init__(self, model: CapturedModel, layout: Layout) -> None:
        self.layout, self.expected = layout, model.expected_inputs
        self.values = Values(model.graph)
        read = {node for statement in self.values.statements for node in statement.reads}
        self.arguments = Arguments(model, read | set(self.values._reads(self.values.output)))
        self.device = _only_device(model.graph) if self.arguments.first_tensor is not None else None
        taken = {*self.arguments.names, *self.arguments.variables.values()}
        self.device_name, self.block_name = fresh("device", taken), fresh("block", taken)
        reserved = RESERVED | {self.device_name, self.block_name}
        reserved |= set(self.arguments.names) - set(self.arguments.variables.values())
        self.names = name_values(self.values, self.arguments.variables, reserved)
        self.base, self.base_text = "", "self"
        outputs = self.values.output.args[0]
        assert isinstance(outputs, tuple | list)
        out_spec = codegen_of(model.graph).pytree_info.out_spec
        self.result = Result(out_spec, [literal(value, self.operand) for value in outputs])

    def lines(self) -> Iterator[str]:
        """`def forward(…):`, then the body."""
        yield self.arguments.definition(self.result.annotation)
        yield self._check()
        yield from self.arguments.unpacking
        if self.device is not None and self.arguments.first_tensor is not None:
            yield f"{self.device_name} = {self.names[self.arguments.first_tensor]}.device"
        previous = ""
        for block, group in itertools.groupby(self._grouped(), key=lambda pair: pair[0]):
            statements = [statement for _, statement in group]
            yield from [""] if block != previous else []
            yield from self._open(block, statements)
            dead: list[str] = []
            for statement in statements:
                yield self._line(statement)
                bound = {self.names[node] for node in bound_nodes(statement.target)}
                dead = [name for name in dead if name not in bound] + statement.deleted
            yield from [f"del {', '.join(dead)}"] if dead else []
            previous = block
        self.base, self.base_text = "", "self"
        yield f"return {self._returned()}"

    def _check(self) -> str:
        given = zip(self.expected, self.arguments.leaves, strict=True)
        return f"check_inputs({{{', '.join(f'{quoted(name)}: {text}' for name, text in given)}}}, INPUTS)"

    def _returned(self) -> str:
        text = self.result.text
        bare = text[1:-1] if text.startswith("(") and not text.endswith(",)") else text
        return bare if len(bare) < WIDTH - 20 else text

    def _grouped(self) -> Iterator[tuple[str, Statement]]:
        """Each statement with the block it belongs to; what belongs nowhere stays with the statement before it."""
        block = ""
        for statement in self.values.statements:
            node = statement.node
            path = str(node.target) if node.op == "call_module" else node.meta.get("module_path", "")
            if path:
                block = self.layout.block(path)
            yield block, statement

    def _open(self, block: str, statements: list[Statement]) -> Iterator[str]:
        """Comment and short name of a block; where it is read only once, the long name stays."""
        self.base, self.base_text = "", "self"
        if not block:
            return
        yield f"# {block}"
        reads = [path for s in statements for path in self._paths(s.node) if path.startswith(f"{block}.")]
        if "." in block and len(reads) > 1:
            yield f"{self.block_name} = {self.layout.text(block)}"
            self.base, self.base_text = block, self.block_name

    def _paths(self, node: fx.Node) -> list[str]:
        own = [str(node.target)] if node.op in ("call_module", "get_attr") else []
        inside = [n for n in node.all_input_nodes if n in self.values.inline]
        return own + [path for n in inside for path in self._paths(n)]

    def _line(self, statement: Statement) -> str:
        text = self._expression(statement.node)
        if statement.index is not None:
            text = f"{text}[{statement.index}]"
        return text if statement.target is None else f"{self._target(statement.target)} = {text}"

    def _target(self, pattern: Pattern, nested: bool = False) -> str:
        if isinstance(pattern, fx.Node):
            return self.names[pattern]
        if pattern is None:
            return "_"
        parts = ", ".join(self._target(part, True) for part in pattern)
        parts += "," if len(pattern) == 1 else ""
        return f"({parts})" if nested else parts

    def _expression(self, node: fx.Node) -> str:
        if node.op == "call_function":
            return spell(node, self.operand)
        if node.op == "get_attr":
            return self._reach(str(node.target))
        texts = [literal(argument, self.operand) for argument in node.args]
        texts += [f"{key}={literal(value, self.operand)}" for key, value in node.kwargs.items()]
        return f"{self._reach(str(node.target))}({', '.join(texts)})"

    def operand(self, value: Any) -> str:
        """A node's variable, or its expression where it has none."""
        if isinstance(value, torch.device):
            return self.device_name if value == self.device else literal(value)
        if value in self.values.inline:
            return self._expression(value)
        return self.names[self.values.canonical(value)]

    def _reach(self, path: str) -> str:
        if self.base and path.startswith(f"{self.base}."):
            return self.layout.text(path, self.base, self.base_text)
        return self.layout.text(path)


def _only_device(graph: fx.Graph) -> torch.device | None:
    """The device on which the graph makes its tensors, if it is the same everywhere."""
    found = {
        leaf
        for node in graph.nodes
        for leaf in tree_leaves((node.args, dict(node.kwargs)))
        if isinstance(leaf, torch.device)
    }
    return found.pop() if len(found) == 1 else None
