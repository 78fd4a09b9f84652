"""An ONNX graph as torch's exporter leaves it, made small, readable, and free of traces of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules.common import slice_split_rule

from .folding import may_fold
from .narrow import narrow
from .spared import spare_float_layers
from .tensor_names import ValueNames, unique

ROUNDS = 2
RULES = rewriter.RewriteRuleSet([r for r in rewriter._DEFAULT_REWRITE_RULES if r is not slice_split_rule])
"""Not the one that makes a Split of two Slices: it compares every node with all others, which takes minutes where
weights are computed by thousands of nodes."""


def tidy(model: ir.Model, names: list[str]) -> None:
    """Folds constants, merges equal weights, packs integers, gives inputs and outputs `names`, drops stack traces."""
    _simplify(model)
    _make_contiguous(model.graph)
    common.DeduplicateHashedInitializersPass()(model)
    taken, weights = ValueNames(model.graph), list(model.graph.initializers.values())
    taken.claim(weights, unique(str(weight.name).removeprefix("model.") for weight in weights))
    narrow(model, taken)
    spare_float_layers(model.graph, taken)
    taken.claim([*model.graph.inputs, *model.graph.outputs], names)
    _name_batch(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None
    model.graph.metadata_props.clear()


def _simplify(model: ir.Model) -> None:
    """What `onnxscript.optimizer.optimize` does, by `may_fold` and `RULES`."""
    optimizer.inline(model)
    optimizer.remove_unused_functions(model)
    for _ in range(ROUNDS):
        folded = _folded(model)
        common.RemoveUnusedNodesPass()(model)
        if not (RULES.apply_to_model(model) or folded):
            break
        common.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _folded(model: ir.Model) -> bool:
    """Whether constants were folded. onnxscript gives up where it cannot evaluate a node, such as a split that gives
    fewer parts than were asked for; what is folded by then stands, and the rest is computed by the runtime."""
    try:
        return bool(optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=may_fold).modified)
    except RuntimeError:
        return False


def forget_inner_shapes(graph: ir.Graph) -> None:
    """Shapes and types between inputs and outputs: every runtime infers them, and in a small model they are much."""
    for value in _values(graph):
        if not (value.is_graph_input() or value.is_graph_output()):
            value.shape = value.type = None


def _make_contiguous(graph: ir.Graph) -> None:
    """Folded transposes are views, for which there is no hash; they are laid out whenever their bytes are asked for."""
    for name, value in graph.initializers.items():
        held = value.const_value
        if isinstance(held, ir.Tensor) and not held.numpy().flags.c_contiguous:
            laid_out = partial(_laid_out, held)
            value.const_value = ir.LazyTensor(laid_out, held.dtype, held.shape, name=name)


def _laid_out(tensor: ir.Tensor[Any]) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().copy(order="C"), tensor.dtype, name=tensor.name)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def _name_batch(graph: ir.Graph) -> None:
    """Replaces torch's symbol for the batch, such as s77, by `batch` in every shape."""
    leading = [value.shape[0] for value in graph.inputs if value.shape]
    symbols = {str(dim.value) for dim in leading if isinstance(dim, ir.SymbolicDim)}
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in sorted(symbols)) or r"(?!)")
    for value in _values(graph):
        if value.shape is not None:
            dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
            value.shape = ir.Shape([pattern.sub("batch", dim) if isinstance(dim, str) else dim for dim in dims])
