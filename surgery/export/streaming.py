"""ONNX files with large weights, written and looked into without holding the weights a second time.

    ModelProto   everything but the graph | graph: everything but large weights | large weight | large weight …

A protobuf message may have its fields in any order, so the weights come last, straight from their tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import ModelError

LARGE = 2**20
"""Bytes of a weight that is written from its tensor."""
_GRAPH, _NODE, _INITIALIZER, _RAW = 7, 1, 5, 9
"""Numbers of fields in onnx.proto."""
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
"""Kinds of fields on the wire (protobuf.dev, "Encoding")."""


def save(model: ir.Model, path: Path) -> onnx.ModelProto:
    """Writes one file. The message that comes back says the same, with large weights as places in the file."""
    large = {
        n: v.const_value for n, v in model.graph.initializers.items() if v.const_value and _is_large(v.const_value)
    }
    outline = _outline(model, large, path)
    small = onnx.ModelProto()
    small.CopyFrom(outline)
    small.graph.ClearField("initializer")
    small.graph.initializer.extend(t for t in outline.graph.initializer if t.name not in large)
    graph = small.graph.SerializeToString(deterministic=True)
    small.ClearField("graph")
    records = {t.name: t for t in outline.graph.initializer if t.name in large}
    heads = {name: _head(records[name], tensor.nbytes) for name, tensor in large.items()}
    total = len(graph) + sum(len(heads[name]) + tensor.nbytes for name, tensor in large.items())
    with path.open("wb") as file:
        file.write(small.SerializeToString(deterministic=True) + _key(_GRAPH, total) + graph)
        for name, tensor in large.items():
            file.write(heads[name])
            _refer(records[name], path.name, file.tell(), tensor.nbytes)
            file.write(tensor.tobytes())
    return outline


def operators(path: Path) -> set[str]:
    """Names of the operators in the main graph of a file; weights are passed over.

    Raises:
        ModelError: the file is no ONNX model.
    """
    try:
        with path.open("rb") as file:
            return {
                onnx.NodeProto.FromString(file.read(size)).op_type
                for number, start, size in _fields(file, path.stat().st_size)
                if number == _GRAPH
                for number, _, size in _fields(file, start + size)
                if number == _NODE
            }
    except (OSError, OverflowError, ValueError, DecodeError) as error:
        raise ModelError(f"{path} is no ONNX model: {error}", fix="export it again") from error


def _is_large(tensor: ir.TensorProtocol) -> bool:
    return tensor.nbytes >= LARGE and not isinstance(tensor, ir.StringTensor)


def _outline(model: ir.Model, large: dict[str, ir.TensorProtocol], path: Path) -> onnx.ModelProto:
    """The model's message, the `large` weights without their values."""
    values = model.graph.initializers
    try:
        for name, tensor in large.items():
            shape = ir.Shape(tensor.shape.numpy())
            values[name].const_value = ir.ExternalTensor(
                path.name, 0, tensor.nbytes, tensor.dtype, shape=shape, name=name, base_dir=path.parent
            )
        return ir.serde.serialize_model(model)
    finally:
        for name, tensor in large.items():
            values[name].const_value = tensor


def _head(record: onnx.TensorProto, size: int) -> bytes:
    """What stands before the values of a weight of `size` bytes."""
    plain = onnx.TensorProto(name=record.name, data_type=record.data_type, dims=record.dims)
    begin = bytes(plain.SerializeToString(deterministic=True)) + _key(_RAW, size)
    return _key(_INITIALIZER, len(begin) + size) + begin


def _refer(record: onnx.TensorProto, name: str, offset: int, size: int) -> None:
    del record.external_data[:]
    for key, value in {"location": name, "offset": offset, "length": size}.items():
        record.external_data.add(key=key, value=str(value))


def _key(number: int, size: int) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(size)


def _varint(value: int) -> bytes:
    parts = []
    while value > 127:
        parts.append(value & 127 | 128)
        value >>= 7
    return bytes([*parts, value])


def _fields(file: IO[bytes], end: int) -> Iterator[tuple[int, int, int]]:
    """Number, place and size of the fields with a length from here to `end`, the file standing at the place."""
    while file.tell() < end:
        key = _read_varint(file)
        number, kind = key >> 3, key & 7
        if kind == _BYTES:
            size, start = _read_varint(file), file.tell()
            yield number, start, size
            file.seek(start + size)
        elif kind == _VARINT:
            _read_varint(file)
        elif kind in (_FIXED32, _FIXED64):
            file.seek(4 if kind == _FIXED32 else 8, 1)
        else:
            raise ValueError(f"field {number} is of kind {kind}")


def _read_varint(file: IO[bytes]) -> int:
    value = shift = 0
    while byte := file.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    raise ValueError("it ends in the middle")
