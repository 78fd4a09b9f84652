"""How a person writes an operator: `aten.flatten.using_ints(x, 1)` → `x.flatten(1)`.

Whatever the table in `spellings` cannot express falls back to `torch.ops.aten.name.overload(…)`, which is always right.
"""

from __future__ import annotations

import ast
import operator
from typing import Any

from torch import fx

from ..errors import ExportError
from ..state.encoding import encode_target
from ..torch_private import OpOverload, schema_of
from .literals import literal, tight
from .spellings import templates
from .subscripts import SUBSCRIPTS, Operand, is_tensor

# Python passes its own setting here, or leaves it at False.
_UNSPOKEN = {"cudnn_enable": True, "cudnn_enabled": True, "pin_memory": False, "non_blocking": False, "copy": False}

_PYTHON = {
    operator.add: ast.Add,
    operator.sub: ast.Sub,
    operator.mul: ast.Mult,
    operator.truediv: ast.Div,
    operator.floordiv: ast.FloorDiv,
    operator.mod: ast.Mod,
    operator.pow: ast.Pow,
    operator.and_: ast.BitAnd,
    operator.or_: ast.BitOr,
    operator.xor: ast.BitXor,
    operator.eq: ast.Eq,
    operator.ne: ast.NotEq,
    operator.lt: ast.Lt,
    operator.le: ast.LtE,
    operator.gt: ast.Gt,
    operator.ge: ast.GtE,
    operator.neg: ast.USub,
    operator.not_: ast.Not,
}


def spell(node: fx.Node, operand: Operand) -> str:
    """The Python expression of a `call_function` node; `operand` gives the text of an argument that is a node.

    Raises:
        ExportError: the function is no operator that torch alone provides.
    """
    target = node.target
    if isinstance(target, OpOverload):
        return _operator(node, target, operand)
    texts = [literal(argument, operand) for argument in node.args]
    if target is operator.getitem:
        return f"{tight(texts[0])}[{texts[1]}]"
    if target in _PYTHON:
        return _infix(_PYTHON[target](), *texts)
    try:
        return f"{encode_target(target)}({', '.join(texts)})"
    except TypeError as error:
        raise ExportError(
            f"node {node.name} calls {target!r}, which is no operator of torch",
            fix="the pass that made this node must use operators of torch.ops.aten, or a layer class",
        ) from error


def _operator(node: fx.Node, target: OpOverload, operand: Operand) -> str:
    special = SUBSCRIPTS.get(str(target))
    text = special(node, operand) if special else None
    template = templates().get(str(target).removeprefix("aten.")) if text is None else None
    if template is not None:
        text = _fill(template, node, target, operand)
    return text or _plain_call(node, target, operand)


def _plain_call(node: fx.Node, target: OpOverload, operand: Operand) -> str:
    if target.namespace not in ("aten", "prims", "quantized_decomposed"):
        raise ExportError(
            f"node {node.name} calls {target}, an operator that plain torch does not have",
            fix="the plugin that made this node must use operators of torch.ops.aten, or a layer class",
        )
    texts = [literal(argument, operand) for argument in node.args]
    texts += [f"{key}={literal(value, operand)}" for key, value in node.kwargs.items()]
    return f"torch.ops.{target}({', '.join(texts)})"


class _CannotSay(Exception):
    """The template has no place for an argument of this call."""


