"""What a pass is given beside the model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from .data import Data
from .process import lent

if TYPE_CHECKING:
    import torch

    from .calibration import Calibration
    from .captured import CapturedModel
    from .channels import Channels
    from .criteria import Criterion
    from .passes import Pass
    from .quantizers import WeightQuantizer
    from .registry import Registry
    from .targets import Target

Progress = Callable[[str, int, int], None]
"""Called with what is worked on, how many are done, and how many there are."""


P = ParamSpec("P")
T = TypeVar("T")


def silent(what: str, done: int, total: int) -> None:
    """Progress that is not shown."""


@dataclass
class Context:
    """`original` is the captured model before the first pass; passes may aim at its activations. `seed` decides every
    random choice of this step, `device` is where heavy work may run."""

    original: CapturedModel
    data: Data = field(default_factory=Data)
    seed: int = 0
    device: str = "cpu"
    progress: Progress = silent
    registry: Registry | None = None
    """Plugins to look up; None = those installed."""
    executor: Executor | None = None
    """Where work that is independent per layer runs; None = here."""

    @property
    def has_calibration(self) -> bool:
        return self.data.calibration is not None

    @cached_property
    def calibration(self) -> Calibration:
        """Statistics of the layers' inputs and outputs over the calibration data.

        Raises:
            InputError: no calibration data was given.
        """
        from .calibration import Calibration

        self.data.require_calibration("this pass")
        assert self.data.calibration is not None
        return Calibration(self.data.calibration, original=self.original, device=self.device, progress=self.progress)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """`function` called by the executor, or at once where there is none. It may run in another process: give a
        function of a module and arguments that can be pickled."""
        if self.executor is not None:
            return self.executor.submit(partial(lent, function), *args, **kwargs)
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def channels(self, model: CapturedModel, *, heads: bool = False) -> Channels:
        """Which channels of `model` live or die together, by the rules of every plugin. See `find_channels`."""
        from .channels import find_channels

        return find_channels(model, self.plugins.channel_rules, heads=heads)

    def criterion(self, name: str) -> Criterion:
        """The criterion of this name.

        Raises:
            RecipeError: there is none of that name.
            InputError: it needs calibration or training data and there is none.
        """
        criterion = self.plugins.find_criterion(name)
        criterion.check_data(self.data)
        return criterion()

    def find_pass(self, name: str) -> type[Pass]:
        """The pass of this name, for a pass that builds on another: `find_pass(name)().apply(model, context)`.

        Raises:
            RecipeError: there is none of that name.
        """
        return self.plugins.find_pass(name)

    def target(self, name: str) -> Target:
        """What the runtime of this name computes in integers.

        Raises:
            RecipeError: there is none of that name.
        """
        return self.plugins.find_target(name)

    def weight_quantizer(self, name: str) -> type[WeightQuantizer]:
        """The quantiser of weights of this name, to be made for each layer.

        Raises:
            RecipeError: there is none of that name.
        """
        return self.plugins.find_weight_quantizer(name)

    @cached_property
    def plugins(self) -> Registry:
        """`registry`, or what is installed."""
        from .registry import Registry

        return self.registry or Registry.load()

    def generator(self) -> torch.Generator:
        """A CPU random generator seeded for this step."""
        import torch

        return torch.Generator().manual_seed(self.seed)
