"""What prune_filters refuses."""

from __future__ import annotations

import math

import pytest
import torch
from pruning_trials import assert_refused, pruned, registry_of
from surgery_plugins.prune_filters import PruneFilters
from torch import nn

from surgery import (
    Context,
    InputError,
    ModelError,
    PassError,
    PluginError,
    RecipeError,
)
from surgery.recipe import build_pass
from surgery.testing import NETWORKS

BAD_OPTIONS = [
    ({"ratio": 1.0}, "ratio: input should be less than 1"),
    ({"ratio": -0.1}, "ratio: input should be greater than or equal to 0"),
    ({"macs": 0}, "macs: input should be greater than 0"),
    ({"macs": 1.1}, "macs: input should be less than or equal to 1"),
    ({"parameters": -1}, "parameters: input should be greater than 0"),
    ({"bytes": 2}, "bytes: input should be less than or equal to 1"),
    ({"ratio": "0.5"}, "ratio: input should be a valid number"),
    ({"overrides": {"stem": 1.0}}, "overrides.stem: input should be less than 1"),
    ({"round_to": 0}, "round_to: should be greater than or equal to 1 or 'auto'"),
    ({"round_to": "often"}, "round_to"),
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


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({"macs": 0.01}, "at least 1 of each group stays"),
        ({"parameters": 0.3, "min_width": 6}, "at least 6 of each group stays"),
        ({"macs": 0.2, "round_to": 6}, r"a multiple \(6\)"),
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
