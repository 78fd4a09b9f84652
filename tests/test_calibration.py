from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery.calibration import Affine, Aim, Calibration, Statistics, Step
from surgery.calibration.moments import Regression, Scatter
from surgery.calibration.ranges import RunningHistogram
from surgery.calibration.unfolding import output_rows, unfold, weight_from_matrix, weight_matrix
from surgery.captured import CapturedModel, capture
from surgery.contract import snapshot
from surgery.errors import InputError, PluginError
from surgery.graph import Layer, layers
from surgery.replacement import replace_layer


class Counted:
    """Batches that count how often they are iterated."""

    def __init__(self, *batches: Any) -> None:
        self.batches, self.rounds = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.rounds += 1
        return iter(self.batches)


def captured(model: nn.Module, *size: int) -> CapturedModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return capture(model, torch.randn(2, *size))


def statistics_of(model: CapturedModel, batches: Any, *want: Any, **options: Any) -> dict[str, Statistics]:
    return Calibration(batches, original=model, **options).collect(model, layers(model), want)


def geometry(draw: Callable[[st.SearchStrategy[Any]], Any]) -> tuple[nn.Module, Tensor]:
    rank, groups, transposed = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.booleans())
    sizes = st.integers(1, 3)
    kernel, stride, dilation = ([draw(sizes) for _ in range(rank)] for _ in range(3))
    padding: Any = [draw(st.integers(0, 2)) for _ in range(rank)]
    options: dict[str, Any] = {"dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["output_padding"] = [min(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
    elif draw(st.booleans()):
        padding, stride = draw(st.sampled_from(["same", "valid"])), [1] * rank
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")
    module = kind(2 * groups, 3 * groups, kernel, stride, padding, **options)
    return module, torch.randn(2, 2 * groups, *[draw(st.integers(8, 9)) for _ in range(rank)])


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=100, deadline=None)
@given(st.data(), st.sampled_from([1, 2**10, 2**14, 2**23]))
def test_every_convolution_is_a_matrix_product_on_its_unfolded_input(data: st.DataObject, limit: int) -> None:
    module, x = geometry(data.draw)
    matrix = weight_matrix(module)
    expected = module(x)
    chunks = list(unfold(module, x, limit))
    y = torch.cat(chunks, 1) @ matrix.mT
    bias = 0 if module.bias is None else module.bias.view(len(y), 1, -1)
    torch.testing.assert_close(y + bias, output_rows(module, expected), rtol=1e-4, atol=1e-5)
    assert torch.equal(weight_from_matrix(module, matrix), module.weight)
    line = output_rows(module, expected).shape[1] // (len(x) * expected.shape[2])
    assert all(c.numel() * 4 <= limit or c.shape[1] == line for c in chunks)


def test_moments_equal_those_of_the_whole_data() -> None:
    model = captured(
        nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, groups=2), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 5)), 4, 8, 8
    )
    x = torch.randn(7, 4, 8, 8)
    found = statistics_of(model, list(x.split(3)), "gram", "moments", chunk_bytes=2000)
    conv = model.get_submodule("0")
    for index, channels in enumerate(x.chunk(2, 1)):
        rows = F.unfold(channels, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1).double()
        torch.testing.assert_close(found["0"].unfolded.gram[index], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(
            found["0"].unfolded.covariance[index], rows.T.cov(correction=0), rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(found["0"].unfolded.mean[index], rows.mean(0), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["0"].unfolded.power[index], rows.square().mean(0), rtol=1e-5, atol=1e-6)
    y = conv(x).transpose(0, 1).flatten(1).double()
    torch.testing.assert_close(found["0"].output.mean, y.mean(1)[None], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["0"].output.variance, y.var(1, correction=0)[None], rtol=1e-5, atol=1e-6)
    rows = conv(x).relu().flatten(0, 1).flatten(1).double()
    torch.testing.assert_close(found["3"].unfolded.gram[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    assert found["3"].unfolded.count == 42


def test_large_means_do_not_spoil_the_covariance() -> None:
    scatter = Scatter(full=True)
    rows = torch.randn(5000, 3) + 10_000
    for chunk in rows.split(999):
        scatter.add(chunk.unsqueeze(0))
    torch.testing.assert_close(
        scatter.finish().full_covariance[0], rows.double().T.cov(correction=0), rtol=1e-5, atol=1e-5
    )


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.linear(self.linear(x).relu()) + x))


def test_calls_of_one_layer_add_up() -> None:
    model, x = captured(Twice(), 4), torch.randn(6, 4)
    calibration = Calibration([x], original=model)
    linear = next(layer for layer in layers(model) if layer.name == "linear")
    found = calibration.collect(model, [linear], ("mean",))["linear"].unfolded
    rows = torch.cat([x, model.get_submodule("linear")(x).relu()]).double()
    torch.testing.assert_close(found.mean[0], rows.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.variance[0], rows.var(0, correction=0), rtol=1e-5, atol=1e-6)


def test_ranges_and_histograms_of_layers_and_nodes() -> None:
    model, x = captured(Twice(), 4), torch.randn(50, 4) * torch.tensor([0.01, 1, 10, 100])
    calibration = Calibration(list(x.split(7)), original=model)
    linear = calibration.collect(model, layers(model)[:1], ("ranges", "histograms"))["linear"]
    first = model.get_submodule("linear")(x).detach()
    seen = torch.cat([x, first.relu()])
    assert linear.input_range.low == pytest.approx(float(seen.min()))
    torch.testing.assert_close(linear.input_range.channel_high, seen.amax(0).double())
    histogram = linear.input_histogram
    assert torch.equal(histogram.counts, torch.histogram(seen.double(), histogram.edges).hist.long())
    node = next(n for n in model.graph.nodes if "relu" in n.name)
    of_node = calibration.collect(model, [node], ("ranges", "histograms", "moments"))[node.name]
    assert of_node.input_range is None
    assert of_node.output_range.high == pytest.approx(float(first.relu().max()))
    torch.testing.assert_close(of_node.output.mean[0], first.relu().double().mean(0), rtol=1e-5, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), max_size=20), min_size=1, max_size=5))
