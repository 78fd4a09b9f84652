"""Questions to a captured graph, and edits of it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from surgery import RecipeError
from surgery.captured import capture
from surgery.graph import (
    Layer,
    could_match,
    layers,
    leaf_inputs,
    matches,
    propagate,
    remove_unused,
    shape,
    sharing,
    tied,
)
from surgery.names import get_attribute, set_module, tensors
from surgery.replacement import Operator, add_buffer, bypass, replace_layer
from surgery.testing import NETWORKS


def layer(model, name):
    return next(found for found in layers(model) if found.name == name)


class Sharing(nn.Module):
    """Every way in which a weight may belong to more than one call."""

    def __init__(self):
        super().__init__()
        self.alone, self.twice, self.tied, self.read = (nn.Linear(4, 4) for _ in range(4))
        self.partner, self.optioned = nn.Linear(4, 4), nn.Conv1d(4, 4, 3, padding=1)
        self.partner.weight = self.tied.weight

    def forward(self, x):
        x = self.twice(self.twice(self.alone(x)))
        x = self.partner(self.tied(x)) + self.read(x) @ self.read.weight
        x = x[:, :, None].expand(-1, -1, 4)
        return self.optioned(x) + F.conv1d(x, self.optioned.weight, padding=1, dilation=1)


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    return capture(Sharing(), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("alone", None),
        ("twice", "called 2 times"),
        ("tied", "shares its parameters with partner.weight"),
        ("partner", "shares its parameters with tied.weight"),
        ("read", "shares its parameters with node matmul"),
    ],
)
def test_sharing_says_why_a_layer_may_not_change_alone(shared, name, why):
    assert sharing(shared, layer(shared, name)) == why


def test_a_layer_called_twice_is_not_tied(shared):
    assert tied(shared, layer(shared, "twice")) is None


def test_a_function_on_a_layers_weight_is_a_layer_of_its_own_that_shares(shared):
    functional = next(found for found in layers(shared) if found.functional)
    assert functional.name.startswith("optioned@conv1d")
    assert functional.module.weight is shared.optioned.weight
    assert "shares its parameters" in sharing(shared, functional)
    assert "shares its parameters" in sharing(shared, layer(shared, "optioned"))


def test_layers_come_in_order_of_execution_with_their_calls():
    found = layers(NETWORKS["shared_module"].captured())
    assert [(f.name, f.type, len(f.nodes)) for f in found] == [
        ("stem.0", "Conv2d", 1),
        ("stem.1", "BatchNorm2d", 1),
        ("shared", "Conv2d", 2),
        ("norm", "BatchNorm2d", 2),
        ("head.2", "Linear", 1),
    ]


def test_functional_layers_are_layers_without_a_module():
    found = layers(NETWORKS["functional_conv"].captured())
    assert [(f.name, f.type, f.functional) for f in found[:3]] == [
        ("weight", "Conv2d", True),
        ("norm", "BatchNorm2d", False),
        ("pointwise", "Conv2d", True),
    ]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("features.0.conv", True),
        ("features.0", True),
        ("features", True),
        ("features.*", True),
        ("*.conv", True),
        ("features.?.conv", True),
        ("features.[01].conv", True),
        ("Conv2d", True),
        ("Conv*", True),
        ("feature", False),
        ("conv", False),
        ("conv2d", False),
        ("features.1", False),
        ("features.0.conv.weight", False),
    ],
)
def test_patterns_match_names_modules_and_types(pattern, expected):
    assert matches(Layer("features.0.conv", nn.Conv2d(1, 1, 1), ()), pattern) is expected


def test_a_pattern_that_matches_nothing_is_an_error_with_the_nearest_name():
    from surgery import Registry

    found = layers(NETWORKS["plain_cnn"].captured())
    step = Registry.load().passes["fold_batchnorm"](select=("Conv2",))
    with pytest.raises(RecipeError, match=r"select: 'Conv2' matches no layer \(did you mean .*Conv2d"):
        step.check_patterns(found, *step.patterns)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("features.0.first", True),
        ("features.0.*", True),
        ("*.pointwise", True),
        ("feat*", True),
        ("Conv3d", True),
        ("featurse.0", False),
        ("features.1.*", False),
        ("head", False),
    ],
)
def test_what_passes_may_still_make_of_a_layer_could_match(pattern, expected):
    assert could_match([Layer("features.0", nn.Linear(1, 1), ())], pattern) is expected


def test_select_and_exclude_keep_the_order():
    from surgery import Registry

    found = layers(NETWORKS["residual"].captured())
    step = Registry.load().passes["fold_batchnorm"](select=("second", "first"), exclude=("BatchNorm2d",))
    assert [f.name for f in step.selected(found)] == ["first.0.0", "first.1", "second.0.0", "second.1"]


def test_a_layer_is_replaced_by_parts_below_its_name():
    model = NETWORKS["plain_cnn"].captured().train()
    old, x = layer(model, "2.0"), torch.randn(3, 3, 8, 8)
    parts = {"wide": nn.Conv2d(8, 5, 3, padding=1), "narrow": nn.Conv2d(5, 12, 1)}
    replace_layer(model, old, parts)
    model.recompile()
    model.graph.lint()
    assert {"2.0.wide", "2.0.narrow"} < {f.name for f in layers(model)}
    assert all(part.training for part in parts.values())
    assert all(module.training for module in model.modules())
    expected = parts["narrow"](parts["wide"](torch.ones(3, 8, 4, 4)))
    assert torch.equal(
        model.get_submodule("2.0.narrow")(model.get_submodule("2.0.wide")(torch.ones(3, 8, 4, 4))), expected
    )
    assert model.eval()(x).shape == (3, 5)
    assert shape(layer(model, "2.0.narrow").nodes[0]) == (2, 12, 4, 4)


def test_one_part_takes_the_layers_own_name_at_every_call():
    model = NETWORKS["shared_module"].captured()
    part = nn.Conv2d(8, 8, 1)
    replace_layer(model, layer(model, "shared"), {"": part})
    model.recompile()
    assert model.shared is part
    assert len(layer(model, "shared").nodes) == 2


def test_a_functional_layer_becomes_a_module_and_its_parameters_go():
    model = NETWORKS["functional_conv"].captured()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    for name in ("weight", "pointwise"):
        functional = layer(model, name)
        replace_layer(model, functional, {"": functional.module})
    model.recompile()
    assert torch.equal(model(x), expected)
    assert not any(f.functional for f in layers(model))
    assert not {"weight", "pointwise", "shift"} & dict(model.named_parameters()).keys()


def test_a_parameter_that_is_the_input_of_a_functional_layer_stays():
    class Learned(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.kernel = nn.Parameter(torch.randn(1, 2, 5)), nn.Parameter(torch.randn(3, 2, 1))

        def forward(self, x):
            return x + F.conv1d(self.query, self.kernel)

    model, x = capture(Learned(), torch.randn(2, 3, 5)), torch.randn(2, 3, 5)
    expected, functional = model(x), layer(model, "kernel")
    replace_layer(model, functional, {"": functional.module})
    model.recompile()
    assert torch.equal(model(x), expected)
    assert model.state_dict().keys() == {"query", "kernel.weight"}


def test_bypassing_a_node_leaves_its_module_to_be_removed():
    model = NETWORKS["plain_cnn"].captured()
    bypass(model, layer(model, "0.1").nodes[0])
    remove_unused(model)
    model.recompile()
    assert "0.1.weight" not in tensors(model)
    assert "0.0.weight" in tensors(model)
    assert model(torch.randn(2, 3, 8, 8)).shape == (2, 5)


def test_what_nobody_reads_is_removed_and_nothing_else():
    model = NETWORKS["fused_qkv"].captured()
    before = tensors(model).keys()
    remove_unused(model)
    assert tensors(model).keys() == before
    set_module(model, "extra.deep", nn.Linear(2, 2))
    model.register_buffer("loose", torch.ones(1))
    remove_unused(model)
    assert tensors(model).keys() == before
    assert not hasattr(model, "extra")


def test_modules_are_set_and_found_by_dotted_names():
    model = nn.Module()
    linear = nn.Linear(2, 2)
    set_module(model, "a.b.c", linear)
    assert get_attribute(model, "a.b.c.weight") is linear.weight
    with pytest.raises(AttributeError):
        get_attribute(model, "a.x")


def test_shapes_are_noted_anew_for_other_inputs():
    network = NETWORKS["two_inputs"]
    model = network.captured()
    outputs = propagate(model, type(model.inputs).of(model, network.inputs(5)))
    assert [tuple(t.shape) for t in outputs] == [(5, 5)]
    assert {shape(node)[0] for node in model.graph.nodes if node.op == "call_module"} == {5}
    assert len(leaf_inputs(model.inputs)) == 2


def test_tensors_hold_every_name_of_a_shared_one():
    named = tensors(NETWORKS["tied_weights"].captured())
    assert named["decode.weight"] is named["embed.weight"]


def test_operators_among_the_parts_are_calls_with_their_parameters_below_the_layers_name():
    model, x = NETWORKS["plain_cnn"].captured(), torch.randn(2, 3, 8, 8)
    old = layer(model, "2.0")
    expected, bias = model(x), old.module.bias
    halves = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    halves.weight = old.module.weight
    add = Operator(torch.ops.aten.add.Tensor, parameter=nn.Parameter(bias.detach().view(12, 1, 1)))
    turned = Operator(torch.ops.aten.flatten.using_ints, (-2, -1)), Operator(torch.ops.aten.unflatten.int, (-1, (4, 4)))
    replace_layer(model, old, {"bare": halves, "bias": add, "flat": turned[0], "square": turned[1]})
    model.recompile()
    model.graph.lint()
    torch.testing.assert_close(model(x), expected)
    assert "2.0.bias" in model.state_dict()
    assert not any(isinstance(module, Operator) for module in model.modules())


def test_a_new_buffer_takes_the_first_free_name():
    model = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 3)))
    model.register_buffer("order", torch.zeros(3))
    [*_, output] = model.graph.nodes
    values = [torch.ones(3), torch.arange(3), torch.tensor(2.0)]
    with model.graph.inserting_before(output):
        nodes = [add_buffer(model, "order", value, persistent=value.ndim > 0) for value in values]
    assert [node.target for node in nodes] == ["order_1", "order_2", "order_3"]
    assert all(torch.equal(tensors(model)[node.target], value) for node, value in zip(nodes, values, strict=True))
    assert [shape(node) for node in nodes] == [(3,), (3,), ()]
    assert model.state_dict().keys() >= {"order", "order_1", "order_2"}
    assert "order_3" not in model.state_dict()


def test_an_operator_is_a_module_that_does_the_same():
    add = Operator(torch.ops.aten.add.Tensor, (), nn.Parameter(torch.ones(3)))
    assert torch.equal(add(torch.zeros(2, 3)), torch.ones(2, 3))
    assert len(list(add.parameters())) == 1


def test_an_operator_takes_the_value_where_its_arguments_say_so():
    model, x = NETWORKS["plain_cnn"].captured(), torch.randn(2, 3, 8, 8)
    old = layer(model, "2.0")
    twice = Operator(torch.ops.aten.cat.default, ([Operator.VALUE] * 2, 1))
    assert torch.equal(copy.deepcopy(twice)(x), torch.cat([x, x], 1))
    halves = nn.Conv2d(16, 12, 3, padding=1)
    halves.weight = nn.Parameter(torch.cat([old.module.weight, old.module.weight], 1).detach() / 2)
    halves.bias = old.module.bias
    expected = model(x)
    replace_layer(model, old, {"twice": twice, "halves": halves})
    model.recompile()
    model.graph.lint()
    torch.testing.assert_close(model(x), expected)
