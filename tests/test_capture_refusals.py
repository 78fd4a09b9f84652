"""What cannot be captured is refused with the value, its place in the user's code, and what to do."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surgery.captured import capture
from surgery.errors import CaptureError, InputError
from surgery.testing import NETWORKS


class Function(nn.Module):
    """A function of the module and its input as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.linear = nn.Linear(3, 3)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        return self.function(self, self.linear(x))


class OnInput(Function):
    def forward(self, x):
        return self.function(self, x)


def refused(model, value, match):
    with pytest.raises(CaptureError, match=match) as caught:
        capture(model, value)
    assert caught.value.fix
    return caught.value


def branch_on_values(model, x):
    if x.sum() > 0:
        return x
    return -x


def test_a_decision_on_values_names_the_line_and_the_remedy():
    error = refused(Function(branch_on_values), torch.randn(2, 3), "torch.export cannot follow the model")
    assert "test_capture_refusals.py:" in error.at
    assert "if x.sum() > 0:" in error.at
    assert "torch.where" in error.fix


def test_a_number_taken_from_a_tensor_is_a_decision_too():
    error = refused(Function(lambda model, x: x[:, : int(x.argmax()) + 1]), torch.randn(2, 3), "export|deviates")
    assert "test_capture_refusals.py:" in error.at


@pytest.mark.parametrize("batch", [1, 2])
def test_a_value_kept_from_the_first_call_is_refused(batch):
    def first_value_ever(model, x):
        model.first = getattr(model, "first", None) or float(x.detach().numpy().max())
        return x * model.first

    error = refused(Function(first_value_ever), torch.randn(batch, 3), "the graph deviates from the model")
    assert ".numpy()" in error.fix


def test_branches_that_are_graphs_of_their_own_are_refused_with_the_line():
    def branches(model, x):
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    error = refused(Function(branches), torch.randn(2, 3), "uses cond")
    assert "test_capture_refusals.py:" in error.at
    assert "torch.where" in error.fix


def test_a_result_of_an_unknown_class_is_refused_with_the_remedy():
    @dataclass
    class Result:
        logits: torch.Tensor

    error = refused(Function(lambda model, x: Result(x)), torch.randn(2, 3), "not a known type")
    assert "register_dataclass" in error.fix


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_refused():
    error = refused(torch.jit.trace(nn.Linear(3, 3), torch.randn(2, 3)), torch.randn(2, 3), "is TorchScript")
    assert "Python model" in error.fix


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("write", [lambda x: x.add_(1), lambda x: x[:, 0].zero_(), lambda x: F.relu(x, inplace=True)])
def test_a_write_to_an_input_is_refused(write, batch):
    error = refused(OnInput(lambda model, x: write(x) * 1), torch.randn(batch, 3), "writes to input x")
    assert "clone" in error.fix


def count_in_place(model, x):
    model.calls += 1
    return x * model.calls


def count_anew(model, x):
    model.calls = model.calls + 1
    return x * 2


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("function", [count_in_place, count_anew])
def test_a_buffer_updated_in_the_forward_is_refused(function, batch):
    assert "calls" in refused(Function(function), torch.randn(batch, 3), "calls").problem


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize(
    "function",
    [
        lambda model, x: x + torch.randn_like(x),
        lambda model, x: F.dropout(x, 0.5, training=True),
        lambda model, x: torch.bernoulli(x.sigmoid()),
        lambda model, x: x * random.random(),
    ],
    ids=["noise", "dropout_in_eval", "samples", "python_random"],
)
def test_a_random_forward_is_refused(function, batch):
    error = refused(Function(function), torch.randn(batch, 3), "two calls of the model in eval mode .* differ")
    assert "deterministic" in error.fix


def test_inputs_of_a_wrong_shape_name_the_line_and_the_shapes():
    error = refused(NETWORKS["plain_cnn"].model(), torch.randn(2, 4, 8, 8), "fails on the example inputs")
    assert "input (2, 4, 8, 8) float32" in error.fix
    assert "shapes" in error.problem or "channels" in error.problem


def test_the_line_of_the_users_forward_stands_in_the_error():
    def fails(model, x):
        return x @ torch.ones(5, 5)

    error = refused(Function(fails), torch.randn(2, 3), "shapes cannot be multiplied")
    assert "return x @ torch.ones(5, 5)" in error.at


def test_a_user_folder_named_as_ours_is_still_the_users(tmp_path):
    folder = tmp_path / "surgery"
    folder.mkdir()
    code = "def fails(model, x):\n    raise ValueError('no')\n"
    (folder / "mine.py").write_text(code)
    scope = {}
    exec(compile(code, str(folder / "mine.py"), "exec"), scope)
    assert "surgery/mine.py:2" in refused(Function(scope["fails"]), torch.randn(2, 3), "ValueError: no").at


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_example_that_is_not_finite_is_refused(value):
    x = torch.randn(2, 3)
    x[1, 2] = value
    with pytest.raises(InputError, match="input input holds NaN or infinity") as caught:
        capture(nn.Linear(3, 3), x)
    assert caught.value.at == "example inputs"


@pytest.mark.parametrize("inputs", [(), (torch.randn(2, 3), torch.randn(2, 3))], ids=["none", "too_many"])
def test_arguments_that_do_not_fit_the_signature_are_refused(inputs):
    with pytest.raises(InputError, match=r"do not fit Linear\.forward\(input"):
        capture(nn.Linear(3, 3), inputs)


def test_a_model_that_cannot_be_copied_is_refused():
    model = nn.Linear(3, 3)
    model.lock = threading.Lock()
    assert "copy.deepcopy" in refused(model, torch.randn(2, 3), "Linear cannot be copied").fix


def test_a_failed_capture_leaves_the_model_as_it_was():
    model = Function(branch_on_values).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    refused(model, torch.randn(2, 3), "export")
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
