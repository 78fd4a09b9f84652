"""Every name of torch that begins with an underscore, once: each minor version moves some of them.

Tried with torch 2.11, 2.13 and 2.14. Imports nothing of ours; plugins find what they need of it in `surgery.graph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload as OpOverload
from torch._ops import OpOverloadPacket as OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.fx import graph as graphs
from torch.fx.passes import shape_prop
from torch.nn.modules import batchnorm, conv, dropout, instancenorm
from torch.utils._pytree import GetAttrKey as GetAttrKey
from torch.utils._pytree import MappingKey as MappingKey
from torch.utils._pytree import SequenceKey as SequenceKey
from torch.utils._pytree import TreeSpec as TreeSpec
from torch.utils._pytree import is_namedtuple_class as is_namedtuple_class
from torch.utils._pytree import keystr as keystr
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_flatten_with_path as tree_flatten_with_path
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_structure as tree_structure
from torch.utils._pytree import tree_unflatten as tree_unflatten

Subclass = TypeVar("Subclass", bound=Tensor)

BatchNorm = batchnorm._BatchNorm
NormBase = batchnorm._NormBase
InstanceNorm = instancenorm._InstanceNorm
ConvNd = conv._ConvNd
ConvTransposeNd = conv._ConvTransposeNd
DropoutNd = dropout._DropoutNd
TreeCodeGen = graphs._PyTreeCodeGen
TreeInfo = graphs._PyTreeInfo
tensor_metadata = shape_prop._extract_tensor_metadata

UNSAFE_VIEW = torch.ops.aten._unsafe_view
TO_COPY = torch.ops.aten._to_copy
TRILINEAR = torch.ops.aten._trilinear


def writable_switches() -> AbstractContextManager[None]:
    """In here `torch.backends` may be written, also once `torch.testing._internal` was imported, which forbids it."""
    opened: AbstractContextManager[None] = getattr(torch.backends, "__allow_nonbracketed_mutation")()
    return opened


# --- modules ---


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The module's own parameters, those that are None included, in order; writing here keeps the order."""
    return module._parameters


def set_parameters(module: nn.Module, parameters: Mapping[str, nn.Parameter | None]) -> None:
    """In place of its own: a shallow copy of a module shares them with the module."""
    module._parameters = dict(parameters)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The module's own buffers, those that are None included, in order; writing here keeps the order."""
    return module._buffers


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The module's own children; a child that is there twice is listed twice."""
    return module._modules


def transient_of(module: nn.Module) -> set[str]:
    """Names of the module's own buffers that its `state_dict` leaves out."""
    return module._non_persistent_buffers_set


def set_transient(module: nn.Module, names: Iterable[str]) -> None:
    """Names of the module's own buffers that its `state_dict` is to leave out."""
    module._non_persistent_buffers_set = set(names)


def pre_hooks_of(module: nn.Module) -> dict[int, Any]:
    """Called before the module's forward, by number."""
    return module._forward_pre_hooks


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None


def flat_weights_of(module: nn.RNNBase) -> list[str]:
    """Names of the parameters in the order in which the operator takes them."""
    return module._flat_weights_names


def flatten_weights(module: nn.RNNBase) -> None:
    """To be called when parameters were replaced."""
    module._init_flat_weights()


def check_dimensions(module: Any, x: Tensor) -> None:
    """Raises what the layer's forward raises where `x` has another number of dimensions."""
    module._check_input_dim(x)


def padding_of(module: ConvNd) -> list[int]:
    """As `F.pad` takes it, last axis first."""
    return module._reversed_padding_repeated_twice


# --- graphs and operators ---


def schema_of(operator: Any) -> Any:
    """Arguments and returns of an overload; None for other functions."""
    return getattr(operator, "_schema", None)


def overload_name(operator: OpOverload) -> str:
    """`int` of `aten.transpose.int`."""
    return operator._overloadname


def higher_order_name(function: Any) -> str:
    """`wrap_with_autocast`, for example; "" for ordinary functions."""
    return str(getattr(function, "_name", ""))


def has_kernel(operator: OpOverload) -> bool:
    """Whether the dispatcher runs it: what only TorchScript has may do anything."""
    return torch._C._dispatch_has_kernel(operator.name())


def register_decomposed() -> None:
    """Makes `torch.ops.quantized_decomposed` known."""
    from torch.ao.quantization.fx import _decomposed  # noqa: F401


def codegen_of(graph: fx.Graph) -> Any:
    """How the graph's inputs and outputs are nested."""
    return graph._codegen


def namespace_of(graph: fx.Graph) -> tuple[set[str], dict[str, int]]:
    """Names that no new node gets, and how often the number behind each base was raised."""
    namespace = graph._graph_namespace
    return namespace._used_names, namespace._base_count


# --- tensors ---


def version_of(tensor: Tensor) -> int:
    """How often it was written in place."""
    return tensor._version


def storage_of(tensor: Tensor) -> int:
    """Equal where two tensors share memory, also where there is none, as on the meta device."""
    key: int = tensor.untyped_storage()._cdata
    return key


def make_subclass(cls: type[Subclass], like: Tensor, requires_grad: bool) -> Subclass:
    """A tensor of `cls` that shares the memory of `like`."""
    made: Subclass = Tensor._make_subclass(cls, like, requires_grad)
    return made


def without_torch_function() -> AbstractContextManager[Any]:
    """In here, subclasses are handled as tensors."""
    context: AbstractContextManager[Any] = torch._C.DisableTorchFunctionSubclass()
    return context
