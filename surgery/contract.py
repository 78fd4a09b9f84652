"""What every pass is held to, whoever wrote it. Used by `Pass.__call__`."""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator
from dataclasses import replace
from textwrap import shorten
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .captured import CapturedModel, relative_error
from .changes import REACHED, Changes, form, reaches_noted, same, skeleton, with_reached
from .errors import PassError, PluginError, SurgeryError
from .graph import layers, leaf_inputs, propagate, remove_unused
from .inputs import Inputs
from .names import bytes_of, tensors
from .passes import Edit, PassReport, Skip
from .process import RANDOM, ProcessState
from .reproduction import other_sizes
from .torch_private import tree_leaves, version_of
from .tracing import first_line

if TYPE_CHECKING:
    from .context import Context
    from .data import Data
    from .passes import Pass

ROLES = ("calibration", "evaluation", "training")
AUTHOR = "its author has to mend it: see the contract in docs/plugins.md"


def snapshot(model: CapturedModel) -> CapturedModel:
    """A copy with a graph and modules of its own that shares every tensor with `model`."""
    info = model.meta["capture"]
    memo: dict[int, Any] = {id(t): t for t in tensors(model).values()}
    memo |= {id(t): t for t in info.inputs.tensors}
    memo |= {id(noted): noted for noted in [model.meta.get(REACHED)] if noted is not None}
    for node in model.graph.nodes:
        memo[id(node.meta)] = dict(node.meta)
    copied = copy.deepcopy(model, memo)
    copied.train(model.training)
    return copied


def applied(step: Pass, model: CapturedModel, context: Context) -> PassReport:
    """What `apply` reports, with the settings of the process as they were before. Data that are no list may draw random
    numbers, as a DataLoader does for every loop."""
    state = ProcessState()
    try:
        with reaches_noted(model) as noted:
            report = check_report(step, step.apply(model, context))
        report = replace(report, edits=with_reached(report.edits, noted))
    finally:
        changed = state.restore()
    loads = [role for role in ROLES if not isinstance(getattr(context.data, role), list | tuple | None)]
    told = [setting for setting in changed if not (loads and setting.startswith(RANDOM))]
    return report.with_restored(told, f"pass {step.name()}")


def check_report(step: Pass, report: Any) -> PassReport:
    """The report itself, if it is one: every edit and skip has a layer and a reason, and numbers are finite."""
    place = f"pass {step.name()}"
    if not isinstance(report, PassReport):
        raise PluginError(f"apply returned {type(report).__name__}, not a PassReport", at=place, fix=AUTHOR)
    for entry, kind in [*((e, Edit) for e in report.edits), *((s, Skip) for s in report.skips)]:
        if not isinstance(entry, kind):
            raise PluginError(f"the report holds {entry!r}, not a surgery.{kind.__name__}", at=place, fix=AUTHOR)
    given = [(e.layer, e.what) for e in report.edits] + [(s.layer, s.why) for s in report.skips]
    for layer, reason in given:
        if not (layer and reason):
            raise PluginError(
                f"an edit or skip lacks its layer or its reason: {layer!r}, {reason!r}", at=place, fix=AUTHOR
            )
    for edit in report.edits:
        for name, value in edit.numbers.items():
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise PluginError(
                    f"the edit of {edit.layer} gives {name} as {value!r}, which is no finite number of Python",
                    at=place,
                    fix=AUTHOR,
                )
    return report


def with_silent(step: Pass, before: CapturedModel, changes: Changes, report: PassReport) -> PassReport:
    """The report with a skip for every layer that `select` names and that was left as it was without a word."""
    if not step.select:
        return report
    told = {edit.layer for edit in report.edits} | {skip.layer for skip in report.skips} | {*changes.layers}
    left = [layer for layer in step.selected(layers(before)) if layer.name not in told]
    why = f"{step.name()} finds nothing to change in it"
    return replace(report, skips=(*report.skips, *(Skip(x.name, f"{why} ({x.type})") for x in left)))


def checked_names(step: Pass, changes: Changes, report: PassReport) -> PassReport:
    """The report, if its edits name what the pass has changed, all of it and nothing else. Of the layers that an edit
    reaches those that were changed are left."""
    place = f"pass {step.name()}"
    if wrong := changes.untouched(edit.layer for edit in report.edits):
        problem = f"an edit names {_listed(wrong)}, where the pass changed nothing"
        raise PluginError(problem, at=place, fix=f"report edits of layers by their names before the pass; {AUTHOR}")
    if missing := changes.unnamed(report.edits):
        problem = f"the pass changed {_listed(missing)}, which no edit names"
        raise PluginError(problem, at=place, fix=f"name it in an edit, or in `Edit.also` of one; {AUTHOR}")
    gone = {*changes.untouched(name for edit in report.edits for name in edit.also)}
    edits = (replace(edit, also=tuple(name for name in edit.also if name not in gone)) for edit in report.edits)
    return replace(report, edits=tuple(edits))


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(dict.fromkeys(names[:most])) + more


class Watch:
    """What a pass may read and must not write: the model before it, the original, and the data."""

    def __init__(self, model: CapturedModel, context: Context) -> None:
        once: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in _watched(model, context):
            once.setdefault(id(tensor), (name, tensor))
        self._held = [(name, tensor, _state(tensor)) for name, tensor in once.values()]

    def check(self, step: Pass) -> None:
        """Raises PluginError where the pass wrote into one of them."""
        for name, tensor, state in self._held:
            if _state(tensor) != state:
                raise PluginError(
                    f"{name} was written in place",
                    at=f"pass {step.name()}",
                    fix="replace parameters of the model that is handed to apply, and never write into tensors; "
                    "begin anew, as the tensor no longer is what it was",
                )


