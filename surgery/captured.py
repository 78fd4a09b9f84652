"""From any `nn.Module` to a graph that reproduces it: `torch.export`, raised back to modules, checked against eager."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils._pytree import tree_leaves, tree_map

from .errors import CaptureError
from .functional import functionalise
from .graph import propagate, remove_unused, retarget, tensors
from .inputs import Inputs
from .preparing import bake_parametrisations, private_copy, twin
from .raising import Raiser, submodule
from .tracing import evaluating, first_line, plain_attention, quiet, user_line

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
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
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
        CaptureError: the model fails on the inputs, changes them, is random, has control flow that depends on values,
            or its graph does not reproduce it; the message names the line of user code and what to try.
    """
    with torch.inference_mode(False), torch.enable_grad():
        inputs = Inputs.of(model, example_inputs).clone()
        inputs.check_finite("example inputs")
        private = private_copy(model)
        notes = bake_parametrisations(private)
        eager = twin(private)  # running the model may fill caches that export would take for constants
        known = [(inputs, _forward(eager, inputs))]
        other, why_static = _on_other_values(private, inputs)
        program, why_static = _export(private, eager, inputs, why_static)
        captured = _raise(program, private, inputs)
        if why_static:
            notes.append(f"batch size fixed at {inputs.batch_size}: {why_static}")
        if other and (not why_static or other[0].batch_size == inputs.batch_size):
            known.insert(0, other)  # the example comes last: the shapes noted on the nodes are its
        error = max(_compare(captured, private, *pair) for pair in known)
        notes += _dropped(private, captured)
    captured.meta["capture"] = CaptureInfo(inputs, not why_static, tuple(notes), error)
    return captured


def _on_other_values(model: nn.Module, inputs: Inputs) -> tuple[tuple[Inputs, list[Tensor]] | None, str]:
    """Other inputs and the model's outputs, of another batch size if the model takes one; else the reason as well."""
    batch, reason = inputs.batch_size, ""
    for size in (batch + 2, 2 * batch, batch):
        for other in (inputs.with_batch(size).map(_varied), inputs.with_batch(size)):
            try:
                return (other, _forward(twin(model), other)), reason if size == batch else ""
            except CaptureError as error:
                reason = reason or f"at {size}, {error.problem}"
    return None, reason


def _varied(tensor: Tensor) -> Tensor:
    """The numbers mixed, and some up to halved; whole numbers may be indices or lengths and stay."""
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    factors = 0.5 + torch.rand(tensor.shape, generator=generator) / 2
    return tensor.flatten()[order].view(tensor.shape) * factors.to(tensor)


