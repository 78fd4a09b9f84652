"""Operators that compute: elementwise, pooling, reductions, products of activations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from string import ascii_letters
from typing import Any

import torch
from torch import fx

from ..torch_private import tree_map_only
from .call import Call
from .movement import SHARED, operator_name
from .values import Axis, Value, values_in

Operand = tuple[Value, str]
"""A tensor and a letter per dimension."""


def elementwise(call: Call) -> Any:
    """Broadcasts its tensors: equal places of those that have a dimension go together."""
    operands = values_in(call.arguments)
    shape = call.result.shape
    axes: list[Axis | None] = []
    for back in range(-len(shape), 0):
        meeting = [o.axes[back] for o in operands if o.ndim >= -back and o.shape[back] == shape[back] > 1]
        united = call.unite_all(meeting)
        axes.append(united and Axis(united.ids, _vanishes(call, back)))
    return call.gives(axes)


def _vanishes(call: Call, back: int) -> bool:
    """Whether the result is zero where those operands are that are zero at removed positions along dimension `back`.

    Asked of the operator itself, with two sets of values for the operands that are not zero.
    """

    def probe(value: Value, other: float) -> torch.Tensor:
        axis = value.axis(back)
        number = 0.0 if axis is not None and axis.zero else other
        return torch.full((1,), number, dtype=torch.float32).to(value.dtype)

    for other in (1.7, -0.4):
        arguments = tree_map_only(Value, partial(probe, other=other), call.arguments)
        target: Any = call.node.target
        try:
            if bool((target(**arguments) != 0).any()):
                return False
        except Exception:
            return False
    return True


def same(call: Call) -> Any:
    """Copies, casts, dropout: the first tensor as it is."""
    return call.gives(call.input.axes)


def fresh(call: Call) -> Any:
    """new_zeros(x, size): has x's type and nothing else of it."""
    return call.result


def per_channel(spatial: int) -> Any:
    """Pooling and resizing over the last `spatial` dimensions."""

    def rule(call: Call) -> Any:
        x = call.input
        call.freeze_all(x.axes[-spatial:], f"{operator_name(call)} over it")
        for other in values_in(list(call.arguments.values())[1:]):
            call.freeze_all(other.axes, f"steers {operator_name(call)}")
        return call.gives([*x.axes[:-spatial], *[None] * spatial])

    return rule


_SUMS = ("sum", "linalg_vector_norm", "norm")


def reduction(call: Call) -> Any:
    """Sums, means, maxima over dimensions. Removed zeros do not change a sum or a norm; everything else they change."""
    if call["other"] is not None:  # max(x, y)
        return elementwise(call)
    x, given = call.input, call["dim"]
    dims = {d % x.ndim for d in (given if isinstance(given, list | tuple) else [given]) if d is not None}
    dims = dims or set(range(x.ndim))
    order = call["ord"] if call["ord"] is not None else call["p"]
    negative = isinstance(order, int | float) and order < 0  # of the smallest, which a zero is
    sums = operator_name(call).removeprefix("aten::") in _SUMS and not negative
    for d in dims:
        axis = x.axes[d]
        if axis and not (sums and axis.zero) and not _normalises(call):
            call.freeze(axis, f"{operator_name(call)} over it")
    kept = [None if d in dims else axis for d, axis in enumerate(x.axes)]
    if not call["keepdim"]:
        kept = [axis for d, axis in enumerate(kept) if d not in dims]
    result = call.result
    return tree_map_only(Value, lambda r: Value(r.shape, tuple(kept), r.dtype), result)


def _normalises(call: Call) -> bool:
    """Whether a mean is only the divisor of a normalisation, as in RMSNorm: then it is over what is left."""
    if operator_name(call) != "aten::mean":
        return False
    aten = torch.ops.aten
    node, roots = call.node, (aten.rsqrt.default, aten.sqrt.default)
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target in roots:
            return True
        if node.target not in (aten.add.Tensor, aten.add.Scalar, aten.clamp.default, aten.clamp_min.default):
            return False
        if len(node.all_input_nodes) > 1:
            return False
    return False


