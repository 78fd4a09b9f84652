"""The pass kmeans: which layers, what it reports, training, ONNX, and bad input."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from surgery_plugins.kmeans import Kmeans
from surgery_plugins.kmeans.packing import packed_bytes
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Context, Data, InputError, PassError, PassReport, RecipeError, Registry, capture
from surgery.recipe import resolve


class Net(nn.Module):
    """A BatchNorm behind one convolution and none behind the others; a functional layer, one of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 32, 3, groups=2)
        self.up = nn.ConvTranspose2d(32, 16, 2, groups=2)
        self.free = nn.Parameter(torch.randn(24, 16) / 4)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.norm(self.conv(x))
        x = self.up(self.grouped(x.relu()).relu())
        return self.head(F.linear(x.mean((2, 3)), self.free).relu())


def net() -> Net:
    torch.manual_seed(0)
    made = Net().eval()
    made.norm.running_mean.normal_(0, 0.1)
    made.norm.running_var.uniform_(0.2, 3)
    return made


@cache
def captured_net() -> CapturedModel:
    return capture(net(), images()[0][:2])


def images(count: int = 128, seed: int = 1) -> list[Tensor]:
    small = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(F.interpolate(small, size=(10, 10), mode="bilinear").split(64))


def apply(step: Kmeans, model: nn.Module, data: Any = None) -> tuple[CapturedModel, CapturedModel, PassReport]:
    before = model if isinstance(model, CapturedModel) else capture(model.eval(), images()[0][:2])
    after, report = step(before, Context(before, Data.of(data)))
    return before, after, report


def weights(model: CapturedModel) -> dict[str, Tensor]:
    found = {layer.name: layer for layer in surgery.layers(model) if layer.type.startswith(("Conv", "Linear"))}
    return {name: surgery.weight_of(layer) for name, layer in found.items()}


def reasons(report: PassReport) -> dict[str, str]:
    return {skip.layer: skip.why for skip in report.skips}


def linear(inputs: int = 40, outputs: int = 30) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, outputs))


def on(model: nn.Module, step: Kmeans, *inputs: int) -> tuple[CapturedModel, PassReport]:
    captured = capture(model.eval(), torch.randn(2, *(inputs or (40,))))
    return step(captured, Context(captured))


# --- what it makes ---


@pytest.mark.parametrize("data", [None, images()], ids=["weight", "output"])
@pytest.mark.parametrize("bits", [2, 3])
def test_every_layer_has_no_more_values_than_the_codebook(bits: int, data: Any) -> None:
    before, after, report = apply(Kmeans(bits=bits), captured_net(), data)
    assert [edit.layer for edit in report.edits] == ["stem", "conv", "grouped", "up", "free", "head"]
    for name, weight in weights(after).items():
        assert len(weight.unique()) <= 2**bits
        assert weight.shape == weights(before)[name].shape
    assert len(apply(Kmeans(bits=bits), after, data)[2].skips) == 6


@pytest.mark.parametrize("options", [{}, {"per": "channels", "size": 5}, {"per": "block", "size": 100}])
def test_the_reported_weight_error_and_bits_are_those_of_the_result(options: dict[str, Any]) -> None:
    before, after, report = apply(Kmeans(bits=2, **options), captured_net())
    state = after.state_dict()
    for edit in report.edits:
        old, new = weights(before)[edit.layer], weights(after)[edit.layer]
        assert edit.numbers["weight_error"] == pytest.approx(float((new - old).norm() / old.norm()), rel=1e-4)
        held = [state[f"{edit.layer}.{part}"] for part in ("codebook", "indices")]
        assert edit.numbers["bits_per_weight"] == pytest.approx(8 * sum(t.nbytes for t in held) / old.numel())


@pytest.mark.parametrize(
    ("options", "span"), [({"per": "channels", "size": 3}, 3 * 40), ({"per": "block", "size": 77}, 77)]
)
def test_groups_have_codebooks_of_their_own_and_the_last_may_be_shorter(options: dict[str, Any], span: int) -> None:
    model = linear(40, 31)
    after, report = on(model, Kmeans(bits=2, **options))
    weight = after.get_parameter("0.codebook")
    parts = surgery.weight_of(surgery.layers(after)[0]).flatten().split(span)
    assert weight.shape == (len(parts), 4)
    assert all(len(part.unique()) <= 4 for part in parts)
    whole = on(model, Kmeans(bits=2))[1].edits[0].numbers["weight_error"]
    assert report.edits[0].numbers["weight_error"] < whole


