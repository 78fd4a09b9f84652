"""Whether a model's tensors are ones that can be worked on: dense, in float, finite. Asked before anything else.

What is quantised already, or holds adapters, is told by the classes and names of the libraries that make such models.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from .errors import ModelError
from .names import tensors
from .torch_private import buffers_of, children_of, parameters_of


def check_model(model: nn.Module) -> None:
    """Raises ModelError, naming the module or tensor, where `model` holds what no pass can work on."""
    for name, module in model.named_modules():
        _check_module(name or type(module).__name__, module)
    strict = _statistics(model) | {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, tensor in tensors(model).items():
        _check_kind(name, tensor)
        _check_values(name, tensor, may_mask=name not in strict)


def check_outputs(model: fx.GraphModule) -> None:
    """Raises ModelError where a captured model takes or gives complex numbers, which ONNX has none of."""
    inputs = [node for node in model.graph.nodes if node.op == "placeholder"]
    outputs = model.graph.output_node().all_input_nodes
    for what, way, nodes in (("input", "view_as_complex", inputs), ("output", "view_as_real", outputs)):
        for number, node in enumerate(nodes):
            kind = getattr(node.meta.get("tensor_meta"), "dtype", None)
            if kind is not None and kind.is_complex:
                raise ModelError(
                    f"{what} {number} of the model ({node.name}) is complex, {str(kind).removeprefix('torch.')}",
                    fix=f"ONNX and its runtimes have real numbers alone: use `torch.{way}` in the forward",
                )


def denormal(model: nn.Module) -> list[str]:
    """A note where parameters hold numbers below the smallest normal one of their type."""
    counts = {name: _denormals(p) for name, p in model.named_parameters() if p.is_floating_point()}
    found = [name for name, count in counts.items() if count]
    listed = ", ".join(found[:3]) + (", …" if len(found) > 3 else "")
    return [f"{sum(counts.values())} weights are denormal numbers, next to zero: in {listed}"] if found else []


def _denormals(tensor: Tensor) -> int:
    size = tensor.detach().abs()
    return int(((size > 0) & (size < torch.finfo(tensor.dtype).tiny)).sum())


_QUANTISED = "give the float model it was made from, and have a pass of a recipe do it"


@dataclass(frozen=True)
class _Kind:
    """Modules of a library, by the path of their class or the names of their tensors."""

    what: str
    fix: str
    classes: str
    names: str

    def holds(self, module: nn.Module) -> bool:
        own = (*parameters_of(module), *buffers_of(module), *children_of(module))
        return bool(re.match(self.classes, _path(module))) or any(re.fullmatch(self.names, name) for name in own)


def _path(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


_KINDS = (
    _Kind(
        "holds an adapter",
        "put adapters into the weights first: `model = model.merge_and_unload()` with PEFT",
        r"(peft|loralib|adapters)\.",
        r"lora_[A-Za-z]\w*|ia3_l|hada_w1_a",
    ),
    _Kind(
        "is quantised already",
        _QUANTISED,
        r"torch\.(ao\.)?(nn\.(intrinsic\.)?(quantized|qat)|quantization\.(fake_quantize|observer))\.(?!.*FloatFunctional)"
        r"|(torchao|bitsandbytes|auto_gptq|gptqmodel|awq|hqq|optimum\.quanto|quanto|aqlm|eetq)\."
        r"|.*\.(Quant|WQLinear|Linear4bit|Linear8bit)\w*Linear\w*$",
        r"qweight|qzeros|W_q|weight_packed|weight_scale(_inv)?|SCB",
    ),
)


def _check_module(name: str, module: nn.Module) -> None:
    for kind in _KINDS:
        if kind.holds(module):
            raise ModelError(f"{name} ({_path(module)}) {kind.what}", fix=kind.fix)


def _check_kind(name: str, tensor: Tensor) -> None:
    if is_lazy(tensor):
        raise ModelError(f"{name} has no shape yet", fix="call the model once, which makes the weights of lazy layers")
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        fix = "`full_tensor()` of every parameter" if type(tensor).__name__ == "DTensor" else _QUANTISED
        raise ModelError(f"{name} is a {type(tensor).__name__}, no ordinary tensor", fix=f"give ordinary ones: {fix}")
    if tensor.layout is not torch.strided:
        kind = str(tensor.layout).removeprefix("torch.")
        raise ModelError(f"{name} is sparse or packed ({kind})", fix="make it an ordinary tensor by `.to_dense()`")
    if tensor.is_meta:
        raise ModelError(
            f"{name} is on the meta device, it has no values",
            fix="`model.to_empty(device='cpu')`, then load its weights",
        )
    short = tensor.is_floating_point() and tensor.element_size() < 2
    whole = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
    if tensor.is_quantized or short or (whole and name.rpartition(".")[2] == "weight"):
        raise ModelError(f"{name} is quantised already, in {tensor.dtype}", fix=_QUANTISED)


def _statistics(model: nn.Module) -> set[str]:
    """Names of buffers that layers normalise with."""
    norms = [(name, m) for name, m in model.named_modules() if hasattr(m, "running_var")]
    return {".".join(filter(None, (name, key))) for name, m in norms for key in buffers_of(m)}


def _check_values(name: str, tensor: Tensor, *, may_mask: bool) -> None:
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return
    parts = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    low, high = (float(end) for end in torch.aminmax(parts))
    if low != low or high == torch.inf or (low == -torch.inf and not may_mask):
        what = "NaN" if low != low else "infinity"
        raise ModelError(
            f"{name} holds {what}",
            fix="train or load the model anew; a mask of -inf is a buffer of the module that adds it",
        )
    if low < 0 and name.rpartition(".")[2] == "running_var":
        raise ModelError(f"{name} is a variance and holds {low:g}", fix="train or load the model anew")