def _forward(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Flat tensor outputs of the model itself; refuses a model that fails, or writes to its inputs or its state."""
    given = inputs.clone()
    watched = {**{f"input {k}": t for k, t in given.named_tensors.items()}, **tensors(model)}
    versions = {name: t._version for name, t in watched.items()}
    try:
        with evaluating(model):
            output = model(*given.args, **given.kwargs)
    except Exception as error:
        raise CaptureError(
            f"the model itself fails on the example inputs: {type(error).__name__}: {first_line(error)}",
            at=user_line(error),
            fix=f"give inputs the model accepts; these are {_shapes(given)}",
        ) from error
    now = tensors(model)
    written = [name for name, t in watched.items() if t._version != versions[name] or now.get(name, t) is not t]
    if written:
        raise CaptureError(
            f"the model writes to {', '.join(written)} in its forward",
            fix="work on a copy (x = x.clone()), and update state outside the forward or in training mode alone",
        )
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _export(
    model: nn.Module, eager: nn.Module, inputs: Inputs, why_static: str
) -> tuple[torch.export.ExportedProgram, str]:
    """The exported program, and why its batch is fixed if it is; with a reason given a free one is not tried.

    `eager` is the model after a call: some build on their first call what they need.
    """
    example = inputs.with_batch(max(2, inputs.batch_size))  # export takes sizes 0 and 1 for constants
    failures: list[Exception] = []
    free, automatic = torch.export.Dim("batch", min=1), torch.export.Dim.AUTO
    for source, dim in () if why_static else ((model, free), (model, automatic), (eager, automatic)):
        try:
            program = _torch_export(source, example, _dynamic_shapes(source, example, dim))
        except Exception as error:
            failures.append(error)
            continue
        if _is_dynamic(program):
            return program, ""
    for source in (model, eager):
        try:
            program = _torch_export(source, inputs, None)
        except Exception as error:
            failures.append(error)
            continue
        return program, why_static or (
            first_line(failures[0]) if failures else "the model computes with the batch size"
        )
    raise _capture_error(failures[0]) from failures[0]


def _dynamic_shapes(model: nn.Module, inputs: Inputs, dim: Any) -> dict[str, Any]:
    """`dim` for dimension 0 of every tensor that carries the batch, in the form torch.export takes."""
    batch = inputs.batch_size

    def spec(leaf: Any) -> Any:
        return {0: dim} if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == batch else None

    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    return {name: tree_map(spec, value) for name, value in bound.arguments.items()}


def _torch_export(model: nn.Module, inputs: Inputs, dynamic_shapes: Any) -> torch.export.ExportedProgram:
    with plain_attention(), quiet():
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


def _dropped(private: nn.Module, captured: CapturedModel) -> list[str]:
    """What a graph of eval mode does not have: state that no operator reads, and behaviour of training mode alone."""
    kept = tensors(captured)
    names = {id(tensor): name for name, tensor in kept.items()}
    notes = []
    for key, tensor in tensors(private).items():
        if key not in kept and not key.endswith("num_batches_tracked"):
            other = _home(names[id(tensor)]) if id(tensor) in names else None
            notes.append(
                f"{_home(key)}: is kept as {other}" if other else f"{_home(key)}: not used in eval mode, left out"
            )
    notes += [
        f"{name}: {type(module).__name__} drops nothing in eval mode, so the graph does not have it"
        for name, module in private.named_modules()
        if type(module).__name__ in _RANDOM_IN_TRAINING and _drop_rate(module)
    ]
    notes += [
        f"{node.meta.get('module_path') or node.name}: normalises with its running statistics in training mode too"
        for node in captured.graph.nodes
        if str(node.target).startswith(("aten.batch_norm", "aten.instance_norm"))
    ]
    return list(dict.fromkeys(notes))


_RANDOM_IN_TRAINING = {"StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d", "MultiheadAttention", "RReLU"}


def _drop_rate(module: nn.Module) -> float:
    rates = [getattr(module, name, None) for name in ("p", "drop_prob", "dropout", "upper")]
    return next((float(rate) for rate in rates if isinstance(rate, float | int)), 1.0)


def _home(name: str) -> str:
    return name.rpartition(".")[0] or name


def _compare(captured: CapturedModel, model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> float:
    """Largest deviation relative to the largest expected value; raises CaptureError above the bound."""
    actual = [v for v in propagate(captured, inputs) if isinstance(v, Tensor)]
    if [a.shape for a in actual] != [e.shape for e in expected]:
        raise CaptureError(
            f"the graph gives shapes {[*map(_shape, actual)]}, the model {[*map(_shape, expected)]}", fix=_CONSTANTS
        )
    error = max((relative_error(a, e) for a, e in zip(actual, expected, strict=True)), default=0.0)
    if error:
        _refuse_randomness(model, inputs, expected)
    if not error <= RELATIVE_BOUND:
        raise CaptureError(
            f"the graph deviates from the model by {error:.2e} of its largest output (bound {RELATIVE_BOUND:g})",
            fix=_CONSTANTS,
        )
    return error


_CONSTANTS = (
    "Python state and what .tolist() or .numpy() take out of a tensor become constants in a graph;"
    " use tensor operators, and report the model if it has none of these"
)


def _refuse_randomness(model: nn.Module, inputs: Inputs, expected: list[Tensor]) -> None:
    again = _forward(twin(model), inputs)
    if any(relative_error(a, e) for a, e in zip(again, expected, strict=True)):
        raise CaptureError(
            "two calls of the model in eval mode with the same inputs differ",
            fix="make the forward deterministic in eval mode (dropout with training=self.training, no noise)",
        )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    if torch.equal(actual, expected) or not expected.numel():
        return 0.0
    same = torch.equal(actual.isnan(), expected.isnan())
    a, e = actual.detach().double().nan_to_num(), expected.detach().double().nan_to_num()
    return float((a - e).abs().max() / e.abs().max().clamp_min(1e-30)) if same else float("inf")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _shapes(inputs: Inputs) -> str:
    return ", ".join(
        f"{name} {tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in inputs.named_tensors.items()
    )


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
    return CaptureError(f"torch.export cannot follow the model: {first_line(error)}", at=user_line(error), fix=fix)