def test_a_size_beyond_the_layer_is_one_codebook() -> None:
    for options in ({"per": "channels", "size": 31}, {"per": "block", "size": 10**9}):
        after, _ = on(linear(), Kmeans(bits=2, **options))
        assert after.get_parameter("0.codebook").shape == (1, 4)


def test_the_output_metric_lowers_the_error_of_outputs() -> None:
    x, model, errors = torch.cat(images(seed=5)), net(), []
    for data in (None, images(512)):
        _, after, _ = apply(Kmeans(bits=2), model, data)
        with torch.no_grad():
            errors.append(float((after(x) - model(x)).norm() / (model(x) - model(x).mean(0)).norm()))
    assert errors[1] < 0.7 * errors[0]


def test_the_reported_output_error_is_that_of_the_layer() -> None:
    data, model = images(), net()
    _, after, report = apply(Kmeans(bits=2, select=("stem",)), model, data)
    x = torch.cat(data)
    with torch.no_grad():
        bias = after.get_parameter("stem.bias")
        ours = F.conv2d(x, weights(after)["stem"], bias, padding=1)
        theirs = model.stem(x)
    spread = theirs - theirs.mean((0, 2, 3), keepdim=True)
    assert report.edits[0].numbers["output_error"] == pytest.approx(
        float((ours - theirs).norm() / spread.norm()), rel=1e-3
    )


