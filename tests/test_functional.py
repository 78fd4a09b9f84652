"""In-place operators, views and regions: the captured graph equals eager bit for bit, and nothing in it writes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from surgery.captured import capture
from surgery.errors import CaptureError

SHAPE = (2, 4, 3)


class Function(nn.Module):
    """A function as a model, behind one parameter so that there is something to train."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 3))

    def forward(self, x):
        return self.function(x * self.weight)


class Untrained(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def assert_equals_eager(function, shape=SHAPE):
    """Outputs and the gradient of a training step, bit for bit, at the example and at another batch size."""
    model = Function(function)
    captured = capture(model, torch.randn(shape))
    assert not [n for n in captured.graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False)]
    for batch in (shape[0], 5):
        x = torch.randn(batch, *shape[1:])
        expected, actual = (flat(m(x.clone())) for m in (model.eval(), captured.eval()))
        assert all(map(torch.equal, actual, expected))
        gradients = [gradient(m, x) for m in (model, captured)]
        assert torch.equal(*gradients)
    return captured


def flat(output):
    return list(output) if isinstance(output, tuple) else [output]


def gradient(model, x):
    model.zero_grad()
    torch.manual_seed(0)
    sum(y.square().sum() for y in flat(model.train()(x.clone()))).backward()
    return dict(model.named_parameters())["weight"].grad


def double_through(view):
    def function(x):
        x = x.clone()
        view(x).mul_(2)
        return x

    return function


VIEWS = {
    "itself": lambda x: x,
    "select": lambda x: x[:, 1],
    "negative_select": lambda x: x[:, -1],
    "slice": lambda x: x[:, 1:3],
    "strided_slice": lambda x: x[:, ::2],
    "slice_and_select": lambda x: x[:, 1:, 0],
    "ellipsis": lambda x: x[..., 0],
    "transpose": lambda x: x.transpose(1, 2),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "matrix_transpose": lambda x: x.mT,
    "t": lambda x: x[0].t(),
    "numpy_transpose": lambda x: x[0].T,
    "permute": lambda x: x.permute(2, 0, 1),
    "movedim": lambda x: x.movedim(0, -1),
    "movedims": lambda x: x.movedim((0, 1), (1, 0)),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "squeeze": lambda x: x[:, :, :1].squeeze(-1),
    "view": lambda x: x.view(x.shape[0], -1),
    "reshape": lambda x: x.reshape(-1),
    "flatten": lambda x: x.flatten(1),
    "unflatten": lambda x: x.unflatten(1, (2, 2)),
    "view_as": lambda x: x.view_as(x.clone()),
    "expand": lambda x: x.expand(-1, 4, -1),
    "narrow": lambda x: x.narrow(1, 1, 2),
    "diagonal": lambda x: x.diagonal(0, 1, 2),
    "same_type": lambda x: x.to(x.dtype),
    "contiguous": lambda x: x.contiguous(),
    "copy_of_another_type": lambda x: x.to(torch.float64),
    "copy_by_reshape": lambda x: x.transpose(1, 2).reshape(-1),
    "copy_by_contiguous": lambda x: x.transpose(1, 2).contiguous(),
}


UNTRAINED_VIEWS = {  # eager refuses the write, or forgets it, where the base has a gradient
    "chunk": lambda x: x.chunk(2, 1)[1],
    "split": lambda x: x.split(3, 1)[1],
    "split_sizes": lambda x: x.split([1, 3], 1)[0],
    "unbind": lambda x: x.unbind(2)[2],
    "detach": lambda x: x.detach(),
    "dropout": lambda x: F.dropout(x, 0.5, False),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
def test_a_write_through_a_view_reaches_its_base(view):
    assert_equals_eager(double_through(view))


@pytest.mark.parametrize("view", UNTRAINED_VIEWS.values(), ids=UNTRAINED_VIEWS.keys())
def test_a_write_through_a_view_of_an_input_reaches_its_base(view):
    model = Untrained(double_through(view))
    captured = capture(model, torch.randn(SHAPE))
    x = torch.randn(5, *SHAPE[1:])
    assert torch.equal(captured(x), model(x))


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.relu_(),
        lambda x: x.add_(1),
        lambda x: x.add_(x[:, :1].clone()),
        lambda x: x.copy_(x[:, :1].clone()),
        lambda x: x.copy_(x.double().flip(1)),
        lambda x: x.zero_(),
        lambda x: x.fill_(2),
        lambda x: x.clamp_(-1, 1),
        lambda x: x.masked_fill_(x > 0, 3),
        lambda x: x.add_(x.double()),
        lambda x: x.gt_(0),
        lambda x: F.leaky_relu(x, 0.1, inplace=True),
        lambda x: F.hardswish(x, inplace=True),
        lambda x: x.__setitem__((slice(None), 1), 0),
        lambda x: x.__setitem__((slice(None), slice(1, 3)), x[:, :2].clone()),
        lambda x: x.__setitem__((slice(None), [0, 2]), 1),
    ],
)
def test_in_place_operators_become_functional(write):
    def function(x):
        x, old = x * 1, x
        write(x)
        return x * old

    assert_equals_eager(function)


