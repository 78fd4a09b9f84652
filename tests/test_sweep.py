"""The sweep: every layer's task from the inputs it has by then, beside the reference."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from torch import fx, nn

import surgery
from surgery import Affine, Aim, Calibration, InputError, Inputs, PluginError, Step, capture
from surgery.calibration import affine_maps
from surgery.calibration.moments import Regression, Scatter
from surgery.calibration.sweep import live_bytes
from surgery.calibration.unfolding import groups_and_features, output_rows, unfold
from surgery.graph import leaf_inputs
from surgery.testing import NETWORKS, networks

MODULE = sys.modules["surgery.calibration.sweep"]
SOLVABLE = networks("residual", "transposed_conv", "grouped_depthwise", "conv_1d", "conv_3d", "attention", "two_inputs")


def operated(model, scale=0.8):
    """A copy with other weights."""
    copy = surgery.snapshot(model)
    for layer in surgery.layers(copy):
        if layer.type.startswith(("Conv", "Linear")):
            layer.module.weight = nn.Parameter(layer.module.weight.detach() * scale)
    return copy


def assert_equal_tasks(found, expected):
    assert found.count == expected.count
    for name in ("x_mean", "y_mean", "xx", "yx", "y_variance"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-5)


def values(model, batch):
    """Of all nodes by name."""
    found, inputs = {}, Inputs.of(model, batch)

    class Recorder(fx.Interpreter):
        def run_node(self, node):
            found[node.name] = super().run_node(node)
            return found[node.name]

    with torch.no_grad():
        Recorder(model).run(*leaf_inputs(inputs))
    return found


def regression_of(step, runs):
    """All rows of all batches at once."""
    module, joint = step.layer.module, Scatter(True)
    for own, theirs in runs:
        target = theirs[step.aim.target] - sum(own[name] for name in step.aim.minus)
        [rows] = unfold(module, own[step.layer.nodes[0].args[0].name], 2**30)
        joint.add(torch.cat([rows, output_rows(module, target)], 2))
    return Regression.of(joint.finish(), groups_and_features(module)[1])


@pytest.mark.parametrize("network", SOLVABLE, ids=str)
def test_a_task_is_the_regression_from_the_inputs_of_one_model_to_the_values_of_the_other(network):
    original = network.captured()
    model = operated(original)
    calibration = Calibration(network.calibration(), original=original, chunk_bytes=3000)
    chosen = [affine.layer for affine in affine_maps(model)]
    steps = [Affine(layer, None, layer.nodes[0]).step() for layer in chosen]
    runs = [(values(model, batch), values(original, batch)) for batch in network.calibration()]
    expected = {step.layer.name: regression_of(step, runs) for step in steps}
    tasks = list(calibration.sweep(model, reversed(steps)))
    assert [task.layer.name for task in tasks] == [layer.name for layer in chosen]
    assert len(tasks) >= 3
    for task in tasks:
        assert_equal_tasks(task.regression, expected[task.layer.name])
        moments = task.inputs()
        torch.testing.assert_close(moments.mean, expected[task.layer.name].x_mean, rtol=1e-4, atol=1e-5)


def test_the_next_layer_sees_what_the_new_weights_of_the_one_before_give():
    network = NETWORKS["residual"]
    original = network.captured()
    model = surgery.snapshot(original)
    calibration = Calibration(network.calibration(), original=original)
    steps = [Step(a.layer, Aim(a.layer.nodes[0].name)) for a in affine_maps(model)]
    seen = {}
    for number, task in enumerate(calibration.sweep(model, steps)):
        seen[task.layer.name] = task.regression
        task.layer.module.weight = nn.Parameter(task.matrix.reshape(task.layer.module.weight.shape) * (2 + number))
    runs = [(values(model, batch), values(original, batch)) for batch in network.calibration()]
    final = {step.layer.name: regression_of(step, runs) for step in steps}
    for name, regression in seen.items():
        assert_equal_tasks(regression, final[name])
    step = Step(affine_maps(original)[2].layer, steps[2].aim)
    before = regression_of(step, [(values(original, batch),) * 2 for batch in network.calibration()])
    assert not torch.allclose(before.xx, seen[step.layer.name].xx, rtol=0.1)


class Forked(nn.Module):
    """Two layers read one value; the sum of theirs is read by a third."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return (self.left(x) + self.right(x)).relu()


