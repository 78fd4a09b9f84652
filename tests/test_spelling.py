from __future__ import annotations

import ast
import math
import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.utils._pytree import tree_leaves, tree_map

from surgery.errors import ExportError
from surgery.export.literals import wrap
from surgery.export.spelling import spell
from surgery.export.spellings import templates
from surgery.export.subscripts import SUBSCRIPTS

X = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
P = X.abs() + 0.1
M = X[0, 0]
V = X[0, 0, 0]
I = torch.tensor([1, 0, 1])  # noqa: E741
B = X > 0
N = (X * 5).to(torch.int64)
DEFAULT_DEVICE = {"device": torch.device("cpu"), "pin_memory": False}

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(*args: Any, **kwargs: Any) -> Call:
    return args, kwargs


UNARY = [
    *("abs", "exp", "expm1", "sin", "cos", "erf", "floor", "ceil", "round", "sign", "tanh", "sigmoid", "relu", "relu6"),
    *("silu", "mish", "hardswish", "hardsigmoid", "selu", "neg", "square", "detach", "alias", "log_sigmoid"),
    *("logical_not", "reciprocal"),
]
POSITIVE = ["log", "log1p", "sqrt", "rsqrt"]
COMPARE = ["eq", "ne", "lt", "le", "gt", "ge"]
LINEAR = call(X, torch.randn(3, 6), torch.randn(3))
CONV1 = call(X[0], torch.randn(2, 3, 3), None, [2], [1], [1], 2)
CONV2 = call(X, torch.randn(2, 2, 3, 3), torch.randn(2), [2, 1], [1, 1], [1, 1], 2)
CONV3 = call(X[None], torch.randn(1, 2, 1, 3, 3), None, [1, 1, 1])
NORM = (torch.randn(4), torch.randn(4))
CREATE = {"dtype": torch.float64, **DEFAULT_DEVICE}

