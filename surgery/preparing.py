"""The copy of the user's model that capture works on: in eval mode, and with weights that are plain parameters."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .errors import CaptureError, ModelError
from .names import tensors
from .soundness import check_model
from .torch_private import pre_hooks_of, tree_leaves

_WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
_COMPUTING_HOOKS = ("WeightNorm", "SpectralNorm")


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile` and data-parallel wrappers.

    Raises:
        ModelError: it is no module, or `check_model` has a reason.
        CaptureError: TorchScript, which has no Python to follow.
    """
    if not isinstance(model, nn.Module):
        given = f"the class {model.__name__}" if isinstance(model, type) else f"of type {type(model).__name__}"
        fix = f"give an instance, {model.__name__}(…)" if isinstance(model, type) else "give an nn.Module"
        weights = "; load the weights into one, `module.load_state_dict(…)`" if isinstance(model, Mapping) else ""
        raise ModelError(f"the model is {given}, no module", fix=fix + weights)
    while inner := next((key for cls, key in _WRAPPERS.items() if type(model).__name__ == cls), None):
        model = model.get_submodule(inner)
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(f"{type(model).__name__} is TorchScript", fix="give the Python model it was made from")
    check_model(model)
    return model


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode; `model` and what belongs to its class stay as they are.

    Raises:
        CaptureError: the model cannot be copied.
    """
    try:
        private = copy.deepcopy(model, _computed_attributes(model))
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}",
            fix="give a model that copy.deepcopy accepts (no open files, locks, or tensors with history in lists)",
        ) from error
    private.train()  # layers that cache what they compute in eval mode empty the cache here
    private.eval()
    return private


def twin(model: nn.Module) -> nn.Module:
    """A copy with Python state of its own that shares every parameter and buffer with `model`."""
    return copy.deepcopy(model, {id(t): t for t in tensors(model).values()})


def _computed_attributes(model: nn.Module) -> dict[int, Tensor]:
    """A memo for deepcopy with copies of what it refuses: tensors with history, as the old weight norm leaves them."""
    attributes = tree_leaves([vars(module) for module in model.modules()])
    return {id(t): t.detach().clone() for t in attributes if isinstance(t, Tensor) and not t.is_leaf}


def bake_parametrisations(model: nn.Module) -> list[str]:
    """Replace weight norm, spectral norm and other parametrisations by the weights they compute; notes that say so."""
    notes = []
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            notes += _bake(name, module)
        for key, hook in list(pre_hooks_of(module).items()):
            if type(hook).__name__ in _COMPUTING_HOOKS:
                trained = any(p.requires_grad for p in module.parameters(recurse=False))
                hook.remove(module)
                del pre_hooks_of(module)[key]
                getattr(module, hook.name).requires_grad_(trained)
                notes.append(f"{name}.{hook.name}: {type(hook).__name__} replaced by the weight it computes")
    return notes


def _bake(name: str, module: nn.Module) -> list[str]:
    cls = type(module)
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    module.__class__ = type(cls.__name__, cls.__bases__, body)  # torch edits the class, which the user's model has too
    notes = []
    for tensor, computation in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
        trained = any(p.requires_grad for p in computation.parameters())
        with torch.enable_grad():
            parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
        getattr(module, tensor).requires_grad_(trained)
        notes.append(f"{name}.{tensor}: parametrisation replaced by the weight it computes")
    return notes
