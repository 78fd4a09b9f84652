"""The loss on the training data, its gradient at activations, its rise under masks. Imports torch: import it late."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

import surgery
from surgery import CapturedModel, Channels, Context, Group, InputError

from .watching import Samples, per_unit, places_by_node, runnable, tapped, training


def taylor(found: Channels, context: Context) -> list[Tensor]:
    """(size,) per group: |sum over positions of gradient · activation|, averaged over samples, added over places."""
    values: dict[str, Tensor] = {}

    def show(name: str, value: Tensor) -> Tensor:
        values[name] = value if value.requires_grad else value.detach().requires_grad_()
        return values[name]

    places, model = places_by_node(found), tapped(found, context, show)
    totals, seen = [torch.zeros(group.size, dtype=torch.float64) for group in found.groups], 0
    for inputs, target in training(found, context):
        samples = inputs.batch_size
        products = _products(context, model, values, (inputs, target))
        for name, product in products.items():
            for number, carrier, batch in places[name]:
                means = per_unit(batch, carrier, len(totals[number]), product, samples)
                positions = product.numel() // product.shape[carrier.dim] // len(means)
                sums = means * positions * torch.bincount(carrier.units, minlength=len(totals[number]))
                own = sums * samples  # from the gradient of the mean loss to that of each sample's loss
                totals[number] += own.abs().mean(0) * samples
        seen += samples
    return [total / seen for total in totals]


def _products(context: Context, model: CapturedModel, values: dict[str, Tensor], batch: Samples) -> dict[str, Tensor]:
    """activation · gradient of the batch's loss, for every value that the run shows and the loss depends on."""
    inputs, target = batch
    values.clear()
    with torch.enable_grad():
        loss = surgery.loss_of(context.data, model(*inputs.args, **inputs.kwargs), target)
    if values and not loss.requires_grad:
        raise InputError(
            "the loss has no gradient", fix="compute it from the output with differentiable operators, without detach()"
        )
    gradients = torch.autograd.grad(loss, list(values.values()), allow_unused=True) if values else ()
    pairs = zip(values.items(), gradients, strict=True)
    return {name: value.detach() * gradient for (name, value), gradient in pairs if gradient is not None}


def rises(found: Channels, context: Context) -> list[Tensor]:
    """(size,) per group: the mean loss with the unit masked, less the loss as it is."""
    model, batches = runnable(found, context), list(training(found, context))
    before = mean_loss(context, model, batches, {})
    scores = []
    done, count = 0, sum(group.size for group in found.groups)
    for group in found.groups:
        masked = []
        for unit in range(group.size):
            context.progress("masking units", done, count)
            masked.append(mean_loss(context, model, batches, without(found, group, unit, context.device)))
            done += 1
        scores.append(torch.tensor(masked, dtype=torch.float64) - before)
    return scores


def mean_loss(
    context: Context, model: CapturedModel, batches: Sequence[Samples], tensors: Mapping[str, Tensor]
) -> float:
    """Over all samples, with `tensors` in the place of the model's own of these names."""
    total, seen = 0.0, 0
    for inputs, target in batches:
        with torch.no_grad():
            output = functional_call(model, dict(tensors), inputs.args, inputs.kwargs)
            total += float(surgery.loss_of(context.data, output, target)) * inputs.batch_size
        seen += inputs.batch_size
    return total / seen


def without(found: Channels, group: Group, unit: int, device: str = "cpu") -> dict[str, Tensor]:
    """Copies of the tensors that `unit` has positions in, with these at zero, by name."""
    masked: dict[str, Tensor] = {}
    for member in group.members:
        own = member.positions[member.units == unit]
        if len(own):
            name = member.slot.tensor
            tensor = masked.get(name, found.tensor(member).detach().to(device))
            if tensor.is_floating_point():
                masked[name] = tensor.index_fill(member.slot.dim, own.to(tensor.device), 0)
    return masked
