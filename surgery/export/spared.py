"""Layers in float that read integers, in a form in which ONNX Runtime leaves them in float.

    Dequantize(x, s) → Conv(·, W)   becomes   Dequantize(x, [s … s]) → Conv(·, W)

ONNX Runtime gives W int8 values of its own where it finds the first, with one scale for all of W (its transformer
WeightBiasQuantization). Whoever left a layer in float did so for a reason; a scale for every channel has it stay so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .tensor_names import ValueNames

LAYERS = {"Conv", "ConvTranspose", "Gemm"}


def spare_float_layers(graph: ir.Graph, names: ValueNames) -> None:
    """Every layer whose weight is not in integers reads them dequantised by channel; the numbers are the same."""
    spared: dict[ir.Value, ir.Value] = {}
    for node in list(graph):
        if node.op_type not in LAYERS or _dequantises(node.inputs[1]):
            continue
        source = node.inputs[0]
        if source is not None and (source in spared or _is_by_tensor(source)):
            spared[source] = spared.get(source) or _by_channel(graph, source, names)
            node.replace_input_with(0, spared[source])


def _dequantises(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _is_by_tensor(value: ir.Value) -> bool:
    """Dequantised by one stored scale and zero point, with a known number of channels."""
    producer = value.producer()
    if producer is None or not _dequantises(value) or not _channels(value):
        return False
    stored = [p.const_value for p in producer.inputs[1:] if p is not None]
    return all(constant is not None and constant.size == 1 for constant in stored)


def _channels(value: ir.Value) -> int:
    """Size of dimension 1; 0 where it is open."""
    size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else 0
    return size if isinstance(size, int) else 0


def _by_channel(graph: ir.Graph, value: ir.Value, names: ValueNames) -> ir.Value:
    """`value`, dequantised with its scale and zero point once for each channel."""
    old = value.producer()
    assert old is not None
    stored = [parameter for parameter in old.inputs[1:] if parameter is not None]
    repeated = [_repeated(graph, parameter, _channels(value), names) for parameter in stored]
    new = ir.node("DequantizeLinear", [old.inputs[0], *repeated], {"axis": 1})
    graph.insert_after(old, new)
    out = new.outputs[0]
    names.give(out, f"{value.name}_by_channel")
    out.type, out.shape = value.type, value.shape
    return out


def _repeated(graph: ir.Graph, value: ir.Value, count: int, names: ValueNames) -> ir.Value:
    assert value.const_value is not None
    tensor = ir.tensor(np.repeat(value.const_value.numpy().reshape(-1), count), dtype=value.const_value.dtype)
    repeated = ir.Value(type=value.type, shape=ir.Shape([count]), const_value=tensor)
    names.give(repeated, f"{value.name}_{count}")
    graph.register_initializer(repeated)
    return repeated
