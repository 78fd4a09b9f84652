"""Which constants of an ONNX graph are computed when the file is written, and which when it is loaded.

    Mul(weight, Cast(Not(Equal(weight, 0))))      no larger than what it is made from: computed now
    Gather(codebook, Cast(indices))               four times as large: stays, and the runtime computes it once
    DequantizeLinear(bias, Mul(scale, s))         stays: runtimes make integer kernels of it
    Gather(Mod(Range(0, 256, 1), 16), indices)    the table, made of numbers alone: computed now

What is decided is the whole way from stored tensors to a result that something else reads, not each step of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import onnx_ir as ir
from onnxscript.optimizer import FOLDED_FROM_KEY

MAY_ADD_BYTES = 2**10
TABLE_MAY_ADD_BYTES = 2**13
VECTOR_MAY_ADD_BYTES = 2**16
"""Vectors may grow, since biases are made by expanding a zero, and fusing them needs their values."""
_NOT_CONSTANT = frozenset({"RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "If", "Loop", "Scan"})


def may_fold(node: ir.Node) -> bool:
    """Whether every result that `node` helps to compute from constants takes no more room than what it is made from."""
    if node.op_type == "DequantizeLinear":
        return False
    return _is_small_table(node) or all(_fits(result) for result in _results(node))


def _is_small_table(node: ir.Node) -> bool:
    """Whether `node` gives a few bytes, made of numbers alone. Those of scales stay: what computes these is less."""
    if not all(0 < _bytes(value) <= TABLE_MAY_ADD_BYTES and _may_add(value) for value in node.outputs):
        return False
    inside = {node}
    for value in _leaves(node, inside):
        if value.const_value is None or not (value.const_value.size <= 1 or FOLDED_FROM_KEY in value.meta):
            return False
    return not any(n.op_type in _NOT_CONSTANT for n in inside)


def _results(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes, `node` itself or after it, whose constant outputs something reads that is not constant."""
    seen, todo = {node}, [node]
    while todo:
        current = todo.pop()
        readers = [use.node for value in current.outputs for use in value.uses()]
        constant = [reader for reader in readers if reader.op_type != "DequantizeLinear" and _is_constant(reader)]
        if len(constant) < len(readers) or any(value.is_graph_output() for value in current.outputs):
            yield current
        todo += [reader for reader in constant if reader not in seen]
        seen.update(constant)


def _fits(node: ir.Node) -> bool:
    """Whether the outputs of `node` are about as large as the tensors that only they are computed from, or smaller."""
    inside = {node}
    tensors = set(_leaves(node, inside))
    own = [value for value in tensors if all(use.node in inside for use in value.uses())]
    before = sum(value.const_value.nbytes for value in own if value.const_value is not None)
    return sum(map(_bytes, node.outputs)) <= before + min(map(_may_add, node.outputs))


def _may_add(value: ir.Value) -> int:
    """Bytes, none to the scales of integers: what computes these is as long as they are few."""
    if value.uses() and all(use.node.op_type == "DequantizeLinear" for use in value.uses()):
        return 0
    vector = value.shape is not None and value.shape.rank() <= 1
    return VECTOR_MAY_ADD_BYTES if vector else MAY_ADD_BYTES


def _is_constant(node: ir.Node) -> bool:
    """Whether `node` depends on stored tensors alone."""
    inside = {node}
    for value in _leaves(node, inside):
        if value.producer() is None and (value.const_value is None or value.is_graph_input()):
            return False
    return not any(n.op_type in _NOT_CONSTANT for n in inside)


def _leaves(node: ir.Node, inside: set[ir.Node]) -> Iterator[ir.Value]:
    """The values that `node` is computed from and that no node gives but a Constant; nodes on the way go `inside`."""
    todo = [node]
    while todo:
        for value in filter(None, todo.pop().inputs):
            producer = value.producer()
            if producer is None or producer.op_type == "Constant":
                yield value
            elif producer not in inside:
                inside.add(producer)
                todo.append(producer)


def _bytes(value: ir.Value) -> float:
    """Of `value`; where its shape is not known yet, as many elements as the largest value that it is computed from."""
    sizes, seen, todo = [0], {value}, [value]
    dtype = value.dtype
    while todo:
        current = todo.pop()
        dtype = dtype or current.dtype
        if current.shape is not None and current.shape.is_static():
            sizes.append(prod(current.shape.numpy()))
        elif (producer := current.producer()) is not None:
            before = [v for v in producer.inputs if v is not None and v not in seen]
            todo += reversed(before)
            seen.update(before)
    return max(sizes) * dtype.itemsize if dtype is not None else 0
