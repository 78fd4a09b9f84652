"""prune_filters proves its removal: where a channel rule is wrong, no wrong model comes out."""

from __future__ import annotations

import pytest
import torch
from pruning_trials import SOME, pruned
from random_networks import Do
from surgery_plugins.prune_filters import PruneFilters, removal
from test_channel_rules import Plugin, gate, read_gate
from torch import nn

import surgery
from surgery import ChannelRule, Context, PassError, Registry, capture
from surgery.testing import randomise

ROLL, GATE = torch.ops.aten.roll, torch.ops.channel_tests.gate


def net(function):
    """`function` on the channels of `a`; `b` and `c` behind it have nothing to do with it."""
    parts = {name: nn.Conv2d(8, 8, 1) for name in "abc"}
    made = Do(lambda m, x: m.c(m.b(function(m, m.a(x).relu())).relu()), w=nn.Parameter(torch.randn(8)), **parts)
    return capture(randomise(made), torch.randn(2, 8, 3, 3))


def rolled():
    return net(lambda m, x: x.roll(1, 1) * m.w.sum())


def gated():
    return net(lambda m, x: gate(x, m.w, 8))


def proven(model, rules, **options):
    return PruneFilters(**options)(model, Context(model, registry=Registry.load([Plugin(rules)])))


def stays(report):
    return {skip.layer: skip.why for skip in report.skips if "channel rule" in skip.why}


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {"ratio": 0.5, "steps": 2}, {"parameters": 0.8}])
def test_units_whose_removal_differs_from_masking_them_stay_and_the_others_go(options):
    model, same = rolled(), ChannelRule(lambda call: call.gives(call.input.axes))
    after, report = proven(model, {ROLL: same}, **options)
    assert stays(report)["a"].startswith("its units stay: a channel rule is wrong, for without them outputs are off by")
    assert [edit.layer for edit in report.edits] == ["b"]
    right, _ = PruneFilters(exclude=("a",), **options)(model, Context(model))
    assert torch.equal(after.get_parameter("b.weight"), right.get_parameter("b.weight"))
    assert after.get_parameter("a.weight") is model.get_parameter("a.weight")


def test_units_without_which_the_model_does_not_run_stay_and_the_error_is_named():
    after, report = proven(gated(), {GATE: ChannelRule(read_gate)}, ratio=0.5)
    assert stays(report)["a"].endswith("the model ends with AssertionError: 4 channels, not 8")
    assert after.get_parameter("a.weight").shape == (8, 8, 1, 1)


def test_a_removal_that_is_wrong_only_as_a_whole_is_refused_and_the_model_stays():
    def shrink(call):
        call.set("channels", max(12, call.size(call.input, 1)))

    made = Do(
        lambda m, x: m.head(gate(torch.cat([m.a(x), m.b(x)], 1), m.w, 16)),
        a=nn.Conv2d(3, 8, 1),
        b=nn.Conv2d(3, 8, 1),
        w=nn.Parameter(torch.randn(16)),
        head=nn.Conv2d(16, 2, 1),
    )
    model = capture(randomise(made), torch.randn(2, 3, 4, 4))
    with pytest.raises(PassError, match=r"a channel rule is wrong: .* 8 channels, not 12") as caught:
        proven(model, {GATE: ChannelRule(read_gate, shrink)}, ratio=0.5)
    assert "exclude" in caught.value.fix
    assert model.get_parameter("a.weight").shape == (8, 3, 1, 1)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("data", [False, True])
def test_the_report_says_how_far_removed_is_from_masked(name, data):
    notes = [note for note in pruned(name, data=data)[1].notes if note.startswith("removed = masked")]
    assert len(notes) == 1
    assert float(notes[0].partition(" by ")[2].split()[0]) <= 1e-5


def test_rounding_that_the_model_itself_makes_large_is_no_wrong_rule():
    made = Do(lambda m, x: m.b(m.a(x).relu()) * 1e5 - m.c(m.a(x).relu()) * 1e5, a=nn.Linear(8, 64), b=nn.Linear(64, 4))
    made.c = nn.Linear(64, 4)
    randomise(made)
    made.c.load_state_dict(made.b.state_dict())
    made.c.weight.data += 1e-5
    model = capture(made, torch.randn(2, 8))
    _, report = PruneFilters(ratio=0.5)(model, Context(model))
    assert [edit.layer for edit in report.edits] == ["a"]
    assert float(report.notes[0].partition(" by ")[2].split()[0]) > 1e-5


def test_above_the_limit_of_memory_nothing_is_compared_and_the_report_says_so(monkeypatch):
    monkeypatch.setattr(removal, "MOST_BYTES", 100)
    model, report = pruned("plain_cnn", ratio=0.5)
    assert any("not compared" in note and "100 bytes" in note for note in report.notes)
    monkeypatch.undo()
    assert surgery.measure(model, model.inputs) == surgery.measure(pruned("plain_cnn", ratio=0.5)[0], model.inputs)
