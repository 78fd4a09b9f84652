"""How a person writes an operator: `aten.flatten.using_ints(x, 1)` → `x.flatten(1)`.

Each line of `SPELLINGS` names an overload and the Python that calls exactly it. Names stand for the operator's own
arguments; a starred one is a list spread out. An argument that is None or has the operator's default is left out, a `+`
before it keeps it (Python's default is another one). Whatever a line cannot express falls back to
`torch.ops.aten.name.overload(…)`, which is always right.
"""

from __future__ import annotations

import ast
import builtins
import math
import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx

from ..errors import ExportError
from .literals import literal, tight

SPELLINGS = """
add.Tensor                 self + other
add.Scalar                 self + other
sub.Tensor                 self - other
sub.Scalar                 self - other
rsub.Scalar                other - self
mul.Tensor                 self * other
mul.Scalar                 self * other
div.Tensor                 self / other
div.Scalar                 self / other
div.Tensor_mode            torch.div(self, other, rounding_mode=rounding_mode)
floor_divide.default       self // other
remainder.Tensor           self % other
remainder.Scalar           self % other
pow.Tensor_Scalar          self ** exponent
pow.Tensor_Tensor          self ** exponent
pow.Scalar                 torch.pow(self, exponent)
matmul.default             self @ other
neg.default                -self
eq.Tensor                  self == other
eq.Scalar                  self == other
ne.Tensor                  self != other
ne.Scalar                  self != other
lt.Tensor                  self < other
lt.Scalar                  self < other
le.Tensor                  self <= other
le.Scalar                  self <= other
gt.Tensor                  self > other
gt.Scalar                  self > other
ge.Tensor                  self >= other
ge.Scalar                  self >= other
bitwise_and.Tensor         self & other
bitwise_or.Tensor          self | other
bitwise_xor.Tensor         self ^ other
bitwise_not.default        ~self
logical_and.default        self.logical_and(other)
logical_or.default         self.logical_or(other)
logical_not.default        self.logical_not()
where.self                 torch.where(condition, self, other)
where.ScalarSelf           torch.where(condition, self, other)
where.ScalarOther          torch.where(condition, self, other)
where.Scalar               torch.where(condition, self, other)
maximum.default            torch.maximum(self, other)
minimum.default            torch.minimum(self, other)
clamp.default              self.clamp(min=min, max=max)
clamp_min.default          self.clamp_min(min)
clamp_max.default          self.clamp_max(max)
abs.default                self.abs()
exp.default                self.exp()
expm1.default              self.expm1()
log.default                self.log()
log1p.default              self.log1p()
sqrt.default               self.sqrt()
rsqrt.default              self.rsqrt()
square.default             self.square()
reciprocal.default         self.reciprocal()
sin.default                self.sin()
cos.default                self.cos()
erf.default                self.erf()
floor.default              self.floor()
ceil.default               self.ceil()
round.default              self.round()
sign.default               self.sign()
tanh.default               self.tanh()
sigmoid.default            self.sigmoid()
relu.default               F.relu(self)
relu6.default              F.relu6(self)
gelu.default               F.gelu(self, approximate=approximate)
silu.default               F.silu(self)
mish.default               F.mish(self)
hardswish.default          F.hardswish(self)
hardsigmoid.default        F.hardsigmoid(self)
hardtanh.default           F.hardtanh(self, min_val, max_val)
leaky_relu.default         F.leaky_relu(self, negative_slope)
elu.default                F.elu(self, alpha)
selu.default               F.selu(self)
celu.default               F.celu(self, alpha)
softplus.default           F.softplus(self, beta, threshold)
log_sigmoid.default        F.logsigmoid(self)
glu.default                F.glu(self, dim)
softmax.int                self.softmax(dim, dtype=dtype)
log_softmax.int            self.log_softmax(dim, dtype=dtype)
dropout.default            F.dropout(input, p=+p, training=+train)
linear.default             F.linear(input, weight, bias)
bilinear.default           F.bilinear(input1, input2, weight, bias)
conv1d.default             F.conv1d(input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
conv2d.default             F.conv2d(input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
conv3d.default             F.conv3d(input, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=groups)
conv1d.padding             F.conv1d(input, weight, bias, stride=stride, padding=+padding, dilation=dilation, groups=groups)
conv2d.padding             F.conv2d(input, weight, bias, stride=stride, padding=+padding, dilation=dilation, groups=groups)
conv3d.padding             F.conv3d(input, weight, bias, stride=stride, padding=+padding, dilation=dilation, groups=groups)
layer_norm.default         F.layer_norm(input, normalized_shape, weight, bias, eps=eps)
rms_norm.default           F.rms_norm(input, normalized_shape, weight, eps=eps)
group_norm.default         F.group_norm(input, num_groups, weight, bias, eps=eps)
batch_norm.default         F.batch_norm(input, running_mean, running_var, weight, bias, +training, +momentum, +eps)
prelu.default              F.prelu(self, weight)
embedding.default          F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
one_hot.default            F.one_hot(self, num_classes)
scaled_dot_product_attention.default \
    F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, \
    scale=scale, enable_gqa=enable_gqa)
bmm.default                self.bmm(mat2)
mm.default                 self.mm(mat2)
mv.default                 self.mv(vec)
dot.default                self.dot(tensor)
addmm.default              torch.addmm(self, mat1, mat2, beta=beta, alpha=alpha)
baddbmm.default            torch.baddbmm(self, batch1, batch2, beta=beta, alpha=alpha)
max_pool1d.default         F.max_pool1d(self, kernel_size, stride=stride, padding=padding, dilation=dilation, \
    ceil_mode=ceil_mode)
max_pool2d.default         F.max_pool2d(self, kernel_size, stride=stride, padding=padding, dilation=dilation, \
    ceil_mode=ceil_mode)
max_pool3d.default         F.max_pool3d(self, kernel_size, stride=stride, padding=padding, dilation=dilation, \
    ceil_mode=ceil_mode)
avg_pool1d.default         F.avg_pool1d(self, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode, \
    count_include_pad=count_include_pad)
avg_pool2d.default         F.avg_pool2d(self, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode, \
    count_include_pad=count_include_pad, divisor_override=divisor_override)
avg_pool3d.default         F.avg_pool3d(self, kernel_size, stride=stride, padding=padding, ceil_mode=ceil_mode, \
    count_include_pad=count_include_pad, divisor_override=divisor_override)
adaptive_avg_pool1d.default  F.adaptive_avg_pool1d(self, output_size)
adaptive_avg_pool2d.default  F.adaptive_avg_pool2d(self, output_size)
adaptive_avg_pool3d.default  F.adaptive_avg_pool3d(self, output_size)
upsample_nearest1d.vec     F.interpolate(input, size=output_size, scale_factor=scale_factors)
upsample_nearest2d.vec     F.interpolate(input, size=output_size, scale_factor=scale_factors)
upsample_nearest3d.vec     F.interpolate(input, size=output_size, scale_factor=scale_factors)
upsample_linear1d.vec      F.interpolate(input, size=output_size, scale_factor=scale_factors, mode="linear", \
    align_corners=align_corners)
upsample_bilinear2d.vec    F.interpolate(input, size=output_size, scale_factor=scale_factors, mode="bilinear", \
    align_corners=align_corners)
upsample_bicubic2d.vec     F.interpolate(input, size=output_size, scale_factor=scale_factors, mode="bicubic", \
    align_corners=align_corners)
upsample_trilinear3d.vec   F.interpolate(input, size=output_size, scale_factor=scale_factors, mode="trilinear", \
    align_corners=align_corners)
pad.default                F.pad(self, pad, mode=mode, value=value)
constant_pad_nd.default    F.pad(self, pad, value=value)
pixel_shuffle.default      F.pixel_shuffle(self, upscale_factor)
pixel_unshuffle.default    F.pixel_unshuffle(self, downscale_factor)
channel_shuffle.default    F.channel_shuffle(self, groups)
cat.default                torch.cat(tensors, dim=dim)
stack.default              torch.stack(tensors, dim=dim)
chunk.default              self.chunk(chunks, dim=dim)
split.Tensor               self.split(split_size, dim=dim)
split.sizes                self.split(split_size, dim=dim)
split_with_sizes.default   self.split(split_sizes, dim=dim)
unbind.int                 self.unbind(dim)
view.default               self.view(*size)
view.dtype                 self.view(dtype)
reshape.default            self.reshape(*shape)
view_as.default            self.view_as(other)
permute.default            self.permute(*dims)
transpose.int              self.transpose(dim0, dim1)
t.default                  self.t()
flatten.using_ints         self.flatten(start_dim, end_dim)
unflatten.int              self.unflatten(dim, sizes)
unsqueeze.default          self.unsqueeze(dim)
squeeze.default            self.squeeze()
squeeze.dim                self.squeeze(dim)
squeeze.dims               self.squeeze(dim)
expand.default             self.expand(*size)
expand_as.default          self.expand_as(other)
repeat.default             self.repeat(*repeats)
roll.default               self.roll(shifts, dims)
flip.default               self.flip(dims)
movedim.int                self.movedim(source, destination)
narrow.default             self.narrow(dim, start, length)
contiguous.default         self.contiguous(memory_format=memory_format)
clone.default              self.clone(memory_format=memory_format)
detach.default             self.detach()
alias.default              torch.ops.aten.alias.default(self)
mean.default               self.mean(dtype=dtype)
mean.dim                   self.mean(dim, keepdim=keepdim, dtype=dtype)
sum.default                self.sum(dtype=dtype)
sum.dim_IntList            self.sum(dim, keepdim=keepdim, dtype=dtype)
amax.default               self.amax(dim, keepdim=keepdim)
amin.default               self.amin(dim, keepdim=keepdim)
max.default                self.max()
min.default                self.min()
max.dim                    self.max(dim, keepdim=keepdim)
min.dim                    self.min(dim, keepdim=keepdim)
argmax.default             self.argmax(dim, keepdim=keepdim)
argmin.default             self.argmin(dim, keepdim=keepdim)
any.dim                    self.any(dim, keepdim=keepdim)
all.dim                    self.all(dim, keepdim=keepdim)
var.correction             self.var(dim, correction=correction, keepdim=keepdim)
std.correction             self.std(dim, correction=correction, keepdim=keepdim)
linalg_vector_norm.default torch.linalg.vector_norm(self, ord, dim, keepdim=keepdim, dtype=dtype)
cumsum.default             self.cumsum(dim, dtype=dtype)
topk.default               self.topk(k, dim, largest=largest, sorted=sorted)
gather.default             self.gather(dim, index)
index_select.default       self.index_select(dim, index)
masked_fill.Scalar         self.masked_fill(mask, value)
masked_fill.Tensor         self.masked_fill(mask, value)
tril.default               self.tril(diagonal)
triu.default               self.triu(diagonal)
select_scatter.default     torch.select_scatter(self, src, dim=dim, index=index)
slice_scatter.default      torch.slice_scatter(self, src, dim=dim, start=start, end=end, step=step)
to.dtype                   self.to(dtype)
to.device                  self.to(device, dtype)
to.other                   self.to(other)
type_as.default            self.type_as(other)
zeros.default              torch.zeros(size, dtype=dtype, device=device)
ones.default               torch.ones(size, dtype=dtype, device=device)
full.default               torch.full(size, fill_value, dtype=dtype, device=device)
arange.default             torch.arange(end, dtype=dtype, device=device)
arange.start               torch.arange(start, end, dtype=dtype, device=device)
arange.start_step          torch.arange(start, end, step, dtype=dtype, device=device)
zeros_like.default         torch.zeros_like(self, dtype=dtype, device=device)
ones_like.default          torch.ones_like(self, dtype=dtype, device=device)
full_like.default          torch.full_like(self, fill_value, dtype=dtype, device=device)
new_zeros.default          self.new_zeros(size, dtype=dtype, device=device)
new_ones.default           self.new_ones(size, dtype=dtype, device=device)
new_full.default           self.new_full(size, fill_value, dtype=dtype, device=device)
"""

