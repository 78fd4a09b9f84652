"""Raise aten calls with weights back to `torch.nn` modules under the names their weights have.

    conv2d(x, p_stem_weight, p_stem_bias, [2, 2], [1, 1])   →   stem(x), stem = nn.Conv2d(3, 64, 3, 2, 1)

A call is raised when the tensors it reads are exactly those of one module, each under the role the `torch.nn` class
gives it; everything else stays a function of `get_attr` operands. Dropout is raised too: it is what export sees of
training mode.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from .graph import get_attribute, set_module

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
        module = self.cls(**self.options, **({} if issubclass(self.cls, nn.modules.dropout._DropoutNd) else _META))
        for role, tensor in tensors.items():
            if role in module._buffers:
                module._buffers[role] = tensor
            else:  # in place, so that the order of parameters stays the class's own
                as_parameter = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, False)
                module._parameters[role] = as_parameter
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
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
        roles = dict(zip(owner._flat_weights_names, a["params"], strict=True))
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
        if isinstance(owner, nn.modules.dropout._DropoutNd) and type(owner).__module__.startswith("torch.nn"):
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
    assert isinstance(node.target, torch._ops.OpOverload)
    schema = node.target._schema.arguments
    given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
    defaults = {argument.name: argument.default_value for argument in schema}
    return {**defaults, **given, **node.kwargs}


def _repeat(value: Any, rank: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    return values * rank if len(values) == 1 else values


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module whose forward made this node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return ".".join(part.split("@")[0] for part in stack[-1][0].split(".")) if stack else ""


class Raiser:
    """Builds the captured graph from an exported one.

    `names` gives the state-dict name of each state placeholder; `origin` is the private copy of the user's model whose
    parameters and buffers the raised modules take over.
    """

    def __init__(
        self, source: fx.Graph, names: Mapping[str, str], constants: Mapping[str, Any], origin: nn.Module
    ) -> None:
        self.source, self.names, self.constants, self.origin = source, names, constants, origin
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.plans: dict[fx.Node, tuple[str, Raised]] = {}
        self.readers: dict[str, fx.Node] = {}

    def run(self) -> tuple[nn.Module, fx.Graph]:
        """Modules and graph; the caller joins them to a GraphModule."""
        self._plan()
        for node in self.source.nodes:
            if node.op == "placeholder" and node.name in self.names:
                continue
            self.values[node] = self._copy(node)
            if isinstance(self.values[node], fx.Node):
                self.values[node].meta = _kept_meta(node)
        return self.root, self.graph

    def _plan(self) -> None:
        """Decide which calls are raised, and to which names, before anything is built."""
        taken: dict[str, Raised] = {}
        dropouts = []
        for node in self.source.nodes:
            rule = RULES.get(node.target) if node.op == "call_function" else None
            if rule in _DROPOUT_RULES:
                dropouts.append(node)
            elif rule and (plan := self._owned(node, rule)):
                name, raised = plan
                known = taken.setdefault(name, raised)
                if known.cls is raised.cls and known.options == raised.options:
                    self.plans[node] = name, raised
        for node in dropouts:
            self.plans[node] = self._place_dropout(node, taken)

    def _owned(self, node: fx.Node, rule: Rule) -> tuple[str, Raised] | None:
        """The module whose tensors `node` reads, if there is exactly one and they are all it has."""
        given = arguments(node)
        if given.get("training", False) is True and given["running_mean"] is not None:
            return None
        read = [ref for ref in node.all_input_nodes if ref.name in self.names]
        homes = [module_path(node), *(self.names[ref.name].rpartition(".")[0] for ref in read[:1])]
        for home in homes:
            owner = submodule(self.origin, home)
            if owner is None or not home:
                continue
            try:
                raised = rule(given, owner, self._tensor)
            except (NotRaised, StopIteration):
                continue
            if read and self._holds_exactly(home, owner, raised):
                return home, raised
        return None

    def _holds_exactly(self, home: str, owner: nn.Module, raised: Raised) -> bool:
        own = dict(owner.named_parameters(remove_duplicate=False)) | dict(owner.named_buffers(remove_duplicate=False))
        own.pop("num_batches_tracked", None)
        roles = {role: ref for role, ref in raised.roles.items() if ref is not None}
        if own.keys() != roles.keys():
            return False
        return all(
            isinstance(ref, fx.Node) and ref.name in self.names and self._tensor(ref) is own[role]
            for role, ref in roles.items()
        )

    def _place_dropout(self, node: fx.Node, taken: dict[str, Raised]) -> tuple[str, Raised]:
        path = module_path(node)
        owner = submodule(self.origin, path)
        raised = RULES[node.target](arguments(node), owner, self._tensor)
        is_own = isinstance(owner, nn.modules.dropout._DropoutNd)
        base = name = path if is_own else f"{path}.dropout".lstrip(".")
        head, _, tail = name.rpartition(".")
        while head and head in taken:  # no child below a layer
            head, _, last = head.rpartition(".")
            tail = f"{last}_{tail}"
            base = name = f"{head}.{tail}".lstrip(".")
        count = 0
        known = taken.get(name)
        while (known is not None and not (is_own and known.options == raised.options)) or (
            not is_own and submodule(self.origin, name) is not None
        ):
            count += 1
            name = f"{base}_{count}"
            known = taken.get(name)
        taken[name] = raised
        return name, raised

    def _tensor(self, ref: Any) -> Tensor:
        if not isinstance(ref, fx.Node) or ref.name not in self.names:
            raise NotRaised
        name = self.names[ref.name]
        try:
            tensor = get_attribute(self.origin, name)
        except AttributeError:
            tensor = self.constants[name]
        assert isinstance(tensor, Tensor)
        return tensor

    def _copy(self, node: fx.Node) -> Any:
        if node in self.plans:
            return self._raise(node)
        if node.op == "output":
            return self.graph.output(self._load(node.args[0]))
        if _is_no_op(node):
            return self._load(node.args[0])
        if node.target is operator.getitem and self._state_of(node) is not None:
            return self._state_of(node)
        return self.graph.node_copy(node, self._load_node)

    def _load(self, value: Any) -> Any:
        return fx.node.map_arg(value, self._load_node)

    def _load_node(self, node: fx.Node) -> Any:
        if node.name not in self.names:
            return self.values[node]
        name = self.names[node.name]
        if name not in self.readers:
            self._register(name, self._tensor(node))
            self.readers[name] = self.graph.get_attr(name)
            self.readers[name].meta = _kept_meta(node)
        return self.readers[name]

    def _register(self, name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        if path and submodule(self.root, path) is None:
            set_module(self.root, path, nn.Module())
        home = self.root.get_submodule(path)
        if leaf in home._parameters or leaf in home._buffers:
            return
        if isinstance(tensor, nn.Parameter):
            home.register_parameter(leaf, tensor)
        else:
            home.register_buffer(leaf, tensor, persistent=name in self.origin.state_dict())

    def _raise(self, node: fx.Node) -> fx.Node:
        name, raised = self.plans[node]
        existing = submodule(self.root, name)
        if existing is None or type(existing) is not raised.cls:
            module = raised.build({r: self._tensor(ref) for r, ref in raised.roles.items() if ref is not None})
            origin = submodule(self.origin, name)
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats:
                counted = getattr(origin, "num_batches_tracked", None)
                module.num_batches_tracked = torch.tensor(0) if counted is None else counted
            set_module(self.root, name, module.eval())
        return self.graph.call_module(name, self._load(raised.args))

    def _state_of(self, node: fx.Node) -> fx.Node | None:
        """`aten.lstm` returns (out, h, c), `nn.LSTM` (out, (h, c))."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or source not in self.plans or self.plans[source][1].cls is not nn.LSTM:
            return None
        index = node.args[1]
        assert isinstance(index, int)
        call = self.values[source]
        if index == 0:
            return self.graph.call_function(operator.getitem, (call, 0))
        states = self.graph.call_function(operator.getitem, (call, 1))
        return self.graph.call_function(operator.getitem, (states, index - 1))


