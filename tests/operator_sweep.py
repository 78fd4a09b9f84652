"""One operator of PyTorch's own database between two layers: captured, pruned, exported, and each result held to proof.

    x → first, a convolution → operator → a head per result

Removed = masked is told by code that shares nothing with the product. All weights are different numbers, so the rows of
`first` and the columns of the heads that are left are found by their values; the model as PyTorch runs it, with all
other rows at zero and what stands at all other columns left out, has to give the same.
"""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from surgery import (
    CapturedModel,
    CaptureError,
    Context,
    ModelError,
    PassError,
    SurgeryError,
    capture,
    export_onnx,
    find_channels,
)
from surgery.registry import Registry

BOUND = 1e-5
PARITY = 1e-4
SAMPLES = 20
"""Of an operator's samples that are tried until one is pruned."""
RANGES = ((0.0, 1.0), (0.5, 0.1), (2.0, 0.2), (0.0, 0.1))
"""Mean and standard deviation of what `first` gives; the first at which the operator's results are finite."""


@dataclass(frozen=True)
class Row:
    """What became of an operator. `outcome` is one of OUTCOMES; `why` what it needs all channels for, or a refusal."""

    name: str
    outcome: str
    why: str = ""
    error: float | None = None
    """Of removed from masked, relative to the largest output."""
    onnx: str = ""
    """`right`, a refusal, or how it is wrong."""
    parity: float | None = None


class Vacuous(Exception):
    """A comparison that could not have failed."""


OUTCOMES = ("pruned", "unprunable", "refused", "out of scope", "wrong", "crash")