# Python passes its own setting here, or leaves it at False.
_UNSPOKEN = {"cudnn_enable": True, "cudnn_enabled": True, "pin_memory": False, "non_blocking": False, "copy": False}

_PYTHON = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.eq: "==",
    operator.ne: "!=",
    operator.lt: "<",
    operator.le: "<=",
    operator.gt: ">",
    operator.ge: ">=",
    operator.and_: "&",
    operator.or_: "|",
    operator.xor: "^",
    operator.lshift: "<<",
    operator.rshift: ">>",
}
_PREFIX = {operator.neg: "-", operator.pos: "+", operator.not_: "not "}
_SIGNS = {
    **{ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.Pow: "**"},
    **{ast.MatMult: "@", ast.BitAnd: "&", ast.BitOr: "|", ast.BitXor: "^", ast.USub: "-", ast.Invert: "~"},
    **{ast.Eq: "==", ast.NotEq: "!=", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">="},
}

Operand = Callable[[Any], str]


def spell(node: fx.Node, operand: Operand) -> str:
    """The Python expression of a `call_function` node; `operand` gives the text of an argument that is a node.

    Raises:
        ExportError: the function is no operator that torch alone provides.
    """
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return _operator(node, target, operand)
    texts = [literal(argument, operand) for argument in node.args]
    if target is operator.getitem:
        return f"{tight(texts[0])}[{texts[1]}]"
    if target in _PYTHON:
        return f"{tight(texts[0], _PYTHON[target] == '**')} {_PYTHON[target]} {tight(texts[1])}"
    if target in _PREFIX:
        return f"{_PREFIX[target]}{tight(texts[0])}"
    name = getattr(target, "__name__", "")
    for module in (math, torch, builtins):
        if getattr(module, name, None) is target:
            prefix = "" if module is builtins else f"{module.__name__}."
            return f"{prefix}{name}({', '.join(texts)})"
    raise ExportError(
        f"node {node.name} calls {target!r}, which is no operator of torch",
        fix="the pass that made this node must use operators of torch.ops.aten, or a layer class",
    )


