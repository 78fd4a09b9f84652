"""The table of operators and the Python that calls exactly them.

Each line names an overload and its spelling. Names stand for the operator's own arguments; a starred one is a list
spread out. An argument that is None or has the operator's default is left out, unless a `+` stands before it (Python's
default is another one). A call with an argument that its line does not name is not spelled this way.
"""

from __future__ import annotations

import ast
from functools import cache

_METHODS = """
logical_not abs exp expm1 log log1p sqrt rsqrt square reciprocal sin cos erf floor ceil round sign tanh sigmoid t
squeeze detach max min
"""

_TABLE = """
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
where.self                 torch.where(condition, self, other)
where.ScalarSelf           torch.where(condition, self, other)
where.ScalarOther          torch.where(condition, self, other)
where.Scalar               torch.where(condition, self, other)
maximum.default            torch.maximum(self, other)
minimum.default            torch.minimum(self, other)
clamp.default              self.clamp(min=min, max=max)
clamp_min.default          self.clamp_min(min)
clamp_max.default          self.clamp_max(max)
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
conv1d.default             F.conv1d(input, weight, bias, stride=stride, padding=padding, dilation=dilation, \
    groups=groups)
conv2d.default             F.conv2d(input, weight, bias, stride=stride, padding=padding, dilation=dilation, \
    groups=groups)
conv3d.default             F.conv3d(input, weight, bias, stride=stride, padding=padding, dilation=dilation, \
    groups=groups)
conv1d.padding             F.conv1d(input, weight, bias, stride=stride, padding=+padding, dilation=dilation, \
    groups=groups)
conv2d.padding             F.conv2d(input, weight, bias, stride=stride, padding=+padding, dilation=dilation, \
    groups=groups)
conv3d.padding             F.conv3d(input, weight, bias, stride=stride, padding=+padding, dilation=dilation, \
    groups=groups)
layer_norm.default         F.layer_norm(input, normalized_shape, weight, bias, eps=eps)
rms_norm.default           F.rms_norm(input, normalized_shape, weight, eps=eps)
group_norm.default         F.group_norm(input, num_groups, weight, bias, eps=eps)
batch_norm.default         F.batch_norm(input, running_mean, running_var, weight, bias, +training, +momentum, +eps)
prelu.default              F.prelu(self, weight)
embedding.default          F.embedding(indices, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, \
    sparse=sparse)
one_hot.default            F.one_hot(self, num_classes)
scaled_dot_product_attention.default  F.scaled_dot_product_attention(query, key, value, attn_mask=attn_mask, \
    dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
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
swapaxes.default           self.swapaxes(axis0, axis1)
unfold.default             self.unfold(dimension, size, step)
flatten.using_ints         self.flatten(start_dim, end_dim)
unflatten.int              self.unflatten(dim, sizes)
unsqueeze.default          self.unsqueeze(dim)
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
alias.default              torch.ops.aten.alias.default(self)
mean.default               self.mean(dtype=dtype)
mean.dim                   self.mean(dim, keepdim=keepdim, dtype=dtype)
sum.default                self.sum(dtype=dtype)
sum.dim_IntList            self.sum(dim, keepdim=keepdim, dtype=dtype)
amax.default               self.amax(dim, keepdim=keepdim)
amin.default               self.amin(dim, keepdim=keepdim)
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


@cache
def templates() -> dict[str, ast.expr]:
    """The spelling of each overload, as `add.Tensor`, by its syntax tree."""
    lines = [f"{name}.default self.{name}()" for name in _METHODS.split()]
    lines += _TABLE.strip().splitlines()
    pairs = (line.split(maxsplit=1) for line in lines)
    return {name: ast.parse(text.strip(), mode="eval").body for name, text in pairs}