class Between(nn.Module):
    """`operator(first(x), …)` with the other tensors of `sample` as buffers, and a head for each tensor it gives."""

    def __init__(self, operator: Any, sample: Any, mean: float, spread: float) -> None:
        super().__init__()
        leaves, self.spec = tree_flatten((sample.input, sample.args, sample.kwargs))
        self.at = next(i for i, leaf in enumerate(leaves) if _is_image(leaf))
        image = leaves[self.at]
        self.operator, self.plain = operator, [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and i != self.at:
                self.register_buffer(f"given_{i}", leaf.detach().clone())
        self.first = getattr(nn, f"Conv{image.ndim - 2}d")(3, image.shape[1], 1)
        with torch.no_grad():
            self.first.weight.mul_(spread)
            self.first.bias.copy_(mean + 0.1 * spread * torch.randn(image.shape[1]))
        self.x = torch.randn(image.shape[0], 3, *image.shape[2:])
        with torch.no_grad():
            self.heads = nn.ModuleList(_head(result) for result in self.results(self.first(self.x)))

    def results(self, image: Tensor) -> list[Tensor]:
        given = [getattr(self, f"given_{i}", leaf) for i, leaf in enumerate(self.plain)]
        given[self.at] = image
        first, args, kwargs = tree_unflatten(given, self.spec)
        made = [leaf for leaf in tree_leaves(self.operator(first, *args, **kwargs)) if isinstance(leaf, Tensor)]
        return [leaf if leaf.is_complex() else leaf.float() for leaf in made[:4]]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [head(result) for head, result in zip(self.heads, self.results(self.first(x)), strict=True)]


def _is_image(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and leaf.ndim in (3, 4)


def _head(result: Tensor) -> nn.Module:
    if result.ndim in (3, 4, 5) and result.shape[1]:
        kind: Any = getattr(nn, f"Conv{result.ndim - 2}d")
        return kind(result.shape[1], 3, 1)
    return nn.Linear(result.shape[-1], 3) if result.ndim else nn.Identity()


def samples(op: Any) -> Iterator[Any]:
    """Those of the database that begin with floats (N, C, …). Elementwise operators have flat ones alone: theirs are
    given such floats in place of their own."""
    flat = []
    for sample in op.sample_inputs("cpu", torch.float32, requires_grad=False):
        parts = sample.input, sample.args, sample.kwargs
        tensors = [leaf for leaf in tree_leaves(parts) if isinstance(leaf, Tensor)]
        if tensors and _is_image(tensors[0]) and tensors[0].numel() and tensors[0].shape[1] > 1:
            yield sample
        elif tensors and len({(tensor.shape, tensor.dtype) for tensor in tensors}) == 1:
            image = tree_map_only(Tensor, lambda _: torch.rand(3, 8, 6), parts)
            flat.append(SimpleNamespace(**dict(zip(("input", "args", "kwargs"), image, strict=True))))
    yield from flat


def name_of(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else str(op.name)


def examined(op: Any, onnx: bool = True) -> Row:
    """The row of the first sample that is pruned; the best one where none is."""
    if why := _OUT_OF_BOUNDS.get(name_of(op)):
        return Row(name_of(op), "out of scope", why)
    found: list[tuple[Row, CapturedModel | None]] = []
    try:
        for sample in itertools.islice(samples(op), SAMPLES):
            found.append(_examined(op, sample))
            if found[-1][0].outcome in ("pruned", "wrong", "crash"):
                break
    except Exception as error:
        return Row(name_of(op), "out of scope", f"the database: {_in_short(error)}")
    if not found:
        return Row(name_of(op), "out of scope", "no sample with floats (N, C, …), C > 1")
    row, model = min(found, key=lambda entry: (*_WORST, *OUTCOMES).index(entry[0].outcome))
    return _exported(row, model) if onnx and model is not None else row


_OUT_OF_BOUNDS = {"lu_unpack": "PyTorch writes out of bounds where its operands differ in their batch"}
_WORST = ("wrong", "crash")


def _examined(op: Any, sample: Any) -> tuple[Row, CapturedModel | None]:
    """The row, and the captured model, pruned where that could be done."""
    name = name_of(op)
    model, why = _model(op, sample)
    if model is None:
        return Row(name, "out of scope", why), None
    try:
        captured = capture(model, (model.x,))
        found = find_channels(captured)
        if not any(group.size > 1 for group in found.groups):
            reasons = dict.fromkeys(f.why for f in found.frozen if f.layer == "first")
            return Row(name, "unprunable", ", ".join(reasons)), captured
        step = Registry.load().passes["prune_filters"](ratio=0.5, reconstruct=False)
        pruned, report = step(captured, Context(captured))
        if not any(edit.layer == "first" for edit in report.edits):
            return Row(name, "unprunable", next((s.why for s in report.skips if s.layer == "first"), "")), captured
        error = removal_error(model, pruned)
    except Vacuous as vacuous:
        return Row(name, "out of scope", str(vacuous)), None
    except CaptureError as refusal:
        return Row(name, "refused", refusal.problem), None
    except (ModelError, PassError) as refusal:
        return Row(name, "unprunable", refusal.problem), captured
    except Exception as error:
        return Row(name, "crash", _in_short(error)), None
    return Row(name, "pruned" if error <= BOUND else "wrong", "", error), pruned


def _model(op: Any, sample: Any) -> tuple[Between | None, str]:
    """The model, or why the operator is no case for it."""
    why = ""
    for mean, spread in RANGES:
        try:
            torch.manual_seed(0)
            model = Between(op.op, sample, mean, spread).eval()
            with torch.no_grad(), _Tags() as seen:
                results, again = model.results(model.first(model.x)), model.results(model.first(model.x))
        except Exception as error:
            why = why or f"takes no numbers of a layer: {_in_short(error)}"
            continue
        if problem := "random" if seen.random else _problem(results, again):
            why = why or problem
            continue
        return model, ""
    return None, why


class _Tags(TorchDispatchMode):
    """Notes whether an operator that runs draws random numbers."""

    random = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _problem(results: list[Tensor], again: list[Tensor]) -> str:
    if any(result.is_complex() for result in results):
        return "complex results"
    if not results or not all(result.numel() for result in results):
        return "no tensor comes out"
    if not all(bool(result.isfinite().all()) for result in results):
        return "results of a layer's numbers are not finite"
    if any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(results, again, strict=True)):
        return "random"
    return ""


def removal_error(model: Between, pruned: nn.Module) -> float:
    """Of the pruned model from the original with everything at zero that the pruned one does not have."""
    kept = _places(model.first.weight, pruned.get_parameter("first.weight"), 0)
    assert 0 < len(kept) < len(model.first.weight), "nothing is gone"
    gone = torch.ones(len(model.first.weight), dtype=torch.bool)
    gone[kept] = False
    hooks = []
    masked = [model.first.weight, model.first.bias]
    before = [tensor.detach().clone() for tensor in masked]
    with torch.no_grad():
        whole = model(model.x)
    for i, head in enumerate(model.heads):
        if not isinstance(head, nn.Identity):
            left = _places(head.weight, pruned.get_parameter(f"heads.{i}.weight"), 1)
            hooks.append(head.register_forward_pre_hook(_masking(left, isinstance(head, nn.Linear))))
    if getattr(model.operator, "__name__", "") in NORMS:
        model.operator = _over_the_rest(model.operator, kept)
    try:
        with torch.no_grad():
            for tensor in masked:
                tensor[gone] = 0
            expected, actual = model(model.x), pruned(model.x)
    finally:
        for hook in hooks:
            hook.remove()
        for tensor, old in zip(masked, before, strict=True):
            tensor.data = old
    if not max(_deviation(w, e) for w, e in zip(whole, expected, strict=True)) > 1e-4:
        raise Vacuous("what goes makes no difference")
    return max(_deviation(a, e) for a, e in zip(actual, expected, strict=True))


NORMS = ("layer_norm", "rms_norm", "group_norm")
"""Where channels go, their statistics are over the channels that are left: the one exception to removed = masked."""


def _over_the_rest(norm: Any, kept: Tensor) -> Any:
    def operator(x: Tensor, sizes: Any, *tensors: Tensor | None, **options: Any) -> Tensor:
        part = x.index_select(1, kept)
        if isinstance(sizes, int):  # groups
            first, sizes = 1, len(kept) if sizes == x.shape[1] else sizes
        else:
            first, sizes = x.ndim - len(sizes), part.shape[x.ndim - len(sizes) :]
        cut = [t if t is None or first > 1 else t.index_select(1 - first, kept) for t in tensors]
        options = {k: t.index_select(1 - first, kept) if isinstance(t, Tensor) else t for k, t in options.items()}
        return torch.zeros_like(x).index_copy(1, kept, norm(part, sizes, *cut, **options))

    return operator


def _places(whole: Tensor, part: Tensor, dim: int) -> Tensor:
    """Where the slices of `part` along `dim` stand in `whole`, by their values, each once and in order."""
    rows, left = (t.detach().movedim(dim, 0).flatten(1) for t in (whole, part))
    if left.shape[1] != rows.shape[1]:
        raise AssertionError(f"weight {tuple(part.shape)} is no part of {tuple(whole.shape)}")
    same = (left[:, None] == rows[None]).all(-1)
    assert bool((same.sum(1) == 1).all()), "values that the original does not have"
    places = same.int().argmax(1)
    assert bool((places.diff() > 0).all()), "another order"
    return places


def _masking(left: Tensor, last: bool) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...]) -> Tensor:
        dim = -1 if last else 1
        whole = torch.zeros_like(given[0])
        return whole.index_copy(dim, left, given[0].index_select(dim, left))

    return hook