def _operator(node: fx.Node, target: torch._ops.OpOverload, operand: Operand) -> str:
    special = _SPECIAL.get(str(target))
    text = special(node, operand) if special else None
    template = _templates().get(str(target).removeprefix("aten.")) if text is None else None
    if template is not None:
        text = _fill(template, node, target, operand)
    return text or _plain_call(node, target, operand)


def _plain_call(node: fx.Node, target: torch._ops.OpOverload, operand: Operand) -> str:
    if target.namespace not in ("aten", "prims", "quantized_decomposed"):
        raise ExportError(
            f"node {node.name} calls {target}, an operator that plain torch does not have",
            fix="the plugin that made this node must use operators of torch.ops.aten, or a layer class",
        )
    texts = [literal(argument, operand) for argument in node.args]
    texts += [f"{key}={literal(value, operand)}" for key, value in node.kwargs.items()]
    return f"torch.ops.{target}({', '.join(texts)})"


@cache
def _templates() -> dict[str, ast.expr]:
    lines = SPELLINGS.replace("\\\n", " ").strip().splitlines()
    return {name: ast.parse(text.strip(), mode="eval").body for name, text in (line.split(maxsplit=1) for line in lines)}


class _CannotSay(Exception):
    """The template has no place for an argument of this call."""


class _Call:
    """Arguments of one operator call by name, and which of them the template has used."""

    def __init__(self, node: fx.Node, target: torch._ops.OpOverload, operand: Operand) -> None:
        self.schema = {argument.name: argument for argument in target._schema.arguments}
        self.values = dict(zip(self.schema, node.args, strict=False)) | dict(node.kwargs)
        self.operand = operand
        self.used: set[str] = set()

    def is_default(self, name: str) -> bool:
        if name not in self.values or self.values[name] is None:
            return True
        argument, value = self.schema[name], self.values[name]
        if name == "end" and value == 2**63 - 1:
            return True
        if not argument.has_default_value() or isinstance(value, fx.Node):
            return False
        default = argument.default_value
        same_list = isinstance(value, list) and isinstance(default, int) and all(v == default for v in value)
        return type(value) is type(default) and value == default or bool(value) and same_list

    def text(self, name: str) -> str:
        self.used.add(name)
        value = self.values.get(name)
        fixed = getattr(self.schema[name], "N", None)
        if isinstance(value, list) and fixed and len(value) in (1, fixed) and all(v == value[0] for v in value):
            if not isinstance(value[0], fx.Node):
                value = value[0]
        elif isinstance(value, list) and not any(map(_is_tensor, value)):
            value = tuple(value)
        return literal(value, self.operand)

    def unsaid(self) -> list[str]:
        """Arguments that the template did not use although they say something."""
        rest = [name for name in self.values if name not in self.used and not self.is_default(name)]
        return [name for name in rest if name not in _UNSPOKEN or self.values[name] != _UNSPOKEN[name]]


