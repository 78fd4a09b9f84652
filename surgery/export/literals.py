"""Values as Python source, and source lines broken as ruff breaks them."""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

WIDTH = 120

_ATOMS = (ast.Name, ast.Attribute, ast.Subscript, ast.Call, ast.Tuple, ast.List, ast.Dict)


def literal(value: Any, operand: Callable[[Any], str] | None = None) -> str:
    """`value` as source; nodes in it as `operand` spells them.

    Raises:
        TypeError: a kind of value that has no literal.
    """
    if isinstance(value, fx.Node) and operand:
        return operand(value)
    if isinstance(value, torch.device) and operand:
        return operand(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or value is ... or isinstance(value, bool | int | float | complex):
        return "..." if value is ... else repr(value)
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return str(value)
    if isinstance(value, torch.device):
        return f"torch.device({quoted(str(value))})"
    if isinstance(value, slice):
        return f"slice({literal(value.start, operand)}, {literal(value.stop, operand)}, {literal(value.step, operand)})"
    if isinstance(value, tuple):
        items = [literal(item, operand) for item in value]
        return f"({items[0]},)" if len(items) == 1 else f"({', '.join(items)})"
    if isinstance(value, list):
        return f"[{', '.join(literal(item, operand) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{literal(k, operand)}: {literal(v, operand)}' for k, v in value.items())}}}"
    raise TypeError(f"{value!r} has no literal")


def quoted(text: str) -> str:
    """A string literal in the quotes that ruff prefers."""
    plain = repr(text)
    if plain.startswith("'") and '"' not in text:
        return f'"{plain[1:-1]}"'
    return plain


def tight(text: str, tightest: bool = False) -> str:
    """`text` as an operand of an arithmetic operator, or (`tightest`) before a dot, a bracket or a power."""
    tree = ast.parse(text, mode="eval").body
    if isinstance(tree, ast.Constant):
        return f"({text})" if tightest and not isinstance(tree.value, str) else text
    signed = isinstance(tree, ast.UnaryOp) and isinstance(tree.operand, ast.Constant) and not tightest
    return text if signed or isinstance(tree, _ATOMS) else f"({text})"


def wrap(text: str, indent: int, *, first: bool = False) -> list[str]:
    """One logical line as lines of at most `WIDTH`, broken at the last bracket (or the first, as in a `def`)."""
    line = " " * indent + text
    pairs = [pair for pair in _bracket_pairs(text) if pair[1] - pair[0] > 1]
    if len(line) <= WIDTH or not pairs:
        return [line]
    start, end = pairs[0] if first else pairs[-1]
    body = text[start + 1 : end]
    if start and text[start] == "[" and text[start - 1] not in " (=[":  # a subscript is no place to break
        left, _, right = text.partition(" = ")
        return [f"{' ' * indent}{left} = (", f"{' ' * (indent + 4)}{right}", f"{' ' * indent})"] if right else [line]
    lines = [" " * (indent + 4) + body]
    if len(lines[0]) > WIDTH:
        lines = [part for item in _items(body) for part in wrap(f"{item},", indent + 4)]
    return [line[: indent + start + 1], *lines, " " * indent + text[end:]]


def _bracket_pairs(text: str) -> list[tuple[int, int]]:
    """Positions of the outermost brackets, strings left out."""
    pairs, depth, quote, start = [], 0, "", 0
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote and text[i - 1] != "\\" else quote
        elif char in "\"'":
            quote = char
        elif char in "([{":
            start = i if depth == 0 else start
            depth += 1
        elif char in ")]}":
            depth -= 1
            if depth == 0:
                pairs.append((start, i))
    return pairs


def _items(body: str) -> list[str]:
    """What the commas of a bracket's inside separate."""
    inside = _bracket_pairs(body)
    quoted_or_nested = {i for start, end in inside for i in range(start, end)}
    items, start, quote = [], 0, ""
    for i, char in enumerate(body):
        if char in "\"'" and i not in quoted_or_nested:
            quote = "" if quote == char else quote or char
        if char == "," and not quote and i not in quoted_or_nested:
            items.append(body[start:i].strip())
            start = i + 1
    return [*items, body[start:].strip()] if body[start:].strip() else items
