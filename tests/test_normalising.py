"""What export sees of BatchNorm leaves no trace in the program it gives."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from surgery.inputs import Inputs
from surgery.program import export


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.cumulative = nn.BatchNorm1d(4, affine=False, momentum=None)

    def forward(self, x):
        with torch.no_grad():
            x = self.norm(x)
        counted = self.norm.num_batches_tracked + 1
        return self.cumulative(self.norm(x).flatten(2).transpose(1, 2)) * counted


def exported(model, x):
    return export([model], Inputs.of(model, x), free_batch=True)[0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_program_is_the_one_without_the_operator(layout, monkeypatch):
    model, x = Network().eval(), torch.randn(3, 3, 2, 2)
    monkeypatch.setattr(Inputs, "with_batch", lambda inputs, size: Inputs((x.to(memory_format=layout),)))
    program = exported(model, x)
    monkeypatch.setattr("surgery.program.opaque_norms", lambda model: nullcontext())
    assert calls(program) == calls(exported(model, x))
    assert torch.equal(program.module()(x), model(x))


def calls(program):
    """Name, operator, arguments, and the strides of the result of every call."""
    nodes = [n for n in program.graph.nodes if n.op == "call_function"]
    strides = {n: str(n.meta["val"].stride()) for n in nodes if isinstance(n.meta["val"], torch.Tensor)}
    return [(n.name, n.target, str(n.args), str(n.kwargs), strides[n]) for n in strides]


def test_the_model_is_as_before_also_after_a_failure():
    model = Network().eval()
    state, names = list(model.state_dict()), sorted(vars(model.norm))
    with pytest.raises(Exception, match="4D input"):
        torch.export.export(model, (torch.randn(3, 3),))
    with pytest.raises(Exception, match="cannot follow"):
        exported(model, torch.randn(3, 3))
    assert list(model.state_dict()) == state
    assert sorted(vars(model.norm)) == names