def _fill(template: ast.expr, node: fx.Node, target: torch._ops.OpOverload, operand: Operand) -> str | None:
    call = _Call(node, target, operand)
    receiver = call.values.get("self")
    if "self" in call.schema and not _is_tensor(receiver) and not isinstance(template, ast.Call):
        return None
    try:
        text = _render(template, call)
    except _CannotSay:
        return None
    return None if call.unsaid() else text


def _render(template: ast.expr, call: _Call) -> str:
    match template:
        case ast.Name(id=name):
            return call.text(name)
        case ast.UnaryOp(op=sign, operand=operand):
            return f"{_SIGNS[type(sign)]}{tight(_render(operand, call))}"
        case ast.BinOp(left=left, op=sign, right=right):
            power = isinstance(sign, ast.Pow)
            return f"{tight(_render(left, call), power)} {_SIGNS[type(sign)]} {tight(_render(right, call))}"
        case ast.Compare(left=left, ops=[sign], comparators=[right]):
            return f"{tight(_render(left, call))} {_SIGNS[type(sign)]} {tight(_render(right, call))}"
        case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=method)):
            if not _is_tensor(call.values["self"]):
                raise _CannotSay
            return f"{tight(call.text('self'), True)}.{method}({_arguments(template, call)})"
        case ast.Call(func=function):
            return f"{ast.unparse(function)}({_arguments(template, call)})"
    raise AssertionError(ast.dump(template))


