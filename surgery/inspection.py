"""What is in a model, and what each pass would do to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import fx, nn

from .captured import capture
from .channels import Frozen, Group, find_channels
from .channels.groups import Role
from .context import Context, Progress
from .data import Data
from .errors import SurgeryError
from .graph import Layer, layers, shape, sharing
from .measurement import Measurement, measure
from .passes import PassReport
from .process import exclusive
from .registry import Registry
from .report import Table


@dataclass(frozen=True)
class LayerInfo:
    """One row of `surgery inspect`. `macs` are per sample."""

    name: str
    type: str
    parameters: int
    macs: int
    output: tuple[int, ...]
    shared: str | None


@dataclass(frozen=True)
class GroupInfo:
    """Channels that can be removed: so many units, output channels of the layers `given`, read by those in `read`."""

    name: str
    units: int
    given: tuple[str, ...]
    read: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """Layers in order of execution, groups of channels, channels that stay and why, what capture noted, and each pass's
    report or the reason it could not run."""

    total: Measurement
    layers: tuple[LayerInfo, ...]
    groups: tuple[GroupInfo, ...]
    frozen: tuple[Frozen, ...]
    notes: tuple[str, ...]
    passes: dict[str, PassReport | str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[Table]:
        rows = tuple(
            (i.name, i.type, f"{i.parameters:,}", f"{i.macs:,}", "x".join(map(str, i.output)), i.shared or "")
            for i in self.layers
        )
        title = f"{len(rows)} layers, {self.total.parameters:,} parameters, {self.total.macs:,} MACs"
        result = [Table(title, ("layer", "type", "parameters", "MACs", "output", "shared"), rows)]
        result += self._channel_tables()
        if self.notes:
            result.append(Table("Capture", ("note",), tuple((note,) for note in self.notes)))
        for name, report in self.passes.items():
            if isinstance(report, str):
                result.append(Table(f"{name}: cannot run", ("reason",), ((report,),)))
                continue
            touched = [("edit", e.layer, e.what) for e in report.edits] + [
                ("skip", s.layer, s.why) for s in report.skips
            ]
            result.append(
                Table(
                    f"{name} alone would edit {len(report.edits)} and skip {len(report.skips)} layers",
                    ("", "layer", "reason"),
                    tuple(touched),
                )
            )
        return result

    def _channel_tables(self) -> list[Table]:
        units = sum(group.units for group in self.groups)
        groups = tuple((g.name, f"{g.units:,}", _listed(g.given), _listed(g.read)) for g in self.groups)
        stay = tuple((f.layer, f"{f.channels:,}", f.why) for f in self.frozen)
        tables = [
            Table(
                f"{units:,} removable units in {len(groups)} groups",
                ("group", "units", "channels of", "read by"),
                groups,
            ),
            Table("Channels that have to stay", ("layer", "channels", "why"), stay),
        ]
        return [table for table in tables if table.rows]


def _listed(names: Sequence[str], most: int = 4) -> str:
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _macs(layer: Layer, total: Measurement, batch: int) -> int:
    """Of one sample. A functional call has no module to count in: every weight is used once per output position."""
    weight = getattr(layer.module, "weight", None)
    if not layer.functional or weight is None or not layer.type.startswith(("Conv", "Linear")):
        return total.by_module.get(layer.name, 0)
    nodes = [n.args[0] if "Transpose" in layer.type else n for n in layer.nodes]
    positions = [prod(shape(n)) // shape(n)[_channel_dim(layer)] for n in nodes if isinstance(n, fx.Node)]
    return int(weight.numel()) * sum(positions) // batch


def _channel_dim(layer: Layer) -> int:
    return -1 if layer.type == "Linear" else 1


@exclusive()
def inspect(
    model: nn.Module,
    example_inputs: Any,
    registry: Registry,
    names: Sequence[str],
    progress: Progress,
    data: Any = None,
) -> Findings:
    """Capture `model`, list its layers, and try every pass (or those in `names`) with its default options, on `data`,
    an iterable of batches or `surgery.Data`, where it needs some.

    Raises:
        RecipeError: a name that is no pass.
    """
    classes = {name: registry.find_pass(name) for name in names} if names else registry.passes
    captured = capture(model, example_inputs)
    total = measure(captured, captured.inputs)
    infos = [
        LayerInfo(
            layer.name,
            layer.type,
            sum(p.numel() for p in layer.module.parameters()),
            _macs(layer, total, captured.inputs.batch_size),
            shape(layer.nodes[0]) if hasattr(layer.nodes[0].meta.get("tensor_meta"), "shape") else (),
            sharing(captured, layer),
        )
        for layer in layers(captured)
    ]
    found = find_channels(captured, registry.channel_rules)
    groups = tuple(GroupInfo(g.name, g.size, _layers_of(g, "output"), _layers_of(g, "input")) for g in found.groups)
    tried: dict[str, PassReport | str] = {}
    for index, (name, cls) in enumerate(classes.items()):
        progress(name, index, len(classes))
        try:
            context = Context(captured, Data.of(data), progress=progress, registry=registry)
            tried[name] = cls()(captured, context)[1]
        except (SurgeryError, TypeError) as error:
            tried[name] = str(error)
    return Findings(total, tuple(infos), groups, found.frozen, captured.notes, tried)


def _layers_of(group: Group, role: Role) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member.layer for member in group.of(role)))