CALLS: dict[str, list[Call]] = {
    **{f"{name}.default": [call(X)] for name in UNARY},
    **{f"{name}.default": [call(P)] for name in POSITIVE},
    **{f"{name}.Tensor": [call(X, P)] for name in COMPARE},
    **{f"{name}.Scalar": [call(X, 0.5)] for name in COMPARE},
    "add.Tensor": [call(X, P), call(X, 1), call(N, 0.5), call(X, -1.5)],
    "add.Scalar": [call(X, 2)],
    "sub.Tensor": [call(X, P), call(X, 2.5)],
    "sub.Scalar": [call(X, 2)],
    "rsub.Scalar": [call(X, 1), call(X, -0.5)],
    "mul.Tensor": [call(X, P), call(X, 0.1), call(N, 3)],
    "mul.Scalar": [call(X, 2)],
    "div.Tensor": [call(X, P), call(X, 3.0), call(N, 3)],
    "div.Scalar": [call(X, 2)],
    "div.Tensor_mode": [call(X, P, rounding_mode="floor"), call(N, 3, rounding_mode="trunc")],
    "floor_divide.default": [call(N, 3), call(X, P)],
    "remainder.Tensor": [call(X, P)],
    "remainder.Scalar": [call(N, 3)],
    "pow.Tensor_Scalar": [call(P, 2), call(P, -0.5)],
    "pow.Tensor_Tensor": [call(P, X)],
    "pow.Scalar": [call(2, X), call(-2.0, N)],
    "matmul.default": [call(X, P), call(X, V)],
    "bitwise_and.Tensor": [call(B, ~B), call(N, N + 1)],
    "bitwise_or.Tensor": [call(B, ~B)],
    "bitwise_xor.Tensor": [call(B, ~B)],
    "bitwise_not.default": [call(B), call(N)],
    "logical_and.default": [call(X, B)],
    "logical_or.default": [call(X, B)],
    "where.self": [call(B, X, P)],
    "where.ScalarSelf": [call(B, 1.0, X)],
    "where.ScalarOther": [call(B, X, -math.inf)],
    "where.Scalar": [call(B, 1.0, 0.0)],
    "maximum.default": [call(X, P)],
    "minimum.default": [call(X, P)],
    "clamp.default": [call(X, 0, 1), call(X, None, 0.5), call(X, -0.5)],
    "clamp_min.default": [call(X, 0.1)],
    "clamp_max.default": [call(X, 0.1)],
    "gelu.default": [call(X), call(X, approximate="tanh")],
    "hardtanh.default": [call(X), call(X, 0.0, 6.0)],
    "leaky_relu.default": [call(X), call(X, 0.2)],
    "elu.default": [call(X), call(X, 0.5)],
    "celu.default": [call(X), call(X, 0.5)],
    "softplus.default": [call(X), call(X, 2, 5)],
    "glu.default": [call(X), call(X, 1)],
    "softmax.int": [call(X, -1), call(X, 1, torch.float64)],
    "log_softmax.int": [call(X, 1)],
    "dropout.default": [call(X, 0.5, False)],
    "linear.default": [LINEAR, call(X, torch.randn(3, 6))],
    "bilinear.default": [call(M, M, torch.randn(2, 6, 6), None)],
    "conv1d.default": [CONV1],
    "conv2d.default": [CONV2, call(X, torch.randn(2, 4, 1, 1))],
    "conv3d.default": [CONV3],
    "conv1d.padding": [call(X[0], torch.randn(2, 6, 3), None, [1], "same")],
    "conv2d.padding": [call(X, torch.randn(2, 4, 3, 3), None, [1, 1], "same"), call(X, torch.randn(2, 4, 3, 3))],
    "conv3d.padding": [call(X[None], torch.randn(1, 2, 1, 3, 3), None, [1, 1, 1], "same")],
    "layer_norm.default": [call(X, [6], V, V, 1e-6), call(X, [6, 6])],
    "rms_norm.default": [call(X, [6], V), call(X, [6, 6], None, 1e-6)],
    "group_norm.default": [call(X, 2, *NORM, 1e-3, True), call(X, 4)],
    "batch_norm.default": [call(X, *NORM, NORM[0], NORM[1].abs(), False, 0.1, 1e-5, True)],
    "prelu.default": [call(X, torch.randn(4))],
    "embedding.default": [call(M, I), call(M, I, 0)],
    "one_hot.default": [call(I, 3)],
    "scaled_dot_product_attention.default": [
        call(X, P, X),
        call(X, P, X, M, 0.0, False, scale=0.3),
        call(X, P, X, is_causal=True),
    ],
    "bmm.default": [call(X[0], P[0])],
    "mm.default": [call(M, M)],
    "mv.default": [call(M, V)],
    "dot.default": [call(V, V)],
    "addmm.default": [call(V, M, M), call(M, M, M, beta=0.5, alpha=2)],
    "baddbmm.default": [call(X[0], X[0], P[0])],
    "max_pool1d.default": [call(X[0], [2], [2]), call(X[0], [3], [1], [1])],
    "max_pool2d.default": [call(X, [3, 3], [2, 2], [1, 1]), call(X, [2, 3], [], [0, 0], [1, 1], True), call(X, [2, 2])],
    "max_pool3d.default": [call(X, [2, 2, 2], [2, 2, 2])],
    "avg_pool1d.default": [call(X[0], [2], [2], [1], False, False)],
    "avg_pool2d.default": [call(X, [3, 3], [2, 2], [1, 1], True, False, 5), call(X, [2, 2])],
    "avg_pool3d.default": [call(X, [2, 2, 2], [1, 1, 1])],
    "adaptive_avg_pool1d.default": [call(X[0], [1]), call(X[0], [4])],
    "adaptive_avg_pool2d.default": [call(X, [1, 1]), call(X, [2, 3])],
    "adaptive_avg_pool3d.default": [call(X, [1, 2, 2])],
    "upsample_nearest1d.vec": [call(X[0], None, [2.0])],
    "upsample_nearest2d.vec": [call(X, [9, 12], None), call(X, None, [2.0, 1.5])],
    "upsample_nearest3d.vec": [call(X[None], None, [1.0, 2.0, 2.0])],
    "upsample_linear1d.vec": [call(X[0], [9], True, None)],
    "upsample_bilinear2d.vec": [call(X, [9, 9], False, None), call(X, None, True, [2.0, 2.0])],
    "upsample_bicubic2d.vec": [call(X, [9, 7], False, None)],
    "upsample_trilinear3d.vec": [call(X[None], [4, 9, 7], False, None)],
    "pad.default": [call(X, [1, 2]), call(X, [1, 1, 1, 1], "reflect"), call(X, [0, 1], "constant", 2.0)],
    "constant_pad_nd.default": [call(X, [1, 2]), call(X, [1, 2, 0, 1], 0.5)],
    "pixel_shuffle.default": [call(X, 2)],
    "pixel_unshuffle.default": [call(X, 3)],
    "channel_shuffle.default": [call(X, 2)],
    "cat.default": [call([X, P]), call([X, P, X], 1), call([X], -1)],
    "stack.default": [call([X, P]), call([X, P], -1)],
    "chunk.default": [call(X, 2, 1), call(X, 2)],
    "split.Tensor": [call(X, 2, 1), call(X, 1)],
    "split.sizes": [call(X, [1, 3], 1)],
    "split_with_sizes.default": [call(X, [1, 3], 1)],
    "unbind.int": [call(X), call(X, 1)],
    "view.default": [call(X, [2, -1]), call(X, [-1])],
    "view.dtype": [call(X, torch.int32)],
    "reshape.default": [call(X, [2, 24, 6]), call(torch.ones(1), [])],
    "view_as.default": [call(X, P)],
    "permute.default": [call(X, [0, 2, 3, 1])],
    "transpose.int": [call(X, 1, -1)],
    "t.default": [call(M)],
    "swapaxes.default": [call(X, 1, 3)],
    "unfold.default": [call(X, 2, 3, 1)],
    "flatten.using_ints": [call(X, 1), call(X), call(X, 0, 1), call(X, 1, 2)],
    "unflatten.int": [call(X, 1, [2, 2])],
    "unsqueeze.default": [call(X, -1)],
    "squeeze.default": [call(X[:1])],
    "squeeze.dim": [call(X[:1], 0)],
    "squeeze.dims": [call(X[:1], [0, 1])],
    "expand.default": [call(X[:1], [3, -1, 6, 6])],
    "expand_as.default": [call(X[:1], X)],
    "repeat.default": [call(X, [1, 2, 1, 1])],
    "roll.default": [call(X, [-1, 2], [2, 3]), call(X, [1])],
    "flip.default": [call(X, [1, 2]), call(X, [0])],
    "movedim.int": [call(X, 1, 3)],
    "narrow.default": [call(X, 1, 1, 2)],
    "clone.default": [call(X), call(X, memory_format=torch.channels_last)],
    "contiguous.default": [call(X), call(X, memory_format=torch.channels_last)],
    "mean.default": [call(X)],
    "mean.dim": [call(X, [2, 3]), call(X, [-1], True), call(N, [1], dtype=torch.float32)],
    "sum.default": [call(X), call(N)],
    "sum.dim_IntList": [call(X, [1], True), call(X, [0, 2])],
    "amax.default": [call(X, [1]), call(X, [-2, -1], True), call(X)],
    "amin.default": [call(X, [1])],
    "max.default": [call(X)],
    "min.default": [call(X)],
    "max.dim": [call(X, 1), call(X, 1, True)],
    "min.dim": [call(X, 1)],
    "argmax.default": [call(X), call(X, 1)],
    "argmin.default": [call(X, 1, True)],
    "any.dim": [call(B, 1)],
    "all.dim": [call(B, 1, True)],
    "var.correction": [call(X, [1], correction=0, keepdim=True), call(X, [1]), call(X)],
    "std.correction": [call(X, [1, 2], correction=0)],
    "linalg_vector_norm.default": [call(X), call(X, 2.0, [1], True), call(X, 1, [1])],
    "cumsum.default": [call(X, 1), call(N, 1, dtype=torch.float32)],
    "topk.default": [call(X, 2), call(X, 2, 1, False)],
    "gather.default": [call(X, 1, torch.zeros(2, 4, 6, 6, dtype=torch.int64))],
    "index_select.default": [call(X, 1, I)],
    "masked_fill.Scalar": [call(X, B, -math.inf), call(X, B, 2)],
    "masked_fill.Tensor": [call(X, B, torch.tensor(3.0))],
    "tril.default": [call(X), call(X, -1)],
    "triu.default": [call(X, 1)],
    "select_scatter.default": [call(X, X[:, 0], 1, 2)],
    "slice_scatter.default": [call(X, P[:, 1:], 1, 1, 2**63 - 1), call(X, P[:, :2], 1, 0, 2)],
    "to.dtype": [call(X, torch.float16), call(X, torch.float32)],
    "to.device": [call(X, torch.device("cpu"), torch.float64)],
    "to.other": [call(X, N)],
    "type_as.default": [call(X, N)],
    "zeros.default": [call([2, 3], **DEFAULT_DEVICE), call([2], **CREATE), call([])],
    "ones.default": [call([2, 3], **DEFAULT_DEVICE)],
    "full.default": [call([2, 3], 0.5, **CREATE), call([1], True), call([2], -math.inf)],
    "arange.default": [call(5, **DEFAULT_DEVICE), call(5.0)],
    "arange.start": [call(1, 5, **CREATE)],
    "arange.start_step": [call(1, 5, 2, **DEFAULT_DEVICE), call(0, 4)],
    "zeros_like.default": [call(X), call(X, dtype=torch.int64, pin_memory=False)],
    "ones_like.default": [call(X)],
    "full_like.default": [call(X, 2), call(N, 2, dtype=torch.float32)],
    "new_zeros.default": [call(X, [2, 3], pin_memory=False)],
    "new_ones.default": [call(N, [2])],
    "new_full.default": [call(X, [2], 0.5)],
    "slice.Tensor": [
        call(X, 1, 1, 3),
        call(X, -1, -2, 2**63 - 1),
        call(X, 0, 0, 1),
        call(X, 2, 0, 2**63 - 1, 2),
        call(X),
    ],
    "select.int": [call(X, 1, -1), call(X, -1, 0), call(X, 0, 1)],
    "index.Tensor": [call(X, [None, I]), call(X, [I % 2, I]), call(X, [B]), call(X, [None, None, I, I])],
    "einsum.default": [call("bchw,bkhw->bck", [X, P]), call("ij->ji", [M])],
}


