"""Torch-Pruning 1.6.1 on the same models, called as its authors' own scripts call it.

Those scripts round widths to the number of heads of `nn.MultiheadAttention`, state that number for timm's attention and
switch its fused form off, and correct the widths that torchvision's ViT and timm's attention remember; so does this.
Output layers are found from the autograd graph.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import lcm
from typing import Any

import torch
from models import drop_auxiliary_heads, in_a_line, leaves, timed
from torch import Tensor, nn

VERSION = "1.6.1"


@dataclass
class Rival:
    """What became of one model. None = it did not get that far."""

    seconds: float | None = None
    """Of the processor, for dependency graph and pruning."""
    parameters_left: float | None = None
    failure: str = ""
    """Empty where the pruned model runs and returns tensors of the same shapes."""


def examine(build: Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], limit: float) -> Rival:
    model, inputs = build()
    drop_auxiliary_heads(model)
    result = Rival()
    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        expected = [o.shape for o in leaves(model(*inputs))]
    try:
        result.seconds = _within(limit, lambda: prune(model, inputs))
        result.parameters_left = sum(p.numel() for p in model.parameters()) / before
        result.failure = _run(model, inputs, expected)
    except TimeoutError:
        result.failure = f"over {limit:.0f} s"
    except Exception as error:
        result.failure = in_a_line(error, 70)
    return result


def prune(model: nn.Module, inputs: tuple[Tensor, ...], kept: Sequence[nn.Module] = ()) -> None:
    """Half of every group by the L1 norm, in place; channels of the output layers and of `kept` stay."""
    import torch_pruning

    pruner = torch_pruning.pruner.BasePruner(
        model,
        inputs[0] if len(inputs) == 1 else inputs,
        importance=torch_pruning.importance.MagnitudeImportance(p=1),
        pruning_ratio=0.5,
        ignored_layers=[*output_layers(model, inputs), *kept],
        num_heads=_heads(model),
        round_to=_round_to(model),
    )
    pruner.step()
    _correct_widths(model)


def output_layers(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[nn.Module]:
    """Convolutions and linear layers with no other between them and an output."""
    kinds = (nn.modules.conv._ConvNd, nn.Linear)
    owners = {m.weight: m for m in model.modules() if isinstance(m, kinds)}
    with torch.enable_grad():
        todo: list[Any] = [o.grad_fn for o in leaves(model(*inputs))]
    found: list[nn.Module] = []
    seen = set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        own = [owners[p] for p in _parameters(node) if p in owners]
        found += own
        todo += [] if own else [parent for parent, _ in node.next_functions]
    return found


def _parameters(node: Any) -> list[Tensor]:
    """Those that the operation takes directly, or transposed."""
    taken = [parent for parent, _ in node.next_functions if parent is not None]
    taken += [grand for parent in taken if parent.name().startswith("TBackward") for grand, _ in parent.next_functions]
    return [parent.variable for parent in taken if hasattr(parent, "variable")]


def _round_to(model: nn.Module) -> int | None:
    """What is left of any layer is a multiple of this: heads of `nn.MultiheadAttention` stay equally wide."""
    heads = [module.num_heads for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    return lcm(*heads) if heads else None


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    """Number of heads by layer, for attention of timm's kind, which is switched to its plain form."""
    attentions = [module for module in model.modules() if _is_attention(module)]
    for module in attentions:
        module.fused_attn = False
    return {module.qkv: module.num_heads for module in attentions}


def _is_attention(module: nn.Module) -> bool:
    """timm's, with one linear layer for queries, keys and values."""
    return isinstance(getattr(module, "qkv", None), nn.Linear) and isinstance(getattr(module, "num_heads", None), int)


def _correct_widths(model: nn.Module) -> None:
    if hasattr(model, "hidden_dim") and hasattr(model, "conv_proj"):
        model.hidden_dim = model.conv_proj.out_channels
    for module in model.modules():
        if _is_attention(module):
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.head_dim * module.num_heads


def _run(model: nn.Module, inputs: tuple[Tensor, ...], expected: list[torch.Size]) -> str:
    try:
        with torch.no_grad():
            actual = [o.shape for o in leaves(model(*inputs))]
    except Exception as error:
        return "forward: " + in_a_line(error, 70)
    return "" if actual == expected else f"returns {tuple(actual[0])} instead of {tuple(expected[0])}"


def _within(limit: float, action: Callable[[], object]) -> float:
    """Processor seconds that `action` takes; TimeoutError above `limit`."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, limit, 1)  # again each second: something may catch the error
    try:
        return timed(action, time.process_time)[0]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
