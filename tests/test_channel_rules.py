"""Rules of third parties: how channels travel through an operator or a module that the core has never heard of."""

from __future__ import annotations

import pytest
import torch
from random_networks import Do
from removal import assert_removed_is_masked, halves, reasons, removed, sizes
from torch import Tensor, nn

from surgery import (
    ChannelRule,
    Context,
    ModelError,
    PluginError,
    Registry,
    capture,
    find_channels,
    hookimpl,
    layers,
    replace_layer,
)
from surgery.testing import randomise


@torch.library.custom_op("channel_tests::gate", mutates_args=())
def gate(x: Tensor, weight: Tensor, channels: int) -> Tensor:
    """x · σ(weight) along the channels, of which there must be as many as it is told."""
    assert x.shape[1] == channels, f"{x.shape[1]} channels, not {channels}"
    return x * weight.sigmoid()[:, None, None]


@gate.register_fake
def _(x, weight, channels):
    return torch.empty_like(x)


def read_gate(call):
    call.unite(call["x"].axes[1], call["weight"].axes[0])
    return call.gives(call["x"].axes)


def shrink_gate(call):
    call.set("channels", call.size(call.input, 1))


class Reversed(nn.Module):
    """Channels in reverse, with a shift of each; checks how many there are."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.shift = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[1] == self.channels
        return x.flip(1) + self.shift[:, None, None]


def read_reversed(call):
    axis, shift = call.input.axes[1], call.parameter("shift", 0)
    turned = axis and type(axis)(axis.ids.flip(0), axis.zero)
    call.unite(turned, shift.axes[0])
    return call.gives([call.input.axes[0], turned, *call.input.axes[2:]])


def shrink_reversed(call):
    call.module.channels = call.size(call.input, 1)


class Plugin:
    """A plugin object that gives these rules."""

    def __init__(self, rules):
        self.rules = rules

    @hookimpl
    def surgery_channel_rules(self):
        return self.rules


def gated():
    made = {"a": nn.Conv2d(3, 8, 1), "w": nn.Parameter(torch.randn(8)), "b": nn.Conv2d(8, 2, 1)}
    model = Do(lambda m, x: m.b(torch.ops.channel_tests.gate(m.a(x), m.w, 8)), **made)
    return capture(randomise(model), torch.randn(2, 3, 4, 4))


def turned():
    model = capture(
        randomise(nn.Sequential(*[nn.Conv2d(*c, 1) for c in ((3, 8), (8, 8), (8, 2))])), torch.randn(2, 3, 4, 4)
    )
    replace_layer(model, layers(model)[1], {"": Reversed(8)})
    return model


CASES = {
    "operator": (gated, torch.ops.channel_tests.gate.default, ChannelRule(read_gate, shrink_gate)),
    "operator of any overload": (gated, torch.ops.channel_tests.gate, ChannelRule(read_gate, shrink_gate)),
    "module": (turned, Reversed, ChannelRule(read_reversed, shrink_reversed)),
}


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (gated, "gate: no channel rule for channel_tests.gate.default"),
        (turned, "1: no channel rule for Reversed"),
    ],
)
def test_what_nobody_described_keeps_the_channels_it_sees_and_is_named(made, why):
    model = made()
    channels = Context(model, registry=Registry()).channels(model)
    assert channels.groups == ()
    assert why in reasons(channels).values()


@pytest.mark.parametrize("name", CASES)
def test_a_plugin_s_rule_lets_channels_through(name):
    made, key, rule = CASES[name]
    model = made()
    channels = Context(model, registry=Registry([Plugin({key: rule})])).channels(model)
    assert list(sizes(channels).values()) == [8]
    assert_removed_is_masked(channels)


def test_a_rule_for_a_class_holds_for_its_subclasses():
    class Special(Reversed):
        pass

    model = turned()
    model.get_submodule("1").__class__ = Special
    assert sizes(find_channels(model, {Reversed: CASES["module"][2]})) == {"0": 8}


def test_shrinking_sets_the_sizes_that_node_and_module_name():
    made, key, rule = CASES["operator"]
    channels = find_channels(made(), {key: rule})
    small = removed(channels, halves(channels))
    node = next(n for n in small.graph.nodes if "gate" in str(n.target))
    assert node.args[2] == 4
    made, key, rule = CASES["module"]
    channels = find_channels(made(), {key: rule})
    assert removed(channels, halves(channels)).get_submodule("1").channels == 4


def test_a_rule_that_shrinks_nothing_is_enough_where_no_size_is_named():
    made, key, _ = CASES["module"]
    channels = find_channels(made(), {key: ChannelRule(read_reversed)})
    small = removed(channels, halves(channels))
    assert small.get_submodule("1").shift.shape == (4,)
    with pytest.raises(AssertionError):
        small(torch.randn(2, 3, 4, 4))


def test_a_plugin_s_rule_takes_the_place_of_a_built_in_one():
    model = capture(
        randomise(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))), torch.randn(2, 3, 4, 4)
    )

    def stays(call):
        call.freeze_all(call.input.axes, "is precious")
        return call.result

    channels = find_channels(model, {torch.ops.aten.relu.default: ChannelRule(stays)})
    assert channels.groups == ()
    assert reasons(channels)["0"] == "relu: is precious"


def test_of_two_plugins_the_first_by_name_wins():
    first, second = ChannelRule(read_gate), ChannelRule(read_reversed)
    plugins = [type(n, (Plugin,), {})({"key": rule}) for n, rule in (("B", second), ("A", first))]
    assert Registry(plugins).channel_rules == {"key": first}


def test_rules_that_are_no_mapping_are_refused_with_the_plugin_s_name():
    with pytest.raises(PluginError) as caught:
        _ = Registry([Plugin([1])]).channel_rules
    assert caught.value.at == "plugin Plugin"


def test_pruning_uses_the_rules_of_the_registry():
    made, key, rule = CASES["operator"]
    step = Registry.load().passes["prune_filters"](ratio=0.5)
    model = made()
    with pytest.raises(ModelError, match="nothing can be removed"):
        step(model, Context(model))
    after, report = step(model, Context(model, registry=Registry.load([Plugin({key: rule})])))
    assert [edit.layer for edit in report.edits] == ["a"]
    assert after.w.shape == (4,)
