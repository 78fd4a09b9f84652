"""From any `nn.Module` to a graph that reproduces it: `torch.export`, raised back to modules, checked against eager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from .errors import CaptureError, InputError
from .fold_constants import fold_numbers
from .functional import functionalise
from .graph import retarget
from .inputs import Inputs
from .names import submodule, tensors
from .precision import full_precision
from .preparing import bake_parametrisations, private_copy, twin, unwrapped
from .process import exclusive
from .program import export
from .raising import Raiser
from .reproduction import RELATIVE_BOUND as RELATIVE_BOUND
from .reproduction import Known, another_sample, at_another_batch, compare, forward, known, on_other_numbers
from .reproduction import relative_error as relative_error
from .sizes import Expected, check_inputs, expected_inputs
from .soundness import denormal
from .torch_private import (
    OpOverload,
    TreeCodeGen,
    TreeInfo,
    TreeSpec,
    codegen_of,
    set_transient,
    transient_of,
    tree_leaves,
    tree_structure,
)
from .tracing import evaluating, uncollected
from .vocabulary import arguments


@dataclass(frozen=True)
class CaptureInfo:
    """What capture found out. `error` is the largest deviation from eager, relative to the largest output."""

    inputs: Inputs
    dynamic_batch: bool
    notes: tuple[str, ...]
    error: float


class CallCodeGen(TreeCodeGen):
    """Code that takes the original's nested arguments, checks them, and gives its nested outputs."""

    def gen_var_bindings(self, fn_args: list[str], free_vars: list[str], expanded_def: bool) -> str:
        names = ", ".join(name.split(":")[0].split("#")[0] for name in free_vars)
        return f"{super().gen_var_bindings(fn_args, free_vars, expanded_def)}\n    self.check_inputs({names})"

    def __deepcopy__(self, memo: dict[int, Any]) -> CallCodeGen:
        return CallCodeGen(self.pytree_info)


class CapturedModel(fx.GraphModule):
    """A `GraphModule` that reproduces the model it was captured from; called, trained and moved like any module."""

    meta: dict[str, Any]

    def __init__(self, root: nn.Module, graph: fx.Graph, class_name: str = "CapturedModel") -> None:
        super().__init__(root, graph, class_name)
        for name, module in self.named_modules():  # GraphModule registers every buffer as persistent
            origin = submodule(root, name)
            set_transient(module, transient_of(origin) if origin else ())

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
        """The example inputs, under the names of the forward's arguments."""
        info = codegen_of(self.graph).pytree_info
        return replace(self._info.inputs, names=tuple(info.orig_args))

    @cached_property
    def expected_inputs(self) -> Expected:
        """What the model takes: see `surgery.sizes`."""
        return expected_inputs(self.inputs, free_batch=self.dynamic_batch)

    def check_inputs(self, *leaves: Any) -> None:
        """Raises InputError where a call's tensors and constants, in order, are not as in the capture."""
        if "capture" in self.meta:
            try:
                check_inputs(dict(zip(self.expected_inputs, leaves, strict=True)), self.expected_inputs)
            except ValueError as error:
                raise InputError(str(error), fix=OTHER_SIZES) from error

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
        """Largest deviation from the original wherever the two were compared, relative to the largest output."""
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


OTHER_SIZES = "give inputs as the example was, or capture the model with an example of this kind and size"


@exclusive()
@full_precision()
def capture(model: nn.Module, example_inputs: Any) -> CapturedModel:
    """A graph of `model` in eval mode whose layers keep their names, checked against the model itself.

    `example_inputs`: a tensor, a tuple of arguments, or a dict of arguments by name; the batch is dimension 0. The
    batch size stays free where the model allows it. `model` is not changed, the result holds a copy of its weights.

    Raises:
        ModelError: it is no module, or holds what no pass can work on, such as NaN, sparse or quantised weights.
        InputError: the inputs do not fit the signature, are empty, or hold NaN.
        CaptureError: the model fails on the inputs, changes them, is random, has control flow that depends on values,
            or its graph does not reproduce it; the message names the line of user code and what to try.
    """
    model = unwrapped(model)
    with torch.inference_mode(False), torch.enable_grad(), uncollected():
        inputs = Inputs.of(model, example_inputs).clone()
        _check_example(inputs)
        private = private_copy(model)
        notes = bake_parametrisations(private)
        captured, error, why_fixed = _reproduced(private, inputs)
        notes += [f"batch size fixed at {inputs.batch_size}: {why_fixed}"] if why_fixed else []
        notes += _fixed_arguments(model, inputs) + _dropped(private, captured) + denormal(captured)
    captured.meta["capture"] = CaptureInfo(inputs, not why_fixed, tuple(notes), error)
    return captured


def nested_as(model: nn.Module, inputs: Inputs) -> tuple[TreeSpec, TreeSpec]:
    """How the arguments of `model` and its outputs are nested, in the user's own classes; it runs once, as a copy."""
    private = private_copy(model)
    with torch.inference_mode(False), evaluating(private):
        given = inputs.clone()
        return tree_structure((inputs.args, inputs.kwargs)), tree_structure(private(*given.args, **given.kwargs))


def _check_example(inputs: Inputs) -> None:
    place = "example inputs"
    if not inputs.tensors:
        raise InputError("they hold no tensor", at=place, fix="give a tensor, a tuple or a dict of arguments")
    if empty := next((n for n, t in inputs.named_tensors.items() if t.ndim and not t.shape[0]), None):
        raise InputError(f"input {empty} is empty", at=place, fix="give at least one sample")
    inputs.check_finite(place)


