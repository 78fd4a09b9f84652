"""Rules on what a pass reports, and on what it leaves alone."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..errors import ModelError
from ..graph import layers
from ..names import tensors
from ..passes import Edit, PassReport, Skip
from .trial import Trial, assert_same_outputs, first_difference, state_of


def reasons_are_given(trial: Trial) -> None:
    """every edit and skip has a reason"""
    for entry in _entries(trial.report):
        reason = entry.what if isinstance(entry, Edit) else entry.why
        assert reason.strip(), f"{entry} has none"


def layers_are_named(trial: Trial) -> None:
    """every edit and skip names a layer, module, tensor or node of the model before the pass"""
    known = {name for name, _ in trial.before.named_modules()} | tensors(trial.before).keys()
    known |= {layer.name for layer in layers(trial.before)} | {node.name for node in trial.before.graph.nodes}
    for entry in _entries(trial.report):
        assert entry.layer in known, f"there is no {entry.layer!r}"


def is_deterministic(trial: Trial) -> None:
    """the same model, data and seed give the same report and the same weights, whatever was drawn at random before"""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch.initial_seed() + 1)
        after, report = trial.step(trial.before, trial.context())
    assert report == trial.report, f"the second run reports {report}, the first {trial.report}"
    difference = first_difference(state_of(after), state_of(trial.after))
    assert difference is None, f"{difference} differs between two runs"


def is_idempotent(trial: Trial) -> None:
    """a second application makes no edit, unless `idempotent` is False"""
    if trial.step.idempotent and trial.report.modified:
        _, again = trial.step(trial.after, trial.context())
        assert not again.edits, f"the second application reports {again.edits[0]}"


def edited_layers_can_be_excluded(trial: Trial) -> None:
    """`exclude` with the name that an edit gives leaves that layer alone"""
    for edit in trial.report.edits[:1]:
        step = replace(trial.step, exclude=(*trial.step.exclude, edit.layer))
        _, report = step(trial.before, trial.context())
        assert edit.layer not in {e.layer for e in report.edits}, f"exclude=({edit.layer!r},) does not exclude it"


def what_select_names_is_told_of(trial: Trial) -> None:
    """a layer that `select` names alone has an edit or a skip, unless the model is refused"""
    told = {entry.layer for entry in _entries(trial.report)}
    for layer in [layer for layer in layers(trial.before) if layer.name not in told][:1]:
        try:
            _, report = replace(trial.step, select=(layer.name,), exclude=())(trial.before, trial.context())
        except ModelError:
            return
        assert layer.name in {entry.layer for entry in _entries(report)}, f"nothing is said of {layer.name!r}"


def no_edit_changes_nothing(trial: Trial) -> None:
    """a pass that reports no edit leaves the outputs bit-identical"""
    if not trial.report.modified:
        assert_same_outputs(trial, trial.after, trial.before)


def _entries(report: PassReport) -> tuple[Edit | Skip, ...]:
    return (*report.edits, *report.skips)


OUTCOME = (
    reasons_are_given,
    layers_are_named,
    is_deterministic,
    is_idempotent,
    edited_layers_can_be_excluded,
    what_select_names_is_told_of,
    no_edit_changes_nothing,
)
