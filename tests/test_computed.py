"""Weights computed in the graph: what `replace_weight` writes, what sees it, and that nothing is lost by it."""

from __future__ import annotations

import copy

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import surgery
from surgery import Context, Data, PluginError, export_onnx, export_source, load, replace_weight, weight_of
from surgery.captured import CapturedModel, capture
from surgery.export.runtime import runtime_session
from surgery.graph import Layer, layers
from surgery.measurement import measure
from surgery.parity import parity
from surgery.state import load_state, save_state


class Wirings(nn.Module):
    """Every kind of layer that can have a computed weight: modules, a functional call, one called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 3, padding="same", bias=False)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=2)
        self.w = nn.Parameter(torch.randn(4, 8, 1, 1))
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.norm(self.stem(x)).relu()))
        return self.head(F.conv2d(self.up(x), self.w).mean((2, 3)))


class Standardised(nn.Module):
    """Weight standardisation as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / w.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, w, self.conv.bias)


def masked(weight: Tensor) -> Tensor:
    return weight * (weight != 0)


@pytest.fixture
def captured() -> CapturedModel:
    torch.manual_seed(0)
    return capture(Wirings().eval(), torch.randn(2, 3, 8, 8))


def weighted(model: CapturedModel) -> list[Layer]:
    return [layer for layer in layers(model) if layer.type.startswith(("Conv", "Linear"))]


def pruned(model: CapturedModel) -> CapturedModel:
    """A copy whose weights below the 80 % quantile are zero and stay it."""
    result = surgery.snapshot(model)
    for layer in weighted(result):
        weight = weight_of(layer)
        kept = torch.where(weight.abs() > weight.abs().quantile(0.8), weight, 0)
        replace_weight(result, layer, masked, {"weight": nn.Parameter(kept)})
    result.recompile()
    return result


def clustered(model: CapturedModel) -> CapturedModel:
    """A copy whose weights are looked up among their different values; the same values."""
    result = surgery.snapshot(model)
    for layer in weighted(result):
        values, indices = weight_of(layer).unique(return_inverse=True)
        tensors = {"codebook": nn.Parameter(values), "indices": indices.to(torch.int16)}
        replace_weight(result, layer, lambda codebook, indices: codebook[indices.long()], tensors)
    result.recompile()
    return result


def run(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_a_single_tensor_takes_the_weights_name_so_the_state_dict_keeps_its_keys(captured):
    assert sorted(pruned(captured).state_dict()) == sorted(captured.state_dict())


def test_every_kind_of_layer_computes_with_the_weight_that_was_given(captured):
    x, model = captured.inputs.args[0], pruned(captured)
    plain = Wirings().eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(run(model, x), run(plain, x))


def test_a_weight_computed_from_several_tensors_has_them_below_the_layers_name(captured):
    model = clustered(captured)
    names = {layer.name: layer.computed for layer in weighted(model)}
    assert names["stem"] == ("stem.codebook", "stem.indices")
    assert names["w"] == ("w.codebook", "w.indices")
    assert [n for n in model.state_dict() if n.startswith("stem")] == ["stem.codebook", "stem.bias", "stem.indices"]


def test_a_computed_weight_can_be_replaced_by_another_expression_of_the_same_value(captured):
    x, once = captured.inputs.args[0], pruned(captured)
    twice = clustered(once)
    assert torch.equal(run(twice, x), run(once, x))
    assert not [name for name in twice.state_dict() if name.endswith(("stem.weight", "head.weight"))]


def test_an_expression_may_use_operators_with_several_results(captured):
    head = next(layer for layer in layers(captured) if layer.name == "head")
    weight = nn.Parameter(head.module.weight.detach())
    expected = run(captured, captured.inputs.args[0])
    replace_weight(captured, head, lambda weight: torch.cat(weight.split([2, 3])), {"weight": weight})
    captured.recompile()
    assert torch.equal(run(captured, captured.inputs.args[0]), expected)


def test_dense_gives_the_same_outputs_and_ordinary_layers(captured):
    x, model = captured.inputs.args[0], clustered(captured)
    dense = surgery.dense(model)
    assert torch.equal(run(dense, x), run(model, x))
    assert [n for n in dense.state_dict() if n != "w.weight"] == [n for n in captured.state_dict() if n != "w"]
    assert type(dense.get_submodule("up")) is nn.ConvTranspose2d
    assert not any(layer.computed for layer in layers(dense))
    assert surgery.dense(captured) is captured


def test_the_stand_in_has_the_computed_weight_and_its_values_only_when_they_are_read(captured):
    layer = next(layer for layer in layers(clustered(captured)) if layer.name == "up")
    weight = layer.module.weight
    assert weight.shape == captured.up.weight.shape
    assert weight.numel() == 128
    assert weight.requires_grad
    assert layer.module.stride == (2, 2)
    assert layer.module.groups == 2
    assert weight._known is None
    assert torch.equal(weight, captured.up.weight)
    assert type(weight + 0) is Tensor
    assert torch.equal(copy.deepcopy(layer.module).weight, captured.up.weight)


def test_other_passes_see_such_layers_and_leave_them_with_the_reason(captured):
    model = clustered(captured)
    stem = next(layer for layer in layers(model) if layer.name == "stem")
    reason = "its weight is computed from stem.codebook, stem.indices"
    assert surgery.sharing(model, stem) == reason
    assert surgery.sharing(model, stem, computed=True) is None
    step = surgery.Registry.load().find_pass("tucker")(rank=(2, 2), select=("stem",))
    _, report = step(model, Context(model))
    assert [(skip.layer, skip.why) for skip in report.skips] == [("stem", reason)]


def test_tensors_of_an_expression_that_others_read_too_are_shared(captured):
    model = clustered(captured)
    model.get_submodule("head").bias = model.get_submodule("up").bias = nn.Parameter(torch.zeros(8)[:5].clone())
    head = next(layer for layer in layers(model) if layer.name == "head")
    assert "conv_transpose2d" in (surgery.sharing(model, head, computed=True) or "")


def test_weights_that_the_users_own_code_computes_are_such_layers():
    model = capture(Standardised().eval(), torch.randn(2, 3, 8, 8))
    (layer,) = layers(model)
    assert (layer.name, layer.type, layer.computed) == ("conv", "Conv2d", ("conv.weight",))
    expected = run(model, model.inputs.args[0])
    assert torch.equal(run(surgery.dense(model), model.inputs.args[0]), expected)
    weight = weight_of(layer)
    assert torch.allclose(weight.mean((1, 2, 3)), torch.zeros(4), atol=1e-6)


def test_gradients_reach_what_is_trained_and_a_zero_stays_zero(captured):
    model = pruned(captured).train()
    weights = {layer.name: model.get_parameter(layer.computed[0]) for layer in weighted(model)}
    zero = {name: weight == 0 for name, weight in weights.items()}
    optimiser = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0.1)
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    for _ in range(3):
        optimiser.zero_grad()
        model(captured.inputs.args[0]).square().sum().backward()
        optimiser.step()
    for name, weight in weights.items():
        assert bool((weight[zero[name]] == 0).all())
        assert bool((weight[~zero[name]] != before[name][~zero[name]]).all())