def forked():
    model, x = capture(Forked(), torch.randn(2, 4)), torch.randn(64, 4)
    return model, Calibration(list(x.split(16)), original=model), x


def test_a_value_that_two_layers_read_stays_and_a_sum_is_aimed_at_less_the_operated_branch():
    model, calibration, x = forked()
    left, right = (a.layer for a in affine_maps(model)[1:])
    with torch.no_grad():
        hidden = model.get_submodule("stem")(x).relu()
        total = left.module(hidden) + right.module(hidden)
    node = next(iter(right.nodes[0].users)).name
    steps = [Step(left, Aim(left.nodes[0].name)), Step(right, Aim(node, (left.nodes[0].name,)), rectified=True)]
    reference, tasks = surgery.snapshot(model), []
    for task in calibration.sweep(model, steps, reference):
        tasks.append(task.regression)
        if task.layer is left:
            left.module.weight = nn.Parameter(torch.zeros_like(left.module.weight))
    for found in tasks:
        torch.testing.assert_close(found.xx[0], hidden.double().T.cov(correction=0), rtol=1e-4, atol=1e-6)
    expected = (total - left.module.bias.detach()).double()  # the branch gives nothing else any more
    torch.testing.assert_close(tasks[1].y_mean[0], expected.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tasks[1].y_variance[0], expected.var(0, correction=0), rtol=1e-4, atol=1e-6)
    assert task.spread == pytest.approx(float(total.double().var(0, correction=0).sum()), rel=1e-5)


def relu_error(task, weight, bias):
    """E‖relu(y) - relu(p)‖², and what the rounds minimise: E[(y - p)² where y > 0, relu(p)² elsewhere]."""
    plain = bound = 0.0
    for rows, target, offset in task._rows():
        shift = 0 if offset is None else offset.double()
        y = target.double() + shift
        p = rows.double() @ weight.mT + bias.unsqueeze(1) + shift
        plain += float((y.relu() - p.relu()).square().sum())
        bound += float(torch.where(y > 0, y - p, p.relu()).square().sum())
    return plain / task.regression.count, bound / task.regression.count


@pytest.mark.parametrize("name", ["first.0.0", "first.1", "second.0.0", "second.1"])
def test_a_fit_through_a_relu_gets_better_from_round_to_round(name):
    network = NETWORKS["residual"]
    original = network.captured()
    model = operated(original)
    affine = next(a for a in affine_maps(model) if a.layer.name == name)
    assert affine.step().rectified
    calibration = Calibration(network.calibration(batches=4), original=original)
    (task,) = calibration.sweep(model, [affine.step()], original)
    regression = task.regression
    matrix = regression.solve(affine.scaled(task.matrix) * 0.5, 1e-9)
    bias, errors = regression.bias(matrix), []
    for _ in range(6):
        errors.append(relu_error(task, matrix, bias))
        current = task.rectified(matrix, bias)
        matrix = current.solve(matrix, 1e-9)
        bias = current.bias(matrix)
    bounds = [bound for _, bound in errors]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(bounds))
    assert bounds[-1] <= bounds[0]
    assert errors[-1][0] <= errors[0][0] * (1 + 1e-5)
    assert all(plain <= bound * (1 + 1e-9) for plain, bound in errors)


def test_values_are_let_go_once_their_last_reader_has_run(monkeypatch):
    made, most = [], []

    class Watched(MODULE._Lockstep):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

        def _run_next(self):
            super()._run_next()
            most.append(max(len([v for v in env.values() if isinstance(v, torch.Tensor)]) for env in self.values))

    monkeypatch.setattr(MODULE, "_Lockstep", Watched)
    network = NETWORKS["residual"]
    model = network.captured()
    steps = [affine.step() for affine in affine_maps(model)]
    assert len(list(Calibration(network.calibration(), original=model).sweep(model, steps))) == len(steps)
    assert len(made) == 2
    assert max(most) <= 5
    for run in made:
        assert all(len(env) <= 1 for env in run.values)


