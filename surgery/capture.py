"""From any `nn.Module` to a graph that reproduces it: `torch.export`, raised back to modules, checked against eager."""

from __future__ import annotations

import copy
import inspect
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from .errors import CaptureError
from .functional import functionalise
from .graph import propagate, remove_unused, retarget, tensors
from .inputs import Inputs
from .raising import Raiser, submodule

# A captured graph calls the very operators of the model; rounding may differ only where a region was recomputed.
RELATIVE_BOUND = 1e-5


@dataclass(frozen=True)
class CaptureInfo:
    """What capture found out. `error` is the largest deviation from eager, relative to the largest output."""

    inputs: Inputs
    dynamic_batch: bool
    notes: tuple[str, ...]
    error: float


class CallCodeGen(_PyTreeCodeGen):
    """Code that takes the original's nested arguments and gives its nested outputs."""

    def __deepcopy__(self, memo: dict[int, Any]) -> CallCodeGen:
        return CallCodeGen(self.pytree_info)


class CapturedModel(fx.GraphModule):
    """A `GraphModule` that reproduces the model it was captured from; called, trained and moved like any module."""

    meta: dict[str, Any]

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "CapturedModel") -> None:
        super().__init__(root, graph, class_name)
        for name, module in self.named_modules():  # GraphModule registers every buffer as persistent
            origin = submodule(root, name)
            module._non_persistent_buffers_set = set(origin._non_persistent_buffers_set if origin else ())

    def _deepcopy_init(self) -> Callable[..., None]:
        return CapturedModel.__init__

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedModel:
        for spec in (self._in_spec, self._out_spec):  # immutable, and torch warns when one is copied
            memo[id(spec)] = spec
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, CapturedModel)
        return copied

    @property
    def inputs(self) -> Inputs:
        """The example inputs."""
        return self._info.inputs

    @property
    def dynamic_batch(self) -> bool:
        """Whether dimension 0 of the inputs is free; otherwise it is fixed at the example's size, `notes` says why."""
        return self._info.dynamic_batch

    @property
    def notes(self) -> tuple[str, ...]:
        """What differs from the original class: parametrisations baked, modules dropped, batch fixed."""
        return self._info.notes

    @property
    def capture_error(self) -> float:
        """Largest deviation from the original, on the example and another batch, relative to the largest output."""
        return self._info.error

    @property
    def _info(self) -> CaptureInfo:
        info = self.meta["capture"]
        assert isinstance(info, CaptureInfo)
        return info

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CapturedModel:
        super()._apply(fn, recurse)
        device = fn(torch.empty(0)).device
        retarget(self.graph, device)
        self.recompile()
        return self


def capture(model: nn.Module, example_inputs: Any) -> CapturedModel:
    """A graph of `model` in eval mode whose layers keep their names, checked against the model itself.

    `example_inputs`: a tensor, a tuple of arguments, or a dict of arguments by name; the batch is dimension 0. The
    batch size stays free where the model allows it. `model` is not changed, the result holds a copy of its weights.

    Raises:
        InputError: the inputs do not fit the signature, or hold NaN.
        CaptureError: the model fails on the inputs, changes them, is random, has control flow that depends on values, or
            its graph does not reproduce it; the message names the line of user code and what to try.
    """
    inputs = Inputs.of(model, example_inputs).clone()
    inputs.check_finite("example inputs")
    private = _private_copy(model)
    notes = _bake_parametrisations(private)
    expected = _run_eager(private, inputs)
    exported, dynamic, why_static = _export(private, inputs)
    notes += [why_static] if why_static else []
    captured = _raise(exported, private, inputs)
    notes += _dropped(private, captured)
    error = 0.0
    if dynamic:
        other = inputs.with_batch(inputs.batch_size + 2)
        error = _compare(captured, other, _forward(private, other))
    error = max(error, _compare(captured, inputs, expected))  # last: shapes on the nodes are the example's
    captured.meta["capture"] = CaptureInfo(inputs, dynamic, tuple(notes), error)
    return captured


def _private_copy(model: nn.Module) -> nn.Module:
    try:
        private = copy.deepcopy(model)
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}",
            fix="give a model that copy.deepcopy accepts (no tensors with history kept as attributes)",
        ) from error
    return private.eval()


def _bake_parametrisations(model: nn.Module) -> list[str]:
    """Replace weight norm, spectral norm and other parametrisations by the weights they compute."""
    notes = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for tensor in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
                notes.append(f"{name}.{tensor}: parametrisation replaced by the weight it computes")
        for key, hook in list(module._forward_pre_hooks.items()):
            if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
                hook.remove(module)
                del module._forward_pre_hooks[key]
                notes.append(f"{name}.{hook.name}: {type(hook).__name__} replaced by the weight it computes")
    return notes