def spelled(overload: Any, args: Any, kwargs: Any) -> tuple[str, dict[str, Tensor]]:
    """The text for a call and the variables it needs."""
    graph = fx.Graph()
    variables: dict[str, Tensor] = {}

    def node(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = graph.placeholder(f"v{len(variables)}")
        made.meta["tensor_meta"] = _extract_tensor_metadata(value)
        variables[made.name] = value
        return made

    target = graph.call_function(overload, tree_map(node, args), tree_map(node, kwargs))
    return spell(target, lambda v: v.name if isinstance(v, fx.Node) else 'torch.device("cpu")'), variables


def overload(name: str) -> Any:
    packet, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), variant)


@pytest.mark.parametrize(
    ("name", "given"), [pytest.param(n, c, id=f"{n}-{i}") for n, calls in CALLS.items() for i, c in enumerate(calls)]
)
def test_the_readable_call_is_the_operator_itself(name: str, given: Call) -> None:
    text, variables = spelled(overload(name), *given)
    actual = tree_leaves(eval(text, {"torch": torch, "F": F}, variables))
    expected = tree_leaves(overload(name)(*given[0], **given[1]))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride()), text
        assert torch.equal(a.nan_to_num(), e.nan_to_num()), text
    if name != "alias.default":
        assert "torch.ops" not in text


