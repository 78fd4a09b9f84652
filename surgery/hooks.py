"""The hooks a plugin may implement. Each returns contributions; none is called back into the host.

A plugin is a module named by an entry point in the group `surgery`:

    [project.entry-points.surgery]
    my_pass = "my_package.my_pass"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from .channels import ChannelRule
    from .criteria import Criterion
    from .packing.codec import Codec
    from .passes import Pass
    from .quantizers import WeightQuantizer
    from .targets import Target

hookspec = pluggy.HookspecMarker("surgery")
hookimpl = pluggy.HookimplMarker("surgery")


@hookspec
def surgery_passes() -> Sequence[type[Pass]]:  # type: ignore[empty-body]
    """Pass classes to offer in recipes.

    Each is a frozen dataclass deriving from `surgery.Pass`; its recipe key is the class name in snake case and must be
    unique over all plugins.
    """


@hookspec
def surgery_recipes() -> Sequence[Traversable]:  # type: ignore[empty-body]
    """Recipe files to offer by name.

    Each is a path or an `importlib.resources` entry ending in `.yaml`; its name is the file name without the ending and
    must be unique over all plugins.
    """


@hookspec
def surgery_criteria() -> Sequence[type[Criterion]]:  # type: ignore[empty-body]
    """Criteria of importance to choose channels by.

    Each derives from `surgery.Criterion`; its name in recipes is the class name in snake case and must be unique over
    all plugins.
    """


@hookspec
def surgery_weight_quantizers() -> Sequence[type[WeightQuantizer]]:  # type: ignore[empty-body]
    """Quantisers to train weights through.

    Each derives from `surgery.WeightQuantizer`; its name in recipes is the class name in snake case and must be unique
    over all plugins.
    """


@hookspec
def surgery_channel_rules() -> Mapping[Any, ChannelRule]:  # type: ignore[empty-body]
    """How channels travel through operators and modules of your own, by operator or class of module.

    Without a rule nothing that such an operator sees can be removed. The first plugin by name wins where two describe
    the same.
    """


@hookspec
def surgery_codecs() -> Sequence[type[Codec]]:  # type: ignore[empty-body]
    """Entropy coders of packs.

    Each derives from `surgery.Codec`; its name in files is the class name in snake case and must be unique over all
    plugins.
    """


@hookspec
def surgery_targets() -> Sequence[Target]:  # type: ignore[empty-body]
    """Runtimes to quantise for.

    Each is a `surgery.Target`; its name, which recipes give as `runtime:`, must be unique over all plugins.
    """
