"""The vocabulary of captured graphs: which `torch.nn` module equals which aten call.

conv2d(x, w, b, [2, 2], [1, 1])   =   nn.Conv2d(3, 64, 3, 2, 1) with weight w and bias b, called on x
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .torch_private import DropoutNd, OpOverload, buffers_of, flat_weights_of, flatten_weights, parameters_of, schema_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Raised:
    """A `torch.nn` module equal to one aten call: `cls(**options)` with `roles` as its tensors, called on `args`."""

    cls: type[nn.Module]
    options: dict[str, Any]
    roles: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()

    def build(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The module holding `tensors` themselves, not copies."""
        module = self.cls(**self.options, **({} if issubclass(self.cls, DropoutNd) else _META))
        for role, tensor in tensors.items():
            if role in buffers_of(module):
                buffers_of(module)[role] = tensor
            else:  # in place, so that the order of parameters stays the class's own
                as_parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
                parameters_of(module)[role] = as_parameter
        if isinstance(module, nn.RNNBase):
            flatten_weights(module)
        return module


_META = {"device": "meta"}

Arguments = dict[str, Any]
Rule = Callable[[Arguments, "nn.Module | None", Callable[[Any], Tensor]], Raised]


def _convolution(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    weight = value(a["weight"])
    rank = weight.ndim - 2
    transposed = "output_padding" in a
    cls = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")
    channels = weight.shape[0], weight.shape[1] * a["groups"]
    options = {
        "in_channels": channels[0] if transposed else channels[1],
        "out_channels": channels[1] if transposed else channels[0],
        "kernel_size": tuple(weight.shape[2:]),
        "stride": _repeat(a["stride"], rank),
        "padding": a["padding"] if isinstance(a["padding"], str) else _repeat(a["padding"], rank),
        "dilation": _repeat(a["dilation"], rank),
        "groups": a["groups"],
        "bias": a["bias"] is not None,
    }
    if transposed:
        options["output_padding"] = _repeat(a["output_padding"], rank)
    return Raised(cls, options, {"weight": a["weight"], "bias": a["bias"]}, (a["input"],))


def _linear(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    out_features, in_features = value(a["weight"]).shape
    options = {"in_features": in_features, "out_features": out_features, "bias": a["bias"] is not None}
    return Raised(nn.Linear, options, {"weight": a["weight"], "bias": a["bias"]}, (a["input"],))


def _bilinear(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    out, in1, in2 = value(a["weight"]).shape
    options = {"in1_features": in1, "in2_features": in2, "out_features": out, "bias": a["bias"] is not None}
    return Raised(nn.Bilinear, options, {"weight": a["weight"], "bias": a["bias"]}, (a["input1"], a["input2"]))


def _normalisation(kind: str) -> Rule:
    def rule(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
        roles = {name: a[name] for name in ("weight", "bias", "running_mean", "running_var")}
        some = next(ref for ref in roles.values() if ref is not None)
        meta = a["input"].meta
        rank = len((meta["val"] if "val" in meta else meta["tensor_meta"]).shape)
        options = {
            "num_features": value(some).shape[0],
            "eps": a["eps"],
            "momentum": getattr(owner, "momentum", a["momentum"]),
            "affine": a["weight"] is not None,
            "track_running_stats": a["running_mean"] is not None,
        }
        fixed = type(owner).__name__ if type(owner).__name__ in dir(nn) and "Lazy" not in type(owner).__name__ else ""
        name = fixed if fixed.startswith(kind) else f"{kind}{max(1, rank - 2)}d"
        return Raised(getattr(nn, name), options, roles, (a["input"],))

    return rule


def _layer_norm(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    options = {
        "normalized_shape": tuple(a["normalized_shape"]),
        "eps": a["eps"],
        "elementwise_affine": a["weight"] is not None,
        "bias": a["bias"] is not None,
    }
    return Raised(nn.LayerNorm, options, {"weight": a["weight"], "bias": a["bias"]}, (a["input"],))


def _rms_norm(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    options = {"normalized_shape": tuple(a["normalized_shape"]), "eps": a["eps"], "elementwise_affine": True}
    return Raised(nn.RMSNorm, options, {"weight": a["weight"]}, (a["input"],))


def _group_norm(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    options = {"num_groups": a["num_groups"], "num_channels": value(a["weight"]).shape[0], "eps": a["eps"]}
    return Raised(nn.GroupNorm, options, {"weight": a["weight"], "bias": a["bias"]}, (a["input"],))


def _prelu(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    return Raised(nn.PReLU, {"num_parameters": value(a["weight"]).numel()}, {"weight": a["weight"]}, (a["self"],))


def _embedding(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
    count, size = value(a["weight"]).shape
    options = {
        "num_embeddings": count,
        "embedding_dim": size,
        "padding_idx": a["padding_idx"] if a["padding_idx"] >= 0 else None,
        "scale_grad_by_freq": a["scale_grad_by_freq"],
        "sparse": a["sparse"],
    }
    return Raised(nn.Embedding, options, {"weight": a["weight"]}, (a["indices"],))


def _recurrent(cls: type[nn.RNNBase], **fixed: Any) -> Rule:
    def rule(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
        if not isinstance(owner, nn.RNNBase):
            raise NotRaised
        names = ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional")
        options = {name: getattr(owner, name) for name in names} | fixed
        options |= {"proj_size": owner.proj_size} if cls is nn.LSTM else {}
        options["batch_first"] = a["batch_first"]  # nn.LSTM turns unbatched input into a batch of one itself
        roles = dict(zip(flat_weights_of(owner), a["params"], strict=True))
        hidden = tuple(a["hx"]) if isinstance(a["hx"], list | tuple) else a["hx"]
        return Raised(cls, options, roles, (a["input"], hidden))

    return rule


def _dropout(prefix: str) -> Rule:
    def rule(a: Arguments, owner: nn.Module | None, value: Callable[[Any], Tensor]) -> Raised:
        cls: type[nn.Module] = (
            getattr(nn, f"{prefix}Dropout") if prefix in ("", "Alpha", "FeatureAlpha") else nn.Dropout
        )
        if prefix == "Feature":
            cls = getattr(nn, f"Dropout{max(1, a['input'].meta['val'].ndim - 2)}d")
        if isinstance(owner, DropoutNd) and type(owner).__module__.startswith("torch.nn"):
            cls = type(owner)
        return Raised(cls, {"p": a["p"]}, {}, (a["input"],))

    return rule


RULES: dict[Any, Rule] = {
    aten.conv1d.default: _convolution,
    aten.conv2d.default: _convolution,
    aten.conv3d.default: _convolution,
    aten.conv1d.padding: _convolution,
    aten.conv2d.padding: _convolution,
    aten.conv3d.padding: _convolution,
    aten.conv_transpose1d.default: _convolution,
    aten.conv_transpose2d.input: _convolution,
    aten.conv_transpose3d.input: _convolution,
    aten.linear.default: _linear,
    aten.bilinear.default: _bilinear,
    aten.batch_norm.default: _normalisation("BatchNorm"),
    aten.instance_norm.default: _normalisation("InstanceNorm"),
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.group_norm.default: _group_norm,
    aten.prelu.default: _prelu,
    aten.embedding.default: _embedding,
    aten.lstm.input: _recurrent(nn.LSTM),
    aten.gru.input: _recurrent(nn.GRU),
    aten.rnn_tanh.input: _recurrent(nn.RNN, nonlinearity="tanh"),
    aten.rnn_relu.input: _recurrent(nn.RNN, nonlinearity="relu"),
    aten.dropout.default: _dropout(""),
    aten.feature_dropout.default: _dropout("Feature"),
    aten.alpha_dropout.default: _dropout("Alpha"),
    aten.feature_alpha_dropout.default: _dropout("FeatureAlpha"),
}


class NotRaised(Exception):
    """The call has no equal `torch.nn` module; it stays a function."""


def arguments(node: fx.Node) -> Arguments:
    """The call's arguments by their names in the operator's schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    schema = schema_of(node.target).arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema}
    return {**defaults, **given, **node.kwargs}


def _repeat(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * rank if len(values) == 1 else values


DROPOUT_RULES = {rule for target, rule in RULES.items() if "dropout" in str(target)}
