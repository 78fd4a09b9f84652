"""Layers in float that read the same integers."""

from __future__ import annotations

import onnx
import pytest
import torch
from torch import nn

import surgery


class Heads(nn.Module):
    """Heads beside each other on one feature map, named like the values that the file gets for them."""

    def __init__(self, count):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.heads = nn.ModuleList(nn.Conv2d(16, 3 + i, 1) for i in range(count))
        self.scale = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        return self.scale(x), *(head(x) for head in self.heads)


@pytest.mark.parametrize("opset", [18, 21])
def test_heads_left_in_float_read_one_tensor_that_is_dequantised_for_them_once(opset, tmp_path):
    torch.manual_seed(0)
    x = torch.rand(2, 3, 8, 8)
    recipe = {"name": "r", "opset": opset, "passes": [{"quantize": {"exclude": ["heads.*", "scale"]}}]}
    operation = surgery.operate(Heads(3).eval(), x, recipe, data=[x], out=tmp_path / "run", latency_rounds=0)
    assert operation.passed
    assert operation.verification.parity[0].relative_error < 0.02
    graph = onnx.load(tmp_path / "run" / "model.onnx").graph
    read = [node.input[0] for node in graph.node if node.op_type == "Conv"]
    assert len(read) == 6
    assert len(set(read[2:])) == 1
