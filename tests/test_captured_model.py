"""A captured model is copied, moved and trained like any module, and the caller's model never changes."""

from __future__ import annotations

import copy

import pytest
import torch
from equality import assert_captured, assert_same, assert_trains_alike, call
from torch import nn

from surgery.captured import CapturedModel, capture
from surgery.graph import shape
from surgery.names import tensors
from surgery.testing import NETWORKS


class Constants(nn.Module):
    """Buffers of both kinds, a frozen layer, a constant and tensors made in the forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 4)
        self.first.requires_grad_(False)
        self.scale = nn.Parameter(torch.full((4,), 2.0), requires_grad=False)
        self.register_buffer("kept", torch.arange(4.0))
        self.register_buffer("passing", torch.arange(4.0) + 1, persistent=False)

    def forward(self, x):
        x = self.first(x) * self.scale + self.kept / self.passing
        return self.second(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]) + torch.arange(4) + torch.zeros(x.shape[0], 1)


@pytest.fixture
def model():
    return Constants()


@pytest.fixture
def captured(model):
    return capture(model, torch.randn(2, 3))


def test_frozen_parameters_stay_frozen(model, captured):
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert {name for name, p in captured.named_parameters() if not p.requires_grad} == frozen
    assert_trains_alike(captured, model, torch.randn(3, 3))


def test_buffers_that_are_not_saved_stay_so(model, captured):
    assert captured.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(captured.passing, model.passing)


def test_a_state_dict_goes_both_ways(model, captured):
    other = Constants()
    captured.load_state_dict(other.state_dict())
    x = torch.randn(4, 3)
    assert_same(call(captured, x), call(other, x))
    model.load_state_dict(captured.state_dict())
    assert_same(call(model, x), call(other, x))


def test_a_deep_copy_keeps_everything_and_shares_nothing(captured):
    captured.train()
    duplicate = copy.deepcopy(captured)
    x = torch.randn(4, 3)
    assert isinstance(duplicate, CapturedModel)
    assert duplicate.training
    assert (duplicate.dynamic_batch, duplicate.notes, duplicate.capture_error) == (True, captured.notes, 0)
    assert torch.equal(duplicate.inputs.tensors[0], captured.inputs.tensors[0])
    assert duplicate.state_dict().keys() == captured.state_dict().keys()
    assert [shape(n) for n in duplicate.graph.nodes if n.op == "call_module"] == [(2, 4)] * 2
    assert [n.meta.get("module_path") for n in duplicate.graph.nodes] == [
        n.meta.get("module_path") for n in captured.graph.nodes
    ]
    assert_same(call(duplicate, x), call(captured, x))
    assert not {t.data_ptr() for t in tensors(duplicate).values()} & {t.data_ptr() for t in tensors(captured).values()}


def test_a_deep_copy_of_a_deep_copy_keeps_nested_arguments_and_ties():
    for name in ("two_inputs", "dict_output", "tied_weights"):
        network = NETWORKS[name]
        captured = network.captured()
        duplicate = copy.deepcopy(copy.deepcopy(captured))
        assert_same(call(duplicate, network.inputs(3)), call(captured, network.inputs(3)))
        assert len(list(duplicate.parameters())) == len(list(captured.parameters()))


def test_constants_inside_the_graph_move_with_the_model(captured):
    captured.to("meta")
    devices = {v for n in captured.graph.nodes for v in n.kwargs.values() if isinstance(v, torch.device)}
    assert devices == {torch.device("meta")}
    assert captured(torch.randn(5, 3, device="meta")).shape == (5, 4)


def test_a_change_of_precision_keeps_the_device(captured):
    captured.double()
    assert captured(torch.randn(5, 3).double()).dtype == torch.float64


def test_the_callers_model_is_untouched():
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.linear = nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2)
            self.seen = []

        def forward(self, x):
            return self.linear(self.drop(self.norm(x)))

    model = Watched().train()
    model.drop.eval()
    model.linear.weight.requires_grad_(False)
    model.linear.bias.grad = torch.ones(2)
    model.linear.register_forward_hook(lambda module, args, output: model.seen.append(output))
    before, identities = copy.deepcopy(model), [id(t) for t in tensors(model).values()]
    x = torch.randn(2, 3)
    original = x.clone()
    capture(model, x)
    assert torch.equal(x, original)
    assert [id(t) for t in tensors(model).values()] == identities
    assert all(torch.equal(t, tensors(before)[name]) for name, t in tensors(model).items())
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["linear.weight"]
    assert torch.equal(model.linear.bias.grad, torch.ones(2))
    assert len(model.linear._forward_hooks) == 1


def test_a_training_step_of_the_captured_model_does_not_reach_the_callers(model, captured):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    captured.train()(torch.randn(4, 3)).sum().backward()
    torch.optim.SGD(captured.parameters(), 0.1).step()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_hooks_that_change_outputs_are_part_of_the_graph():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    assert_captured(model, torch.randn(2, 3))


def test_a_captured_model_can_be_captured_again(model, captured):
    again = capture(captured, torch.randn(2, 3))
    x = torch.randn(4, 3)
    assert_same(call(again, x), call(model, x))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_two_captures_are_alike(model, captured):
    again = capture(model, captured.inputs)
    assert str(again.graph) == str(captured.graph)
    assert again.code == captured.code


def test_state_that_eval_mode_does_not_use_is_left_out_and_said():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.auxiliary = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return (self.main(x), self.auxiliary(x)) if self.training else self.main(x)

    captured = capture(Auxiliary(), torch.randn(2, 3))
    assert captured.notes == ("auxiliary: no operator of eval mode reads it, left out",)
    assert set(captured.state_dict()) == {"main.weight", "main.bias"}


def test_random_depth_and_attention_dropout_are_said():
    class StochasticDepth(nn.Module):
        p = 0.2

        def forward(self, x):
            return x * (torch.rand(len(x), 1) > self.p) if self.training else x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.depth = nn.Linear(4, 4), StochasticDepth()
            self.attention = nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)

        def forward(self, x):
            x = self.depth(self.linear(x))[:, None]
            return self.attention(x, x, x)[0]

    notes = capture(Model(), torch.randn(2, 4)).notes
    assert [note.split(":")[0] for note in notes] == ["depth", "attention"]


@pytest.mark.parametrize("batch", [1, 2])
def test_what_a_first_call_builds_is_captured_as_it_is_trained(batch):
    class Cached(nn.Module):
        """As in EfficientFormer: in eval mode the indexed biases are looked up once and kept until `train()`."""

        def __init__(self):
            super().__init__()
            self.biases, self.cache = nn.Parameter(torch.randn(6)), {}
            self.register_buffer("positions", torch.tensor([0, 2, 4]), persistent=False)

        def train(self, mode=True):
            self.cache = {} if mode else self.cache
            return super().train(mode)

        def forward(self, x):
            if self.training:
                return x + self.biases[self.positions]
            if "bias" not in self.cache:
                self.cache["bias"] = self.biases[self.positions]
            return x + self.cache["bias"]

    model, x = Cached().eval(), torch.randn(batch, 3)
    model(x)
    captured = assert_captured(model, x, trains=False)
    assert_trains_alike(captured, model.train(), torch.randn(4, 3))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("begin", [None, torch.zeros(1)])
def test_a_buffer_built_on_the_first_call_is_captured(begin, batch):
    class Lazy(nn.Module):
        """As in ConViT, whose relative positions are worked out for the first input."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.register_buffer("table", begin, persistent=False)

        def forward(self, x):
            if self.table is None or len(self.table) != x.shape[1]:
                self.table = torch.arange(float(x.shape[1]))
            return self.linear(x) + self.table

    model, x = Lazy(), torch.randn(batch, 3)
    captured = capture(model, x)
    assert model.table is begin
    assert captured.dynamic_batch
    assert_same(call(captured, x), call(model, x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_are_taken_off(wrap, model):
    captured = capture(wrap(model), torch.randn(2, 3))
    assert captured.state_dict().keys() == model.state_dict().keys()


def test_a_train_method_that_returns_nothing_is_no_obstacle():
    class Backbone(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)

    model, x = Backbone(nn.Linear(3, 3)), torch.randn(2, 3)
    assert_same(call(capture(model, x), x), call(model, x))


class Colliding(nn.Module):
    """Names that a graph module has itself, or that Python reads otherwise."""

    def __init__(self):
        super().__init__()
        self.meta = nn.Linear(3, 4)
        self.graph = nn.Parameter(torch.rand(4))
        self.inputs = nn.BatchNorm1d(4)
        self.meta_ = nn.Linear(4, 4)
        self.add_module("lambda", nn.Linear(4, 4))
        self.register_buffer("notes", torch.rand(4))

    def forward(self, x):
        x = self.inputs(self.meta(x) * self.graph) + self.notes
        return getattr(self, "lambda")(self.meta_(x))


def test_names_that_collide_get_an_underscore_and_are_noted():
    model = Colliding().eval()
    captured = capture(model, torch.rand(2, 3))
    x = torch.rand(5, 3)
    assert torch.equal(captured(x), model(x))
    assert {"meta__.weight", "meta_.weight", "graph_", "inputs_.weight", "lambda_.weight", "notes_"} <= {
        *captured.state_dict()
    }
    assert "meta: is kept as meta__" in captured.notes


def test_arguments_that_become_constants_are_noted():
    class Optional(nn.Module):
        def forward(self, x, *, temperature=None):
            return x if temperature is None else x / temperature

    assert "temperature: fixed at None" in " ".join(capture(Optional(), torch.rand(2, 3)).notes)
    kept = capture(Optional(), {"x": torch.rand(2, 3), "temperature": torch.tensor(2.0)})
    assert not kept.notes