def _watched(model: CapturedModel, context: Context) -> Iterator[tuple[str, Tensor]]:
    for what, watched in (("the model before the pass", model), ("the original", context.original)):
        yield from ((f"{name} of {what}", tensor) for name, tensor in tensors(watched).items())
    data: Data = context.data
    for role in ROLES:
        batches = getattr(data, role)
        for number, batch in enumerate(batches if isinstance(batches, list | tuple) else ()):
            found = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
            yield from ((f"tensor {i} of {role} batch {number}", tensor) for i, tensor in enumerate(found))


def _state(tensor: Tensor) -> tuple[int, int]:
    """Write counter and checksum: writes through `.data`, and to tensors of inference mode, are not counted."""
    return 0 if tensor.is_inference() else version_of(tensor), zlib.crc32(bytes_of(tensor))


def check_result(step: Pass, before: CapturedModel, after: CapturedModel, report: PassReport) -> PassReport:
    """Lint, compile and run the edited model, and hold it against the report, which comes back complete."""
    place = f"pass {step.name()}"
    try:
        remove_unused(after)
        after.graph.lint()
        after.recompile()
    except Exception as error:
        raise PluginError(f"the edited graph is none: {in_short(error)}", at=place, fix=AUTHOR) from error
    changed = _changed(before, after)
    if changed and not report.modified:
        raise PluginError(f"the pass reports no edit but changed {changed}", at=place, fix=AUTHOR)
    if report.modified and not changed:
        raise PluginError(f"the pass reports {len(report.edits)} edits but changed nothing", at=place, fix=AUTHOR)
    if changed:
        _check_outputs(step, before, after, place)
    changes = Changes(before, after)
    return with_silent(step, before, changes, checked_names(step, changes, report))


def _check_outputs(step: Pass, before: CapturedModel, after: CapturedModel, place: str) -> None:
    with torch.no_grad():
        expected = _outputs(before, before.inputs)
        try:
            actual = [v for v in propagate(after, after.inputs) if isinstance(v, Tensor)]
        except SurgeryError:
            raise
        except Exception as failure:
            raise PluginError(f"the edited graph does not run: {in_short(failure)}", at=place, fix=AUTHOR) from failure
    if [(a.shape, a.dtype) for a in actual] != [(e.shape, e.dtype) for e in expected]:
        raise PassError(
            f"the outputs change from {[tuple(e.shape) for e in expected]} to {[tuple(a.shape) for a in actual]}",
            at=place,
        )
    _check_other_batches(before, after, place)
    for value, reference in zip(actual, expected, strict=True):
        if value.is_floating_point() and bool(value.isnan().any()) and not bool(reference.isnan().any()):
            raise PassError("the edited model gives NaN on the example inputs", at=place)
        error, bound = relative_error(value, reference), _bound(step, value)
        if step.exact and not error <= bound:
            raise PassError(
                f"the pass is declared exact but moves an output by {error:.1e} of its largest value (bound {bound:g})",
                at=place,
            )


def _check_other_batches(before: CapturedModel, after: CapturedModel, place: str) -> None:
    """A model that takes any number of samples still does."""
    problem = ""
    sizes = other_sizes(before.inputs.batch_size) if before.dynamic_batch else []
    for size in sizes:
        try:
            with torch.no_grad():
                _outputs(after, after.inputs.with_batch(size))
            return
        except Exception as error:
            problem = problem or f"the edited model no longer takes {size} samples: {in_short(error)}"
    if problem:
        fix = f"write no batch size into the graph, such as the {before.inputs.batch_size} of the example; {AUTHOR}"
        raise PluginError(problem, at=place, fix=fix)


def in_short(error: BaseException) -> str:
    """Kind and first line of an error, cut where it is long; PyTorch's may print a whole graph."""
    return f"{type(error).__name__}: {shorten(first_line(error), LONGEST, placeholder=' …')}"


LONGEST = 300
"""Characters of another library's message that ours quote."""


def _bound(step: Pass, value: Tensor) -> float:
    """`exact_bound`, or four rounding steps of a type too short for it."""
    return max(step.exact_bound, 4 * torch.finfo(value.dtype).eps) if value.is_floating_point() else step.exact_bound


def _outputs(model: CapturedModel, inputs: Inputs) -> list[Tensor]:
    from torch import fx

    flat = fx.Interpreter(model).run(*leaf_inputs(inputs), enable_io_processing=False)
    return [v for v in flat if isinstance(v, Tensor)]


def _changed(before: CapturedModel, after: CapturedModel) -> str | None:
    """Name of something that differs, or None."""
    if _skeleton(before) != _skeleton(after):
        return "the graph"
    old, new = tensors(before), tensors(after)
    if old.keys() != new.keys():
        return f"the parameters ({sorted(old.keys() ^ new.keys())[0]})"
    for name in old:
        if not same(old[name], new[name]):
            return name
    modules = dict(after.named_modules())
    inner = [(name, module) for name, module in before.named_modules() if name]  # a GraphModule has its own class
    return next((name for name, module in inner if form(module) != form(modules[name])), None)


def _skeleton(model: CapturedModel) -> list[tuple[str, str, str, str]]:
    return [skeleton(node) for node in model.graph.nodes]
