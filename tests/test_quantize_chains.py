"""Chains of passes that end in integers: every layer an integer kernel, the simulation what the runtime computes."""

from __future__ import annotations

import pytest
import torch
from integers import exported, session_outputs, steps_apart
from surgery_plugins.quantize.counting import kernels

import surgery
from surgery import Context, Data, Registry
from surgery.testing import NETWORKS

REGISTRY = Registry.load()
PRUNE = ("prune_filters", {"ratio": 0.3})
TUCKER = ("tucker", {"layer_macs": 0.6})
SVD = ("svd", {"layer_macs": 0.6})
HASHED = ("hashed", {"factor": 0.25, "min_weights": 256})
CHAINS = {
    "prune, tucker": ("residual", [PRUNE, TUCKER]),
    "prune": ("grouped_depthwise", [PRUNE]),
    "depthwise_separable": ("plain_cnn", [("depthwise_separable", {})]),
    "svd of attention": ("attention", [SVD]),
    "prune, svd of attention": ("fused_qkv", [PRUNE, SVD]),
    "prune, prune_weights, kmeans": ("concatenation", [PRUNE, ("prune_weights", {"sparsity": 0.5}), ("kmeans", {})]),
    "hashed": ("residual", [HASHED]),
}
FLOAT_PRODUCTS = {"attention": 2, "fused_qkv": 2}
"""Of scaled_dot_product_attention, which stays whole."""
NARROW = {"grouped_depthwise": 1}
"""Convolutions with groups of few channels, float between integers."""


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_ends_in_integer_kernels_that_agree_with_the_simulation(chain, tmp_path):
    network, steps = NETWORKS[CHAINS[chain][0]], CHAINS[chain][1]
    model = network.captured()
    context = Context(model, Data.of(network.calibration()), registry=REGISTRY)
    for name, options in [*steps, ("quantize", {})]:
        model, report = REGISTRY.find_pass(name)(**options)(model, context)
        assert report.edits, name
    path, x = exported(model, tmp_path), network.inputs(16, seed=5)
    found = kernels(path)
    assert found.integer_layers >= sum("weight_error" in edit.numbers for edit in report.edits)
    assert found.float_layers == FLOAT_PRODUCTS.get(network.name, 0) + NARROW.get(network.name, 0)
    assert len(found.stranded) == NARROW.get(network.name, 0)
    assert max(steps_apart(model, path, x)) <= 1
    surgery.export_source(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(surgery.load(tmp_path)(x), model(x))
        top = [answer.argmax(-1) for answer in (model(x), session_outputs(path, x)[0])]
    assert (top[0] == top[1]).double().mean() > 0.9
