"""What a model has that can be trained: its layers, and parameters that are an operand of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Edit, Layer


class Operand(nn.Module):
    """A parameter that no layer has, such as a position embedding; patterns know it by this type or its name."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


@dataclass(frozen=True)
class Part:
    """A layer, or an operand as one. `names` are those of its tensors in the model."""

    layer: Layer
    names: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.layer.name

    def values(self) -> list[Tensor]:
        """Its parameters as the forward has them: a weight that is computed is computed for it."""
        return [p.detach() for p in self.layer.module.parameters() if p.is_floating_point()]


def parts(model: CapturedModel) -> list[Part]:
    """Every layer in order of execution, then operands."""
    named = surgery.tensors(model)
    found, owned = [], set[int]()
    for layer in surgery.layers(model):
        own = {id(t) for t in chain(layer.module.parameters(), layer.module.buffers())}
        own |= {id(named[name]) for name in layer.computed}
        found.append(Part(layer, tuple(name for name, tensor in named.items() if id(tensor) in own)))
        owned |= own
    for name, parameter in model.named_parameters():
        if id(parameter) not in owned:
            found.append(Part(Layer(name, Operand(parameter), ()), (name,)))
    return found


def trainable(model: CapturedModel, chosen: Iterable[Part], others: Iterable[Part]) -> list[str]:
    """Names of the parameters of `chosen` that can be trained; what belongs to one of `others` as well stays."""
    named = surgery.tensors(model)
    kept = {id(named[name]) for part in others for name in part.names}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in kept and any(name in part.names for part in chosen)
    ]


def put(model: CapturedModel, values: Mapping[str, Tensor]) -> set[str]:
    """Replace those tensors of `model` whose value differs from that in `values`; their names. Tensors with several
    names stay one."""
    replaced: dict[int, Tensor] = {}
    changed = set()
    for name, old in surgery.tensors(model).items():
        new = values.get(name)
        if id(old) not in replaced and (new is None or torch.equal(old, new := new.detach().to(old.device))):
            continue
        if id(old) not in replaced:
            assert new is not None
            value = new.clone()
            replaced[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, replaced[id(old)])  # and not into a dict: an LSTM keeps a list of them
        changed.add(name)
    return changed


def edits(
    before: Mapping[str, list[Tensor]], after: Iterable[Part], changed: set[str], ways: Mapping[str, str]
) -> Iterator[Edit]:
    """One for each part with a tensor among `changed`, in order. `before`: the values by part; `ways`: how parts were
    trained, where there is more to say than that."""
    for part in after:
        if changed.isdisjoint(part.names):
            continue
        change = _distance(before[part.name], part.values())
        what = ways.get(part.name, "trained") if change else "statistics renewed"
        yield Edit(part.name, what, {"change": change})


def _distance(before: Iterable[Tensor], after: Iterable[Tensor]) -> float:
    """‖after - before‖ / ‖before‖, 1 where that divides by zero."""
    pairs = [(b.double(), a.double()) for b, a in zip(before, after, strict=True)]
    moved = sum(float((a - b).square().sum()) for b, a in pairs)
    whole = sum(float(b.square().sum()) for b, _ in pairs)
    return (moved / whole) ** 0.5 if whole else float(moved > 0)
