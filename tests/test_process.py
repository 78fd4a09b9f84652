"""What belongs to the whole process is after a call as it was before, whatever happens inside."""

from __future__ import annotations

import logging
import random
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier

import numpy as np
import pytest
import torch
from small_runs import Damp, Jitter, Net, files, small_inputs

import surgery
from surgery import Data, Edit, Pass, PassReport, hookimpl
from surgery.errors import MemoryLimitError
from surgery.process import ProcessState, exclusive

CHANGES = {
    "grad mode": lambda: torch.set_grad_enabled(False),
    "default dtype": lambda: torch.set_default_dtype(torch.float64),
    "thread count": lambda: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic algorithms": lambda: torch.use_deterministic_algorithms(True),
    "attention's fast path": lambda: torch.backends.mha.set_fastpath_enabled(False),
    "oneDNN": lambda: setattr(torch.backends.mkldnn, "enabled", False),
    "cuDNN's benchmark": lambda: setattr(torch.backends.cudnn, "benchmark", True),
    "random state of torch": lambda: torch.manual_seed(9),
    "random state of Python": random.random,
    "random state of NumPy": np.random.rand,
}


@dataclass(frozen=True, kw_only=True)
class Meddle(Pass):
    """Damps the head, and changes what belongs to the process."""

    setting: str = "grad mode"
    fails: bool = False
    idempotent = False

    def apply(self, model, context):
        CHANGES[self.setting]()
        warnings.simplefilter("error", ResourceWarning)
        logging.getLogger("torch").setLevel(logging.DEBUG)
        logging.getLogger().addHandler(logging.NullHandler())
        logging.disable(logging.CRITICAL)
        sys.stderr = sys.__stdout__
        if self.fails:
            raise ZeroDivisionError("by design")
        layer = next(layer for layer in surgery.layers(model) if layer.name == "head")
        layer.module.weight = torch.nn.Parameter(layer.module.weight.detach() * 0.5)
        return PassReport((Edit("head", "halved"),))


class Plugin:
    @hookimpl
    def surgery_passes(self):
        return [Damp, Jitter, Meddle]


REGISTRY = surgery.Registry([Plugin()])


torch.manual_seed(0)
NET, INPUTS = Net().eval(), small_inputs()


def operate(*passes, **options):
    recipe = {"name": "test", "passes": list(passes)}
    return surgery.operate(NET, INPUTS, recipe, registry=REGISTRY, latency_rounds=0, **options)


def everything():
    """What a caller could see of the process."""
    numpy = np.random.get_state()
    loggers = [logging.getLogger(), *map(logging.getLogger, ("torch", "torch.onnx", "onnxscript", "onnx_ir"))]
    return [
        *(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        *(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), torch.backends.mkldnn.enabled),
        *(torch.backends.mha.get_fastpath_enabled(), torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark),
        *(torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), numpy[2:]),
        *([*warnings.filters], warnings.showwarning, sys.stdout, sys.stderr, logging.root.manager.disable),
        *[(logger.level, [*logger.handlers], logger.propagate, logger.disabled) for logger in loggers],
    ]


@pytest.fixture(autouse=True)
def restored():
    state = ProcessState()
    yield
    state.restore()


def assert_unchanged(before):
    assert not [(then, now) for then, now in zip(before, everything(), strict=True) if then != now]


@pytest.mark.parametrize("setting", CHANGES)
def test_what_a_pass_changes_is_put_back_and_told(setting):
    captured = surgery.capture(NET, INPUTS)
    before = everything()
    _, report = Meddle(setting=setting)(captured, surgery.Context(captured))
    assert_unchanged(before)
    [note] = report.notes
    assert note == f"pass meddle changed what belongs to the whole process: {setting}; it was put back"


def refused():
    operate({"damp": {"select": ["nothing"]}})


def crashed():
    operate({"meddle": {"setting": "default dtype", "fails": True}})


def exported_in_vain():
    surgery.export_onnx(NET, INPUTS, "/no/such/folder/model.onnx")