_DROPOUT_RULES = {rule for target, rule in RULES.items() if "dropout" in str(target)}


def stand_in(model: fx.GraphModule, node: fx.Node) -> tuple[str, nn.Module] | None:
    """Name and module view of a functional call whose weights are `get_attr` operands; None for every other call."""
    rule = RULES.get(node.target)
    if rule is None or rule in _DROPOUT_RULES:
        return None

    def value(ref: Any) -> Tensor:
        if not isinstance(ref, fx.Node) or ref.op != "get_attr":
            raise NotRaised
        tensor = get_attribute(model, str(ref.target))
        assert isinstance(tensor, Tensor)
        return tensor

    try:
        raised = rule(arguments(node), None, value)
        tensors = {role: value(ref) for role, ref in raised.roles.items() if ref is not None}
    except (NotRaised, StopIteration, KeyError):
        return None
    if not tensors:
        return None
    first = next(ref for ref in raised.roles.values() if ref is not None)  # the weight, where there is one
    name = str(first.target)
    return name.removesuffix(".weight").removesuffix(".running_mean"), raised.build(tensors).train(model.training)


def submodule(root: nn.Module, path: str) -> nn.Module | None:
    """The module at `path`, or None."""
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


_CONSTANT_BOOKKEEPING = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach.default)


def _is_no_op(node: fx.Node) -> bool:
    """What export puts around a constant written in the forward."""
    source: Any = node
    while source.op == "call_function" and source.target in _CONSTANT_BOOKKEEPING:
        source = source.args[0]
    return source is not node and source.op == "placeholder" and source.name.startswith("c_")


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    return {"module_path": module_path(node)}
