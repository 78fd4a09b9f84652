"""The pass prune_filters: how many units go, and which."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pruning_trials import BUDGETS, SOME, captured, chosen, pruned, registry_of, same, share, sizes, widths
from surgery_plugins.prune_filters import PruneFilters
from surgery_plugins.prune_filters.choice import (
    Budget,
    Limits,
    cut_for,
    forced,
    keys_by_share,
    marks_at,
)
from surgery_plugins.prune_filters.choosing import Start

import surgery
from surgery import (
    Context,
    find_channels,
)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
def test_every_group_loses_the_ratio_of_its_units(name, ratio):
    marks = chosen(name, ratio=ratio)
    assert [int(own.sum()) for own in marks] == [min(len(own) - 1, int(ratio * len(own) + 1e-9)) for own in marks]
    smaller = surgery.snapshot(captured(name))
    find_channels(smaller).remove(marks)
    assert same(smaller, pruned(name, ratio=ratio)[0])


@given(st.integers(1, 60), st.data())
def test_a_ratio_that_is_a_whole_number_of_units_takes_just_these(size, data):
    count = data.draw(st.integers(0, size - 1))
    keys = keys_by_share(torch.rand(size), Limits())
    assert int(marks_at([keys], count / size)[0].sum()) == count
    assert int((forced(keys, count / size) == -math.inf).sum()) == count


@pytest.mark.parametrize("data", [False, True])
@pytest.mark.parametrize("options", [{"ratio": 0.0}, {"macs": 1.0}, {"ratio": 0.0, "steps": 3}])
def test_nothing_asked_for_is_no_edit(data, options):
    model, report = pruned("residual", data=data, **options)
    assert not report.modified
    assert same(model, captured("residual"))


def test_half_goes_by_default():
    assert same(pruned("residual")[0], pruned("residual", ratio=0.5)[0])


def test_the_report_has_the_widths_before_and_after_and_what_stays():
    model, report = pruned("residual", ratio=0.25)
    before, after = widths(captured("residual")), widths(model)
    edits = {e.layer: (e.numbers["channels_before"], e.numbers["channels_after"]) for e in report.edits}
    assert edits == {layer: (n, after[layer]) for layer, n in before.items() if after[layer] < n}
    assert [(skip.layer, skip.why) for skip in report.skips] == [("head.2", "5 channels stay: an output of the model")]


@pytest.mark.parametrize("criterion", ["l2", "random"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("name", ["residual", "attention", "deep"])
def test_a_global_ratio_takes_that_share_of_all_units(name, ratio, criterion):
    marks = chosen(name, ratio=ratio, scope="global", criterion=criterion)
    units = sum(map(len, marks))
    assert sum(int(own.sum()) for own in marks) == int(ratio * units + 1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-14, 1.0])
def test_a_global_ratio_holds_for_tiny_and_for_equal_scores(scale):
    def scores(found):
        return [scale * torch.arange(group.size) for group in found.groups]

    before = sum(sizes(captured("residual")))
    given = registry_of(scores, comparable=True)
    model, _ = pruned("residual", registry=given, criterion="given", ratio=0.25, scope="global")
    assert sum(sizes(model)) == before - before // 4


@pytest.mark.parametrize("name", ["plain_cnn", "residual", "grouped_depthwise", "zero_padded_shortcut", "attention"])
@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("scope", ["group", "global"])
def test_a_budget_is_kept(name, kind, scope):
    for target in (0.35, 0.7):
        model, _ = pruned(name, scope=scope, **{kind: target})
        assert share(name, model, kind) <= target * 1.01


@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("options", [{}, {"scope": "global"}, {"steps": 3}, {"data": True, "reconstruct": False}])
def test_a_budget_is_met_within_one_percent_where_units_are_small(kind, options):
    for target in (0.3, 0.6):
        model, _ = pruned("deep", **{kind: target}, **options)
        assert share("deep", model, kind) == pytest.approx(target, rel=0.01)


@pytest.mark.parametrize("name", SOME)
def test_the_share_that_a_choice_foresees_is_measured_afterwards(name):
    found = find_channels(captured(name))
    start = Start.of(found)
    keys = [keys_by_share(torch.rand(group.size), Limits()) for group in found.groups]
    for kind in BUDGETS:
        budget = Budget(kind, 0.5, getattr(found.cost, kind), start.costs[kind])
        marks, left = cut_for(found, keys, budget)
        smaller = surgery.snapshot(captured(name))
        find_channels(smaller).remove(marks)
        assert share(name, smaller, kind) == pytest.approx(left, rel=1e-9)


def test_a_smaller_budget_never_leaves_more():
    found = find_channels(captured("deep"))
    whole = Start.of(found).costs["macs"]
    keys = [keys_by_share(torch.rand(group.size), Limits()) for group in found.groups]
    shares = [cut_for(found, keys, Budget("macs", t / 20, found.cost.macs, whole))[1] for t in range(1, 20)]
    assert shares == sorted(shares)
    assert shares[0] < 0.06
    assert shares[-1] > 0.93


def test_a_pattern_gives_its_groups_a_ratio_of_their_own_and_the_first_that_fits_counts():
    overrides = {"first.0.0": 0.0, "first.*": 0.75, "second.*": 0.75}
    after = widths(pruned("residual", ratio=0.5, overrides=overrides)[0])
    assert after["first.0.0"] == 8
    assert after["second.0.0"] == 3
    assert after["second.1"] == after["shortcut.0"] == 3
    assert after["stem.0"] == after["first.1"] == 2


def test_overrides_hold_beside_a_budget_that_is_met_without_them():
    for options in ({"macs": 0.98}, {"macs": 0.4}, {"ratio": 0.25, "scope": "global"}):
        model, _ = pruned("deep", overrides={"0.body.0": 0.75, "1.body.0": 0.0}, **options)
        after = widths(model)
        assert after["0.body.0"] == 8
        assert after["1.body.0"] == 32


def test_a_group_is_left_out_as_soon_as_one_of_its_layers_is():
    for options in ({"exclude": ("first.1",)}, {"select": ("stem", "first.0", "second", "shortcut")}):
        before, after = widths(captured("residual")), widths(pruned("residual", **options)[0])
        assert {layer for layer in before if after[layer] == before[layer]} == {"stem.0", "first.1", "head.2"}


def test_selected_groups_alone_make_room_for_the_budget():
    model, _ = pruned("deep", macs=0.9, select=("4.body.0",))
    before, after = widths(captured("deep")), widths(model)
    assert [layer for layer in before if after[layer] < before[layer]] == ["4.body.0"]
    assert share("deep", model, "macs") == pytest.approx(0.9, rel=0.01)


@pytest.mark.parametrize(
    "options", [{"ratio": 0.4}, {"macs": 0.4}, {"ratio": 0.4, "scope": "global"}, {"macs": 0.4, "scope": "global"}]
)
@pytest.mark.parametrize("steps", [1, 3])
def test_what_is_left_of_a_group_that_loses_any_is_a_multiple(options, steps):
    model, report = pruned("deep", round_to=8, steps=steps, **options)
    assert report.modified
    before, after = sizes(captured("deep")), sizes(model)
    assert after != before
    assert all(n == old or n % 8 == 0 for n, old in zip(after, before, strict=True))


@pytest.mark.parametrize("options", [{"ratio": 0.9}, {"macs": 0.45}, {"ratio": 0.9, "scope": "global"}])
def test_min_width_is_left_of_every_group(options):
    after = sizes(pruned("residual", min_width=5, **options)[0])
    assert min(after) == 5


@pytest.mark.parametrize(
    "options",
    [{"ratio": 0.5}, {"ratio": 0.6, "round_to": 4}, {"ratio": 0.3, "overrides": {"second.0.0": 0.75}}, {"ratio": 0.9}],
)
@pytest.mark.parametrize("name", ["residual", "deep"])
def test_several_steps_end_at_the_widths_of_one(name, options):
    if name == "deep":
        options = {k: v for k, v in options.items() if k != "overrides"}
    once, thrice = (pruned(name, steps=steps, **options)[0] for steps in (1, 3))
    assert widths(thrice) == widths(once)


@pytest.mark.parametrize("kind", BUDGETS)
def test_several_steps_end_at_the_budget_of_one(kind):
    once, thrice = (pruned("deep", steps=steps, **{kind: 0.4})[0] for steps in (1, 3))
    assert all(abs(a - b) <= 1 for a, b in zip(sizes(once), sizes(thrice), strict=True))


def test_steps_go_on_where_a_group_is_no_longer_there():
    model, _ = pruned("in_place", data=True, ratio=0.5, steps=3)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in captured("in_place").parameters())


def test_patterns_are_held_against_the_model_before_the_first_step():
    overrides = {"squeeze": 0.9, "stem": 0.25}
    for options in ({"overrides": overrides}, {"select": ("squeeze",), "ratio": 0.9}):
        model, _ = pruned("squeeze_excite", steps=8, **options)
        assert model.get_submodule("squeeze").out_channels == 1


def test_of_a_dimension_that_would_be_empty_the_highest_score_stays():
    importance = torch.tensor([10, 11, 12, 13, 0, 0, 0, 1, 3, 5, 4, 2.0])

    def scores(found):
        members = [group.of("output")[0] for group in found.groups]
        return [importance[member.positions][member.units.argsort()] for member in members]

    weight = captured("slices").get_submodule("stem.0").weight
    for overrides in ({}, {"stem.0": 0.6}):
        options = {"criterion": "given", "ratio": 0.6, "select": ("stem.0",), "overrides": overrides}
        model, _ = pruned("slices", registry=registry_of(scores), **options)
        left = model.get_submodule("stem.0").weight
        assert [any(torch.equal(own, kept) for kept in left) for own in weight[7:]] == [
            False,
            False,
            True,
            False,
            False,
        ]


def test_every_step_judges_what_is_left_anew():
    seen = []

    def scores(found):
        seen.append([group.size for group in found.groups])
        return [torch.arange(group.size).float() for group in found.groups]

    pruned("plain_cnn", registry=registry_of(scores), criterion="given", ratio=0.5, steps=2)
    assert seen == [[8, 12], [6, 9]]


def test_attention_loses_whole_heads():
    model, _ = pruned("fused_qkv", ratio=0.5, heads=True, select=("qkv",))
    before, after = (m.get_submodule("qkv").weight.detach() for m in (captured("fused_qkv"), model))
    rows = [int((before == row).all(1).nonzero()) for row in after]
    heads = {(row % 16) // 4 for row in rows}
    assert rows == [16 * part + 4 * head + i for part in range(3) for head in sorted(heads) for i in range(4)]
    assert len(heads) == 2


def test_without_heads_every_head_loses_features():
    model, _ = pruned("fused_qkv", ratio=0.5, select=("qkv",))
    before, after = (m.get_submodule("qkv").weight.detach() for m in (captured("fused_qkv"), model))
    rows = [int((before == row).all(1).nonzero()) for row in after]
    assert {(row % 16) // 4 for row in rows} == {0, 1, 2, 3}
    assert len(rows) == 24


def test_a_second_application_takes_the_ratio_of_what_is_left():
    assert not PruneFilters.idempotent
    once, _ = pruned("residual", ratio=0.5)
    twice, report = PruneFilters(ratio=0.5)(once, Context(once))
    assert report.modified
    assert sizes(twice) == [n - n // 2 for n in sizes(once)]


def test_scope_is_global_for_a_budget_with_a_criterion_that_compares_groups_and_else_by_group():
    def scores(found):
        return [
            torch.rand(g.size, generator=torch.Generator().manual_seed(n)) * 10**n for n, g in enumerate(found.groups)
        ]

    for comparable, options, scope in (
        (True, {"macs": 0.5}, "global"),
        (False, {"macs": 0.5}, "group"),
        (True, {"ratio": 0.5}, "group"),
    ):
        given = registry_of(scores, comparable)
        results = {
            said: widths(pruned("residual", registry=given, criterion="given", scope=said, **options)[0])
            for said in (None, "global", "group")
        }
        assert results["global"] != results["group"]
        assert results[None] == results[scope]


def test_under_a_global_budget_units_of_little_worth_per_cost_go_first():
    def scores(found):
        return [torch.full((g.size,), 1.0 if g.name == "0.body.0" else 1e-3) for g in found.groups]

    model, _ = pruned("deep", registry=registry_of(scores, True), criterion="given", macs=0.7)
    before, after = widths(captured("deep")), widths(model)
    assert after["0.body.0"] == before["0.body.0"]
    assert share("deep", model, "macs") == pytest.approx(0.7, rel=0.01)


@pytest.mark.parametrize("scope", ["group", "global"])
@pytest.mark.parametrize("name", ["residual", "attention", "deep"])
def test_a_larger_ratio_takes_the_units_of_a_smaller_one_and_more(name, scope):
    marks = [chosen(name, ratio=ratio / 10, scope=scope) for ratio in range(1, 10)]
    for less, more in itertools.pairwise(marks):
        assert all(bool((b | ~a).all()) for a, b in zip(less, more, strict=True))
    assert sum(int(m.sum()) for m in marks[0]) < sum(int(m.sum()) for m in marks[-1])


def test_choices_repeat_with_the_seed():
    first, again, other = (chosen("deep", criterion="random", seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert same(*(pruned("residual", data=True, macs=0.5)[0] for _ in range(2)))


def test_a_budget_that_multiples_undershoot_is_noted():
    model, coarse = pruned("plain_cnn", macs=0.9, round_to=4)
    left = share("plain_cnn", model, "macs")
    assert left < 0.9 * 0.99
    assert coarse.notes[0] == (
        f"macs: {left:.3g} are left where 0.9 was asked for: what is left of a group is a multiple (round_to: 4); "
        "`round_to: 1` comes nearest"
    )
    assert not any("macs" in note for note in pruned("deep", macs=0.5)[1].notes)


def test_a_criterion_that_gives_no_tensors_is_named():
    given = registry_of(lambda found: [1 for _ in found.groups])
    with pytest.raises(surgery.PluginError, match="criterion given gives scores of other shapes"):
        pruned("plain_cnn", criterion="given", registry=given)
