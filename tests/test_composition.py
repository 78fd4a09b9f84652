"""Every ordered pair of passes composes, or is refused before anything runs with an order that does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from composing import (
    FITTING,
    NAMES,
    PAIRS,
    REGISTRY,
    Applied,
    built,
    chained,
    first,
    hold,
    in_turns,
    matrix,
    refusal,
    refusals,
    untouched,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import RandomNetwork, Step, image

from surgery import Context, Data, PluginError, RecipeError, layers, weight_function, weight_of
from surgery.recipe import resolve
from surgery.recipe.ordering import first_conflict
from surgery.testing import NETWORKS, Network

PAGE = (Path(__file__).parent.parent / "docs" / "composition.md").read_text()
REFUSED = [pair for pair in PAIRS if refusal(*pair)]
ALLOWED = [pair for pair in PAIRS if pair not in REFUSED]
EXPORTED = sorted(in_turns(ALLOWED))[::2]
"""The others are left to `make composition`."""
MARKING = [name for name in NAMES if REGISTRY.passes[name].marks]


def applied(*names):
    return chained(*names, network=FITTING.name)


def both_edit(pair):
    found = applied(*pair)
    return len(found.reports) == 2 and found.all_edit


@pytest.mark.parametrize("pair", ALLOWED, ids=" → ".join)
def test_an_allowed_pair_gives_a_model_that_runs_reloads_and_exports(pair):
    if both_edit(pair):
        hold(*pair, applied=applied(*pair), onnx=pair in EXPORTED)


@pytest.mark.parametrize("pair", REFUSED, ids=" → ".join)
def test_a_refused_pair_names_a_reason_and_ways_that_work(pair):
    one, other = pair
    error = refusal(*pair)
    assert re.match(f"{other} cannot run after {one}: .{{20,}}", error.problem)
    ways = error.fix.split("; or ")
    assert (f"put {other} before {one}" in ways) == (one != other and refusal(other, one) is None)
    by_layer = bool(REGISTRY.passes[one].marks)
    assert ("put densify between the two" in ways) == by_layer == ("divide the layers" in error.fix)
    assert not by_layer or refusal(one, "densify", other) is None
    assert ("leave one of the two out" in ways) == (pair == ("quantize", "quantize"))


@pytest.mark.parametrize("pair", sorted(in_turns(REFUSED)), ids=" → ".join)
def test_what_a_refusal_proposes_runs(pair):
    one, other = pair
    ways = refusal(*pair).fix
    if f"put {other} before {one}" in ways and other != "densify":
        assert applied(other, one).all_edit
    if "densify between" in ways:
        assert applied(one, "densify", other).all_edit
    if "divide the layers" in ways:
        assert both_edit_parts(one, other)


def both_edit_parts(one, other):
    """Whether `one` on the outer layers and `other` after it on those between both find something to do."""
    edited = [edit.layer for edit in first(one, FITTING.name).reports[0].edits]
    outer = built(one, select=(edited[0], edited[-1]))
    assert first_conflict([outer, built(other)]) is None
    return untouched(FITTING.name).then(outer).then(built(other)).all_edit


def test_the_page_has_the_matrix_that_the_code_has():
    verdicts = {pair: "composes" if both_edit(pair) else "nothing" for pair in ALLOWED}
    verdicts |= dict.fromkeys(REFUSED, "refused")
    odd = [line for line in matrix(verdicts).splitlines() if line not in PAGE]
    assert not odd
    assert refusals() in PAGE


def test_every_refusal_of_the_page_is_there_for_a_trait_that_some_pass_leaves():
    left = {trait for cls in REGISTRY.passes.values() for trait in (*cls.gives, *cls.marks)}
    named = {trait for cls in REGISTRY.passes.values() for trait in (*cls.refuses, *cls.clears)}
    assert named == left
    assert all(f"`{trait}`" in PAGE for trait in left)


@pytest.mark.parametrize("name", MARKING)
def test_densify_gives_the_way_back_bit_for_bit(name):
    marked, dense = first(name, FITTING.name), applied(name, "densify")
    assert any(layer.computed for layer in layers(marked.after))
    assert not any(layer.computed or layer.functional for layer in layers(dense.after))
    value = FITTING.inputs(batch=3, seed=5)
    assert torch.equal(FITTING.call(dense.after, value), FITTING.call(marked.after, value))


# --- which orders are refused ---


def test_a_pass_that_leaves_layers_to_others_refuses_nothing():
    for narrow in ({"select": ["Linear"]}, {"exclude": ["0.0"]}):
        passes = [{"kmeans": narrow}, "tucker", "prune_weights"]
        assert len(resolve({"name": "r", "passes": passes}, REGISTRY).steps) == 3
    assert resolve({"name": "r", "passes": [{"hashed": {"min_weights": 4096}}, "svd"]}, REGISTRY)


def test_integers_are_refused_whatever_layers_were_quantised():
    with pytest.raises(RecipeError, match="put svd before quantize") as caught:
        resolve({"name": "r", "passes": [{"quantize": {"exclude": ["Linear"]}}, "svd"]}, REGISTRY)
    assert "divide" not in str(caught.value)


def test_a_pass_is_moved_before_all_that_it_refuses():
    with pytest.raises(RecipeError, match="tucker cannot run after prune_weights") as caught:
        resolve({"name": "r", "passes": ["fold_batchnorm", "prune_weights", "kmeans", "tucker"]}, REGISTRY)
    assert caught.value.fix.endswith("put tucker before prune_weights; or put densify between the two")
    assert caught.value.at.endswith("passes.3")


@given(st.lists(st.sampled_from(NAMES), min_size=2, max_size=5))
@settings(max_examples=100, derandomize=True, deadline=None)
def test_what_a_refusal_proposes_resolves(names):
    error = refusal(*names)
    if error is None:
        return
    place = int(error.at.rpartition(".")[2])
    *before, last = names[: place + 1]
    for way in error.fix.split("; or "):
        if found := re.fullmatch(f"put {last} before (\\w+)", way):
            put = [i for i, name in enumerate(before) if name == found[1]]
            moved = [[*before[:i], last, *before[i:]] for i in put]
            assert any(refusal(*names) is None for names in moved), way
        if way == "put densify between the two":
            assert refusal(*before, "densify", last) is None


# --- passes after masks ---


def pruned(network, **options):
    captured = NETWORKS[network].captured()
    context = Context(captured, Data.of(NETWORKS[network].calibration()))
    return built("prune_weights", **options)(captured, context)[0], context


@pytest.mark.parametrize("network", ["residual", "functional_conv", "transposed_conv", "conv_1d"])
def test_batchnorm_is_folded_into_masked_weights_whose_zeros_stay(network):
    model, context = pruned(network)
    zeros = [weight_of(layer) == 0 for layer in layers(model) if layer.computed]
    folded, report = built("fold_batchnorm")(model, context)
    norms = [layer for layer in layers(model) if layer.type.startswith("BatchNorm")]
    assert len(report.edits) == len(norms) > 0
    computed = [layer for layer in layers(folded) if layer.computed]
    assert all(torch.equal(weight_of(layer) == 0, zero) for layer, zero in zip(computed, zeros, strict=True))
    assert len(zeros) > len(norms) / 2


def test_a_pruned_layer_that_is_called_twice_is_clustered_on_data():
    model, context = pruned("shared_module")
    after, report = built("kmeans")(model, context)
    assert "shared" in {edit.layer for edit in report.edits}
    [shared] = [layer for layer in layers(after) if layer.name == "shared"]
    assert len(weight_of(shared).unique()) <= 4
    assert bool((weight_of(shared) == 0).any())


def test_channels_leave_masked_weights_and_the_report_says_what_was_not_solved_anew():
    model, context = pruned("plain_cnn")
    after, report = built("prune_filters")(model, context)
    masked = {layer.name: layer for layer in layers(after) if layer.computed}
    assert set(masked) == {"0.0", "2.0", "5"}
    assert {skip.layer for skip in report.skips if skip.why.startswith("not solved anew")} == set(masked)
    kept = weight_of(masked["0.0"])
    before = weight_of(layers(model)[0])
    assert all(any(torch.equal(row, old) for old in before) for row in kept)
    assert len(kept) < len(before)


def test_the_function_of_a_computed_weight_gives_it_from_its_tensors():
    for name in MARKING:
        after = first(name, FITTING.name).after
        for layer in layers(after):
            if layer.computed:
                function, tensors = weight_function(after, layer)
                assert {f"{layer.name}.{name}" for name in tensors} == set(layer.computed)
                assert torch.equal(function(**tensors), weight_of(layer))
            elif layer.type == "BatchNorm2d":
                with pytest.raises(PluginError, match="its weight is an ordinary one"):
                    weight_function(after, layer)


# --- longer chains ---

KINDS = ("conv", "grouped", "depthwise", "batch_norm", "merged", "cat", "piece", "gate", "tokens", "twice", "shuffle")
STEPS = st.lists(st.builds(Step, st.sampled_from(KINDS), *[st.integers(0, 11)] * 3), min_size=1, max_size=4)
CHAINS = st.lists(st.sampled_from(NAMES), min_size=3, max_size=3).filter(lambda names: refusal(*names) is None)


@given(STEPS, CHAINS)
@settings(max_examples=4, derandomize=True, deadline=None)
def test_three_passes_on_a_random_network_keep_parity_and_reload(steps, names):
    found = Applied.of(Network(str(steps), lambda: RandomNetwork(steps).float(), lambda n, _: image(n).float()))
    for before, name in zip((None, *names), names, strict=False):
        step = found.then(built(name, before))
        found = found if step.refused else step
    hold(*names, applied=found)
