"""What units contribute to the outputs of the layers that read them. Imports torch: import it late.

    y = Σ_u W_u x_u        the unfolded input x of a layer, by unit; W (outputs, features)
    M_uv = tr(W_u E[x_u x_vᵀ] W_vᵀ)
    E‖Σ_{u in T} W_u x_u‖² = Σ_{u, v in T} M_uv        the change of y when the units T go

A layer with groups has one such sum per group; they add up.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import surgery
from surgery import Carrier, Channels, Context
from surgery.graph import ConvNd

from .watching import calibration, mean_per_unit


def contributions(found: Channels, context: Context) -> list[Tensor]:
    """M (size, size) per group, added over the layers that read it; diagonal, from the units' mean squares, without."""
    matrices = [torch.zeros(group.size, group.size, dtype=torch.float64) for group in found.groups]
    readings = _readings(found)
    layers = [layer for layer in surgery.layers(found.model) if layer.name in readings]
    for layer, statistics in context.calibration.stream(found.model, layers, ("gram",)):
        shares = _by_feature(layer.module, statistics.unfolded.gram)
        for number, carrier in readings[layer.name].items():
            matrices[number] += _by_unit(shares, layer.module, carrier, len(matrices[number]))
    judged = {number for places in readings.values() for number in places}
    if len(judged) < len(found.groups):
        powers = mean_per_unit(found, context, calibration(found, context), torch.square)
        matrices = [
            m if n in judged else power.diag() for n, (m, power) in enumerate(zip(matrices, powers, strict=True))
        ]
    return matrices


def _readings(found: Channels) -> dict[str, dict[int, Carrier]]:
    """By name of a convolution or linear layer the numbers of the groups that it reads, and where.

    A layer that is called again takes the same units again: it counts once, with the statistics of all its calls.
    """
    by_node: dict[fx.Node, dict[int, Carrier]] = {}
    for number, own in enumerate(found.carriers):
        for carrier in own:
            for reader in carrier.readers:
                if reader.args[0] is carrier.node:
                    by_node.setdefault(reader, {})[number] = carrier
    layers = [layer for layer in surgery.layers(found.model) if isinstance(layer.module, nn.Linear | ConvNd)]
    places = {layer.name: {n: c for node in layer.nodes for n, c in by_node.get(node, {}).items()} for layer in layers}
    return {name: own for name, own in places.items() if own}


def _by_feature(module: nn.Module, gram: Tensor) -> Tensor:
    """(groups, features, features) entries of tr(W_f E[x_f x_g] W_gᵀ): WᵀW ∘ E[x xᵀ]."""
    weight = surgery.weight_matrix(module).detach().double().cpu()
    return (weight.mT @ weight).mul_(gram)


def _by_unit(shares: Tensor, module: nn.Module, carrier: Carrier, size: int) -> Tensor:
    """(size, size) sums of the entries (groups, features, features) over the features of each unit."""
    groups, features, _ = shares.shape
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    assert isinstance(channels, int)
    of_channel = torch.full((channels,), size)  # what belongs to other groups goes to a place of its own
    of_channel[carrier.positions] = carrier.units
    of_feature = of_channel.view(groups, -1).repeat_interleave(features * groups // channels, 1)
    total = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    for own, entries in zip(of_feature, shares, strict=True):
        rows = torch.zeros(size + 1, features, dtype=torch.float64).index_add_(0, own, entries)
        total.index_add_(1, own, rows)
    return total[:size, :size]


def greedy(matrix: Tensor) -> Tensor:
    """(size,) error Σ M over all that are gone, at the time when each goes: always the one that raises it least.

    Where contributions cancel the error falls again; the score does not, so that it keeps the order.
    """
    size = len(matrix)
    rise, left = matrix.diagonal().clone(), torch.ones(size, dtype=torch.bool)
    scores, error, last = torch.zeros(size, dtype=torch.float64), 0.0, torch.zeros((), dtype=torch.float64)
    for _ in range(size):
        unit = int(torch.where(left, rise, torch.inf).argmin())
        error += float(rise[unit])
        left[unit] = False
        rise += 2 * matrix[:, unit]
        scores[unit] = last = torch.maximum(torch.tensor(error, dtype=torch.float64), last.nextafter(ENDLESS))
    return scores


ENDLESS = torch.tensor(torch.inf, dtype=torch.float64)
