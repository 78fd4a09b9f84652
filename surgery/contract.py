"""What every pass is held to, whoever wrote it. Used by `Pass.__call__`."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .captured import CapturedModel, relative_error
from .errors import PassError, PluginError
from .graph import leaf_inputs, propagate, remove_unused
from .names import tensors
from .passes import PassReport

if TYPE_CHECKING:
    from .passes import Pass


def snapshot(model: CapturedModel) -> CapturedModel:
    """A copy with a graph and modules of its own that shares every tensor with `model`."""
    info = model.meta["capture"]
    memo: dict[int, Any] = {id(t): t for t in tensors(model).values()}
    memo |= {id(t): t for t in info.inputs.tensors}
    for node in model.graph.nodes:
        memo[id(node.meta)] = dict(node.meta)
    copied = copy.deepcopy(model, memo)
    copied.train(model.training)
    return copied


def check_report(step: Pass, report: Any) -> PassReport:
    """The report itself, if it is one and every edit and skip has a layer and a reason."""
    place = f"pass {step.name()}"
    if not isinstance(report, PassReport):
        raise PluginError(f"apply returned {type(report).__name__}, not a PassReport", at=place)
    given = [(e.layer, e.what) for e in report.edits] + [(s.layer, s.why) for s in report.skips]
    for layer, reason in given:
        if not (layer and reason):
            raise PluginError(f"an edit or skip lacks its layer or its reason: {layer!r}, {reason!r}", at=place)
    return report


def versions(model: CapturedModel) -> dict[str, tuple[Tensor, int]]:
    """Every tensor with its write counter, for `check_untouched`."""
    return {name: (tensor, tensor._version) for name, tensor in tensors(model).items()}


def check_untouched(step: Pass, watched: dict[str, tuple[Tensor, int]]) -> None:
    """Raises PluginError where the pass wrote into a tensor of the model before it."""
    for name, (tensor, version) in watched.items():
        if tensor._version != version:
            raise PluginError(
                f"{name} of the model before the pass was written in place",
                at=f"pass {step.name()}",
                fix="replace parameters, never write into them",
            )


def check_result(step: Pass, before: CapturedModel, after: CapturedModel, report: PassReport) -> None:
    """Lint, compile and run the edited model, and hold it against the report."""
    place = f"pass {step.name()}"
    remove_unused(after)
    after.graph.lint()
    after.recompile()
    changed = _changed(before, after)
    if changed and not report.modified:
        raise PluginError(f"the pass reports no edit but changed {changed}", at=place)
    if report.modified and not changed:
        raise PluginError(f"the pass reports {len(report.edits)} edits but changed nothing", at=place)
    if changed:
        _check_outputs(step, before, after, place)


def _check_outputs(step: Pass, before: CapturedModel, after: CapturedModel, place: str) -> None:
    with torch.no_grad():
        expected = _outputs(before)
        actual = [v for v in propagate(after, after.inputs) if isinstance(v, Tensor)]
    if [(a.shape, a.dtype) for a in actual] != [(e.shape, e.dtype) for e in expected]:
        raise PassError(
            f"the outputs change from {[tuple(e.shape) for e in expected]} to {[tuple(a.shape) for a in actual]}",
            at=place,
        )
    for value, reference in zip(actual, expected, strict=True):
        if value.is_floating_point() and bool(value.isnan().any()) and not bool(reference.isnan().any()):
            raise PassError("the edited model gives NaN on the example inputs", at=place)
        error, bound = relative_error(value, reference), _bound(step, value)
        if step.exact and not error <= bound:
            raise PassError(
                f"the pass is declared exact but moves an output by {error:.1e} of its largest value (bound {bound:g})",
                at=place,
            )


def _bound(step: Pass, value: Tensor) -> float:
    """`exact_bound`, or four rounding steps of a type too short for it."""
    return max(step.exact_bound, 4 * torch.finfo(value.dtype).eps) if value.is_floating_point() else step.exact_bound


def _outputs(model: CapturedModel) -> list[Tensor]:
    from torch import fx

    flat = fx.Interpreter(model).run(*leaf_inputs(model.inputs), enable_io_processing=False)
    return [v for v in flat if isinstance(v, Tensor)]


def _changed(before: CapturedModel, after: CapturedModel) -> str | None:
    """Name of something that differs, or None."""
    if _skeleton(before) != _skeleton(after):
        return "the graph"
    old, new = tensors(before), tensors(after)
    if old.keys() != new.keys():
        return f"the parameters ({sorted(old.keys() ^ new.keys())[0]})"
    for name in old:
        if old[name] is not new[name] and not _same(old[name], new[name]):
            return name
    modules = dict(after.named_modules())
    layers = [(name, module) for name, module in before.named_modules() if name]  # a GraphModule has a class of its own
    return next((name for name, module in layers if _options(module) != _options(modules[name])), None)


def _options(module: nn.Module) -> tuple[type[nn.Module], str]:
    return type(module), module.extra_repr()


def _same(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype == new.dtype and bool(torch.equal(old, new))


def _skeleton(model: CapturedModel) -> list[tuple[str, str, str, str]]:
    return [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in model.graph.nodes]