def test_histograms_count_every_value_in_its_bin_however_the_range_grows(chunks: list[list[float]]) -> None:
    running = RunningHistogram()
    for chunk in chunks:
        running.add(torch.tensor([*chunk, torch.inf, torch.nan]))
    result = running.finish()
    values = torch.tensor([v for chunk in chunks for v in chunk], dtype=torch.float64)
    expected = torch.zeros_like(result.counts)
    for index in torch.bucketize(values, result.edges, right=True) - 1:
        expected[index] += 1
    assert torch.equal(result.counts, expected)


def test_attention_masks_do_not_count_in_ranges() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(x.masked_fill(x > 0, -torch.inf), -1)

    model, x = captured(Masked(), 5), -torch.rand(3, 5)
    x[:, 0] = 1
    node = next(n for n in model.graph.nodes if "masked_fill" in n.name)
    found = Calibration([x], original=model).collect(model, [node], ("ranges", "histograms"))[node.name]
    assert found.output_range.low == pytest.approx(float(x.min()))
    assert int(found.output_histogram.counts.sum()) == 12


def test_the_data_is_read_once_for_all_layers_and_then_remembered() -> None:
    model, batches = captured(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), 3), Counted(torch.randn(4, 3))
    calibration = Calibration(batches, original=model)
    first = calibration.collect(model, layers(model), ("gram",))
    assert calibration.collect(snapshot(model), layers(model), ("gram", "mean")) == first
    assert batches.rounds == 1
    calibration.collect(model, layers(model), ("gram", "ranges"))
    assert batches.rounds == 2


def test_an_edited_model_has_new_statistics() -> None:
    model, batches = captured(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), 3), Counted(torch.randn(4, 3))
    calibration = Calibration(batches, original=model)
    before = calibration.collect(model, layers(model), ("gram",))["1"].unfolded
    edited = snapshot(model)
    edited.get_submodule("0").weight = nn.Parameter(torch.zeros(3, 3))
    assert not torch.equal(calibration.collect(edited, layers(edited), ("gram",))["1"].unfolded.gram, before.gram)
    assert torch.equal(calibration.collect(model, layers(model), ("gram",))["1"].unfolded.gram, before.gram)
    assert batches.rounds == 2


def test_covariances_keep_to_the_memory_limit() -> None:
    model = captured(nn.Sequential(*(nn.Linear(10, 10) for _ in range(6))), 10)
    batches, one = Counted(torch.randn(4, 10)), 10 * 10 * 8
    calibration = Calibration(batches, original=model, gram_bytes=2 * one)
    held = lambda: sum(s.gram_bytes for _, known in calibration._cache for s in known.values())  # noqa: E731
    for _ in calibration.stream(model, layers(model), ("gram",)):
        assert held() <= 2 * one
    assert batches.rounds == 3
    calibration.collect(model, layers(model)[-2:], ("gram",))
    assert batches.rounds == 3
    calibration.collect(model, layers(model)[:1], ("gram",))
    assert batches.rounds == 4
    assert held() <= 2 * one


