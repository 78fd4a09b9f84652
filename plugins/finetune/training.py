"""The loop, and the way of the pass through a model.

a copy → its weights seen through the quantiser → a twin without what is constant → trained → its values put back
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import surgery
from surgery import CapturedModel, Context, PassError, PassReport, Skip
from surgery.graph import NormBase, tree_map_only

from .accelerating import accelerator
from .batches import Batches
from .losses import distillation
from .parts import Part, edits, parts, put, trainable
from .quantising import Quantisers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from . import Finetune

LONGEST = 5.0
"""Of the gradient of all parameters together; a longer one is shortened to this."""


@dataclass(frozen=True)
class Trained:
    """What a training gives: values of all tensors by name, the mean loss of every epoch, names of parameters that no
    gradient reached, and what the weights were seen through."""

    values: dict[str, Tensor]
    losses: list[float]
    idle: list[str]
    quantisers: Quantisers


class Finetuning:
    """One application of the pass."""

    def __init__(self, step: Finetune, model: CapturedModel, context: Context) -> None:
        self.step, self.model, self.context = step, model, context
        self.batches = Batches.of(model, context)
        self.by_labels = self.batches.labelled and step.loss != "distillation"
        self.by_teacher = step.loss in ("distillation", "both", None)

    def run(self) -> PassReport:
        found = parts(self.model)
        names = {layer.name for layer in self.step.selected(part.layer for part in found)}
        chosen = [part for part in found if part.name in names and not _is_frozen(part)]
        others = [part for part in found if part not in chosen]
        frozen = [Skip(part.name, "its parameters are frozen") for part in others if part.name in names]
        before = {part.name: part.values() for part in found}
        trained = self._trained(chosen, others)
        if trained is None:
            return PassReport(skips=(*frozen, *(Skip(part.name, "no gradient reaches it") for part in chosen)))
        changed = put(self.model, trained.values)
        return self._report(before, chosen, changed, trained, frozen)

    def _report(
        self,
        before: dict[str, list[Tensor]],
        chosen: Iterable[Part],
        changed: set[str],
        trained: Trained,
        skips: list[Skip],
    ) -> PassReport:
        losses = trained.losses
        made = list(edits(before, parts(self.model), changed, trained.quantisers.ways))
        edited = {edit.layer for edit in made}
        skips += [Skip(part.name, "training left it as it was") for part in chosen if part.name not in edited]
        note = f"loss {losses[0]:.4g} in the first epoch, {losses[-1]:.4g} in the last of {len(losses)}"
        if losses[-1] > losses[0]:
            note += f": it rose, learning_rate {self.step.learning_rate:g} is too high"
        idle = [f"no gradient reached {name}" for name in trained.idle]
        return PassReport(tuple(made), tuple(skips), (note, *idle))

    def _trained(self, chosen: list[Part], others: list[Part]) -> Trained | None:
        """None where nothing can be trained."""
        with torch.enable_grad(), accelerator(self.context.device) as accelerate, _seeded(self.context):
            work = copy.deepcopy(self.model)
            names = set(trainable(work, chosen, others))
            for name, parameter in work.named_parameters():
                parameter.requires_grad_(name in names)
            quantisers = Quantisers.of(self.step, work, chosen, self.context)
            twin = surgery.hoisted(work)
            _set_mode(twin, {part.name.partition("@")[0] for part in others}, self.step.freeze_batchnorm)
            losses, idle = self._losses(twin, quantisers, accelerate) if names else ([], [])
            return Trained(quantisers.final(surgery.tensors(twin)), losses, idle, quantisers) if losses else None

    def _losses(
        self, twin: CapturedModel, quantisers: Quantisers, accelerate: Accelerator
    ) -> tuple[list[float], list[str]]:
        """Train `twin`. The mean loss of every epoch, none where the loss depends on no parameter; and the names of
        parameters that it does not depend on."""
        step, steps = self.step, self.step.epochs * self.batches.count()
        named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
        model: nn.Module = accelerate.prepare(twin)
        optimiser = accelerate.prepare(self._optimiser(named.values()))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser.optimizer, steps)
        teacher = self._teacher(accelerate)
        losses, idle, done = [], list(named), 0
        for epoch in range(step.epochs):
            total, seen = 0.0, 0
            for inputs, target, place in self.batches.epoch():
                self.context.progress("training", done, steps)
                target = _moved(target, accelerate.device)
                loss = self._loss(model, teacher, inputs.to(accelerate.device), target, place)
                if not loss.requires_grad:
                    return [], []
                optimiser.zero_grad()
                accelerate.backward(loss)
                idle = [name for name in idle if not _has_gradient(named[name])]
                accelerate.clip_grad_norm_(named.values(), LONGEST)
                optimiser.step()
                schedule.step()
                quantisers.update(named)
                done += 1
                total, seen = total + self._finite(loss, epoch) * inputs.batch_size, seen + inputs.batch_size
            losses.append(total / seen)
        return losses, idle

    def _loss(
        self, model: nn.Module, teacher: nn.Module | None, inputs: surgery.Inputs, target: Any, place: str
    ) -> Tensor:
        try:
            outputs = model(*inputs.args, **inputs.kwargs)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise PassError(
                f"a batch of {inputs.batch_size} cannot be trained on: {error}",
                at=f"pass {self.step.name()}",
                fix="leave the last, smaller batch out, or set freeze_batchnorm: true",
            ) from error
        terms = [surgery.loss_of(self.context.data, outputs, target, place)] if self.by_labels else []
        if teacher is not None:
            with torch.no_grad():
                wanted = teacher(*inputs.args, **inputs.kwargs)
            terms.append(distillation(outputs, wanted, self.step.temperature))
        return torch.stack(terms).sum()

    def _finite(self, loss: Tensor, epoch: int) -> float:
        value = float(loss.detach())
        if not math.isfinite(value):
            raise PassError(
                f"the loss is {value} in epoch {epoch + 1} of {self.step.epochs}",
                at=f"pass {self.step.name()}",
                fix=f"the model is unchanged; lower learning_rate, which is {self.step.learning_rate:g}",
            )
        return value

    def _optimiser(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        rate, decay = self.step.learning_rate, self.step.weight_decay
        if self.step.optimizer == "sgd":
            return torch.optim.SGD(parameters, rate, momentum=self.step.momentum, weight_decay=decay)
        return torch.optim.AdamW(parameters, rate, weight_decay=decay)

    def _teacher(self, accelerate: Accelerator) -> nn.Module | None:
        """The model before the first pass, in eval mode on the device."""
        if not self.by_teacher:
            return None
        original = self.context.original
        here = accelerate.device.type == "cpu"
        return (surgery.snapshot(original) if here else copy.deepcopy(original).to(accelerate.device)).eval()


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _is_frozen(part: Part) -> bool:
    """Whether it has parameters and none of them can be trained."""
    parameters = list(part.layer.module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _set_mode(model: CapturedModel, others: set[str], freeze_batchnorm: bool) -> None:
    """Train, but for layers that are not trained, which neither renew statistics nor drop."""
    model.train()
    for name, module in model.named_modules():
        if name in others or (freeze_batchnorm and isinstance(module, NormBase)):
            module.eval()


@contextmanager
def _seeded(context: Context) -> Iterator[None]:
    device = torch.device(context.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(context.seed)
        yield


def _moved(target: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), target)