def captured_in_vain():
    surgery.capture(NET, {**INPUTS, "image": torch.ones(1, 7, 8, 8)})


@pytest.mark.parametrize("use", [refused, crashed, exported_in_vain, captured_in_vain])
def test_the_process_is_as_before_after_an_error(use):
    before = everything()
    with pytest.raises(surgery.SurgeryError):
        use()
    assert_unchanged(before)


def test_what_a_metric_changes_is_put_back_and_told():
    def metric(output, target):
        torch.set_num_threads(3)
        return 1.0

    before = everything()
    data = Data(evaluation=[(INPUTS, torch.zeros(1, dtype=torch.long))], metric=metric)
    operation = operate("damp", data=data)
    assert_unchanged(before)
    for step in operation.steps:
        assert step.report.notes[-1].startswith(
            "the evaluation changed what belongs to the whole process: thread count"
        )


def test_random_numbers_of_a_loader_are_put_back_without_a_word():
    class Reads(Meddle):
        def apply(self, model, context):
            list(context.data.calibration)
            return PassReport()

    captured, before = surgery.capture(NET, INPUTS), everything()
    loader = torch.utils.data.DataLoader([{k: v[0] for k, v in INPUTS.items()}], shuffle=True)
    _, report = Reads()(captured, surgery.Context(captured, Data(calibration=loader)))
    assert_unchanged(before)
    assert report.notes == ()


def test_a_run_in_inference_mode_is_the_same_bytes(tmp_path):
    operate("damp", out=tmp_path / "plain")
    with torch.inference_mode():
        torch.manual_seed(0)
        net, inputs = Net().eval(), small_inputs()  # which can have no gradients
        recipe = {"name": "test", "passes": ["damp"]}
        surgery.operate(net, inputs, recipe, registry=REGISTRY, latency_rounds=0, out=tmp_path / "inside")
    assert files(tmp_path / "inside") == files(tmp_path / "plain")


def test_the_callers_autocast_and_default_device_are_left_outside():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    x = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = surgery.capture(model, x)
    assert torch.equal(captured(x), model(x))
    with torch.device("meta"):
        captured = surgery.capture(model, x)
    assert torch.equal(captured(x), model(x))


def test_threads_at_once_give_what_one_after_the_other_gives(tmp_path):
    barrier, before = Barrier(2), everything()

    def run(name):
        barrier.wait()
        operate("jitter", out=tmp_path / name)

    def capture_and_export(name):
        barrier.wait()
        return surgery.export_onnx(surgery.capture(NET, INPUTS), INPUTS, tmp_path / name).read_bytes()

    with ThreadPoolExecutor(2) as pool:
        _, exported = pool.submit(run, "a"), pool.submit(capture_and_export, "b.onnx")
    assert_unchanged(before)
    barrier = Barrier(1)
    run("alone")
    assert files(tmp_path / "a") == files(tmp_path / "alone")
    assert capture_and_export("c.onnx") == exported.result()


def test_workers_of_a_pass_use_what_the_pass_holds():
    with ThreadPoolExecutor(1) as pool, exclusive():
        captured = surgery.capture(NET, INPUTS)
        context = surgery.Context(captured, executor=pool)
        assert context.submit(surgery.measure, NET, INPUTS).result(timeout=60) == surgery.measure(NET, INPUTS)


@pytest.mark.parametrize("fails", [lambda: torch.empty(1 << 50), lambda: np.empty(1 << 57), lambda: bytearray(1 << 60)])
def test_no_memory_is_told_with_a_remedy(fails):
    class Hungry(torch.nn.Module):
        def forward(self, x):
            fails()
            return x

    class Greedy(Meddle):
        def apply(self, model, context):
            fails()

    captured = surgery.capture(NET, INPUTS)
    for use in (
        lambda: surgery.capture(Hungry(), torch.rand(1, 3)),
        lambda: Greedy()(captured, surgery.Context(captured)),
    ):
        with pytest.raises(MemoryLimitError, match="not enough memory") as caught:
            use()
        assert "smaller batches" in caught.value.fix
