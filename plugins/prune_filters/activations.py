"""Criteria that read activations: the values that layers take in, after normalisation, activation and pooling.

A unit's score adds up over all places where it is read (`Channels.carriers`), in a residual stream by every block. A
unit that no layer reads is judged by the last value that it stands in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from surgery import Criterion, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Channels, Context


class ActivationMean(Criterion):
    """Mean absolute activation of the unit where layers read it.

    Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference (arXiv:1611.06440),
    section 2.2, "Activation".
    """

    needs_calibration: ClassVar[bool] = True

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from .watching import calibration, mean_per_unit

        return mean_per_unit(found, context, calibration(found, context), lambda value: value.abs())


class Apoz(Criterion):
    """Share of the unit's activations that are not zero where layers read it: 1 - APoZ (average percentage of zeros).

    Hu et al. 2016, Network Trimming (arXiv:1607.03250), section 3.1. Tells units apart only where values are exactly
    zero: not behind GELU, nor behind an average over the whole image.
    """

    needs_calibration: ClassVar[bool] = True

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        from .watching import calibration, mean_per_unit

        return mean_per_unit(found, context, calibration(found, context), lambda value: (value != 0).float())


class MutualInformation(Criterion):
    """Mutual information, in nats, of the unit's mean activation and the class.

    Molchanov et al. 2017 (arXiv:1611.06440), section 2.2, "Mutual information": of quantised variables. Activations are
    averaged over positions and quantised to levels that equally many of the N samples have, √N of them but at most
    32. Values in which samples cannot be told apart count 0.
    """

    needs_training: ClassVar[bool] = True

    def scores(self, found: Channels, context: Context) -> list[Tensor]:
        import torch

        from .information import mutual_information
        from .watching import per_unit, places_by_node, tapped, training

        rows: dict[tuple[int, str, int], list[Tensor]] = {}
        classes: list[Tensor] = []

        def show(name: str, value: Tensor) -> Tensor:
            for number, carrier, batch in places[name]:
                size = found.groups[number].size
                means = per_unit(batch, carrier, size, value, inputs.batch_size)
                rows.setdefault((number, name, carrier.dim), []).append(means)
            return value

        places, model = places_by_node(found), tapped(found, context, show)
        for inputs, target in training(found, context):
            classes.append(_classes(target, inputs.batch_size))
            with torch.no_grad():
                model(*inputs.args, **inputs.kwargs)
        target, totals = torch.cat(classes), [torch.zeros(group.size, dtype=torch.float64) for group in found.groups]
        for (number, *_), parts in rows.items():
            values = torch.cat(parts)
            if len(values) == len(target):
                totals[number] += torch.stack([mutual_information(column, target) for column in values.T])
        return totals


def _classes(target: object, samples: int) -> Tensor:
    """(samples,) class numbers on the CPU."""
    import torch

    if not isinstance(target, torch.Tensor) or target.is_floating_point() or target.shape != (samples,):
        shape = tuple(target.shape) if isinstance(target, torch.Tensor) else type(target).__name__
        raise InputError(
            f"criterion mutual_information needs one class per sample and the target is {shape}",
            fix="give training data with class numbers (samples,), or choose another criterion",
        )
    return target.cpu()
