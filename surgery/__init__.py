"""Surgery on trained PyTorch models: capture, passes, proof, and files that load anywhere.

Everything public stands in `__all__`. Names are imported when they are first used, so that listing passes does not load
torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .calibration import Affine as Affine
    from .calibration import Aim as Aim
    from .calibration import Calibration as Calibration
    from .calibration import Regression as Regression
    from .calibration import Statistics as Statistics
    from .calibration import Step as Step
    from .calibration import Task as Task
    from .calibration import affine_maps as affine_maps
    from .calibration import checked_inputs as checked_inputs
    from .calibration import conjugate_gradients as conjugate_gradients
    from .calibration import error_feedback as error_feedback
    from .calibration import gram_bytes as gram_bytes
    from .calibration import weight_from_matrix as weight_from_matrix
    from .calibration import weight_matrix as weight_matrix
    from .captured import CapturedModel as CapturedModel
    from .captured import capture as capture
    from .changes import note_reach as note_reach
    from .channels import Axis as Axis
    from .channels import Call as Call
    from .channels import Carrier as Carrier
    from .channels import ChannelRule as ChannelRule
    from .channels import Channels as Channels
    from .channels import Group as Group
    from .channels import Member as Member
    from .channels import Shrinking as Shrinking
    from .channels import Value as Value
    from .channels import find_channels as find_channels
    from .computed import dense as dense
    from .computed import make_dense as make_dense
    from .computed import replace_weight as replace_weight
    from .computed import weight_function as weight_function
    from .computed import weight_of as weight_of
    from .context import Context as Context
    from .contract import snapshot as snapshot
    from .criteria import Criterion as Criterion
    from .data import Data as Data
    from .data import pair_of as pair_of
    from .datasets import data_from as data_from
    from .errors import BudgetError as BudgetError
    from .errors import CaptureError as CaptureError
    from .errors import CrashError as CrashError
    from .errors import ExportError as ExportError
    from .errors import InputError as InputError
    from .errors import ModelError as ModelError
    from .errors import PassError as PassError
    from .errors import PluginError as PluginError
    from .errors import RecipeError as RecipeError
    from .errors import RunError as RunError
    from .errors import SurgeryError as SurgeryError
    from .export.checked import export_onnx as export_onnx
    from .export.source import export_source as export_source
    from .graph import Layer as Layer
    from .graph import batch_dims as batch_dims
    from .graph import layers as layers
    from .graph import matches as matches
    from .graph import shape as shape
    from .graph import sharing as sharing
    from .graph import tied as tied
    from .hoisting import hoisted as hoisted
    from .hooks import hookimpl as hookimpl
    from .inputs import Inputs as Inputs
    from .loading import load as load
    from .losses import loss_of as loss_of
    from .measurement import measure as measure
    from .names import set_module as set_module
    from .names import tensors as tensors
    from .packing.codec import Codec as Codec
    from .packing.reading import Pack as Pack
    from .packing.unpacking import unpack as unpack
    from .packing.writing import pack as pack
    from .passes import Edit as Edit
    from .passes import Pass as Pass
    from .passes import PassReport as PassReport
    from .passes import Skip as Skip
    from .pipeline import Operation as Operation
    from .pipeline import operate as operate
    from .quantizers import WeightQuantizer as WeightQuantizer
    from .racing import onnx_latency as onnx_latency
    from .registry import Registry as Registry
    from .replacement import Operator as Operator
    from .replacement import add_buffer as add_buffer
    from .replacement import bypass as bypass
    from .replacement import replace_layer as replace_layer
    from .targets import Target as Target
    from .verification import verify as verify

_HOME = {
    "calibration": (
        "Affine",
        "Aim",
        "Calibration",
        "Regression",
        "Statistics",
        "Step",
        "Task",
        "affine_maps",
        "checked_inputs",
        "conjugate_gradients",
        "error_feedback",
        "gram_bytes",
        "weight_from_matrix",
        "weight_matrix",
    ),
    "captured": ("CapturedModel", "capture"),
    "changes": ("note_reach",),
    "channels": (
        "Axis",
        "Call",
        "Carrier",
        "ChannelRule",
        "Channels",
        "Group",
        "Member",
        "Shrinking",
        "Value",
        "find_channels",
    ),
    "computed": ("dense", "make_dense", "replace_weight", "weight_function", "weight_of"),
    "context": ("Context",),
    "contract": ("snapshot",),
    "criteria": ("Criterion",),
    "data": ("Data", "pair_of"),
    "datasets": ("data_from",),
    "errors": (
        "BudgetError",
        "CaptureError",
        "CrashError",
        "ExportError",
        "InputError",
        "ModelError",
        "PassError",
        "PluginError",
        "RecipeError",
        "RunError",
        "SurgeryError",
    ),
    "export.checked": ("export_onnx",),
    "export.source": ("export_source",),
    "graph": ("Layer", "batch_dims", "layers", "matches", "shape", "sharing", "tied"),
    "hoisting": ("hoisted",),
    "hooks": ("hookimpl",),
    "inputs": ("Inputs",),
    "loading": ("load",),
    "losses": ("loss_of",),
    "measurement": ("measure",),
    "names": ("set_module", "tensors"),
    "packing.codec": ("Codec",),
    "packing.reading": ("Pack",),
    "packing.unpacking": ("unpack",),
    "packing.writing": ("pack",),
    "passes": ("Edit", "Pass", "PassReport", "Skip"),
    "pipeline": ("Operation", "operate"),
    "quantizers": ("WeightQuantizer",),
    "racing": ("onnx_latency",),
    "registry": ("Registry",),
    "replacement": ("Operator", "add_buffer", "bypass", "replace_layer"),
    "targets": ("Target",),
    "verification": ("verify",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted([*_MODULE_OF, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with warnings.catch_warnings():  # what is imported first here, such as SymPy, sets filters of its own
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