def _deviation(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{tuple(actual.shape)}, not {tuple(expected.shape)}"
    assert bool(expected.isfinite().all()), "the masked model gives no finite numbers"
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))


def _exported(row: Row, model: CapturedModel) -> Row:
    """`row` with what ONNX Runtime makes of the file."""
    import onnxruntime

    example = model.inputs.args
    with tempfile.TemporaryDirectory() as folder:
        try:
            path = export_onnx(model, example, Path(folder) / "model.onnx")
        except SurgeryError as error:
            return Row(row.name, row.outcome, row.why, row.error, f"refused: {error.problem}")
        except Exception as error:
            return Row(row.name, "crash", f"export: {_in_short(error)}", row.error, "crash")
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            session = onnxruntime.InferenceSession(path, options)
            outputs = session.run(None, {session.get_inputs()[0].name: example[0].numpy()})
        except Exception as error:
            return Row(row.name, "wrong", f"ONNX Runtime: {_in_short(error)}", row.error, "does not run")
    with torch.no_grad():
        expected = tree_leaves(model(*example))
    try:
        parity = max(_deviation(torch.from_numpy(a), e) for a, e in zip(outputs, expected, strict=True))
    except AssertionError as error:
        return Row(row.name, "wrong", f"ONNX Runtime: {error}", row.error, "wrong")
    right = parity <= PARITY
    return Row(row.name, row.outcome if right else "wrong", row.why, row.error, "right" if right else "wrong", parity)


def _in_short(error: Exception, width: int = 160) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= width else text[: width - 1] + "…"


def database() -> list[Any]:
    """All operators, in the order of the database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.testing._internal.common_methods_invocations import op_db
    # the import forbids to write PyTorch's switches from then on, which other tests do
    torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
    return list(op_db)
