"""Which channels live or die together: the groups of every network of the kit, and removed = masked on each of them."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from removal import (
    assert_costs_are_measured,
    assert_removed_is_masked,
    outputs,
    random_marks,
    reasons,
    removed,
)
from sample_models import resnet18
from surgery_plugins.prune_filters import PruneFilters

from surgery import Channels, Context, capture, find_channels
from surgery.testing import NETWORKS
from surgery.testing.network import Network

OUTPUT = "an output of the model"

GROUPS = {
    "plain_cnn": [(8, "0.0"), (12, "2.0")],
    "residual": [(8, "stem.0 first.1"), (8, "first.0.0"), (12, "shortcut.0 second.1"), (12, "second.0.0")],
    "concatenation": [(6, "stem"), (4, "first.2"), (4, "second.2")],
    "channel_shuffle": [(8, "stem.0"), (4, "branch.0.0 branch.1")],
    "grouped_depthwise": [(4, "0.0"), (4, "1.0"), (16, "2.0.0 2.1.0"), (8, "2.2")],
    "squeeze_excite": [(8, "stem.0 excite"), (4, "squeeze")],
    "zero_padded_shortcut": [(8, "stem.0 branch.1"), (4, "branch.1"), (12, "branch.0.0")],
    "shared_module": [(8, "stem.0 shared")],
    "functional_conv": [(8, "weight"), (8, "pointwise")],
    "in_place": [(8, "stem.0 branch.0")],
    "constant_views": [(8, "stem.0"), (6, "after")],
    "pixels": [(4, "stem.0"), (16, "mix.0"), (4, "spread.0")],
    "normalised": [(4, "0"), (6, "3"), (8, "6"), (6, "8")],
    "slices": [(9, "stem.0"), (3, "stem.0 middle")],
    "transposed_conv": [(12, "0.0"), (4, "1.0"), (4, "2")],
    "conv_1d": [(8, "0"), (12, "4"), (6, "9")],
    "conv_3d": [(6, "0"), (8, "4")],
    "attention": [(16, "embed attention.out_proj mlp.2"), (4, "attention.in_proj_weight"), (24, "mlp.0")],
    "fused_qkv": [(16, "patches project"), (4, "qkv")],
    "windows": [(16, "patches project"), (4, "qkv")],
    "contractions": [(4, "query key"), (8, "value"), (6, "meet")],
    "lstm": [],
    "gru": [],
    "two_inputs": [(8, "gate stem.0")],
    "dict_output": [(8, "stem.0")],
    "tied_weights": [(16, "embed mix.0")],
}
"""Per network the units of each group and the layers whose output channels they are."""

FROZEN = {
    "plain_cnn": {"5": OUTPUT},
    "concatenation": {"head.2": OUTPUT},
    "constant_views": {"mix": "after: convolved over", "classify": OUTPUT},
    "pixels": {"after": OUTPUT},
    "normalised": {"12": OUTPUT},
    "transposed_conv": {"4": OUTPUT},
    "conv_1d": {"12": OUTPUT},
    "conv_3d": {"9": OUTPUT},
    "grouped_depthwise": {"4.2": OUTPUT},
    "attention": {"classify": OUTPUT},
    "fused_qkv": {"classify": OUTPUT},
    "windows": {"classify": OUTPUT},
    "contractions": {"classify": OUTPUT},
    "lstm": {"project": "recurrent: LSTM takes it", "classify": OUTPUT},
    "gru": {"project": "recurrent: GRU takes it", "classify": OUTPUT},
    "dict_output": {"auxiliary": "mean: aten::mean over it", "head.2": OUTPUT},
    "tied_weights": {"decode": OUTPUT},
}
"""Layers with channels that stay, and why; elsewhere the head's."""

PRUNABLE = [network for name, network in NETWORKS.items() if GROUPS[name]]


@cache
def channels(network: Network) -> Channels:
    """Made once: nobody edits the model."""
    return find_channels(network.captured())


def named(networks):
    return pytest.mark.parametrize("network", networks, ids=str)


@named(NETWORKS.values())
def test_channels_fall_into_these_groups_and_the_others_stay_for_these_reasons(network: Network):
    found = channels(network)
    sizes = [group.size for group in found.groups]
    assert list(zip(sizes, outputs(found), strict=True)) == [(n, set(by.split())) for n, by in GROUPS[network.name]]
    assert reasons(found) == FROZEN.get(network.name, {"head.2": OUTPUT})


@named(PRUNABLE)
def test_removed_is_masked_on_every_network(network: Network):
    assert_removed_is_masked(channels(network))


@named(PRUNABLE)
def test_the_costs_foreseen_are_those_of_the_removed_model(network: Network):
    found = channels(network)
    for seed in range(3):
        assert_costs_are_measured(found, random_marks(found, seed, least=2))


@named(NETWORKS.values())
def test_the_cost_of_the_whole_model_is_what_it_measures(network: Network):
    found = channels(network)
    assert_costs_are_measured(found, [torch.zeros(group.size, dtype=torch.bool) for group in found.groups])


def few(found):
    """Marks of a sixth of the larger groups: what is widest stays widest."""
    return [torch.arange(group.size) >= group.size - group.size // 6 for group in found.groups]


@named(PRUNABLE)
def test_the_removed_model_has_the_units_that_were_left(network: Network):
    found = channels(network)
    marks = few(found)
    again = find_channels(removed(found, marks))
    assert [(g.size, o) for g, o in zip(again.groups, outputs(again), strict=True)] == [
        (int((~m).sum()), o) for m, o in zip(marks, outputs(found), strict=True)
    ]


@named(PRUNABLE)
def test_a_removed_model_can_lose_more_and_is_masked_again(network: Network):
    found = channels(network)
    again = find_channels(removed(found, few(found)))
    assert_removed_is_masked(again, seeds=range(2))


@named(PRUNABLE)
def test_removing_everything_leaves_one_unit_in_every_dimension(network: Network):
    found = channels(network)
    marks = found.spared([torch.ones(group.size, dtype=torch.bool) for group in found.groups])
    smallest = removed(found, marks)
    assert all(tensor.numel() for tensor in smallest.parameters())
    assert_removed_is_masked(found, seeds=(0,))
    assert all(
        torch.isfinite(y).all() for y in torch.utils._pytree.tree_leaves(network.call(smallest, network.inputs()))
    )


def test_the_unit_that_is_spared_is_the_most_important():
    found = channels(NETWORKS["slices"])
    marks = [torch.ones(group.size, dtype=torch.bool) for group in found.groups]
    importance = [torch.tensor([3, 9, 4, 1, 5, 2, 8, 6, 7.0]), torch.tensor([0.5, -1, 2.5])]
    early, value, gate = 1, 6, 2
    left = [torch.nonzero(~own).flatten().tolist() for own in found.spared(marks, importance)]
    assert left == [[early, value], [gate]]
    assert [torch.nonzero(~own).flatten().tolist() for own in found.spared(marks)] == [[0, 4], [0]]


def test_resnet_18_at_half_of_every_group_has_the_parameters_of_one_of_half_the_width():
    model = capture(resnet18(), torch.randn(2, 3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == 11_689_512
    after, report = PruneFilters(ratio=0.5)(model, Context(model))
    assert sum(p.numel() for p in after.parameters()) == 3_055_880
    assert [skip.layer for skip in report.skips] == ["10"]
    assert len(report.edits) == 20