def test_every_line_of_the_table_is_tried() -> None:
    special = {name.removeprefix("aten.") for name in SUBSCRIPTS} - {"sym_size.int"}  # a number, tried below
    assert set(templates()) | special == set(CALLS)


def test_every_line_names_arguments_of_its_operator() -> None:
    for name, template in templates().items():
        known = {argument.name for argument in overload(name)._schema.arguments}
        used = {node.id for node in ast.walk(template) if isinstance(node, ast.Name)} - {"F", "torch"}
        assert used <= known, name


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("flatten.using_ints", call(X, 1), "v0.flatten(1)"),
        ("add.Tensor", call(X, P), "v0 + v1"),
        ("cat.default", call([X, P], 1), "torch.cat([v0, v1], dim=1)"),
        ("mean.dim", call(X, [2, 3], True), "v0.mean((2, 3), keepdim=True)"),
        ("max_pool2d.default", call(X, [3, 3], [2, 2], [1, 1]), "F.max_pool2d(v0, 3, stride=2, padding=1)"),
        ("slice.Tensor", call(X, 1, 0, 2), "v0[:, :2]"),
        ("sym_size.int", call(X, 0), "v0.shape[0]"),
        ("zeros.default", call([2, 3], **DEFAULT_DEVICE), 'torch.zeros((2, 3), device=torch.device("cpu"))'),
        ("softmax.int", call(X, -1), "v0.softmax(-1)"),
    ],
)
def test_the_spelling_is_that_of_a_person(name: str, given: Call, expected: str) -> None:
    assert spelled(overload(name), *given)[0] == expected


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("add.Tensor", call(X, P, alpha=2)),
        ("div.Tensor", call(2.0, X)),
        ("elu.default", call(X, 1.0, 2.0)),
        ("to.dtype", call(X, torch.float32, False, True)),
        ("einsum.default", call("ij,jk,kl->il", [M, M, M])),
        ("hypot.default", call(X, P)),
        ("group_norm.default", call(X, 2, None, None, 1e-5, False)),
    ],
)
def test_what_python_cannot_say_stays_the_operator(name: str, given: Call) -> None:
    text, variables = spelled(overload(name), *given)
    assert text.startswith(f"torch.ops.aten.{name}(")
    assert torch.equal(eval(text, {"torch": torch}, variables), overload(name)(*given[0], **given[1]))


