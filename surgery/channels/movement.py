"""Operators that move values about without changing them: run on numbers instead of values.

A dimension that comes apart (channels into heads × features) must stay rectangular when positions go: all but one of
the parts are united, so that each row loses the same places.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..torch_private import schema_of, tree_leaves, tree_map
from .call import Call, Heads
from .values import Axis, Value


def moved(call: Call) -> Any:
    """The very operator, executed on the numbers of each dimension in turn."""
    results = list(tree_leaves(call.result))
    pieces: list[list[tuple[Tensor, bool]]] = [[] for _ in results]
    for dim, axis in enumerate(call.input.axes):
        if axis is not None:
            for found, moved_ids in zip(pieces, tree_leaves(_run(call, call.input.index(dim))), strict=True):
                found.append((moved_ids, axis.zero))
    made = [_assembled(call, value, found) for value, found in zip(results, pieces, strict=True)]
    remaining = iter(made)
    return tree_map(lambda _: next(remaining), call.result)


def _run(call: Call, numbers: Tensor) -> Any:
    """The operator on `numbers` in place of its (only) tensor."""
    target: Any = call.node.target
    if target is torch.ops.aten.view.default:  # numbers are broadcast, which a view cannot always look at
        return numbers.reshape(call["size"])
    return target(**{name: numbers if isinstance(v, Value) else v for name, v in call.arguments.items()})


def _assembled(call: Call, value: Value, pieces: list[tuple[Tensor, bool]]) -> Value:
    """A result from the numbers that came out of the operator, one tensor per dimension that went in."""
    axes: list[Axis | None] = [None] * value.ndim
    for numbers, zero in pieces:
        place = rectangular(call, numbers)
        if place is None:
            continue
        dim, ids = place
        present = axes[dim]
        if present is None:
            axes[dim] = Axis(ids, zero)
            continue
        narrow, wide = sorted((present, Axis(ids, zero)), key=lambda a: len(a.ids.unique()))
        call.freeze(narrow, "two dimensions that may shrink become one")
        axes[dim] = wide
    return Value(value.shape, tuple(axes), value.dtype)


def rectangular(call: Call, numbers: Tensor) -> tuple[int, Tensor] | None:
    """The dimension along which `numbers` vary, and the numbers along it.

    Where they vary along several, one is kept and the others are united: the one with most different numbers, in
    attention the features, or the heads where these go as a whole. A single number that is everywhere stays.
    """
    core = numbers[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in numbers.stride())]
    if not core.numel():
        return None
    varying = [d for d, size in enumerate(core.shape) if size > 1 and bool((core != core.narrow(d, 0, 1)).any())]
    if not varying:
        call.freeze(Axis(core.reshape(-1)[:1]), "a single position is picked out")
        return None
    keep = _kept(core, varying, call.heads)
    rows = core.movedim(keep, -1).reshape(-1, core.shape[keep])
    return keep, call.rows_alike(rows)


def _kept(core: Tensor, varying: list[int], heads: Heads | None) -> int:
    if len(varying) == 1 or (heads and not heads.whole):
        return varying[-1]
    counts = {d: len(_fiber(core, d).unique()) for d in varying}
    own = [d for d in varying if heads and d in heads.dims]
    return max(own or varying, key=lambda d: (counts[d], d))


def _fiber(core: Tensor, dim: int) -> Tensor:
    """Numbers along `dim` at the origin of the other dimensions."""
    index: list[int | slice] = [0] * core.ndim
    index[dim] = slice(None)
    return core[tuple(index)]


def reshaped(call: Call) -> Any:
    """view(x, size): sizes that depend on the batch can be left to -1 once, where their dimension may shrink."""
    value = _with_heads(call, moved(call))
    sizes = next(a for a in call.node.args[1:] if isinstance(a, list | tuple))
    unknown = [d for d, size in enumerate(sizes) if isinstance(size, fx.Node) and value.axes[d]]
    if len(unknown) + list(sizes).count(-1) > 1:
        call.freeze_all((value.axes[d] for d in unknown), "its size is computed together with the batch's")
        return Value(value.shape, tuple(None if d in unknown else a for d, a in enumerate(value.axes)), value.dtype)
    return value


def _with_heads(call: Call, value: Value) -> Value:
    """Where one head, of a mask or of keys and values, is expanded to as many as the queries have and heads go as a
    whole: each of the copies may go."""
    dims = call.heads.dims if call.heads and call.heads.whole and operator_name(call) == "aten::expand" else ()
    wide = [d for d in dims if value.shape[d] > 1 and (call.input.shape[d - value.ndim :] or (1,))[0] == 1]
    if not wide or any(value.axes[d] for d in dims):
        return value
    call.freeze_all(value.axes, SHARED)
    axes = [Axis(call.facts.positions.fresh(n), False) if d == wide[-1] else None for d, n in enumerate(value.shape)]
    return Value(value.shape, tuple(axes), value.dtype)


SHARED = "grouped queries: one head of keys and values serves all of them, and heads go as a whole"


def sliced(call: Call) -> Any:
    """slice(x, dim, start, end, step): with a step n, blocks of n places go together."""
    dim, step = (call["dim"] or 0) % call.input.ndim, call["step"] or 1
    axis = call.input.axes[dim]
    if step > 1 and axis is not None:
        start, end = call["start"] or 0, call["end"]
        if axis.size % step or not 0 <= start < step or (end is not None and end < axis.size):
            call.freeze(axis, "every n-th position is taken")
            return _rigid_at(call, {dim}, moved)
        call.rows_alike(axis.ids.view(-1, step).T)
    return moved(call)


def windows(call: Call) -> Any:
    """unfold(x, dimension, size, step): windows along a dimension, which keeps its positions."""
    dim = call["dimension"] % call.input.ndim
    call.freeze(call.input.axes[dim], "cut into windows")
    return _rigid_at(call, {dim}, moved)


def selected(call: Call) -> Any:
    """select(x, dim, index), unbind(x, dim): single positions are taken."""
    dim = (call["dim"] or 0) % call.input.ndim
    call.freeze(call.input.axis(dim), "single positions are taken")
    return _rigid_at(call, {dim}, moved)


def along(*names: str) -> Any:
    """Operators that mix positions along the dimensions in the arguments `names`; the others pass."""

    def rule(call: Call) -> Any:
        dims: set[int] = set()
        for name in names:
            given = call[name]
            given = given if isinstance(given, list | tuple) else [given]
            dims |= {d % call.input.ndim for d in given if d is not None}
        for dim in dims or range(call.input.ndim):
            call.freeze(call.input.axis(dim), f"{operator_name(call)} along it")
        return call.gives([None if d in dims or not dims else a for d, a in enumerate(call.input.axes)])

    return rule


def _rigid_at(call: Call, dims: set[int], rule: Any) -> Any:
    """`rule` with these dimensions of the input fixed."""
    first = next(iter(call.arguments))
    axes = tuple(None if d in dims else axis for d, axis in enumerate(call.input.axes))
    call.arguments[first] = Value(call.input.shape, axes, call.input.dtype)
    return rule(call)


def operator_name(call: Call) -> str:
    schema = schema_of(call.node.target)
    return str(schema.name if schema else call.node.target)


def padded(call: Call) -> Any:
    """pad(x, [left, right of the last dimension, of the one before, …]): padding adds positions of its own."""
    x, amounts = call.input, call["pad"]
    axes = list(x.axes)
    for pair in range(len(amounts) // 2):
        left, right = amounts[2 * pair : 2 * pair + 2]
        dim = x.ndim - 1 - pair
        axis = axes[dim]
        if axis is None or (left == 0 and right == 0):
            continue
        if min(left, right) < 0 or call["mode"] not in (None, "constant"):
            call.freeze(axis, "padded by its own values, or cut by padding")
            axes[dim] = None
            continue
        fresh = call.facts.positions.fresh(left), call.facts.positions.fresh(right)
        axes[dim] = Axis(torch.cat([fresh[0], axis.ids, fresh[1]]), axis.zero and not call["value"])
    return call.gives(axes)


def concatenated(call: Call) -> Any:
    """cat(tensors, dim): places add up along `dim` and are the same along the others."""
    tensors = [t for t in call["tensors"] if t.shape != (0,)]
    dim = (call["dim"] or 0) % tensors[0].ndim
    axes = [_alike(call, [t.axes[d] for t in tensors]) if d != dim else None for d in range(tensors[0].ndim)]
    if any(t.axes[dim] for t in tensors):
        parts = [axis.ids if (axis := t.axes[dim]) else torch.zeros(t.shape[dim], dtype=torch.long) for t in tensors]
        axes[dim] = Axis(torch.cat(parts), all(axis.zero for t in tensors if (axis := t.axes[dim])))
    return call.gives(axes)


def stacked(call: Call) -> Any:
    """stack(tensors, dim): the same places along every old dimension."""
    tensors = call["tensors"]
    dim = (call["dim"] or 0) % (tensors[0].ndim + 1)
    axes = [_alike(call, [t.axes[d] for t in tensors]) for d in range(tensors[0].ndim)]
    return call.gives([*axes[:dim], None, *axes[dim:]])


def _alike(call: Call, axes: list[Axis | None]) -> Axis | None:
    united = call.unite_all(axes)
    return united and Axis(united.ids, all(axis.zero for axis in axes if axis))


def scattered(call: Call) -> Any:
    """slice_scatter(x, src, dim, start, end, step), select_scatter(x, src, dim, index): x with a part replaced."""
    x, source = call.input, call["src"]
    dim = (call["dim"] or 0) % x.ndim
    others = list(source.axes)
    if source.ndim < x.ndim:  # select_scatter
        others.insert(dim, None)
    axes = [_alike(call, [a, b]) if d != dim else None for d, (a, b) in enumerate(zip(x.axes, others, strict=True))]
    own, theirs = x.axes[dim], others[dim]
    if own and theirs and call["step"] in (None, 1):
        part = slice(call["start"], call["end"])
        call.facts.positions.unite(own.ids[part], theirs.ids)
        axes[dim] = Axis(own.ids, own.zero and theirs.zero)
    else:
        call.freeze_all([own, theirs], "partly replaced by a tensor of fixed size")
    return call.gives(axes)


def indexed(call: Call) -> Any:
    """x[indices]: dimensions that an index tensor picks from stay whole, the others move."""
    x, indices = call.input, call["indices"]
    picked = {d for d, index in enumerate(indices) if index is not None}
    for d in picked:
        call.freeze(x.axes[d], "positions are picked by an index")
    stand_ins = [
        i if i is None else torch.zeros(i.shape, dtype=torch.bool if i.dtype == torch.bool else torch.long)
        for i in indices
    ]
    if any(s is not None and s.dtype == torch.bool for s in stand_ins):
        call.freeze_all(x.axes, "picked by a mask")
        return call.result
    pieces = [
        (torch.ops.aten.index.Tensor(x.index(d), stand_ins), axis.zero)
        for d, axis in enumerate(x.axes)
        if axis is not None and d not in picked
    ]
    return _assembled(call, call.result, pieces)
