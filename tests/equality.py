"""Bit-for-bit comparison of a captured model with the model itself, in eval and in training mode."""

from __future__ import annotations

import copy

import torch
from torch.utils._pytree import tree_flatten

from surgery.captured import capture
from surgery.inputs import Inputs
from surgery.names import tensors


def call(model, value, seed=0):
    """Flat outputs and their structure; the arguments are copies, the random state is `seed`."""
    inputs = Inputs.of(model, value).clone()
    torch.manual_seed(seed)
    return tree_flatten(model(*inputs.args, **inputs.kwargs))


def assert_same(actual, expected):
    (actual, structure), (expected, known) = actual, expected
    assert structure == known
    for a, e in zip(actual, expected, strict=True):
        if isinstance(e, torch.Tensor):
            assert a.dtype == e.dtype
            assert torch.equal(a, e)
        else:
            assert a == e


def training_step(model, value):
    """Every gradient, and every buffer after the step, by name."""
    leaves, _ = call(model.train(), value)
    trained = [y for y in leaves if isinstance(y, torch.Tensor) and y.requires_grad]
    sum(y.square().mean() for y in trained).backward()
    gradients = {f"{name}.grad": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | {name: b.clone() for name, b in model.named_buffers()}


def assert_trains_alike(captured, model, value):
    """Gradients of one step and BatchNorm statistics after it; the models themselves are not changed."""
    expected, actual = (training_step(copy.deepcopy(m), value) for m in (model, captured))
    constants = tensors(captured).keys() - tensors(model).keys()
    assert actual.keys() - constants == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def assert_captured(model, *examples, trains=True):
    """The first example is captured; outputs and a training step are compared on all of them."""
    captured = capture(model.eval(), examples[0])
    assert captured.capture_error == 0
    assert captured.state_dict().keys() == model.state_dict().keys()
    for value in examples:
        assert_same(call(captured, value), call(model, value))
    if trains:
        assert_trains_alike(captured, model, examples[-1])
    return captured