def test_state_and_source_come_back_bit_for_bit(captured, tmp_path):
    x, model = captured.inputs.args[0], clustered(captured)
    save_state(model, tmp_path / "state")
    export_source(model, tmp_path)
    assert torch.equal(run(load_state(tmp_path / "state"), x), run(model, x))
    assert torch.equal(run(load(tmp_path), x), run(model, x))


def test_the_onnx_file_stays_small_and_the_runtime_computes_the_weight_once(tmp_path):
    torch.manual_seed(0)
    model = capture(nn.Sequential(nn.Linear(512, 256)).eval(), torch.randn(2, 512))
    (layer,) = layers(model)
    codebook, indices = nn.Parameter(torch.randn(16)), torch.randint(0, 16, (256, 512), dtype=torch.uint8)
    tensors = {"codebook": codebook, "indices": indices}
    replace_weight(model, layer, lambda codebook, indices: codebook[indices.long()], tensors)
    model.recompile()
    path = export_onnx(model, model.inputs, tmp_path / "model.onnx")
    assert path.stat().st_size < 256 * 512 + 8192
    assert parity(model, path, [model.inputs]).passed
    assert _types_after_loading(path, tmp_path) == {"Gemm"}


def _types_after_loading(path, folder) -> set[str]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return {node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node}


def test_a_masked_weight_is_an_ordinary_one_in_the_onnx_file(captured, tmp_path):
    path = export_onnx(pruned(captured), captured.inputs, tmp_path / "model.onnx")
    types = {node.op_type for node in onnx.load(path).graph.node}
    assert not types & {"Equal", "Not", "Where", "Cast"}
    assert len(runtime_session(path)(captured.inputs)) == 1


def test_calibration_sees_what_the_dense_model_gives_it(captured):
    model = clustered(captured)
    data = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    context = Context(captured, Data(calibration=data))
    here = context.calibration.collect(model, weighted(model), ("gram",))
    plain = surgery.dense(model)
    there = context.calibration.collect(plain, weighted(plain), ("gram",))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name].unfolded.gram, there[name].unfolded.gram) for name in here)


def test_stored_bytes_count_what_a_computed_weight_is_made_from(captured):
    model = clustered(captured)
    expected = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert measure(model, model.inputs).stored_bytes == expected
    assert measure(model, model.inputs).macs == measure(captured, captured.inputs).macs


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda weight: weight[:1] * 1, r"is \(1, 3, 3, 3\)"),
        (lambda weight: weight.double(), "float64"),
        (lambda weight: weight.mul(1).add_(1), "writes in place"),
        (lambda weight: weight + FOREIGN, "not among those given"),
    ],
)
def test_an_expression_that_a_graph_cannot_hold_is_refused_and_nothing_changes(captured, function, message):
    before = captured.code
    stem = next(layer for layer in layers(captured) if layer.name == "stem")
    with pytest.raises(PluginError, match=message):
        replace_weight(captured, stem, function, {"weight": nn.Parameter(stem.module.weight.detach())})
    captured.recompile()
    assert captured.code == before


FOREIGN = torch.randn(8, 3, 3, 3)


def test_a_layer_of_another_kind_is_refused(captured):
    norm = next(layer for layer in layers(captured) if layer.name == "norm")
    with pytest.raises(PluginError, match="BatchNorm2d has no weight that could be computed"):
        replace_weight(captured, norm, masked, {"weight": nn.Parameter(torch.ones(8))})


class TiedThroughAFunction(nn.Module):
    """A weight that a layer has, and that the graph computes another one from."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.enc(x).relu(), self.enc.weight.t())


def test_a_weight_computed_from_that_of_a_layer_leaves_the_layer_its_own() -> None:
    captured = capture(TiedThroughAFunction().eval(), x := torch.randn(2, 6))
    made = surgery.dense(captured)
    assert torch.equal(made(x), captured(x))
    assert sorted(name for name, _ in made.named_parameters()) == ["enc.bias", "enc.weight", "enc_linear_1.weight"]
    operation = surgery.operate(captured, x, "fold_only", latency_rounds=0)
    assert operation.passed
