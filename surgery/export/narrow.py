"""Stored integers that need four bits, in INT4 of ONNX: two of them in a byte.

    DequantizeLinear(int8, …)   →   DequantizeLinear(Cast(int4), …)

The runtime casts once, when it loads the file, and fuses what it would have fused.
"""

from __future__ import annotations

import onnx_ir as ir

from .tensor_names import ValueNames

SINCE = 21
"""Opset that has INT4."""
LOW, HIGH = -8, 7


def narrow(model: ir.Model, names: ValueNames) -> None:
    """Stores int8 weights whose values all have four bits in these, where the opset allows it."""
    if model.opset_imports.get("", 0) < SINCE:
        return
    for value in list(model.graph.initializers.values()):
        if value.dtype == ir.DataType.INT8 and value.const_value is not None and _is_dequantised(value):
            _narrow(model.graph, value, value.const_value, names)


def _is_dequantised(value: ir.Value) -> bool:
    """Only its first input, so that zero points keep their type."""
    uses = value.uses()
    return bool(uses) and all(use.node.op_type == "DequantizeLinear" and use.idx == 0 for use in uses)


def _narrow(graph: ir.Graph, value: ir.Value, stored: ir.TensorProtocol, names: ValueNames) -> None:
    integers = stored.numpy()
    if not integers.size or integers.min() < LOW or integers.max() > HIGH:
        return
    kind, own = ir.DataType.INT4, str(value.name)
    tensor = ir.tensor(integers.astype(kind.numpy()), dtype=kind, name=own)
    small = ir.Value(type=ir.TensorType(kind), shape=value.shape, const_value=tensor)
    cast = ir.node("Cast", [small], {"to": int(ir.DataType.INT8)})
    graph.insert_before(min((use.node for use in value.uses()), key=list(graph).index), cast)
    out = cast.outputs[0]
    names.give(out, f"{own}.int8")
    out.type, out.shape = value.type, value.shape
    for use in list(value.uses()):
        use.node.replace_input_with(use.idx, out)
    del graph.initializers[own]
    names.claim([small], [own])
    graph.register_initializer(small)
