"""A comparison leaves out what it knows, and nothing else."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from surgery import replay
from surgery.captured import capture
from surgery.errors import CaptureError
from surgery.replay import Recording
from surgery.tracing import uncollected

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Counting(Recording):
    """Counts the layers that computed while the recording was replayed."""

    computed = 0

    def _look_up(self, layer, compute, x):
        def counted(value):
            self.computed += 1
            return compute(value)

        return super()._look_up(layer, counted, x)


def recorded(model, x=X):
    recording = Counting()
    with torch.no_grad(), recording.records(model):
        output = model(x)
    return recording, output


def replayed(recording, model, x=X):
    with torch.no_grad(), recording.replays(model):
        output = model(x)
    return output, recording.computed


def test_the_same_input_is_not_computed_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    recording, expected = recorded(model)
    output, computed = replayed(recording, model)
    assert computed == 0
    assert torch.equal(output, expected)


@pytest.mark.parametrize("change", [lambda x: x + 1e-6, lambda x: x[:1], lambda x: x.double().float().t().t() * -1])
def test_another_input_is_computed(change):
    model = nn.Linear(4, 3)
    recording, _ = recorded(model)
    output, computed = replayed(recording, model, change(X))
    assert computed == 1
    assert torch.equal(output, model(change(X)))


def test_another_sign_of_zero_is_another_input():
    recording, _ = recorded(model := nn.Linear(4, 3), torch.zeros(1, 4))
    assert replayed(recording, model, -torch.zeros(1, 4))[1] == 1


def test_other_options_are_computed():
    first, second = nn.Conv1d(2, 2, 1), nn.Conv1d(2, 2, 1, stride=2)
    second.weight, second.bias = first.weight, first.bias
    recording, _ = recorded(first, x := torch.randn(1, 2, 4))
    assert replayed(recording, second, x)[1] == 1


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.data.mul_(2)], ids=["counted", "past the counter"])
def test_weights_that_changed_are_computed(write):
    recording, _ = recorded(model := nn.Linear(4, 3))
    with torch.no_grad():
        write(model.weight)
    assert replayed(recording, model)[1] == 1


def test_a_write_after_the_layer_does_not_reach_the_recording():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True))
    recording, _ = recorded(model)
    with torch.no_grad():
        expected = model[0](X)
    assert torch.equal(replayed(recording, model[0])[0], expected)


def test_a_full_recording_leaves_the_rest_to_the_graph(monkeypatch):
    monkeypatch.setattr(replay, "LIMIT", X.numel() * 4 + 2 * 4 * 4 + 1)
    recording, expected = recorded(model := nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    output, computed = replayed(recording, model)
    assert computed == 1
    assert torch.equal(output, expected)


def test_layers_inside_vmap_are_computed():
    class PerSample(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return torch.vmap(self.layer)(x)

    recording, expected = recorded(model := PerSample())
    assert torch.equal(replayed(recording, model)[0], expected)


def test_layers_are_as_before_after_a_failure():
    model = nn.Linear(4, 3)
    with pytest.raises(RuntimeError), Recording().records(model):
        model(torch.randn(1, 5))
    assert "forward" not in vars(model)


def test_a_model_that_writes_past_the_counter_is_still_refused():
    class Decaying(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            if not torch.compiler.is_compiling():
                self.layer.weight.data.mul_(0.5)
            return self.layer(x)

    with pytest.raises(CaptureError):
        capture(Decaying(), X)


def test_an_example_of_many_samples_is_compared_with_a_batch_of_two():
    sizes = set()

    class Noting(nn.Module):
        def forward(self, x):
            if isinstance(x.shape[0], int):
                sizes.add(x.shape[0])
            return x + 1

    assert capture(Noting(), torch.randn(16, 2)).dynamic_batch
    assert sizes == {2, 16}


def test_an_example_of_one_sample_is_compared_with_one_other_sample():
    seen = []

    class Noting(nn.Module):
        def forward(self, x):
            if type(x) is torch.Tensor:
                seen.append(x)
            return x + 1

    captured = capture(Noting(), x := torch.randn(1, 5))
    assert captured.dynamic_batch
    assert [tuple(other.shape) for other in seen] == [(1, 5)]
    assert not bool((seen[0] == x).any())


@pytest.mark.parametrize("enabled", [True, False])
def test_the_cycle_collector_gets_back_its_state(enabled):
    (gc.enable if enabled else gc.disable)()
    try:
        with uncollected():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