@pytest.mark.parametrize(
    ("function", "args", "expected"),
    [
        (operator.floordiv, (7, 2), "7 // 2"),
        (operator.pow, (-2, 2), "(-2) ** 2"),
        (operator.getitem, ((5, 6), 1), "(5, 6)[1]"),
        (operator.neg, (3,), "-3"),
        (torch.sym_max, (3, 4), "torch.sym_max(3, 4)"),
        (math.floor, (2.5,), "math.floor(2.5)"),
    ],
)
def test_arithmetic_on_sizes_is_python(function: Any, args: tuple[Any, ...], expected: str) -> None:
    text, _ = spelled(function, args, {})
    assert text == expected
    assert eval(text, {"torch": torch, "math": math}) == function(*args)


@pytest.mark.parametrize("function", [print, torch.load])
def test_a_function_that_is_no_operator_is_refused(function: Any) -> None:
    with pytest.raises(ExportError, match="no operator"):
        spelled(function, (), {})


def test_an_operator_of_another_library_is_refused() -> None:
    library = torch.library.Library("spelling_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    with pytest.raises(ExportError, match="plain torch does not have"):
        spelled(torch.ops.spelling_test.twice.default, (X,), {})


def test_long_lines_are_broken_at_brackets() -> None:
    names = [f"x{i}" for i in range(40)]
    lines = wrap(f"x = torch.cat([{', '.join(names)}], dim=1)", 8)
    assert max(map(len, lines)) <= 120
    assert [line.strip() for line in lines[:3]] == ["x = torch.cat(", "[", "x0,"]
    assert ast.parse("\n".join(line[8:] for line in lines))