def contraction(call: Call, operands: Sequence[Operand], out: str) -> Value:
    """The product of tensors, summed over the letters that are not in `out` (as einsum writes it).

    Equal letters lose the same places. A letter that is summed over must vanish with its positions.
    """
    sizes: dict[str, int] = {}
    for value, letters in operands:
        for size, letter in zip(value.shape, letters, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    axes: dict[str, Axis | None] = {}
    for letter, size in sizes.items():
        places = [(value, own.index(letter)) for value, own in operands if letter in own]
        meeting = [value.axes[d] for value, d in places if value.shape[d] == size > 1]
        united = call.unite_all(meeting, "multiplied with a tensor whose size is fixed")
        zero = any(axis.zero for axis in meeting if axis)
        if united and letter not in out and not zero:
            call.freeze(united, "summed over, and not zero where its weights are")
        axes[letter] = united and Axis(united.ids, zero)
    if len(operands) > 1:
        call.costs((size, axes[letter]) for letter, size in sizes.items())
    shape = tuple(sizes[letter] for letter in out)
    return Value(shape, tuple(axes[letter] for letter in out), operands[0][0].dtype)


def matmul(call: Call) -> Any:
    """matmul(a, b), bmm, mm: (…, n, k) · (…, k, m)."""
    first, second = values_in(call.arguments)[:2]
    a, b = ("k" if v.ndim == 1 else ends for v, ends in ((first, "nk"), (second, "km")))
    batch = ascii_letters[26 : 26 + max(0, max(first.ndim, second.ndim) - 2)]
    operands = [
        (value, batch[len(batch) - (value.ndim - len(ends)) :] + ends) for value, ends in ((first, a), (second, b))
    ]
    out = batch + "".join(letter for letter in "nm" if letter in a + b)
    if isinstance(call.node.args[1], fx.Node) and call.node.args[1].op == "get_attr" and second.ndim == 2:
        call.takes(second.axes[0])  # a linear layer written by hand
        call.produces(second.axes[1])
    return contraction(call, operands, out)


def baddbmm(call: Call) -> Any:
    """baddbmm(bias, a, b) = bias + a · b, unscaled, in batches."""
    if (call["beta"] or 1) != 1 or (call["alpha"] or 1) != 1:
        return unknown(call)
    product = contraction(call, [(call["batch1"], "bnk"), (call["batch2"], "bkm")], "bnm")
    call.arguments = {"self": call["self"], "other": product}
    return elementwise(call)


def addmm(call: Call) -> Any:
    """addmm(bias, x, weight) = bias + x · weight, unscaled."""
    bias, x, weight = call["self"], call["mat1"], call["mat2"]
    if call["beta"] != 1 or call["alpha"] != 1:
        return unknown(call)
    call.takes(weight.axes[0])
    call.produces(weight.axes[1])
    value = contraction(call, [(x, "nk"), (weight, "km")], "nm")
    for back in range(-bias.ndim, 0):
        if bias.shape[back] > 1:
            call.unite(value.axes[back], bias.axes[back])
    zero = bias.ndim == 1
    axes = [axis and Axis(axis.ids, axis.zero and (d == 1 or not zero)) for d, axis in enumerate(value.axes)]
    return call.gives(axes)


def einsum(call: Call) -> Any:
    """einsum(equation, operands)."""
    equation, tensors = call["equation"].replace(" ", ""), call["tensors"]
    left, _, out = equation.partition("->")
    terms = left.split(",")
    used = set(equation)
    spare = [letter for letter in ascii_letters if letter not in used]
    dots = max((t.ndim - len(term.replace("...", "")) for t, term in zip(tensors, terms, strict=True)), default=0)
    ellipsis = "".join(spare[:dots])
    if "->" not in equation:
        once = sorted(letter for letter in used - set(",.") if left.count(letter) == 1)
        out = ("..." if "..." in left else "") + "".join(once)
    operands = []
    for tensor, term in zip(tensors, terms, strict=True):
        width = tensor.ndim - len(term.replace("...", ""))
        operands.append((tensor, term.replace("...", ellipsis[dots - width :] if width else "")))
    if any(len(set(term)) < len(term) for _, term in operands):
        return unknown(call)  # a diagonal
    return contraction(call, operands, out.replace("...", ellipsis))


def attention(call: Call) -> Any:
    """scaled_dot_product_attention(q, k, v, mask): softmax(q kᵀ · scale + mask) v."""
    q, k, v, mask = (call[name] for name in ("query", "key", "value", "attn_mask"))
    batch = ascii_letters[26 : 26 + q.ndim - 2]
    k, v = (_serving(call, t, q) for t in (k, v))
    if call.heads and call.heads.whole and any(t.shape[-3] > 1 and t.axes[-3] is None for t in (k, v)):
        call.freeze_all((q.axes[-3], k.axes[-1], v.axes[-1]), SHARED)
    scores = contraction(call, [(q, batch + "ld"), (k, batch + "sd")], batch + "ls")
    call.freeze(scores.axes[-1], "softmax over it")
    axes = list(scores.axes[:-1])
    if mask is not None:
        for back in range(-mask.ndim, 0):
            if mask.shape[back] == scores.shape[back] > 1:
                call.unite(scores.axes[back] if back != -1 else None, mask.axes[back])
    weights = Value(scores.shape, (*(a and Axis(a.ids, False) for a in axes), None), scores.dtype)
    return contraction(call, [(weights, batch + "ls"), (v, batch + "se")], batch + "le")


def _serving(call: Call, value: Value, query: Value) -> Value:
    """Keys or values as every query head sees them: each head serves a group of queries (enable_gqa), or the only one
    serves all, by broadcasting."""
    if value.shape[:-2] == query.shape[:-2]:
        return value
    place, heads = value.ndim - 3, value.shape[-3]
    if call["enable_gqa"] and heads > 1 and query.shape[-3] % heads == 0:
        times = query.shape[-3] // heads
        axis = value.axes[place]
        axes = list(value.axes)
        axes[place] = axis and Axis(axis.ids.repeat_interleave(times), axis.zero)
        return Value((*value.shape[:place], heads * times, *value.shape[-2:]), tuple(axes), value.dtype)
    if call.heads and call.heads.whole:
        call.freeze(value.axes[-1], SHARED)
    return value


def unknown(call: Call, why: str = "") -> Any:
    """An operator that nobody described, or not for such arguments: nothing that it sees may go, its own weights
    included."""
    own = [] if call.module is None else [*call.module.parameters(), *call.module.buffers()]
    for value in (*values_in(call.arguments), *(call.tensor(tensor, range(tensor.ndim)) for tensor in own)):
        call.freeze_all(value.axes, why or f"no channel rule for {described(call)}")
    return call.result


def described(call: Call) -> str:
    """What is called, in words: a class of modules or an operator."""
    return type(call.module).__name__ if call.module is not None else str(call.node.target)