def test_editing_while_statistics_stream_is_refused() -> None:
    model = captured(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 4)
    calibration = Calibration([torch.randn(4, 4)], original=model, gram_bytes=1)
    stream = calibration.stream(model, layers(model), ("gram",))
    next(stream)
    model.get_submodule("0").weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(PluginError, match="edited while"):
        next(stream)


def test_samples_limit_what_is_used() -> None:
    model, x = captured(nn.Sequential(nn.Linear(3, 2)), 3), torch.randn(10, 3)
    found = statistics_of(model, list(x.split(4)), "mean", samples=6)["0"].unfolded
    assert found.count == 6
    torch.testing.assert_close(found.mean[0], x[:6].double().mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = (
        capture(nn.Sequential(nn.Conv1d(2, 3, 3)).to(dtype), torch.randn(2, 2, 9, dtype=dtype)),
        torch.randn(5, 2, 9),
    )
    found = statistics_of(model, [x.to(dtype)], "gram", "histograms")["0"]
    rows = next(unfold(nn.Conv1d(2, 3, 3), x.to(dtype).double(), 2**20))[0]
    torch.testing.assert_close(found.unfolded.gram[0], rows.T @ rows / len(rows), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batches", "problem", "place"),
    [
        ([], "has no batches", ""),
        ([torch.ones(2, 3), torch.tensor([[1, torch.nan, 2]])], "input input holds NaN", "calibration batch 1"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "dimension 1 is fixed at 3", "calibration batch 1"),
        ([torch.ones(2, 3).double()], "input input is torch.float64", "calibration batch 0"),
        ([torch.ones(0, 3)], "input input is empty, (0, 3)", "calibration batch 0"),
        ([(torch.ones(2, 3), torch.ones(2))], "do not fit", "calibration batch 0"),
        ([torch.full((2, 3), 3e38)], "0 computes with NaN or infinity", "calibration batch 0"),
    ],
)
def test_unusable_data_is_named(batches: list[Any], problem: str, place: str) -> None:
    model = captured(nn.Sequential(nn.Linear(3, 2)), 3)
    model.get_submodule("0").weight = nn.Parameter(torch.full((2, 3), 100.0))
    with pytest.raises(InputError) as error:
        statistics_of(model, batches, "moments")
    assert problem in error.value.problem
    assert error.value.at == place
    assert error.value.fix


def test_a_fixed_batch_size_is_held_to() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + torch.arange(4.0).view(4, 1)

    model = capture(Fixed(), torch.randn(4, 3))
    assert not model.dynamic_batch
    with pytest.raises(InputError, match="batch is fixed at"):
        statistics_of(model, [torch.randn(2, 3)], "mean")


class KeywordOnly(Twice):
    def forward(self, x: Tensor, *, scale: float = 2.0, shift: Tensor) -> Tensor:
        return self.linear(x * scale + shift)


def test_arguments_by_keyword_fit_whatever_form_the_batch_has() -> None:
    x, shift = torch.randn(2, 4), torch.randn(2, 4)
    model = capture(KeywordOnly(), {"shift": shift, "x": x})
    by_name = statistics_of(model, [{"x": x, "shift": shift}, {"shift": shift, "x": x}], "mean")["linear"]
    in_order = statistics_of(model, [(x, shift), model.inputs], "mean")["linear"]
    rows = (x * 2 + shift).double()
    torch.testing.assert_close(by_name.unfolded.mean[0], rows.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(by_name.unfolded.mean, in_order.unfolded.mean)


@pytest.mark.parametrize("want", ["gram", "moments", "ranges"])
def test_a_layer_that_an_edit_has_taken_away_is_named(want: Any) -> None:
    model = captured(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), 3, 8, 8)
    gone = layers(model)[0]
    replace_layer(model, gone, {"a": nn.Conv2d(3, 4, 3), "b": nn.ReLU()})
    model.recompile()
    with pytest.raises(PluginError, match="0 is no longer called in this model"):
        Calibration([torch.randn(2, 3, 8, 8)], original=model).collect(model, [gone], [want])


def test_layers_without_an_unfolded_input_are_refused() -> None:
    model = captured(Twice(), 4)
    with pytest.raises(PluginError, match="unfolded input of LayerNorm"):
        statistics_of(model, [torch.randn(2, 4)], "gram")


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x * 2
        return self.head(self.second(self.first(x).relu()) + shortcut)


def swept(calibration: Calibration, model: CapturedModel, layer: Layer, aim: Aim | None = None) -> Regression:
    """The task of one layer, by default towards what its own step says."""
    step = Affine(layer, None, layer.nodes[0]).step() if aim is None else Step(layer, aim)
    [task] = calibration.sweep(model, [step])
    return task.regression


def test_a_sweep_gives_the_regression_from_operated_inputs_to_original_outputs() -> None:
    torch.manual_seed(0)
    original, x = captured(Residual(), 4), torch.randn(64, 4)
    operated = snapshot(original)
    operated.get_submodule("first").weight = nn.Parameter(torch.randn(6, 4))
    second = next(layer for layer in layers(operated) if layer.name == "second")
    calibration = Calibration(list(x.split(10)), original=original, chunk_bytes=100)
    assert Affine(second, None, second.nodes[0]).step().aim.minus == ("mul",)
    task = swept(calibration, operated, second)
    rows = operated.get_submodule("first")(x).relu().detach().double()
    y = original.get_submodule("second")(original.get_submodule("first")(x).relu()).detach().double()
    design = torch.cat([rows, torch.ones(64, 1)], 1)
    solution = torch.linalg.lstsq(design, y).solution
    weight = task.solve(second.module.weight[None], ridge=1e-9)
    torch.testing.assert_close(weight[0], solution[:-1].T, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(task.bias(weight)[0], solution[-1], rtol=1e-3, atol=1e-4)
    by_hand = float((y - design @ solution).norm() / (y - y.mean(0)).norm())
    assert task.error(weight, task.bias(weight)) == pytest.approx(by_hand, rel=1e-4)
    rest = y - second.module(rows.float()).detach()
    assert task.error(second.module.weight[None], second.module.bias[None]) == pytest.approx(
        float(rest.norm() / (y - y.mean(0)).norm()), rel=1e-4
    )


def fitted(x: Tensor, y: Tensor) -> Regression:
    scatter = Scatter(True)
    scatter.add(torch.cat([x, y], 1).unsqueeze(0))
    return Regression.of(scatter.finish(), x.shape[1])


def test_few_rows_are_not_fitted_by_heart() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4096, 64, generator=generator, dtype=torch.float64)
    truth = torch.randn(8, 64, generator=generator, dtype=torch.float64) / 8
    y = x @ truth.T + torch.randn(4096, 8, generator=generator, dtype=torch.float64)
    few, all_rows, start = fitted(x[:80], y[:80]), fitted(x, y), truth[None] * 0.9
    by_heart, damped = few.solve(start, 1e-4), few.solve(start)
    assert few.error(by_heart, few.bias(by_heart)) < few.error(damped, few.bias(damped))
    assert all_rows.error(damped, few.bias(damped)) < all_rows.error(by_heart, few.bias(by_heart))


@pytest.mark.parametrize("ridge", [None, 1e-4])
def test_features_that_hardly_vary_do_not_become_large_weights(ridge: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 1 + 1e-6 * torch.randn(256, 16, generator=generator, dtype=torch.float64)
    y = torch.randn(256, 4, generator=generator, dtype=torch.float64)
    start = torch.randn(1, 4, 16, generator=generator, dtype=torch.float64)
    assert float((fitted(x, y).solve(start, ridge) - start).abs().max()) < 1
    assert float(fitted(x * 0, y).damping(ridge)) > 0


def test_a_layer_before_a_sum_aims_at_making_up_for_the_shortcut_too() -> None:
    original, x = captured(Residual(), 4), torch.randn(32, 4)
    operated = snapshot(original)
    scale = next(n for n in operated.graph.nodes if n.name == "mul")
    scale.args = (scale.args[0], 3)
    second = next(layer for layer in layers(operated) if layer.name == "second")
    task = swept(Calibration([x], original=original), operated, second)
    wanted = original.get_submodule("second")(original.get_submodule("first")(x).relu()) - x
    torch.testing.assert_close(task.y_mean[0], wanted.double().mean(0), rtol=1e-5, atol=1e-5)


def test_aims_can_be_given_for_layers_with_fewer_channels() -> None:
    original, x = captured(Residual(), 4), torch.randn(32, 4)
    operated = snapshot(original)
    first, head = operated.get_submodule("first"), operated.get_submodule("second")
    keep = torch.tensor([0, 2, 5])
    operated.get_submodule("first").weight = nn.Parameter(first.weight[keep])
    operated.get_submodule("first").bias = nn.Parameter(first.bias[keep])
    head.weight = nn.Parameter(head.weight[:, keep])
    layer = layers(operated)[0]
    calibration = Calibration([x], original=original)
    task = swept(calibration, operated, layer, Aim(layer.nodes[0].name, keep={1: keep}))
    torch.testing.assert_close(
        task.y_mean[0], original.get_submodule("first")(x)[:, keep].double().mean(0), rtol=1e-5, atol=1e-5
    )