def _arguments(template: ast.Call, call: _Call) -> str:
    positional = template.args
    while positional and (name := _optional(positional[-1])) and call.is_default(name):
        positional = positional[:-1]
    texts = [_positional(argument, call) for argument in positional]
    for keyword in template.keywords:
        name = _optional(keyword.value)
        if name is None or not call.is_default(name):
            texts.append(f"{keyword.arg}={_positional(keyword.value, call)}")
    return ", ".join(texts)


def _optional(argument: ast.expr) -> str | None:
    """The operator's argument that may be left out here."""
    return argument.id if isinstance(argument, ast.Name) else None


def _positional(argument: ast.expr, call: _Call) -> str:
    match argument:
        case ast.Constant(value=value):
            return literal(value, call.operand)
        case ast.UnaryOp(op=ast.UAdd(), operand=ast.Name(id=name)):
            return call.text(name)
        case ast.Starred(value=ast.Name(id=name)):
            call.used.add(name)
            if not call.values[name]:
                return "()"
            return ", ".join(literal(value, call.operand) for value in call.values[name])
        case ast.Name(id=name):
            return call.text(name)
    raise AssertionError(ast.dump(argument))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, fx.Node) and not is_scalar(value)


def is_scalar(node: fx.Node) -> bool:
    """Whether the node's value is a Python number: a size, or arithmetic on sizes."""
    if node.op != "call_function" or node.target is operator.getitem:
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).startswith(("aten.sym_size", "aten.sym_numel", "aten.sym_stride"))
    return True


# Subscripts


def _rank(node: Any) -> int | None:
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return len(meta.shape) if hasattr(meta, "shape") else None


def _subscript(node: fx.Node, dim: int, index: str, operand: Operand) -> str | None:
    """`x[:, :, index]` with `index` at dimension `dim`."""
    rank = _rank(node.args[0])
    if not _is_tensor(node.args[0]) or (dim < 0 and rank is None):
        return None
    position = dim if dim >= 0 else dim + int(rank or 0)
    return f"{tight(literal(node.args[0], operand), True)}[{':, ' * position}{index}]"


def _slice(node: fx.Node, operand: Operand) -> str | None:
    _, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    first = "" if start in (0, None) else literal(start, operand)
    last = "" if end is None or end == 2**63 - 1 else literal(end, operand)
    by = "" if step == 1 else f":{literal(step, operand)}"
    if node.kwargs or not isinstance(dim, int):
        return None
    return _subscript(node, dim, f"{first}:{last}{by}", operand)


def _select(node: fx.Node, operand: Operand) -> str | None:
    if len(node.args) != 3 or not isinstance(node.args[1], int):
        return None
    return _subscript(node, node.args[1], literal(node.args[2], operand), operand)


def _index(node: fx.Node, operand: Operand) -> str | None:
    indices = node.args[1]
    if not isinstance(indices, list | tuple) or not indices or not _is_tensor(node.args[0]):
        return None
    inside = ", ".join(":" if index is None else literal(index, operand) for index in indices)
    return f"{tight(literal(node.args[0], operand), True)}[{inside}]"


def _size(node: fx.Node, operand: Operand) -> str | None:
    tensor, dim = node.args
    return f"{tight(literal(tensor, operand), True)}.shape[{literal(dim, operand)}]"


def _einsum(node: fx.Node, operand: Operand) -> str | None:
    equation, tensors = node.args[:2]
    if len(node.args) > 2 or node.kwargs or not isinstance(tensors, list | tuple) or len(tensors) > 2:
        return None  # with more operands Python chooses an order of its own
    return f"torch.einsum({', '.join(literal(value, operand) for value in (equation, *tensors))})"


_SPECIAL: dict[str, Callable[[fx.Node, Operand], str | None]] = {
    "aten.slice.Tensor": _slice,
    "aten.select.int": _select,
    "aten.index.Tensor": _index,
    "aten.sym_size.int": _size,
    "aten.einsum.default": _einsum,
}