def test_more_bits_leave_less_error_and_the_optimum_the_least() -> None:
    errors = [on(linear(), Kmeans(bits=bits))[1].edits[0].numbers["weight_error"] for bits in (1, 2, 4, 6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.03
    starts = ("exact", "optimal", "density", "linear", "random")
    by_start = [on(linear(), Kmeans(bits=3, start=start))[1].edits[0].numbers["weight_error"] for start in starts]
    assert by_start[0] == min(by_start)
    assert by_start[1] <= by_start[0] * 1.005


def test_equal_seeds_give_equal_models() -> None:
    model = capture(linear(), torch.randn(2, 40))
    made = [
        Kmeans(bits=3, start="random")(model, Context(model, seed=seed))[0].get_parameter("0.codebook")
        for seed in (1, 1, 2)
    ]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


# --- zeros, training, tying ---


def pruned(share: float = 0.7) -> nn.Sequential:
    model = linear()
    weight = model[0].weight.data
    weight[weight.abs() < weight.abs().quantile(share)] = 0
    return model


@pytest.mark.parametrize("data", [None, [torch.randn(200, 40)]], ids=["weight", "output"])
def test_zeros_stay_zero_and_under_training_too(data: Any) -> None:
    model = pruned()
    captured = capture(model.eval(), torch.randn(2, 40))
    after, _ = Kmeans(bits=3)(captured, Context(captured, Data.of(data)))
    zero = model[0].weight == 0
    assert after.get_parameter("0.codebook").shape == (1, 7)
    assert bool((weights(after)["0"][zero] == 0).all())
    after.train()
    optimiser = torch.optim.SGD(after.parameters(), lr=0.1)
    (after(torch.randn(8, 40)) - 1).square().mean().backward()
    optimiser.step()
    trained = weights(after)["0"]
    assert bool((trained[zero] == 0).all())
    assert len(trained.unique()) <= 8


def test_weights_that_were_pruned_are_swept_like_others_and_keep_their_zeros() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(linear(40, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    data = [torch.randn(256, 40) @ torch.randn(40, 40) for _ in range(2)]
    context = Context(captured := capture(model, data[0][:2]), Data.of(data))
    prune = Registry.load().find_pass("prune_weights")
    sparse, _ = prune(sparsity=0.7)(captured, context)  # type: ignore[call-arg]
    errors = {}
    for metric in ("weight", "output"):
        after, report = Kmeans(bits=2, metric=metric)(sparse, context)  # type: ignore[arg-type]
        errors[metric] = float((after(data[0]) - sparse(data[0])).norm() / sparse(data[0]).norm())
        dense = {layer.name: layer.module.weight == 0 for layer in surgery.layers(sparse)}
        assert all(bool((layer.module.weight[dense[layer.name]] == 0).all()) for layer in surgery.layers(after))
        assert len(report.edits) == 3
    assert errors["output"] < 0.8 * errors["weight"]


def test_trained_quantisation_fits_codebooks_and_leaves_the_indices() -> None:
    model = linear()
    after, _ = on(model, Kmeans(bits=2))
    indices = after.get_buffer("0.indices").clone()
    x = torch.randn(256, 40)
    wanted = 1.5 * model(x).detach()
    optimiser = torch.optim.Adam(after.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = (after(x) - wanted).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(after.get_buffer("0.indices"), indices)
    assert len(weights(after)["0"].unique()) == 4


def test_frozen_weights_make_frozen_codebooks() -> None:
    model = linear()
    model[0].weight.requires_grad_(False)
    assert not on(model, Kmeans())[0].get_parameter("0.codebook").requires_grad


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(40, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x).relu())


@pytest.mark.parametrize("data", [None, [torch.randn(50, 40)]], ids=["weight", "output"])
def test_a_layer_that_is_called_twice_is_looked_up_at_both_calls(data: Any) -> None:
    torch.manual_seed(0)
    captured = capture(Twice().eval(), torch.randn(2, 40))
    after, report = Kmeans(bits=3)(captured, Context(captured, Data.of(data)))
    (layer,) = surgery.layers(after)
    assert (len(layer.nodes), [edit.layer for edit in report.edits]) == (2, ["layer"])
    twin = Twice().eval()
    twin.layer.weight.data, twin.layer.bias.data = weights(after)["layer"], after.get_parameter("layer.bias").data
    x = torch.randn(4, 40)
    torch.testing.assert_close(after(x), twin(x))


def test_tied_weights_are_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 40))
    model[2].weight = model[0].weight
    _, report = on(model, Kmeans())
    assert "shares its parameters with" in reasons(report)["0"]
    assert not report.edits


# --- what is left, and bad input ---


def test_few_different_values_are_kept_without_loss_in_fewer_bits() -> None:
    model = linear()
    model[0].weight.data = model[0].weight.data.mul(12).round() / 12
    count = len(model[0].weight.unique())
    assert 4 < count < 8
    after, report = on(model, Kmeans(bits=8))
    assert torch.equal(weights(after)["0"], model[0].weight)
    assert report.edits[0].what == f"its {count} different values in a codebook, without loss"
    assert len(after.get_buffer("0.indices")) == packed_bytes(1200, 3)


def test_neighbouring_numbers_are_told_apart() -> None:
    model, two = linear(), torch.tensor([1.0, 1.0 + 2**-23])
    model[0].weight.data = two[torch.randint(0, 2, (30, 40))]
    assert torch.equal(weights(on(model, Kmeans())[0])["0"], model[0].weight)


def test_constant_and_small_layers_are_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(40, 6), nn.ReLU(), nn.Linear(6, 2))
    model[0].weight.data.fill_(0.5)
    _, report = on(model, Kmeans(bits=4))
    assert reasons(report) == {
        "0": "all its weights are 0.5",
        "2": "indices and codebook would take 70 bytes, its weight takes 48",
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    captured = capture(model.eval(), torch.zeros(2, 40))
    captured.get_parameter("1.weight").data[3, 4] = bad
    with pytest.raises(PassError, match="1: its weight holds NaN or infinity") as caught:
        Kmeans()(captured, Context(captured))
    assert caught.value.fix
    assert not any(layer.computed for layer in surgery.layers(captured))


def test_the_output_metric_without_data_is_refused() -> None:
    with pytest.raises(InputError, match="kmeans needs calibration data"):
        on(linear(), Kmeans(metric="output"))


@pytest.mark.parametrize(
    "options", [{"bits": 0}, {"bits": 9}, {"bits": 2.5}, {"size": 0, "per": "block"}, {"start": "x"}]
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        resolve({"name": "x", "passes": [{"kmeans": options}]}, Registry.load())


def test_a_size_for_the_whole_layer_is_refused() -> None:
    with pytest.raises(RecipeError, match="size: 8 says how much"):
        Kmeans(size=8)


# --- ONNX ---


@pytest.mark.parametrize(("rows", "folded"), [((3,), ["Gemm"]), ((2, 3), ["MatMul", "Add"])])
def test_the_file_holds_little_more_than_the_indices_and_the_runtime_folds_them(
    tmp_path: Any, rows: tuple[int, ...], folded: list[str]
) -> None:
    torch.manual_seed(0)
    after, _ = on(nn.Sequential(nn.Linear(512, 1024)), Kmeans(bits=3), *rows[1:], 512)
    path = surgery.export_onnx(after, after.inputs, tmp_path / "model.onnx")
    assert path.stat().st_size < 1.1 * packed_bytes(512 * 1024, 3)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "folded.onnx"), 3
    session = onnxruntime.InferenceSession(path, options)
    import onnx

    assert [node.op_type for node in onnx.load(tmp_path / "folded.onnx").graph.node] == folded
    x = torch.randn(*rows, 512)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), after(x), rtol=1e-5, atol=1e-5)