def test_an_earlier_view_sees_a_later_write():
    def function(x):
        x = x.clone()
        first, whole = x[:, 0], x.view(-1)
        x.mul_(3)
        whole.add_(1)
        return first, x, whole

    assert_equals_eager(function)


def test_a_copy_made_before_a_write_keeps_the_old_value():
    def function(x):
        x = x.clone()
        old = x.transpose(1, 2).contiguous()
        x.mul_(3)
        return old, x

    assert_equals_eager(function)


def test_shape_changes_in_place_are_views():
    def function(x):
        x = x.clone()
        row = x[:, 0]
        x.unsqueeze_(1).transpose_(1, 2)
        row.mul_(2)
        return x, row

    assert_equals_eager(function)


def test_in_place_dropout_drops_once():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.5, inplace=True)

        def forward(self, x):
            return self.drop(x.flatten(1) + 1)

    model, x = InPlace(), torch.randn(4, 8, 16)
    captured = capture(model, x).train()
    outputs = []
    for m in (model.train(), captured):
        torch.manual_seed(1)
        outputs.append(m(x))
    assert torch.equal(*outputs)
    assert [type(m) for m in captured.modules()].count(nn.Dropout) == 1


def test_a_no_grad_region_keeps_gradients_out():
    def function(x):
        with torch.no_grad():
            scale = x.abs().mean(1, keepdim=True) + 1
            with torch.enable_grad():
                inner = x.sigmoid()
        return x / scale * inner

    assert_equals_eager(function)


def test_checkpointed_and_plain_precision_regions_are_inlined():
    def function(x):
        x = checkpoint(torch.tanh, x, use_reentrant=False)
        with torch.autocast("cpu", enabled=False):
            return x @ x.mT

    assert_equals_eager(function)


def test_autocast_in_the_forward_is_refused_with_its_line():
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x.mT

    with pytest.raises(CaptureError, match="autocast") as caught:
        capture(Function(function), torch.randn(SHAPE))
    assert "test_functional.py:" in caught.value.at
    assert caught.value.fix


def test_a_write_through_a_view_without_inverse_names_the_line():
    def function(x):
        x = x.clone()
        x.as_strided((2, 2), (4, 1)).mul_(2)
        return x

    with pytest.raises(CaptureError, match="as_strided") as caught:
        capture(Function(function), torch.randn(SHAPE))
    assert "test_functional.py:" in caught.value.at


ALL_VIEWS = VIEWS | UNTRAINED_VIEWS


@st.composite
def programs(draw):
    """Steps on a list of tensors: take a view of one, or write to one."""
    views = [n for n in ALL_VIEWS if n not in ("detach", "dropout")]
    steps = []
    for _ in range(draw(st.integers(2, 5))):
        source = draw(st.integers(0, 3))
        steps.append((draw(st.sampled_from([*views, "write", "write"])), source, draw(st.integers(1, 3))))
    return [*steps, ("write", draw(st.integers(0, 4)), 2)]


def run_program(program, x):
    """Every tensor ever made, so that each stale view shows."""
    values = [x.clone()]
    for name, source, number in program:
        chosen = values[source % len(values)]
        if name == "write":
            chosen.mul_(number + 1).add_(number)
        else:
            values.append(ALL_VIEWS[name](chosen))
    return tuple(v.clone() for v in values)


def runs(program):
    try:
        run_program(program, torch.randn(SHAPE))
    except (RuntimeError, IndexError):
        return False
    return True


@settings(max_examples=25)
@given(programs().filter(runs))
def test_random_views_and_writes_equal_eager(program):
    x = torch.randn(SHAPE)
    model = Untrained(lambda x: run_program(program, x))
    captured = capture(model, x)
    assert all(map(torch.equal, captured(x), model(x)))
