"""Kernels to decompose, random and trained, and what every decomposition has to keep to."""

from __future__ import annotations

import copy
import importlib.util
import os
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from surgery_plugins.low_rank.chain import Chain
from surgery_plugins.low_rank.kernel import Kernel
from surgery_plugins.low_rank.method import Method, Ranks
from torch import Tensor, nn

from surgery.calibration.moments import Scatter
from surgery.calibration.unfolding import unfold
from surgery.captured import relative_error
from surgery.testing import NETWORKS, networks

_KINDS = ("residual", "grouped_depthwise", "shared_module", "functional_conv", "transposed_conv", "conv_1d", "conv_3d")
KINDS = networks(*((*_KINDS, "attention", "tied_weights") if os.environ.get("CONTRACT") != "all" else NETWORKS))
"""Networks with every kind of layer that a decomposition meets, for its options; all with CONTRACT=all. The defaults of
every plugin meet all networks in test_contract."""

MODELS = Path(__file__).resolve().parents[2] / "shared" / "models"
METRICS = ("weight", "output", "deficient")


def kernel(shape: tuple[int, ...], seed: int = 0, metric: str = "output") -> Kernel:
    """A random kernel (O, I, *k) in the metric of weights, of outputs, or of outputs that some inputs do not reach."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    features = weight[0].numel()
    if metric == "weight":
        return Kernel(weight)
    rows = 2 * features if metric == "output" else max(1, features // 2)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64).cumsum(1)
    return Kernel(weight, x.T @ x / rows)


@lru_cache
def trained(name: str, metric: str) -> Kernel:
    """A layer of a ResNet-20 trained on CIFAR-10, with noise of neighbouring pixels for images."""
    if not MODELS.exists():
        pytest.skip(f"no trained models at {MODELS}")
    spec = importlib.util.spec_from_file_location("resnet_cifar", MODELS / "resnet_cifar.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network = module.resnet(20, "resnet20_original").eval()
    layer, scatter = network.get_submodule(name), Scatter(full=True)

    def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        for rows in unfold(layer, args[0], 2**20):
            scatter.add(rows)

    layer.register_forward_pre_hook(see)
    small = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        network(nn.functional.interpolate(small, size=(32, 32), mode="bilinear"))
    weight = layer.weight.detach().double()
    return Kernel(weight, scatter.finish().full_covariance[0] if metric == "output" else None)


def every_rank(method: Method, task: Kernel, each: int = 4) -> list[Ranks]:
    """Up to about `each` of every rank, the limits included."""
    limits = method.limits(tuple(task.weight.shape))
    return list(product(*(sorted({*range(1, limit + 1, -(-limit // each)), limit}) for limit in limits)))


def assert_keeps_its_promises(method: Method, task: Kernel, each: int = 4, tolerance: float = 1e-2) -> None:
    """Shapes as said; estimates are bounds; W at the limits; a higher rank loses no more, up to `tolerance`; the
    metric of outputs loses no more of them than that of weights."""
    shape, errors = tuple(task.weight.shape), {}
    ranks = every_rank(method, task, each)
    for own, estimate in zip(ranks, method.estimates(task, ranks), strict=True):
        chain = method.decompose(task, own)
        assert isinstance(chain, Chain)
        assert [tuple(stage.weight.shape) for stage in chain.stages] == method.shapes(shape, own)
        errors[own] = task.error(chain.product)
        assert errors[own] ** 2 <= estimate * (1 + 1e-5) + 1e-5
        blind = method.decompose(Kernel(task.weight), own).product
        assert errors[own] <= task.error(blind) * (1 + 1e-6) + 1e-9
    for low, high in product(ranks, ranks):
        if all(a <= b for a, b in zip(low, high, strict=True)):
            assert errors[high] <= errors[low] * (1 + tolerance) + 1e-9, (low, high)
    found = method.decompose(task, method.limits(shape)).product
    assert float((found - task.weight).norm() / task.weight.norm()) < 1e-10


@st.composite
def convolutions(draw: st.DrawFn, least: int = 1, both: bool = False) -> tuple[nn.Module, Tensor]:
    """A convolution of any form with `least` or more axes, and an input; `both`: every kernel size is above 1."""
    rank = draw(st.integers(least, 3))
    size = [draw(st.integers(2 if both or not axis else 1, 3)) for axis in range(rank)]
    padding: Any = draw(st.sampled_from([0, 1, 2, "valid", "same"]))
    stride = 1 if padding == "same" else [draw(st.integers(1, 2)) for _ in range(rank)]
    dilation = [draw(st.integers(1, 2)) for _ in range(rank)]
    mode = draw(st.sampled_from(["zeros", "circular", "replicate", "reflect"]))
    inputs, outputs = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    kind = getattr(nn, f"Conv{rank}d")
    torch.manual_seed(draw(st.integers(0, 1000)))
    module = kind(inputs, outputs, size, stride, padding, dilation, bias=draw(st.booleans()), padding_mode=mode)
    return module, torch.randn(2, inputs, *[draw(st.integers(7, 8)) for _ in range(rank)])


def assert_computes_its_product(method: Method, module: Any, x: Tensor, ranks: Ranks) -> None:
    """The layers that take the place of `module` give what it would give with their product for a weight."""
    chain = method.decompose(Kernel(module.weight.detach().double()), ranks)
    parts = nn.Sequential(*chain.parts(module, module.bias).values()).eval()
    dense = copy.deepcopy(module)
    dense.weight = nn.Parameter(chain.product.float())
    expected = dense(x)
    assert parts(x).shape == expected.shape
    assert relative_error(parts(x).detach(), expected.detach()) < 2e-5