class _Call:
    """Arguments of one operator call by name, and which of them the template has used."""

    def __init__(self, node: fx.Node, target: OpOverload, operand: Operand) -> None:
        self.schema = {argument.name: argument for argument in schema_of(target).arguments}
        self.values = dict(zip(self.schema, node.args, strict=False)) | dict(node.kwargs)
        self.operand = operand
        self.used: set[str] = set()

    def is_default(self, name: str) -> bool:
        if name not in self.values or self.values[name] is None:
            return True
        argument, value = self.schema[name], self.values[name]
        if name == "end" and value == 2**63 - 1:
            return True
        if not argument.has_default_value() or isinstance(value, fx.Node):
            return False
        default = argument.default_value
        same_list = isinstance(value, list) and isinstance(default, int) and all(v == default for v in value)
        return (type(value) is type(default) and value == default) or (bool(value) and same_list)

    def text(self, name: str) -> str:
        self.used.add(name)
        value = self.values.get(name, self.schema[name].default_value)
        fixed = getattr(self.schema[name], "N", None)
        if isinstance(value, list) and fixed and len(value) in (1, fixed) and all(v == value[0] for v in value):
            if not isinstance(value[0], fx.Node):
                value = value[0]
        elif isinstance(value, list) and not any(map(is_tensor, value)):
            value = tuple(value)
        return literal(value, self.operand)

    def unsaid(self) -> list[str]:
        """Arguments that the template did not use although they say something."""
        rest = [name for name in self.values if name not in self.used and not self.is_default(name)]
        return [name for name in rest if name not in _UNSPOKEN or self.values[name] != _UNSPOKEN[name]]


def _fill(template: ast.expr, node: fx.Node, target: OpOverload, operand: Operand) -> str | None:
    call = _Call(node, target, operand)
    receiver = call.values.get("self")
    if "self" in call.schema and not is_tensor(receiver) and not isinstance(template, ast.Call):
        return None
    try:
        text = _render(template, call)
    except _CannotSay:
        return None
    return None if call.unsaid() else text


def _render(template: ast.expr, call: _Call) -> str:
    match template:
        case ast.Name(id=name):
            return call.text(name)
        case ast.UnaryOp(op=sign, operand=operand):
            return _infix(sign, _render(operand, call))
        case ast.BinOp(left=left, op=sign, right=right) | ast.Compare(left=left, ops=[sign], comparators=[right]):
            return _infix(sign, _render(left, call), _render(right, call))
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=method)):
            if not is_tensor(call.values["self"]):
                raise _CannotSay
            return f"{tight(call.text('self'), True)}.{method}({_arguments(template, call)})"
        case ast.Call(func=function):
            return f"{ast.unparse(function)}({_arguments(template, call)})"
    raise AssertionError(ast.dump(template))


def _infix(sign: ast.AST, *operands: str) -> str:
    """`a + b`, `-a`: the operands with brackets where they need them."""
    if isinstance(sign, ast.unaryop):
        return ast.unparse(ast.UnaryOp(sign, ast.Name("a")))[:-1] + tight(operands[0])
    a, b = ast.Name("a"), ast.Name("b")
    pattern = ast.Compare(a, [sign], [b]) if isinstance(sign, ast.cmpop) else ast.BinOp(a, sign, b)  # type: ignore[arg-type]
    left = tight(operands[0], tightest=isinstance(sign, ast.Pow))
    return f"{left}{ast.unparse(pattern)[1:-1]}{tight(operands[1])}"


def _arguments(template: ast.Call, call: _Call) -> str:
    positional = template.args
    while positional and (name := _optional(positional[-1])) and call.is_default(name):
        positional = positional[:-1]
    texts = [_positional(argument, call) for argument in positional]
    for keyword in template.keywords:
        name = _optional(keyword.value)
        if name is None or not call.is_default(name):
            texts.append(f"{keyword.arg}={_positional(keyword.value, call)}")
    return ", ".join(texts)


def _optional(argument: ast.expr) -> str | None:
    """The operator's argument that may be left out here."""
    return argument.id if isinstance(argument, ast.Name) else None


def _positional(argument: ast.expr, call: _Call) -> str:
    match argument:
        case ast.Constant(value=value):
            return literal(value, call.operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Name(id=name)):
            return call.text(name)
        case ast.Starred(value=ast.Name(id=name)):
            call.used.add(name)
            values: Any = call.values[name]
            return ", ".join(literal(value, call.operand) for value in values) or "()"
        case ast.Name(id=name):
            return call.text(name)
    raise AssertionError(ast.dump(argument))
