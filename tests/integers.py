"""A quantised model beside what ONNX Runtime makes of its file, integer by integer."""

from __future__ import annotations

import onnx
import onnxruntime as ort
import torch

import surgery


def exported(model, folder, **options):
    return surgery.export_onnx(model, model.inputs, folder / "model.onnx", **options)


def session_outputs(path, x):
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


class Compared(torch.fx.Interpreter):
    """Runs the model on the integers of the runtime, and notes how far its own are from them."""

    def __init__(self, model, theirs):
        super().__init__(model)
        self.theirs, self.apart = iter(theirs), []

    def run_node(self, n):
        value = super().run_node(n)
        if "quantize_per_tensor" in str(n.target) and value.dtype == torch.uint8:
            own, value = value, next(self.theirs)
            self.apart.append((value.int() - own.int()).abs().max().item())
        return value


def steps_apart(model, path, x):
    """At every value that is rounded, the largest difference in steps where both compute from the same integers."""
    proto = onnx.load(path)
    names = [node.output[0] for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in names)
    watched = path.with_suffix(".watched.onnx")
    onnx.save(proto, watched)
    outputs = session_outputs(watched, x)
    compared = Compared(model, outputs[len(outputs) - len(names) :])
    with torch.no_grad():
        compared.run(x, enable_io_processing=False)
    assert len(compared.apart) == len(names) > 0
    return compared.apart
