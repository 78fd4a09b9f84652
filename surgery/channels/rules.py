"""Which rule is for which operator and which module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..torch_private import BatchNorm, ConvNd, DropoutNd, InstanceNorm
from ..tracing import first_line
from . import arithmetic, layers, movement, shrinking
from .call import Call, Rule
from .shrinking import Shrink
from .trial import can_be_tried, tried
from .values import Value, values_in

aten = torch.ops.aten


@dataclass(frozen=True)
class ChannelRule:
    """How channels travel through an operator or a module.

    `read` says of a call which places of its dimensions belong together, and gives its result as a `Value` or a list
    of them; `shrink` sets what the module or node says about sizes once channels are gone, where it says anything.
    """

    read: Rule
    shrink: Shrink | None = None


def _table(rules: Iterable[tuple[Rule, str]]) -> dict[Any, Rule]:
    """Rules by operator, from operators' names."""
    return {getattr(aten, name): rule for rule, names in rules for name in names.split() if hasattr(aten, name)}


_READ: dict[Any, Rule] = {
    ConvNd: layers.convolution,
    nn.Linear: layers.linear,
    nn.Bilinear: layers.bilinear,
    nn.Embedding: layers.embedding,
    BatchNorm: layers.normalised_per_channel,
    InstanceNorm: layers.normalised_per_channel,
    nn.PReLU: layers.prelu,
    nn.LayerNorm: layers.layer_norm,
    nn.RMSNorm: layers.layer_norm,
    nn.GroupNorm: layers.group_norm,
    nn.RNNBase: layers.recurrent,
    DropoutNd: arithmetic.same,
} | _table(
    (
        (layers.convolution, "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d"),
        (layers.linear, "linear"),
        (layers.embedding, "embedding"),
        (layers.normalised_per_channel, "batch_norm instance_norm"),
        (layers.layer_norm, "layer_norm rms_norm"),
        (layers.group_norm, "group_norm"),
        (
            movement.moved,
            "permute transpose swapaxes swapdims t movedim moveaxis flatten unflatten unsqueeze squeeze"
            " split split_with_sizes chunk tensor_split repeat repeat_interleave tile flip narrow numpy_T mT"
            " adjoint unsafe_split unsafe_chunk",
        ),
        (movement.reshaped, "view reshape expand _unsafe_view"),
        (movement.windows, "unfold"),
        (movement.sliced, "slice"),
        (movement.selected, "select unbind"),
        (movement.along("dims"), "roll rot90"),
        (movement.along("dim"), "softmax log_softmax _softmax _log_softmax"),
        (movement.padded, "pad constant_pad_nd"),
        (movement.concatenated, "cat concat concatenate"),
        (movement.stacked, "stack"),
        (movement.scattered, "slice_scatter select_scatter"),
        (movement.indexed, "index"),
        (arithmetic.fresh, "new_zeros new_ones new_full new_empty"),
        (arithmetic.same, "contiguous to _to_copy dropout alpha_dropout feature_dropout detach alias lift_fresh_copy"),
        (
            arithmetic.elementwise,
            "expand_as type_as hardswish relu6 square true_divide fill zero where leaky_relu elu selu celu mish"
            " softplus hardshrink softshrink clip zeros_like ones_like full_like addcmul addcdiv lerp prelu",
        ),
        (
            arithmetic.per_channel(2),
            "max_pool2d avg_pool2d adaptive_avg_pool2d upsample_nearest2d upsample_bilinear2d grid_sampler",
        ),
        (arithmetic.per_channel(1), "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d"),
        (
            arithmetic.per_channel(3),
            "max_pool3d avg_pool3d adaptive_avg_pool3d",
        ),
        (
            arithmetic.reduction,
            "mean sum amax amin max min prod var std norm linalg_vector_norm logsumexp argmax argmin any all var_mean",
        ),
        (arithmetic.matmul, "matmul bmm mm mv dot"),
        (arithmetic.addmm, "addmm"),
        (arithmetic.baddbmm, "baddbmm"),
        (arithmetic.einsum, "einsum"),
        (arithmetic.attention, "scaled_dot_product_attention"),
    )
)


RULES: dict[Any, ChannelRule] = {key: ChannelRule(read, shrinking.RULES.get(key)) for key, read in _READ.items()}


def find(rules: Mapping[Any, ChannelRule], node: fx.Node, module: nn.Module | None) -> ChannelRule | None:
    """By class of the module, or by operator, its overload first."""
    if module is not None:
        return next((rules[cls] for cls in type(module).__mro__ if cls in rules), None)
    target: Any = node.target
    return rules.get(target) or rules.get(getattr(target, "overloadpacket", None))


def read(rules: Mapping[Any, ChannelRule], call: Call) -> Any:
    """The call's result. Operators that torch marks as elementwise need no rule, and others of PyTorch are tried.

    What has no rule that works makes unprunable what it sees, with its name as the reason; it ends nothing.
    """
    rule = find(rules, call.node, call.module)
    what = arithmetic.described(call)
    try:
        if rule is not None:
            if rule in _BUILT_IN and (names := _depends_on_batch(call, rule)):
                return arithmetic.unknown(call, f"{what} takes its {names} from the size of the batch")
            return _checked(call, rule.read(call))
        if isinstance(call.result, Value) and torch.Tag.pointwise in getattr(call.node.target, "tags", ()):
            return arithmetic.elementwise(call)
        return tried(call) if can_be_tried(call) else arithmetic.unknown(call)
    except Exception as error:
        return arithmetic.unknown(
            call, f"the channel rule for {what} fails: {type(error).__name__}: {first_line(error)}"
        )


_BUILT_IN = frozenset(RULES.values())
_TAKES_ANY_NUMBER = (arithmetic.elementwise, arithmetic.same, arithmetic.fresh, movement.reshaped)


def _depends_on_batch(call: Call, rule: ChannelRule) -> str:
    """Names of the arguments that are other numbers at another batch size, where these matter to the channels: not
    along a dimension whose positions stay."""
    dim = call["dim"]
    stays = bool(call.computed) and isinstance(dim, int) and call.input.axis(dim) is None
    if stays or rule.read in _TAKES_ANY_NUMBER or (rule.read is movement.moved and dim is None):
        return ""
    return " and ".join(sorted(call.computed))


def _checked(call: Call, result: Any) -> Any:
    """`result` if it has the shape that the node has, and an axis as many positions as its dimension."""
    expected, given = values_in([call.result]), values_in([result])
    if [v.shape for v in given] != [v.shape for v in expected]:
        raise ValueError(f"it gives {[v.shape for v in given]} where the result is {[v.shape for v in expected]}")
    for value in given:
        if any(axis and axis.size != size for axis, size in zip(value.axes, value.shape, strict=True)):
            raise ValueError(f"its axes do not have the sizes {value.shape}")
    return result
