"""A quantised model beside what ONNX Runtime makes of its file, integer by integer."""

from __future__ import annotations

import onnx
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import nn

import surgery


class HardGates(nn.Module):
    """hardswish twice, and a squeeze-and-excite block with a hardsigmoid, as in MobileNetV3 (Howard et al. 2019)."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        with torch.no_grad():
            self.first.weight.mul_(20)  # beyond both ends of the gate
            self.excite.weight.mul_(20)

    def forward(self, x):
        x = F.hardswish(self.second(F.hardswish(self.first(x))))
        x = x * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.last(x)


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
