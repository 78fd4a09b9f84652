"""What runs on a CUDA device gives what the processor gives. `pytest -m gpu --device cpu` tries the tests alone."""

from __future__ import annotations

import copy
from dataclasses import astuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import surgery
from surgery import Context, Data, ModelError, Registry
from surgery.captured import relative_error
from surgery.testing import NETWORKS, networks

pytestmark = pytest.mark.gpu

REGISTRY = Registry.load()
NETWORK = NETWORKS["residual"]
OPTIONS = {"tensor_train": {"min_features": 1}, "hashed": {"min_weights": 1}}
"""Without which a pass finds nothing large enough in the small networks."""
MARGIN = 1.1
"""How much larger the error of what a device has fitted may be: rounding may tip a choice between two near equals."""
ROUNDING = 1e-4
"""Of the largest output: float32 sums in another order, through some ten layers."""


def places(model) -> set[str]:
    return {tensor.device.type for tensor in surgery.tensors(model).values()}


def moved(value, device):
    return value.to(device) if isinstance(value, Tensor) else {k: moved(v, device) for k, v in value.items()}


def outputs(network, model, seed=5) -> list[Tensor]:
    return [y for y in tree_leaves(network.call(model, network.inputs(4, seed))) if isinstance(y, Tensor)]


def error(network, model, original) -> float:
    pairs = zip(outputs(network, model), outputs(network, original), strict=True)
    return max(relative_error(actual, expected) for actual, expected in pairs)


def test_a_captured_model_runs_on_the_device_and_comes_back(device):
    model, x = NETWORK.captured(), NETWORK.inputs(4)
    there = copy.deepcopy(model).to(device)
    with torch.no_grad():
        torch.testing.assert_close(there(x.to(device)).cpu(), model(x), rtol=1e-3, atol=1e-3)
        assert torch.equal(there.cpu()(x), model(x))


def test_a_model_on_the_device_is_captured_there(device):
    model = NETWORK.model()
    captured = surgery.capture(model.to(device), NETWORK.inputs().to(device))
    assert places(captured) == places(model) == {device}
    assert error(NETWORK, captured.cpu(), NETWORK.model()) < ROUNDING


@pytest.mark.parametrize("network", networks("residual", "conv_3d", "transposed_conv", "grouped_depthwise"), ids=str)
@pytest.mark.parametrize("want", ["gram", "moments", "ranges", "histograms"])
def test_statistics_from_the_device_equal_those_from_the_processor(device, network, want):
    model, batches = network.captured(), Data(network.calibration())
    layers = [layer for layer in surgery.layers(model) if want != "gram" or "Conv" in type(layer.module).__name__]
    here, there = (
        Context(model, batches, device=name).calibration.collect(model, layers, (want,)) for name in ("cpu", device)
    )
    assert here
    for name in here:
        for known, found in zip(tree_leaves(astuple(here[name])), tree_leaves(astuple(there[name])), strict=True):
            if want == "histograms" and isinstance(known, Tensor):
                assert float((known - found).abs().sum()) <= 1e-3 * float(known.sum())
            else:
                torch.testing.assert_close(found, known, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", networks("residual", "grouped_depthwise", "attention", "lstm"), ids=str)
@pytest.mark.parametrize("name", sorted(REGISTRY.passes))
def test_a_pass_on_the_device_does_what_it_does_on_the_processor(device, name, network):
    step = REGISTRY.find_pass(name)(**OPTIONS.get(name, {}))
    original, found = network.captured(), []
    for place in ("cpu", device):
        context = Context(original, Data(network.calibration()), device=place, registry=REGISTRY)
        try:
            model, report = step(original, context)
        except ModelError as refusal:
            found.append((0.0, refusal.problem))
        else:
            assert places(model) == {"cpu"}
            found.append((error(network, model, original), [edit.layer for edit in report.edits]))
    (known, edits), (error_there, edits_there) = found
    assert edits_there == edits
    assert error_there <= MARGIN * known + ROUNDING


def test_a_model_that_lives_on_the_device_is_operated_there_and_shipped(device, tmp_path):
    model, x = NETWORK.model().to(device), NETWORK.inputs().to(device)
    batches = [batch.to(device) for batch in NETWORK.calibration()]
    recipe = {"name": "there", "passes": ["fold_batchnorm", {"kmeans": {"bits": 6}}, "quantize"]}
    recipe["export"] = ["onnx", "source", "pack"]
    operation = surgery.operate(model, x, recipe, data=batches, out=tmp_path, device=device, latency_rounds=0)
    assert places(model) == {device}
    assert operation.verification.passed, operation.verification.shortfalls
    for artifact in (tmp_path, tmp_path / "model.surgery"):
        assert error(NETWORK, surgery.load(artifact).cpu(), operation.model.cpu()) < ROUNDING


RECIPE = {"name": "three", "passes": ["fold_batchnorm", {"tucker": {"layer_macs": 0.7}}, {"kmeans": {"bits": 5}}]}


def run(out, device, resume=False, progress=lambda *_: None):
    operation = surgery.operate(
        *(NETWORK.model(), NETWORK.inputs(), RECIPE),
        data=NETWORK.calibration(),
        out=out,
        device=device,
        resume=resume,
        progress=progress,
        latency_rounds=0,
    )
    return operation, (out / "model.onnx").read_bytes()


def stopped(what: str, done: int, total: int) -> None:
    if what == "kmeans":
        raise KeyboardInterrupt


def test_a_run_on_the_device_is_resumed_with_the_same_bytes(device, tmp_path):
    _, whole = run(tmp_path / "whole", device)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", device, progress=stopped)
    assert run(tmp_path / "stopped", device, resume=True)[1] == whole


def test_a_run_that_stopped_on_the_device_goes_on_without_it(device, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, device, progress=stopped)
    operation, _ = run(tmp_path, "cpu", resume=True)
    assert operation.verification.passed


def test_verify_compares_the_device_with_the_processor(device):
    model = NETWORK.captured()
    proof = surgery.verify(model, copy.deepcopy(model).to(device), NETWORK.calibration())
    assert proof.passed
    assert len(proof.devices) == (device == "cuda")


def test_training_on_the_processor_and_on_the_device_follow_each_other(device):
    """accelerate keeps its device in the process."""
    original, found = NETWORK.captured(), []
    for place in ("cpu", device, "cpu"):
        context = Context(original, Data(NETWORK.calibration()), device=place, registry=REGISTRY)
        trained, _ = REGISTRY.find_pass("finetune")(epochs=2)(original, context)
        assert places(trained) == {"cpu"}
        found.append(surgery.tensors(trained))
    first, there, again = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    for name, value in first.items():
        torch.testing.assert_close(there[name], value, rtol=1e-2, atol=1e-3)


def test_tf32_does_not_reach_statistics(device):
    """Weights of 10 bits in place of 23 would shift these means by some 0.03."""
    model = surgery.capture(torch.nn.Conv1d(64, 64, 1), torch.rand(2, 64, 3))
    data = Data([torch.rand(64, 64, 3) + 100])
    collect = [Context(model, data, device=place).calibration.collect for place in ("cpu", device)]
    here, there = (found(model, surgery.layers(model), ("moments",)) for found in collect)
    (name,) = here
    torch.testing.assert_close(there[name].output.mean, here[name].output.mean, rtol=1e-5, atol=1e-3)