def _reproduced(private: nn.Module, inputs: Inputs) -> tuple[CapturedModel, float, str]:
    """A graph of `private` with its error, and why its batch size is fixed if it is.

    An example of one sample is exported as a batch of two, so that one other sample is other numbers and another batch
    size at once. Where that does not do, the model is run on the example and at another batch size.
    """
    if sample := another_sample(private, inputs):
        with suppress(CaptureError):
            captured = _graph(_candidates(private, inputs), inputs, free_batch=True)
            return captured, compare(captured, private, sample, note_shapes=True), ""
    called = twin(private)
    example = known(called, inputs)
    other, why_fixed = at_another_batch(private, inputs)
    if other:
        try:
            captured = _graph((private, called), inputs, free_batch=True)
            return captured, _error(captured, private, example, other), ""
        except CaptureError as error:
            why_fixed = error.problem
    captured = _graph((private, called), inputs, free_batch=False)
    return captured, _error(captured, private, example, *on_other_numbers(private, inputs)), why_fixed


def _candidates(private: nn.Module, inputs: Inputs) -> Iterator[nn.Module]:
    """The model before and after its first call: some build there what they need, others keep what had better be
    computed anew."""
    yield private
    called = twin(private)
    forward(called, inputs)
    yield called


def _error(captured: CapturedModel, model: nn.Module, example: Known, *others: Known) -> float:
    """Largest deviation; the shapes of the example are noted on the nodes."""
    errors = [compare(captured, model, other, note_shapes=False) for other in others]
    return max(*errors, compare(captured, model, example, note_shapes=True), 0.0)


def _graph(candidates: Iterable[nn.Module], inputs: Inputs, *, free_batch: bool) -> CapturedModel:
    """The first of `candidates` that torch.export can follow, raised back to modules."""
    program, private = export(candidates, inputs, free_batch=free_batch)
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
    root, graph = Raiser(module.graph, names, program.constants, private, _reserved_names()).run()
    in_spec, out_spec = program.call_spec.in_spec, program.call_spec.out_spec
    assert in_spec is not None
    graph.set_codegen(CallCodeGen(TreeInfo(_signature_names(private, inputs), in_spec, out_spec)))
    captured = CapturedModel(root, graph)
    fold_numbers(captured)
    _check_options(graph)
    captured.eval()
    captured.recompile()
    return captured


def _check_options(graph: fx.Graph) -> None:
    """Raises CaptureError where a layer has another form at every batch size, which no runtime has."""
    for node in graph.nodes:
        given = arguments(node) if isinstance(node.target, OpOverload) else {}
        for name in _OPTIONS & given.keys() if "size" not in given else ():
            if any(isinstance(leaf, fx.Node) for leaf in tree_leaves(given[name])):
                raise CaptureError(f"the {name} of {node.target} depend on it")


_OPTIONS = {
    "groups",
    "kernel_size",
    "stride",
    "padding",
    "output_padding",
    "dilation",
    "num_groups",
    "normalized_shape",
}


@cache
def _reserved_names() -> frozenset[str]:
    """What a captured model calls its own, beside what every module does."""
    empty = CapturedModel(nn.Module(), fx.Graph())
    return frozenset({*dir(CapturedModel), *vars(empty)}) - {*dir(nn.Module()), *vars(nn.Module())}


def _signature_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of the arguments in the order the graph takes them."""
    names: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}_{i}" for i in range(len(inputs.args) - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return [*names[: len(inputs.args)], *inputs.kwargs]


def _fixed_arguments(model: nn.Module, inputs: Inputs) -> list[str]:
    """Arguments that are constants in the graph: left at their default, or given as something else than a tensor."""
    bound = inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    given = {name for name, value in bound.arguments.items() if any(isinstance(v, Tensor) for v in tree_leaves(value))}
    bound.apply_defaults()
    fixed = [(name, value) for name, value in bound.arguments.items() if name not in given and value not in ((), {})]
    return [f"argument {name}: fixed at {value!r}; give it as a tensor to keep it an input" for name, value in fixed]


def _dropped(private: nn.Module, captured: CapturedModel) -> list[str]:
    """What a graph of eval mode does not have: state that no operator reads, and behaviour of training mode alone."""
    kept = tensors(captured)
    names = {id(tensor): name for name, tensor in kept.items()}
    notes = []
    for key, tensor in tensors(private).items():
        if key not in kept and not key.endswith("num_batches_tracked"):
            other = _home(names[id(tensor)]) if id(tensor) in names else None
            notes.append(
                f"{_home(key)}: is kept as {other}"
                if other
                else f"{_home(key)}: no operator of eval mode reads it, left out"
            )
    notes += [
        f"{name}: {type(module).__name__} drops nothing in eval mode, so the graph does not have it"
        for name, module in private.named_modules()
        if type(module).__name__ in _RANDOM_IN_TRAINING and _drop_rate(module)
    ]
    notes += [
        f"{node.meta.get('module_path') or node.name}: normalises with its running statistics in training mode too"
        for node in captured.graph.nodes
        if str(node.target).startswith(("aten.batch_norm", "aten.instance_norm")) and node.args[3] is not None
    ]
    return list(dict.fromkeys(notes))


_RANDOM_IN_TRAINING = {"StochasticDepth", "DropPath", "DropBlock2d", "DropBlock3d", "MultiheadAttention", "RReLU"}


def _drop_rate(module: nn.Module) -> float:
    rates = [getattr(module, name, None) for name in ("p", "drop_prob", "dropout", "upper")]
    return next((float(rate) for rate in rates if isinstance(rate, float | int)), 1.0)


def _home(name: str) -> str:
    return name.rpartition(".")[0] or name
