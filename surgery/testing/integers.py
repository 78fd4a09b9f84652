"""How large the integers of an ONNX file get: not every runtime has 64 bits for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper
from torch import Tensor

LIMIT = 2**31
WIDE = {TensorProto.INT64, TensorProto.UINT64, TensorProto.UINT32}


def wide_integers(path: Path, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """The largest magnitude of each value in a file that reaches 2³¹, stored or computed from `inputs`, by name.

    What the file is given is not its own doing, and the open end of a slice may be any large number.
    """
    model = onnx.load(path)
    found = {name: _magnitude(value) for name, value in (*_stored(model.graph), *_computed(model, inputs))}
    return {name: size for name, size in found.items() if size >= LIMIT and name not in _ends_alone(model.graph)}


def _magnitude(value: np.ndarray) -> int:
    return max(abs(int(value.min())), abs(int(value.max()))) if value.size else 0


def _stored(graph: GraphProto) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in graph.initializer:
        if tensor.data_type in WIDE:
            yield tensor.name, numpy_helper.to_array(tensor)


def _computed(model: ModelProto, inputs: Mapping[str, Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Every integer between input and output, as the runtime computes it where it fuses and folds nothing."""
    known = onnx.shape_inference.infer_shapes(model).graph
    inside = {name for node in model.graph.node for name in node.output}
    wanted = [v for v in known.value_info if v.name in inside and v.type.tensor_type.elem_type in WIDE]
    model.graph.output.extend(wanted)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in wanted]
    feed = {name: tensor.detach().cpu().numpy() for name, tensor in inputs.items()}
    yield from zip(names, session.run(names, feed) if names else [], strict=True)


def _ends_alone(graph: GraphProto) -> set[str]:
    """What is read as the start or the end of a slice and as nothing else."""
    ends = {name for node in graph.node if node.op_type == "Slice" for name in node.input[1:3]}
    others = {
        name for node in graph.node for i, name in enumerate(node.input) if node.op_type != "Slice" or i in (0, 3, 4)
    }
    return ends - others