def test_as_many_samples_are_used_as_fit_into_the_memory():
    model, _, x = forked()
    per_sample = 2 * live_bytes(model)
    step = affine_maps(model)[0].step()
    batches = list(x.split(16))
    for samples, limit, expected in (
        (None, 10 * per_sample, 10),
        (7, 10 * per_sample, 7),
        (None, 2**31, 64),
        (20, 1, 1),
    ):
        calibration = Calibration(batches, original=model, samples=samples, sweep_bytes=limit)
        (task,) = calibration.sweep(model, [step])
        assert task.regression.count == expected


def test_live_bytes_are_the_most_that_a_run_holds_per_sample():
    model, *_ = forked()
    assert live_bytes(model) == 4 * (6 + 5 + 5)  # the hidden value with both branches


def test_of_very_many_rows_every_nth_is_taken_whatever_the_chunks(monkeypatch):
    monkeypatch.setattr(MODULE, "ROWS", 2048)
    network = NETWORKS["plain_cnn"]
    model = network.captured()
    batches = network.calibration(batches=6, batch=64)
    step = affine_maps(model)[0].step()

    def task(chunk_bytes=2**23):
        (found,) = Calibration(batches, original=model, chunk_bytes=chunk_bytes).sweep(model, [step])
        return found

    first = task()
    assert first._every == 13
    assert first._every % 2 == 1
    rows = [torch.cat([x for x, _, _ in found._rows()], 1) for found in (first, task(20_000), task(4_000))]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])
    assert first.regression.count == sum(-(-64 * 64 // 13) for _ in batches)
    monkeypatch.setattr(MODULE, "ROWS", 10**9)
    thinned, whole = first.regression, task().regression
    assert whole.count == 6 * 64 * 64
    deviation = (thinned.x_mean - whole.x_mean).abs() * (thinned.count / whole.xx.diagonal(dim1=1, dim2=2)).sqrt()
    assert float(deviation.max()) < 5
    torch.testing.assert_close(thinned.xx, whole.xx, rtol=0, atol=5 * float(whole.xx.abs().max()) / 1888**0.5)


@pytest.mark.parametrize("rows", [1, 10, 4096, 5000, 9000, 10**6])
def test_thinning_is_odd_and_leaves_enough(monkeypatch, rows):
    monkeypatch.setattr(MODULE, "ROWS", 4096)
    model = capture(nn.Sequential(nn.Linear(2, 1)), torch.randn(2, 2))
    (layer,) = surgery.layers(model)
    wanted = torch.empty(1).expand(rows, 1)
    every = MODULE.Task(Step(layer, Aim("")), [{}], [wanted], 2**20)._every
    assert every % 2 == 1
    assert min(rows, 4096 * 2 / 3) <= -(-rows // every) <= max(4096 * 2, 1)


def test_places_that_the_operated_model_has_lost_are_left_out_of_the_target():
    model, calibration, _ = forked()
    affine = affine_maps(model)[1]
    assert affine.layer.name == "left"
    keep = torch.tensor([0, 3])
    (whole,) = calibration.sweep(model, [Step(affine.layer, Aim(affine.end.name))])
    means = whole.regression.y_mean
    (part,) = calibration.sweep(model, [Step(affine.layer, Aim(affine.end.name, keep={-1: keep}))])
    torch.testing.assert_close(part.regression.y_mean, means[:, keep])


def test_data_that_does_not_fit_and_layers_without_a_matrix_are_errors():
    model, _, _ = forked()
    step = affine_maps(model)[0].step()
    for batches, message in (
        ([], "no batches"),
        ([torch.randn(3, 5)], "batch 0"),
        ([torch.full((2, 4), torch.nan)], "NaN"),
    ):
        with pytest.raises(InputError, match=message):
            list(Calibration(batches, original=model).sweep(model, [step]))
    norm = capture(nn.Sequential(nn.LayerNorm(4)), torch.randn(2, 4))
    (layer,) = surgery.layers(norm)
    with pytest.raises(PluginError, match="unfolded input of LayerNorm"):
        list(Calibration([torch.randn(2, 4)], original=norm).sweep(norm, [Step(layer, Aim(layer.nodes[0].name))]))
