"""Layers in float that read integers, in a form in which ONNX Runtime leaves them in float.

    Dequantize(x, s) → Conv(·, W)   becomes   Dequantize(x, [s … s]) → Conv(·, W)

ONNX Runtime gives W int8 values of its own where it finds the first, with one scale for all of W (its transformer
WeightBiasQuantization). Whoever left a layer in float did so for a reason; a scale for every channel has it stay so.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .tensor_names import fresh

LAYERS = {"Conv", "ConvTranspose", "Gemm"}


def spare_float_layers(graph: ir.Graph) -> None:
    """Every layer whose weight is not in integers reads them dequantised by channel; the numbers are the same."""
    for node in list(graph):
        if node.op_type not in LAYERS or _dequantises(node.inputs[1]):
            continue
        source = node.inputs[0]
        if source is not None and _dequantises(source) and (channels := _channels(source)):
            node.replace_input_with(0, _by_channel(graph, source, channels))


def _dequantises(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def _channels(value: ir.Value) -> int:
    """Size of dimension 1; 0 where it is open."""
    size = value.shape[1] if value.shape is not None and len(value.shape) > 1 else 0
    return size if isinstance(size, int) else 0


def _by_channel(graph: ir.Graph, value: ir.Value, channels: int) -> ir.Value:
    """`value`, dequantised with its scale and zero point for each of `channels`, which may be there already."""
    old = value.producer()
    assert old is not None
    stored = [parameter for parameter in old.inputs[1:] if parameter is not None]
    if not all(p.const_value is not None and p.const_value.numpy().size == 1 for p in stored):
        return value
    inputs = [old.inputs[0], *(_repeated(graph, parameter, channels) for parameter in stored)]
    new = ir.node("DequantizeLinear", inputs, {"axis": 1})
    graph.insert_after(old, new)
    out = new.outputs[0]
    out.name, out.type, out.shape = f"{value.name}_by_channel", value.type, value.shape
    return out


def _repeated(graph: ir.Graph, value: ir.Value, count: int) -> ir.Value:
    assert value.const_value is not None
    stored = value.const_value.numpy().reshape(-1)
    name = fresh(f"{value.name}_{count}", graph.initializers)
    tensor = ir.tensor(np.repeat(stored, count), dtype=value.const_value.dtype, name=name)
    repeated = ir.Value(name=name, type=value.type, shape=ir.Shape([count]), const_value=tensor)
    graph.register_initializer(repeated)
    return repeated
