"""Random small networks of random wiring: removed = masked, whatever is removed, and costs are what is measured."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_networks import KINDS, RandomNetwork, Step, image
from removal import assert_costs_are_measured, deviation, found, outputs, random_marks, removed
from torch.utils._pytree import tree_leaves

from surgery import find_channels
from surgery.channels.values import values_in


def networks(kinds):
    """Of one to five steps."""
    steps = st.builds(Step, st.sampled_from(kinds), st.integers(0, 2), st.integers(0, 4), st.integers(0, 29))
    return st.lists(steps, min_size=1, max_size=5).map(RandomNetwork)


BOUND = 1e-8  # in double precision

PLAIN = ("conv", "batch_norm", "function", "merged", "cat", "gate", "parameter", "depthwise", "twice", "instance_norm")
"""Steps after which no dimension comes apart, so that the choice of what stays rectangular cannot change."""


def random_networks(examples, kinds=KINDS):
    profile = settings(max_examples=examples, suppress_health_check=list(HealthCheck))

    def decorated(test):
        return profile(given(model=networks(kinds), seed=st.integers(0, 2**16))(test))

    return decorated


@random_networks(30)
def test_removed_is_masked_in_any_network_and_again_after_that(model, seed):
    channels = found(model, image(), heads=seed % 2 == 0)
    batch = channels.model.inputs.with_batch(3 if channels.model.dynamic_batch else 2)
    for inputs, number in ((channels.model.inputs, seed), (batch, seed + 1)):
        assert deviation(channels, random_marks(channels, number), inputs) <= BOUND
    again = find_channels(removed(channels, random_marks(channels, seed)))
    assert deviation(again, random_marks(again, seed), batch) <= BOUND


@pytest.mark.parametrize(
    "steps",
    [
        [("shuffle", 0, 3, 13), ("shuffle", 0, 4, 24)],
        [("conv", 0, 0, 19), ("shuffle", 2, 0, 9), ("shuffle", 0, 1, 19)],
    ],
)
def test_removed_is_masked_where_one_shuffle_follows_another(steps):
    channels = found(RandomNetwork([Step(*step) for step in steps]), image())
    for seed in range(4):
        assert deviation(channels, random_marks(channels, seed), channels.model.inputs) <= BOUND


@random_networks(14)
def test_no_dimension_is_ever_left_empty_and_the_costs_foreseen_are_those_measured(model, seed):
    channels = found(model, image())
    everything = [torch.ones(group.size, dtype=torch.bool) for group in channels.groups]
    alive = channels.alive(channels.spared(everything))
    axes = [a for value in values_in(list(channels.walk.values.values())) for a in value.axes if a is not None]
    assert all(alive[axis.ids].any() for axis in axes)
    assert_costs_are_measured(channels, random_marks(channels, seed, least=2))


@random_networks(10, PLAIN)
def test_the_removed_model_has_the_units_that_were_left(model, seed):
    channels = found(model, image())
    marks = random_marks(channels, seed, least=2)
    again = find_channels(removed(channels, marks))
    left = [(int((~mark).sum()), layers) for mark, layers in zip(marks, outputs(channels), strict=True)]
    assert [(group.size, layers) for group, layers in zip(again.groups, outputs(again), strict=True)] == left


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_step_makes_a_network_that_runs(kind):
    for option in range(6):
        model = RandomNetwork([Step(kind, 0, 0, option)]).eval()
        assert all(y.isfinite().all() for y in tree_leaves(model(image())))
        assert str((kind, 0, 0, option)) in repr(model)
