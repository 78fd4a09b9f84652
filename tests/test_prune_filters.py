"""The pass prune_filters: how many units go, which, what it refuses, and what reconstruction gives back."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from surgery_plugins.prune_filters import PruneFilters, repair
from surgery_plugins.prune_filters.choice import (
    NEVER,
    Budget,
    Limits,
    cut_for,
    first_units,
    forced,
    keys_by_score,
    keys_by_share,
    marks_at,
)
from surgery_plugins.prune_filters.choosing import Choice, Start
from torch import nn

import surgery
from surgery import (
    Context,
    Criterion,
    Data,
    InputError,
    ModelError,
    PassError,
    PluginError,
    RecipeError,
    Registry,
    capture,
    find_channels,
    hookimpl,
)
from surgery.calibration import affine_maps
from surgery.captured import relative_error
from surgery.recipe import build_pass
from surgery.testing import NETWORKS, networks, randomise
from surgery.testing.trial import description, first_difference, state_of

SOME = ("plain_cnn", "residual", "grouped_depthwise", "squeeze_excite", "zero_padded_shortcut", "conv_1d", "attention")
BUDGETS = {"macs": "macs", "parameters": "parameters", "bytes": "parameter_bytes"}


class Block(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return (self.shortcut(x) + self.body(x)).relu()


@cache
def captured(name):
    if name == "deep":
        blocks = [Block(a, b) for a, b in ((3, 32), (32, 32), (32, 48), (48, 48), (48, 64))]
        model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5))
        return capture(randomise(model), torch.randn(2, 3, 8, 8))
    return NETWORKS[name].captured()


def context(name, *, data=False, **options):
    batches = NETWORKS["plain_cnn" if name == "deep" else name].calibration() if data else None
    return Context(captured(name), Data(batches), **options)


def pruned(name, *, data=False, registry=None, seed=0, **options):
    """The pruned network and the report."""
    step = PruneFilters(**options)
    return step(captured(name), context(name, data=data, registry=registry, seed=seed))


def sizes(model, **options):
    return [group.size for group in find_channels(model, **options).groups]


def widths(model):
    """Output channels by layer."""
    return {side.layer: len(side.ids) for side in find_channels(model).outputs}


def share(name, result, kind):
    before, after = (surgery.measure(m, captured(name).inputs) for m in (captured(name), result))
    return getattr(after, BUDGETS[kind]) / getattr(before, BUDGETS[kind])


def chosen(name, *, part=1.0, seed=0, criterion="l2", **options):
    """Marks per group."""
    found, own = find_channels(captured(name)), context(name, seed=seed)
    return Choice(PruneFilters(**options), found, own.criterion(criterion), own, Start.of(found), part).marks()


def registry_of(function, comparable=False):
    """A registry whose criterion `given` has the scores `function(found)`."""
    scores = {"scores": lambda self, found, context: function(found), "comparable": comparable, "__doc__": "Given."}
    cls = type("Given", (Criterion,), scores)

    class Plugin:
        @hookimpl
        def surgery_criteria(self):
            return [cls]

    return Registry([Plugin()])


def same(a, b):
    return first_difference(state_of(a), state_of(b)) is None and description(a) == description(b)


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


LIMITS = st.builds(Limits, st.integers(1, 9), st.integers(1, 8))
SCORES = st.lists(st.floats(-100, 100), min_size=1, max_size=24).map(lambda s: torch.tensor(s, dtype=torch.float64))


@given(SCORES, LIMITS, st.integers(0, 5), st.floats(0.1, 100))
def test_keys_keep_the_order_of_the_scores_and_the_limits(scores, limits, gone, cost):
    size = len(scores)
    for keys in (keys_by_share(scores, limits, gone), keys_by_score(scores, limits, cost)):
        in_order = keys[scores.argsort(stable=True)]
        assert bool((in_order[1:] >= in_order[:-1]).all())
        for cut in {float(k) for k in keys if k < NEVER}:
            left = size - int((keys <= cut).sum())
            assert left >= limits.least
            assert left % limits.round_to == 0
        least = min([k for k in range(limits.least, size) if k % limits.round_to == 0], default=size)
        assert int((keys == NEVER).sum()) == least


@given(SCORES, st.floats(0.5, 100))
def test_single_units_are_ordered_by_score_per_cost(scores, cost):
    keys = keys_by_score(scores, Limits(), cost)
    goes = keys < NEVER
    assert int(goes.sum()) == len(scores) - 1
    torch.testing.assert_close(keys[goes], scores[goes] / cost, rtol=1e-9, atol=1e-9)
    assert len(keys[goes].unique()) == len(scores) - 1


@given(st.lists(SCORES, max_size=4), st.floats(0, 1), st.floats(0, 1))
def test_cuts_are_nested_and_counts_are_exact(scores, first, second):
    low, high = sorted((first, second))
    shares = [keys_by_share(s, Limits()) for s in scores]
    assert all(bool((b | ~a).all()) for a, b in zip(marks_at(shares, low), marks_at(shares, high), strict=True))
    keys = [keys_by_score(s, Limits(), 1.0) for s in scores]
    free = sum(len(s) - 1 for s in scores)
    counts = [int(low * free), int(high * free)]
    less, more = (first_units(keys, count) for count in counts)
    assert [sum(int(m.sum()) for m in marks) for marks in (less, more)] == counts
    assert all(bool((b | ~a).all()) for a, b in zip(less, more, strict=True))


@settings(max_examples=30)
@given(st.integers(0, 1000), st.floats(0.05, 1), LIMITS)
def test_a_cut_is_within_one_percent_above_the_target_or_as_far_as_it_goes(seed, target, limits):
    found = find_channels(captured("deep"))
    generator = torch.Generator().manual_seed(seed)
    keys = [keys_by_score(torch.rand(g.size, generator=generator), limits, 1.0) for g in found.groups]
    budget = Budget("macs", target, found.cost.macs, Start.of(found).costs["macs"])
    marks, left = cut_for(found, keys, budget)
    assert left == pytest.approx(found.cost.macs(found.alive(marks)) / budget.whole)
    furthest = found.cost.macs(found.alive([k < NEVER for k in keys])) / budget.whole
    assert left <= max(target * 1.01, furthest)


BAD_OPTIONS = [
    ({"ratio": 1.0}, "ratio: input should be less than 1"),
    ({"ratio": -0.1}, "ratio: input should be greater than or equal to 0"),
    ({"macs": 0}, "macs: input should be greater than 0"),
    ({"macs": 1.1}, "macs: input should be less than or equal to 1"),
    ({"parameters": -1}, "parameters: input should be greater than 0"),
    ({"bytes": 2}, "bytes: input should be less than or equal to 1"),
    ({"ratio": "0.5"}, "ratio: input should be a valid number"),
    ({"overrides": {"stem": 1.0}}, "overrides.stem: input should be less than 1"),
    ({"round_to": 0}, "round_to: input should be greater than or equal to 1"),
    ({"min_width": 0}, "min_width"),
    ({"steps": 0}, "steps"),
    ({"scope": "all"}, "scope"),
    ({"ratios": 0.5}, "unknown option 'ratios'.*did you mean ratio"),
    ({"ratio": 0.5, "macs": 0.5}, "ratio and macs are both given"),
    ({"macs": 0.5, "bytes": 0.5}, "macs and bytes are both given"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_an_option_out_of_range_is_refused_before_anything_runs(options, message):
    with pytest.raises(RecipeError, match=message) as caught:
        build_pass(PruneFilters, options)
    assert caught.value.fix


def test_equal_options_are_equal_passes_with_equal_hashes():
    first, again = (build_pass(PruneFilters, {"overrides": {"stem": 0.25}, "macs": 0.5}) for _ in range(2))
    assert first == again != PruneFilters(macs=0.5)
    assert hash(first) == hash(again)


def assert_refused(error, message, name="residual", *, given=None, data=None, **options):
    """A clear error with a remedy; the model stays as it was, bit for bit."""
    model = captured(name)
    state, text = state_of(model), description(model)
    with pytest.raises(error, match=message) as caught:
        PruneFilters(**options)(model, Context(model, Data(data), registry=given))
    assert caught.value.fix
    assert caught.value.at or "prune_filters" in caught.value.problem or "criteri" in caught.value.problem
    assert first_difference(state_of(model), state) is None
    assert description(model) == text


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"macs": 0.01}, "at least 1 of each group stays"),
        ({"parameters": 0.3, "min_width": 6}, "at least 6 of each group stays"),
        ({"macs": 0.2, "round_to": 6}, "a multiple of 6"),
        ({"bytes": 0.3, "exclude": ("second",)}, r"2 groups are left out or overridden; 5 channels have to stay"),
        ({"macs": 0.01, "steps": 3}, "macs: 0.01 cannot be met"),
    ],
)
def test_a_budget_out_of_reach_says_how_far_it_goes_and_what_limits_it(options, limit):
    assert_refused(PassError, rf"cannot be met, 0\.\d+ is as far as it goes(.|\n)*|{limit}", **options)
    assert_refused(PassError, limit, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"select": ("nothing.*",)}, r"select: 'nothing.\*' matches no layer"),
        ({"exclude": ("frist.0",)}, "exclude: 'frist.0' matches no layer.*did you mean first.0"),
        ({"overrides": {"frist.0.0": 0.5}}, "overrides: 'frist.0.0' matches no layer.*did you mean first.0.0"),
        ({"criterion": "l3"}, "unknown criterion 'l3'.*did you mean l[12] or l[12]"),
    ],
)
def test_a_name_that_fits_nothing_is_refused(options, message):
    assert_refused(RecipeError, message, **options)


def test_a_model_in_which_nothing_can_go_is_refused_with_the_reasons():
    assert_refused(ModelError, "nothing can be removed: an output of the model; recurrent: LSTM takes it", "lstm")


@pytest.mark.parametrize("options", [{"exclude": ("*",)}, {"overrides": {"*": 0.0}}], ids=str)
def test_leaving_every_group_out_makes_no_edit(options):
    assert not pruned("plain_cnn", **options)[1].edits


def test_reconstruction_leaves_the_weights_of_excluded_layers():
    _, report = pruned("plain_cnn", data=True, ratio=0.5, exclude=("5",))
    solved = {edit.layer for edit in report.edits if "anew" in edit.what}
    assert "5" not in solved
    assert solved


@pytest.mark.parametrize("criterion", ["reconstruction", "apoz", "thinet", "taylor", "oracle", "mutual_information"])
def test_a_criterion_without_its_data_is_refused(criterion):
    role = "calibration" if criterion in ("reconstruction", "apoz", "thinet") else "training"
    assert_refused(InputError, f"criterion {criterion} needs {role} data", criterion=criterion)
    if role == "training":
        batches = NETWORKS["residual"].calibration()
        assert_refused(InputError, "with labels", criterion=criterion, data=batches)


def test_reconstruction_without_data_is_refused():
    assert_refused(InputError, "prune_filters with reconstruct needs calibration data", reconstruct=True)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_refused(value):
    def scores(found):
        return [torch.full((group.size,), value if n == 1 else 1.0) for n, group in enumerate(found.groups)]

    message = "criterion given gives NaN or infinity for the group of first.0.0"
    assert_refused(PassError, message, given=registry_of(scores), criterion="given")


@pytest.mark.parametrize("wrong", [lambda g: torch.rand(g.size + 1), lambda g: torch.rand(g.size, 1)])
def test_scores_of_another_shape_are_the_authors_fault(wrong):
    given = registry_of(lambda found: [wrong(group) for group in found.groups])
    assert_refused(PluginError, "criterion given gives scores of other shapes", given=given, criterion="given")
    none = registry_of(lambda found: [])
    assert_refused(PluginError, "criterion given gives scores of other shapes", given=none, criterion="given")


def test_nan_in_the_weights_or_the_data_is_refused():
    model = NETWORKS["residual"].captured()
    weight = model.get_submodule("first.1").weight.detach().clone()
    weight[3, 0, 0, 0] = math.nan
    model.get_submodule("first.1").weight = nn.Parameter(weight)
    with pytest.raises(PassError, match=r"criterion l2 gives NaN or infinity for the group of stem\.0"):
        PruneFilters()(model, Context(model))
    assert_refused(InputError, "NaN", data=[torch.full((2, 3, 8, 8), math.nan)])


def redundant():
    """Of eight channels 5 repeats 2, 7 is twice 2, and 6 is always 1.5; behind a ReLU all of them."""
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
    with torch.no_grad():
        first.weight[5], first.bias[5] = first.weight[2], first.bias[2]
        first.weight[7], first.bias[7] = first.weight[2] * 2, first.bias[2] * 2
        first.weight[6], first.bias[6] = 0, 1.5
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    return capture(model, torch.randn(2, 3, 8, 8))


def without(model, *units, **options):
    """`model` without these units of its first group, with reconstruction, and its relative error on other data."""
    given = registry_of(lambda found: [torch.tensor([float(u not in units) for u in range(8)]), torch.ones(4)])
    data = [torch.randn(64, 3, 8, 8) for _ in range(4)]
    step = PruneFilters(ratio=len(units) / 8, criterion="given", select=("0",), **options)
    result, report = step(model, Context(model, Data(data), registry=given))
    assert result.get_submodule("0").out_channels == 8 - len(units)
    x = torch.randn(32, 3, 8, 8)
    with torch.no_grad():
        return result, report, relative_error(result(x), model(x))


@pytest.mark.parametrize(("ridge", "bound"), [(1e-4, 5e-3), (1e-7, 5e-4)])
def test_channels_that_others_make_up_for_can_go_without_a_loss(monkeypatch, ridge, bound):
    monkeypatch.setattr(repair, "RIDGE", ridge)
    model = redundant()
    assert without(model, 5, 6, 7)[2] < bound
    assert without(model, 5, 6, 7, reconstruct=False)[2] > 0.05


def test_what_a_constant_channel_gave_goes_into_the_bias():
    model = redundant()
    result, report, error = without(model, 6)
    assert error < 1e-4
    before, after = model.get_submodule("2"), result.get_submodule("2")
    kept = [0, 1, 2, 3, 4, 5, 7]
    torch.testing.assert_close(after.weight, before.weight[:, kept], rtol=0, atol=5e-3)
    torch.testing.assert_close(after.bias, before.bias + 1.5 * before.weight[:, 6, 0, 0], rtol=0, atol=5e-3)
    assert {e.layer for e in report.edits if "anew" in e.what} == {"0", "2", "5"}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=str)
def test_no_layer_is_worse_for_being_solved_anew(network):
    if network.name in ("lstm", "gru"):
        pytest.skip("nothing can be removed")
    model, report = pruned(network.name, data=True, ratio=0.5)
    numbers = {e.layer: e.numbers for e in report.edits if "error_after" in e.numbers}
    solvable = {affine.layer.name for affine in affine_maps(model)}
    assert numbers.keys() == solvable
    for own in numbers.values():
        assert 0 <= own["error_after"] <= own["error_before"] * (1 + 1e-9) + 1e-9


GAINS = ("plain_cnn", "residual", "grouped_depthwise", "transposed_conv", "conv_1d", "conv_3d", "constant_views")


@pytest.mark.parametrize("name", GAINS)
def test_the_output_is_nearer_to_the_original_for_reconstruction(name):
    network, errors = NETWORKS[name], []
    x = torch.cat(network.calibration(batches=8))
    data = Data(network.calibration(batches=16))
    for reconstruct in (False, True):
        step = PruneFilters(ratio=0.4, criterion="l2", reconstruct=reconstruct)
        result, _ = step(captured(name), Context(captured(name), data))
        expected = network.call(captured(name), x)
        errors.append(float((network.call(result, x) - expected).norm() / expected.norm()))
    assert errors[1] < 0.8 * errors[0]


def norm_inputs(model, batches):
    """What every BatchNorm takes in, by name."""
    seen = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(values).transpose(0, 1).flatten(1).double() for name, values in seen.items()}


@pytest.mark.parametrize("name", ["plain_cnn", "residual", "transposed_conv", "conv_1d", "conv_3d"])
def test_batchnorm_keeps_the_statistics_of_its_new_input_and_the_model_trains(name):
    network = NETWORKS[name]
    model, _ = pruned(name, data=True, ratio=0.5)
    inputs = norm_inputs(model, network.calibration())
    behind = {a.norm.name for a in affine_maps(model) if a.norm is not None}
    assert behind
    for norm in behind:
        module, rows = model.get_submodule(norm), inputs[norm]
        torch.testing.assert_close(module.running_mean.double(), rows.mean(1), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(module.running_var.double(), rows.var(1, correction=0), rtol=1e-3, atol=1e-5)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    x, losses = torch.cat(network.calibration()), []
    for _ in range(8):
        losses.append((model(x) - 1).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        optimizer.step()
    assert losses[-1].item() < losses[0].item()


def test_a_layer_that_is_called_twice_and_tied_layers_are_left_alone():
    for name, layers in (("shared_module", ["shared", "norm"]), ("tied_weights", ["embed", "decode"])):
        plain, _ = pruned(name, data=True, ratio=0.5, criterion="l2", reconstruct=False)
        solved, report = pruned(name, data=True, ratio=0.5, criterion="l2")
        assert not {e.layer for e in report.edits if "anew" in e.what} & set(layers)
        for layer in layers:
            assert first_difference(*(state_of(m.get_submodule(layer)) for m in (plain, solved))) is None
        assert first_difference(state_of(plain), state_of(solved)) is not None


def test_a_residual_sum_is_aimed_at_by_the_last_of_its_terms_less_the_operated_rest():
    maps = {affine.layer.name: affine for affine in affine_maps(captured("residual"))}
    first, shortcut, second = (maps[name] for name in ("first.1", "shortcut.0", "second.1"))
    (total,) = first.end.users
    aim = first.step().aim
    assert (aim.target, aim.minus) == (total.name, tuple(n.name for n in total.all_input_nodes if n is not first.end))
    earlier, later = sorted((shortcut, second), key=lambda a: a.end)
    (total,) = later.end.users
    assert (earlier.step().aim.target, earlier.step().aim.minus) == (earlier.end.name, ())
    assert (later.step().aim.target, later.step().aim.minus) == (total.name, (earlier.end.name,))
    assert later.step().rectified
    assert not earlier.step().rectified


def test_a_bias_is_added_only_where_no_batchnorm_has_one():
    residual, _ = pruned("residual", data=True, ratio=0.5)
    assert all(residual.get_submodule(name).bias is None for name in ("stem.0", "first.0.0", "first.1", "shortcut.0"))
    assert float(residual.get_submodule("second.1").bias.detach().abs().max()) == 0
    assert captured("windows").get_submodule("qkv").bias is None
    windows, _ = pruned("windows", data=True, ratio=0.5)
    assert windows.get_submodule("qkv").bias.shape == (windows.get_submodule("qkv").out_features,)


def test_a_trained_network_keeps_its_accuracy_at_half_the_macs(shared):
    import cifar10
    import resnet_cifar

    train, (pictures, labels) = cifar10.lossless("train")[0], cifar10.lossless("test")
    data = list(resnet_cifar.normalise(torch.from_numpy(train[:512])).split(128))
    test, labels = resnet_cifar.normalise(torch.from_numpy(pictures)), torch.from_numpy(labels)
    original = capture(resnet_cifar.resnet20(), data[0][:2])
    accuracy = {}
    for options in ({}, {"reconstruct": False}):
        result, _ = PruneFilters(macs=0.5, **options)(original, Context(original, Data(data)))
        before, after = (surgery.measure(m, original.inputs).macs for m in (original, result))
        assert after / before == pytest.approx(0.5, rel=0.01)
        with torch.no_grad():
            accuracy[not options] = float((result(test).argmax(1) == labels).float().mean())
    assert len(labels) == 846
    assert accuracy[True] >= 0.80
    assert accuracy[False] <= 0.40


@pytest.mark.parametrize("network", networks("residual", "constant_views", "functional_conv", "attention"), ids=str)
def test_several_steps_with_reconstruction_run_on_what_is_left(network):
    model, report = pruned(network.name, data=True, ratio=0.5, steps=3)
    once = widths(pruned(network.name, data=True, ratio=0.5)[0])
    assert all(once[layer] <= n <= 1.2 * once[layer] for layer, n in widths(model).items())
    assert any("anew" in edit.what for edit in report.edits)
