"""Raise aten calls with weights back to `torch.nn` modules under the names their weights have.

    conv2d(x, p_stem_weight, p_stem_bias, [2, 2], [1, 1])   →   stem(x), stem = nn.Conv2d(3, 64, 3, 2, 1)

A call is raised when the tensors it reads are exactly those of one module, each under the role the `torch.nn` class
gives it; everything else stays a function of `get_attr` operands. Dropout is raised too: it is what export sees of
training mode.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from keyword import iskeyword
from typing import Any

import torch
from torch import Tensor, fx, nn

from .names import get_attribute, set_module, submodule
from .torch_private import DropoutNd, NormBase, buffers_of, parameters_of
from .vocabulary import DROPOUT_RULES, RULES, NotRaised, Raised, Rule, arguments

aten = torch.ops.aten


def module_path(node: fx.Node) -> str:
    """Qualified name of the innermost module whose forward made this node."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return ".".join(part.split("@")[0] for part in stack[-1][0].split(".")) if stack else ""


class Raiser:
    """Builds the captured graph from an exported one.

    `names` gives the state-dict name of each state placeholder; `origin` is the private copy of the user's model whose
    parameters and buffers the raised modules take over. Top-level names in `reserved` get an underscore.
    """

    def __init__(
        self,
        source: fx.Graph,
        names: Mapping[str, str],
        constants: Mapping[str, Any],
        origin: nn.Module,
        reserved: Collection[str],
    ) -> None:
        self.source, self.names, self.constants, self.origin = source, names, constants, origin
        self.reserved = reserved
        self.persistent = origin.state_dict().keys()
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
            if rule in DROPOUT_RULES:
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
        is_own = isinstance(owner, DropoutNd)
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
            target = self._free_name(name)
            self._register(name, target, self._tensor(node))
            self.readers[name] = self.graph.get_attr(target)
            self.readers[name].meta = _kept_meta(node)
        return self.readers[name]

    def _free_name(self, name: str) -> str:
        """`name`, with an underscore to each part that a graph module or Python itself uses otherwise."""
        first, *rest = name.split(".")
        taken = [first in self.reserved, *[False] * len(rest)]
        parts = [f"{p}_" if t or iskeyword(p) or p == "self" else p for p, t in zip([first, *rest], taken, strict=True)]
        while parts[0] != first and hasattr(self.origin, parts[0]):
            parts[0] += "_"
        return ".".join(parts)

    def _register(self, name: str, target: str, tensor: Tensor) -> None:
        path, _, leaf = target.rpartition(".")
        if path and submodule(self.root, path) is None:
            set_module(self.root, path, nn.Module())
        home = self.root.get_submodule(path)
        if leaf in parameters_of(home) or leaf in buffers_of(home):
            return
        if isinstance(tensor, nn.Parameter):
            home.register_parameter(leaf, tensor)
        else:
            home.register_buffer(leaf, tensor, persistent=name in self.persistent)

    def _raise(self, node: fx.Node) -> fx.Node:
        name, raised = self.plans[node]
        target = self._free_name(name)
        existing = submodule(self.root, target)
        if existing is None or type(existing) is not raised.cls:
            module = raised.build({r: self._tensor(ref) for r, ref in raised.roles.items() if ref is not None})
            origin = submodule(self.origin, name)
            if isinstance(module, NormBase) and module.track_running_stats:
                counted = getattr(origin, "num_batches_tracked", None)
                module.num_batches_tracked = torch.tensor(0) if counted is None else counted
            set_module(self.root, target, module.eval())
        return self.graph.call_module(target, self._load(raised.args))

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


_CONSTANT_BOOKKEEPING = (aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.detach.default)


def _is_no_op(node: fx.Node) -> bool:
    """What export puts around a constant written in the forward."""
    source: Any = node
    while source.op == "call_function" and source.target in _CONSTANT_BOOKKEEPING:
        source = source.args[0]
    return source is not node and source.op == "placeholder" and source.name.startswith("c_")


def _kept_meta(node: fx.Node) -> dict[str, Any]:
    return {"module_path": module_path(node), "stack_trace": node.meta.get("stack_trace", "")}
