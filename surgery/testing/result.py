"""Rules on the model a pass gives back. They are asked only where the pass made an edit."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..captured import relative_error
from ..export.onnx import write_onnx
from ..export.source import export_source
from ..export.tensor_names import named_inputs
from ..inputs import Inputs
from ..loading import read_model, run_source
from ..parity import parity
from ..state import Known, load_state, save_state
from ..torch_private import tree_leaves
from .integers import wide_integers
from .trial import Trial, assert_same_outputs, description, first_difference, flat_outputs, state_of

_OPS = {"placeholder", "get_attr", "call_module", "call_function", "output"}


def graph_is_sound(trial: Trial) -> None:
    """the graph lints and holds only nodes that other passes know"""
    trial.after.graph.lint()
    strange = [node for node in trial.after.graph.nodes if node.op not in _OPS]
    assert not strange, f"node {strange[0]} is a {strange[0].op}" if strange else ""
    unused = [node for node in trial.after.graph.nodes if not node.users and node.op not in ("placeholder", "output")]
    assert not unused, f"node {unused[0]} has no users" if unused else ""


def shapes_are_known(trial: Trial) -> None:
    """every node with a tensor has its shape in `meta["tensor_meta"]`"""
    for node in trial.after.graph.nodes:
        if node.op in ("call_module", "get_attr"):
            assert "tensor_meta" in node.meta, f"node {node} has none"


def runs(trial: Trial) -> None:
    """the result runs at every batch size and returns finite outputs of the original's structure, shapes and types"""
    for value in trial.batches():
        actual, structure = flat_outputs(trial.network, trial.after, value)
        expected, known = flat_outputs(trial.network, trial.model, value)
        assert structure == known, f"outputs are {structure}, not {known}"
        for a, e in zip(actual, expected, strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype), (
                f"{a.dtype} {tuple(a.shape)}, not {e.dtype} {tuple(e.shape)}"
            )
            assert bool(a.isfinite().all()), "an output is NaN or infinite"


def equals_the_original_if_exact(trial: Trial) -> None:
    """with `exact` the outputs equal the original's within `exact_bound`, on the calibration data too"""
    if not trial.step.exact:
        return
    for value in (*trial.batches(), *trial.calibration):
        actual, expected = (flat_outputs(trial.network, m, value)[0] for m in (trial.after, trial.model))
        error = max(relative_error(a, e) for a, e in zip(actual, expected, strict=True))
        assert error <= trial.step.exact_bound, f"deviates by {error:.1e}, the bound is {trial.step.exact_bound:g}"


def survives_a_restart(trial: Trial) -> None:
    """saved as a run's state and read again it is the same model"""
    save_state(trial.after, trial.folder / "state")
    again = load_state(trial.folder / "state", Known(model=trial.after))
    difference = first_difference(state_of(again), state_of(trial.after))
    assert difference is None, f"{difference} differs"
    assert description(again) == description(trial.after), "the graph or its modules differ"
    assert_same_outputs(trial, again, trial.after)


def exports_to_source(trial: Trial) -> None:
    """written as plain Python, graph and safetensors, and loaded without pickle, it gives bit-identical outputs"""
    export_source(trial.after, trial.folder / "source")
    files = {path.suffix for path in (trial.folder / "source").iterdir() if path.is_file()}
    assert files == {".py", ".json", ".safetensors"}, f"wrote {sorted(files)}"
    source = trial.folder / "source" / "model.py"
    run = run_source(source.read_text(encoding="utf-8"), source)
    for again in (run, read_model(source, Known(model=trial.after))):
        assert list(again.state_dict()) == list(trial.after.state_dict()), "the state_dict has other keys"
        assert_same_outputs(trial, again, trial.after)


def exports_to_onnx(trial: Trial) -> None:
    """its ONNX file gives the same outputs in ONNX Runtime, within the bound of its type; its integers fit 31 bits"""
    path = write_onnx(trial.after, trial.after.inputs, trial.folder / "model.onnx")
    proof = parity(trial.after, path, list(trial.batches()))
    where = f", first at {proof.first_divergence}" if proof.first_divergence else ""
    assert proof.passed, f"deviates by {proof.relative_error:.1e}, the bound is {proof.bound:g}{where}"
    wide = wide_integers(path, named_inputs(trial.after, trial.after.inputs))
    assert not wide, f"integers that need more than 31 bits, which not every runtime has: {wide}"


def trains(trial: Trial) -> None:
    """one training step has finite gradients and leaves a model that runs, unless the pass leaves integers"""
    if "int8" in trial.step.gives:
        return
    model = copy.deepcopy(trial.after).train()
    inputs = Inputs.of(model, trial.calibration[0]).clone()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = [t for t in tree_leaves(model(*inputs.args, **inputs.kwargs)) if isinstance(t, Tensor)]
        loss = torch.stack([t.square().mean() for t in outputs if t.is_floating_point()]).sum()
        assert loss.requires_grad, "no parameter has a gradient"
        loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    assert not broken, f"the gradient of {broken[0]} is NaN or infinite" if broken else ""
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    outputs, _ = flat_outputs(trial.network, model.eval(), trial.calibration[0])
    assert all(bool(t.isfinite().all()) for t in outputs), "outputs after the step are NaN or infinite"


RESULT = (
    graph_is_sound,
    shapes_are_known,
    runs,
    equals_the_original_if_exact,
    survives_a_restart,
    exports_to_source,
    exports_to_onnx,
    trains,
)
