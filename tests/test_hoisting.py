"""What no input and no training moves is computed once."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import surgery
from surgery import Context, Registry, capture
from surgery.testing import NETWORKS

REGISTRY = Registry.load()
SHARING = {"hashed": {"factor": 0.25, "min_weights": 8}, "kmeans": {"bits": 2}, "prune_weights": {"sparsity": 0.5}}


def operated(name, model):
    return REGISTRY.find_pass(name)(**SHARING[name])(model, Context(model))[0]


def trained_once(model, value):
    """Outputs in training mode, the gradient of every parameter by name, and the buffers after it."""
    model.train().zero_grad()
    torch.manual_seed(0)
    out = model(value)
    out.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.detach(), gradients, dict(model.named_buffers())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(actual[name], value) for name, value in expected.items() if name in actual)


@pytest.mark.parametrize("network", ["plain_cnn", "residual", "transposed_conv", "functional_conv", "shared_module"])
@pytest.mark.parametrize("name", list(SHARING))
def test_outputs_gradients_and_statistics_are_the_same_bit_for_bit(name, network):
    model = operated(name, NETWORKS[network].captured())
    value = NETWORKS[network].inputs(batch=4, seed=1)
    twin = surgery.hoisted(copy.deepcopy(model))
    out, gradients, buffers = trained_once(model, value)
    twin_out, twin_gradients, twin_buffers = trained_once(twin, value)
    assert torch.equal(twin_out, out)
    assert twin_gradients.keys() == gradients.keys()
    assert_same(twin_gradients, gradients)
    assert_same(twin_buffers, buffers)
    assert torch.equal(twin.eval()(value), model.eval()(value))


@functools.cache
def linear():
    torch.manual_seed(0)
    return capture(nn.Linear(4, 3), torch.randn(2, 4))


def computed(recipe, **tensors: Tensor) -> Tensor:
    """A tree of operators over the tensors and one that it makes."""
    values = [*tensors.values(), torch.ones(3, 4)]
    for kind, a, b in recipe:
        one, other = values[a % len(values)], values[b % len(values)]
        halves = one.chunk(2, 1)[0].repeat(1, 2)
        values.append([one + other, one * other.tanh(), (one @ other.T) @ one, halves][kind])
    return values[-1]


@settings(max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6))
def test_whatever_is_computed_from_constants_leaves_the_graph_and_changes_nothing(recipe):
    model, value = surgery.snapshot(linear()), torch.randn(5, 4)
    tensors = {"weight": nn.Parameter(torch.randn(3, 4)), "first": torch.randn(3, 4), "second": torch.rand(3, 4)}
    surgery.replace_weight(model, surgery.layers(model)[0], lambda **given: computed(recipe, **given), tensors)
    model.recompile()
    twin = surgery.hoisted(model)
    assert torch.equal(twin(value), model(value))
    found, wanted = gradients(twin, value), gradients(model, value)
    assert found.keys() == wanted.keys()
    assert_same(found, wanted)
    fixed = {n for n in twin.graph.nodes if n.op == "get_attr" and n.target in dict(twin.named_buffers())}
    assert not [n for n in twin.graph.nodes if n.op == "call_function" and fixed.issuperset(n.all_input_nodes)]


def gradients(model, value):
    """Of the sum of squares, of the parameters that it depends on, by name."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(model(value).square().sum(), list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def test_positions_of_shared_values_are_buffers_and_the_values_stay_parameters():
    model = operated("hashed", capture(nn.Linear(16, 8), torch.randn(2, 16)))
    twin = surgery.hoisted(model)
    assert [name for name, _ in twin.named_buffers()] == ["hoisted"]
    assert all(dict(twin.named_parameters())[name] is p for name, p in model.named_parameters())
    assert not any(str(node.target).startswith("aten.remainder") for node in twin.graph.nodes)
    assert "hoisted" not in twin.state_dict()
    assert any(str(node.target).startswith("aten.remainder") for node in model.graph.nodes)


def test_a_frozen_weight_is_computed_once_and_a_trained_one_at_every_step():
    model = operated("prune_weights", capture(nn.Linear(4, 4), torch.randn(2, 4)))
    assert "aten.mul.Tensor" in {str(node.target) for node in surgery.hoisted(model).graph.nodes}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert "aten.mul.Tensor" not in {str(node.target) for node in surgery.hoisted(model).graph.nodes}


def test_noise_is_drawn_at_every_step():
    model = capture(nn.Linear(4, 4), torch.randn(2, 4))
    [layer] = surgery.layers(model)
    weight = nn.Parameter(layer.module.weight.detach().clone(), requires_grad=False)
    surgery.replace_weight(model, layer, lambda weight: weight + torch.rand_like(weight), {"weight": weight})
    twin, value = surgery.hoisted(model), torch.randn(2, 4)
    assert not torch.equal(twin(value), twin(value))


class Normalised(nn.Module):
    """Reads the statistics that its BatchNorm renews."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + (self.norm.running_mean * 2 + 1)


def test_what_is_computed_from_statistics_that_training_renews_stays():
    value = torch.randn(8, 4) + 1
    model = capture(Normalised(), value)
    twin = surgery.hoisted(copy.deepcopy(model))
    for network in (model, twin):
        network.train()(value)
        network.eval()
    assert torch.equal(twin(value), model(value))
    assert float(model.get_buffer("norm.running_mean").abs().min()) > 0
