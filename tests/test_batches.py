"""Batches of any size, the last one smaller, wherever a model moves the batch to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery import Context, Data, Registry
from surgery.calibration import Calibration
from surgery.captured import capture
from surgery.graph import batch_dims

LENGTH, WIDTH = 6, 5


class Hidden(nn.Module):
    """The state of a recurrence, (layers, batch, features)."""

    def __init__(self):
        super().__init__()
        self.lstm, self.linear = nn.LSTM(WIDTH, 8, 2, batch_first=True), nn.Linear(8, 8)
        self.leave = nn.Linear(8, 4)

    def forward(self, x):
        state = self.lstm(x)[1][0]
        return self.leave(torch.relu(self.linear(state[-1])))


class TimeFirst(nn.Module):
    """Attention over (length, batch, features)."""

    def __init__(self):
        super().__init__()
        self.enter, self.attend = nn.Linear(WIDTH, 8), nn.MultiheadAttention(8, 2)
        self.hidden, self.leave = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x):
        y = torch.relu(self.enter(x.permute(1, 0, 2)))
        y = y + self.attend(y, y, y, need_weights=False)[0]
        return self.leave(torch.relu(self.hidden(y))).mean(0)


class Flattened(nn.Module):
    """Batch and length in one dimension."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, 8), nn.Linear(8, 3)

    def forward(self, x):
        y = torch.relu(self.enter(x.reshape(-1, WIDTH)))
        return self.leave(y).view(-1, LENGTH, 3).sum(1)


NETWORKS = {cls.__name__: cls for cls in (Hidden, TimeFirst, Flattened)}


@pytest.fixture(scope="module")
def captured():
    torch.manual_seed(0)
    return {name: capture(cls().eval(), torch.randn(2, LENGTH, WIDTH)) for name, cls in NETWORKS.items()}


def batches(*sizes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, LENGTH, WIDTH, generator=generator) for size in sizes]


PASSES = [
    ("quantize", {}),
    ("quantize", {"observer": "mse"}),
    ("prune_filters", {"ratio": 0.5}),
    ("kmeans", {"bits": 2}),
]


@pytest.mark.parametrize(("name", "options"), PASSES)
@pytest.mark.parametrize("network", NETWORKS)
def test_passes_take_a_smaller_last_batch_and_ones_larger_than_the_example(captured, network, name, options):
    model = captured[network]
    step = Registry.load().find_pass(name)(**options)
    result, report = step(model, Context(model, Data(calibration=batches(4, 4, 1))))
    assert report.edits
    assert result(batches(7)[0]).shape[0] == 7


@pytest.mark.parametrize("network", NETWORKS)
def test_ranges_of_every_value_are_the_same_however_the_samples_are_cut_into_batches(captured, network):
    model, whole = captured[network], batches(9)[0]
    nodes = [n for n in model.graph.nodes if getattr(n.meta.get("tensor_meta"), "dtype", None) is torch.float32]
    nodes = [n for n in nodes if n.op != "get_attr"]
    cut = [Calibration(whole.split(size), original=model).collect(model, nodes, ("ranges",)) for size in (9, 4, 1)]
    for node in nodes:
        first, *others = (found[node.name].output_range for found in cut)
        for other in others:
            assert other.low == pytest.approx(first.low, rel=1e-5, abs=1e-6)
            assert other.high == pytest.approx(first.high, rel=1e-5, abs=1e-6)
            torch.testing.assert_close(other.channel_low, first.channel_low, rtol=1e-5, atol=1e-6)


def test_the_batch_is_found_where_it_stands_and_where_it_is_a_factor(captured):
    found = {name: batch_dims(model, model.inputs, free_batch=True) for name, model in captured.items()}
    assert found["TimeFirst"]["enter"] == (1,)
    assert found["Flattened"]["enter"] == (0,)
    assert found["Hidden"]["select"] == (0,)
    (state,) = next(n for n in captured["Hidden"].graph.nodes if n.name == "select").all_input_nodes
    assert found["Hidden"][state.name] == (1,)


@pytest.mark.parametrize("criterion", ["taylor", "mutual_information"])
def test_criteria_by_sample_are_the_same_where_the_batch_is_not_first(criterion):
    """The example has as many samples as the batches, and the length is a multiple of it."""

    class First(nn.Module):
        def __init__(self, turned):
            super().__init__()
            self.turned, self.a, self.b = turned, nn.Linear(WIDTH, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = torch.relu(self.a(x.transpose(0, 1) if self.turned else x))
            return self.b(y).mean(0 if self.turned else 1)

    torch.manual_seed(0)
    weights = First(False).state_dict()
    labelled = [(x, torch.tensor([0, 2])) for x in batches(2, 2, 2)]
    found = []
    for turned in (False, True):
        model = First(turned)
        model.load_state_dict(weights)
        model = capture(model, torch.randn(2, LENGTH, WIDTH))
        context = Context(model, Data(training=labelled))
        found.append(context.criterion(criterion).scores(context.channels(model), context))
    for plain, turned in zip(*found, strict=True):
        torch.testing.assert_close(turned, plain, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["svd", "kmeans", "prune_weights"])
def test_one_sample_on_which_outputs_do_not_vary_gives_errors_that_are_numbers(captured, name):
    options = {"rank": 2} if name == "svd" else {}
    model = captured["Hidden"]
    step = Registry.load().find_pass(name)(select=("linear",), **options)
    _, report = step(model, Context(model, Data(calibration=batches(1))))
    assert [edit.layer for edit in report.edits] == ["linear"]
