"""Which calls become `torch.nn` modules, under which names, and which stay functions of their weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from equality import assert_captured
from torch import fx, nn

from surgery.captured import capture
from surgery.names import submodule
from surgery.operands import stand_in
from surgery.raising import module_path
from surgery.testing import NETWORKS, randomise
from surgery.vocabulary import arguments

aten = torch.ops.aten


def functions(captured):
    return [node.target for node in captured.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (4, 9)),
        (nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False), (4, 5, 5)),
        (nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 5)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2), (4, 5, 5)),
        (nn.Linear(5, 6, bias=False), (4, 5)),
        (nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), (4, 5, 5)),
        (nn.BatchNorm1d(4), (4,)),
        (nn.LayerNorm((4, 5), eps=1e-3), (4, 5)),
        (nn.GroupNorm(2, 4, eps=1e-3), (4, 5)),
        (nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (nn.PReLU(4, init=0.1), (4, 5)),
        (nn.Dropout2d(0.3), (4, 5, 5)),
        (nn.LSTM(5, 3, 2, batch_first=True, dropout=0.1, bidirectional=True), (4, 5)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_comes_back_with_its_class_its_options_and_its_tensors(layer, shape):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.ModuleDict({"layer": layer})

        def forward(self, x):
            return self.block["layer"](x)

    model = randomise(Model())
    raised = capture(model, torch.randn(2, *shape)).get_submodule("block.layer")
    assert repr(raised) == repr(layer)
    assert [name for name, _ in raised.named_parameters()] == [name for name, _ in layer.named_parameters()]
    assert all(torch.equal(t, raised.state_dict()[name]) for name, t in layer.state_dict().items())


def test_a_subclass_becomes_the_plain_layer_and_what_it_adds():
    class Mine(nn.Linear):
        def forward(self, x):
            return F.relu(super().forward(x))

    captured = assert_captured(nn.Sequential(Mine(3, 3)), torch.randn(2, 3))
    assert type(captured.get_submodule("0")) is nn.Linear
    assert aten.relu.default in functions(captured)


def test_weights_that_are_computed_or_more_than_the_layers_own_stay_operands():
    class Scaled(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.gain = nn.Parameter(torch.full((1,), 2.0))

        def forward(self, x):
            return F.linear(x, self.weight, self.bias) * self.gain

    captured = assert_captured(nn.Sequential(Scaled()), torch.randn(2, 3))
    assert type(captured.get_submodule("0")) is nn.Module
    assert aten.linear.default in functions(captured)


def test_one_weight_used_with_other_options_stays_a_function_beside_the_layer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.conv(x)[:, :, ::2, ::2] + F.conv2d(x, self.conv.weight, self.conv.bias, stride=2, padding=1)

    captured = assert_captured(Model(), torch.randn(2, 3, 6, 6))
    assert type(captured.conv) is nn.Conv2d
    assert functions(captured).count(aten.conv2d.default) == 1


def test_the_weight_of_a_layer_read_elsewhere_is_the_very_same_parameter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x) + x @ self.linear.weight

    captured = assert_captured(Model(), torch.randn(2, 3))
    assert [node.target for node in captured.graph.nodes if node.op == "get_attr"] == ["linear.weight"]
    assert type(captured.linear) is nn.Linear


def test_a_buffer_as_weight_stays_out_of_training():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("kernel", torch.randn(3, 3, 3))
            self.linear = nn.Linear(4, 2)

        def forward(self, x):
            return self.linear(F.conv1d(x, self.kernel))

    captured = assert_captured(Model(), torch.randn(2, 3, 6))
    assert "kernel" not in dict(captured.named_parameters())


class Dropouts(nn.Module):
    """One module called twice, two functional calls in one forward, and one inside a layer with weights."""

    class Dropping(nn.Linear):
        def forward(self, x):
            return F.dropout(super().forward(x), 0.1, self.training)

    def __init__(self):
        super().__init__()
        self.shared, self.layer = nn.Dropout(0.2), self.Dropping(4, 4)
        self.dropout = nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(self.layer(self.shared(x)))
        x = F.dropout(self.dropout(x), 0.3, self.training)
        return F.dropout(x, 0.4, self.training)


def test_every_dropout_gets_a_name_of_its_own_and_a_shared_one_stays_shared():
    captured = assert_captured(Dropouts(), torch.randn(2, 4))
    dropouts = {name: m.p for name, m in captured.named_modules() if isinstance(m, nn.Dropout)}
    assert sorted(dropouts.values()) == [0.1, 0.2, 0.3, 0.4]
    assert dropouts["shared"] == 0.2
    assert [node.target for node in captured.graph.nodes].count("shared") == 2
    assert type(captured.layer) is nn.Linear
    assert not any(name.startswith("layer.") for name in dropouts)


def test_states_of_an_lstm_are_taken_as_nn_lstm_gives_them():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x):
            _, (h, c) = self.lstm(x)
            return h[0] - c[0]

    captured = assert_captured(Model(), torch.randn(2, 3, 3), torch.randn(4, 3, 3))
    assert isinstance(captured.lstm(torch.randn(1, 2, 3))[1], tuple)


def test_the_graph_holds_no_placeholder_for_state_and_no_bookkeeping():
    for name in ("attention", "constant_views", "functional_conv"):
        captured = NETWORKS[name].captured()
        assert [node.op for node in captured.graph.nodes].count("placeholder") == 1
        assert not any(
            str(t).startswith(("aten._assert", "aten.sym_constrain", "aten.lift")) for t in functions(captured)
        )
        assert not any("val" in node.meta for node in captured.graph.nodes)


def test_nodes_know_the_module_and_the_line_they_come_from():
    captured = NETWORKS["residual"].captured()
    node = next(node for node in captured.graph.nodes if node.target == "first.0.0")
    assert node.meta["module_path"] == "first.0.0"
    assert "convolutional.py" in node.meta["stack_trace"]


def test_arguments_are_named_and_defaults_filled_in():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    node = graph.call_function(aten.conv2d.default, (x, w), {"groups": 2})
    given = arguments(node)
    assert (given["input"], given["weight"], given["bias"]) == (x, w, None)
    assert (given["stride"], given["groups"]) == ([1, 1], 2)


def test_a_stand_in_shares_its_parameters_and_follows_the_mode():
    captured = NETWORKS["functional_conv"].captured().train()
    calls = [node for node in captured.graph.nodes if node.target is aten.conv2d.default]
    views = [stand_in(captured, node) for node in calls]
    assert [(name, computed) for name, _, computed in views] == [("weight", ()), ("pointwise", ())]
    assert views[0][1].weight is captured.weight
    assert views[1][1].bias is captured.shift
    assert all(type(module) is nn.Conv2d and module.training for _, module, _ in views)
    assert all(stand_in(captured, node) is None for node in captured.graph.nodes if node not in calls)


def test_paths_of_modules_and_what_is_not_there():
    model = nn.Sequential(nn.Sequential(nn.ReLU()))
    assert submodule(model, "0.0") is model[0][0]
    assert submodule(model, "0.1") is None
    assert module_path(fx.Graph().placeholder("x")) == ""