def _run_eager(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Flat tensor outputs of the model itself; refuses models that write to their inputs or state, or are random."""
    first = _forward(model, inputs)
    second = _forward(model, inputs)
    if any(not torch.equal(a, b) for a, b in zip(first, second, strict=True) if not a.isnan().any()):
        raise CaptureError(
            "two calls of the model in eval mode with the same inputs differ",
            fix="make the forward deterministic in eval mode (dropout with training=self.training, no noise)",
        )
    return first


def _forward(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    given = inputs.clone()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    watched = {**{f"input {k}": t for k, t in given.named_tensors.items()}, **state}
    versions = {name: t._version for name, t in watched.items()}
    try:
        with torch.no_grad(), _plain_attention():
            output = model(*given.args, **given.kwargs)
    except Exception as error:
        raise CaptureError(
            f"the model itself fails on the example inputs: {type(error).__name__}: {_first_line(error)}",
            at=_user_line(error),
            fix=f"give inputs the model accepts; these are {_shapes(given)}",
        ) from error
    written = [name for name, t in watched.items() if t._version != versions[name]]
    if written:
        raise CaptureError(
            f"the model writes to {', '.join(written)} in its forward",
            fix="work on a copy (x = x.clone()) or use the out-of-place operator",
        )
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _export(model: nn.Module, inputs: Inputs) -> tuple[torch.export.ExportedProgram, bool, str | None]:
    """The exported program, whether its batch is free, and why not."""
    batch = max(2, inputs.batch_size)  # export takes sizes 0 and 1 for constants
    example = inputs.with_batch(batch)
    failures: list[Exception] = []
    for dim in (torch.export.Dim("batch", min=1), torch.export.Dim.AUTO):
        try:
            program = _torch_export(model, example, _dynamic_shapes(model, example, dim))
        except Exception as error:
            failures.append(error)
            continue
        if _is_dynamic(program):
            return program, True, None
    try:
        program = _torch_export(model, inputs, None)
    except Exception as error:
        raise _capture_error(failures[0] if failures else error) from error
    reason = _first_line(failures[0]) if failures else "the model computes with the batch size"
    return program, False, f"batch size fixed at {inputs.batch_size}: {reason}"


def _dynamic_shapes(model: nn.Module, inputs: Inputs, dim: Any) -> dict[str, Any]:
    """`dim` for dimension 0 of every tensor that carries the batch, in the form torch.export takes."""
    batch = inputs.batch_size

    def spec(leaf: Any) -> Any:
        return {0: dim} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None

    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: tree_map(spec, value) for name, value in bound.arguments.items()}


def _torch_export(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    with _plain_attention(), _quiet():
        return torch.export.export(model, inputs.args, inputs.kwargs, dynamic_shapes=dynamic_shapes, strict=False)


def _is_dynamic(program: torch.export.ExportedProgram) -> bool:
    user = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in user]
    return any(isinstance(v, Tensor) and v.ndim and isinstance(v.shape[0], torch.SymInt) for v in values)


def _raise(program: torch.export.ExportedProgram, private: nn.Module, inputs: Inputs) -> CapturedModel:
    module = program.graph_module
    functionalise(module)
    names = {
        spec.arg.name: str(spec.target)
        for spec in program.graph_signature.input_specs
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
    }
    for node in list(module.graph.nodes):
        if str(node.target).startswith(("aten._assert", "aten.sym_constrain")):
            module.graph.erase_node(node)
    root, graph = Raiser(module.graph, names, program.constants, private).run()
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    graph.set_codegen(CallCodeGen(_PyTreeInfo(_signature_names(private, inputs), in_spec, out_spec)))
    captured = CapturedModel(root, graph)
    remove_unused(captured)
    captured.eval()
    captured.recompile()
    return captured


def _signature_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of the arguments in the order the graph takes them."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(inputs.args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return [*names[: len(inputs.args)], *inputs.kwargs]


def _dropped(private: nn.Module, captured: nn.Module) -> list[str]:
    """What eval mode left out: state that no operator reads, and random depth."""
    kept = tensors(captured)
    names = {id(tensor): name for name, tensor in kept.items()}
    notes = []
    for key, tensor in tensors(private).items():
        home = key.rpartition(".")[0] or key
        other = names.get(id(tensor), "").rpartition(".")[0]
        if key not in kept and not key.endswith("num_batches_tracked"):
            notes.append(f"{home}: is kept as {other}" if other else f"{home}: not used in eval mode, left out")
    notes = list(dict.fromkeys(notes))
    random = [
        f"{name}: {type(module).__name__} does nothing in eval mode, so the graph does not have it"
        for name, module in private.named_modules()
        if type(module).__name__ in ("StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d")
    ]
    return notes + random


def _compare(captured: CapturedModel, inputs: Inputs, expected: list[Tensor]) -> float:
    """Largest deviation relative to the largest expected value; raises CaptureError above the bound."""
    actual = [v for v in propagate(captured, inputs) if isinstance(v, Tensor)]
    if [a.shape for a in actual] != [e.shape for e in expected]:
        raise CaptureError(f"the graph gives shapes {[*map(_shape, actual)]}, the model {[*map(_shape, expected)]}")
    error = max((relative_error(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)
    if not error <= RELATIVE_BOUND:
        raise CaptureError(
            f"the graph deviates from the model by {error:.2e} of its largest output (bound {RELATIVE_BOUND:g})",
            fix="report this with the model; behaviour that torch.export does not see is the usual cause",
        )
    return error


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if torch.equal(actual, expected) or not expected.numel():
        return 0.0
    same = torch.equal(actual.isnan(), expected.isnan())
    a, e = actual.double().nan_to_num(), expected.double().nan_to_num()
    return float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) if same else float("inf")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _shapes(inputs: Inputs) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in inputs.named_tensors.items()
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _user_line(error: BaseException) -> str:
    """File and line of the last frame that is neither torch's nor ours."""
    ours = ("/torch/", "/surgery/", "<eval_with_key>", "<string>")
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in ours)]
    return f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _capture_error(error: Exception) -> CaptureError:
    text = str(error)
    data_dependent = (
        "data-dependent" in text or "unbacked" in text or type(error).__name__.startswith("GuardOnDataDependent")
    )
    fix = (
        "the forward decides on the values of a tensor: use torch.where or torch.cond instead of a Python if"
        if data_dependent
        else "write the line with tensor operations; torch.export.draft_export(model, inputs) reports every obstacle"
    )
    return CaptureError(f"torch.export cannot follow the model: {_first_line(error)}", at=_user_line(error), fix=fix)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """`nn.MultiheadAttention` must show its operators, not the fused inference kernel."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and warns about attempts that we retry."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
