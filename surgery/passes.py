"""The pass contract: what a pass is, what it reports, and the one place where the contract is enforced.

    check options and traits → work on a snapshot → lint → run the example → compare with the report → result

A pass edits the snapshot it is handed; the model before it stays as it was, so a pass that fails costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from math import ceil, floor
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, final

from pydantic import ConfigDict, Field

from .errors import CrashError, PassError, PluginError, RecipeError, SurgeryError, did_you_mean
from .named import Named
from .precision import full_precision
from .process import exclusive

if TYPE_CHECKING:
    from torch import Tensor

    from .captured import CapturedModel
    from .context import Context
    from .data import Data
    from .graph import Layer
    from .registry import Registry

Patterns = Annotated[
    tuple[str, ...],
    Field(description="patterns on layer names (with all below them) or layer types, such as `features.*` or `Conv2d`"),
]


RESERVED = ("use", "with", "on_break")
"""Keys that stand beside a pass in a recipe's list."""


@dataclass(frozen=True)
class Edit:
    """One change: the layer (its name before the pass), what was done, and measured numbers by name."""

    layer: str
    what: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    """Other layers that the change reaches, such as those that read fewer channels then."""


@dataclass(frozen=True)
class Skip:
    """A layer the pass would have changed, and why it did not."""

    layer: str
    why: str


@dataclass(frozen=True)
class PassReport:
    """What a pass did and left alone, in order of execution."""

    edits: tuple[Edit, ...] = ()
    skips: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        return bool(self.edits)

    def with_restored(self, settings: Sequence[str], who: str) -> PassReport:
        """With a note of what `who` changed of the whole process's settings, and we put back."""
        if not settings:
            return self
        note = f"{who} changed what belongs to the whole process: {', '.join(settings)}; it was put back"
        return replace(self, notes=(*self.notes, note))


@dataclass(frozen=True, kw_only=True)
class Pass(Named, ABC):
    """A transformation of a captured model. Subclasses are frozen dataclasses whose fields are the recipe's options.

    Every option carries its meaning, unit and range: `rank: Annotated[int, Field(ge=1, description="…")] = 8`.
    The first line of the class docstring is the pass's summary; the docstring names the paper it follows.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    select: Patterns = ()
    """Only these layers; empty = all."""
    exclude: Patterns = ()
    """Not these layers."""

    exact: ClassVar[bool] = False
    """The result computes the same function in eval mode up to rounding; it is held to `exact_bound`."""
    exact_bound: ClassVar[float] = 1e-4
    """Largest deviation of an exact pass on the example, relative to the largest output; rounding grows with depth."""
    idempotent: ClassVar[bool] = True
    """A second application with the same options makes no edit."""
    needs_calibration: ClassVar[bool] = False
    """The pass cannot run without calibration data."""
    gives: ClassVar[frozenset[str]] = frozenset()
    """Traits the model has after the pass, such as `int8`."""
    marks: ClassVar[frozenset[str]] = frozenset()
    """Traits of the layers that the pass edits, such as `shared`; the model has them unless the pass is `partial`."""
    clears: ClassVar[frozenset[str]] = frozenset()
    """Traits that layers have no longer after the pass."""
    refuses: ClassVar[Mapping[str, str]] = {}
    """Traits after which this pass cannot run, each with the reason and the order that works."""
    strength: ClassVar[Mapping[str, float]] = {}
    """Options that say how much the pass does, each with the value at which it does least: `{"ratio": 0.0}`."""
    patterns: ClassVar[tuple[str, ...]] = ("select", "exclude")
    """Options that hold patterns on layers, as a list or as the keys of a mapping."""

    @property
    def partial(self) -> bool:
        """Whether options leave layers to other passes."""
        return bool(self.select or self.exclude)

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its value, defaults included."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def softened(self) -> Self | None:
        """This pass with every `strength` that is given as a number halfway to where it does least, integers rounded
        towards that; None where there is none, or none can be weaker."""
        milder = {name: _halfway(getattr(self, name), least) for name, least in self.strength.items()}
        changed = {name: value for name, value in milder.items() if value != getattr(self, name)}
        return replace(self, **changed) if changed else None

    def check(self, registry: Registry) -> None:
        """Raises RecipeError where an option names something that no plugin offers. Called before any pass runs."""

    def check_data(self, data: Data, registry: Registry) -> None:
        """Raises InputError where `data` lacks what the options need. Called before any pass runs."""
        if self.needs_calibration:
            data.require_calibration(f"pass {self.name()}")

    @abstractmethod
    def apply(self, model: CapturedModel, context: Context) -> PassReport:
        """Edit `model` in place and report every edit and skip, each with its reason.

        Parameters are shared with the model before the pass: replace them, never write into them.
        """

    def nameable(self, model: CapturedModel) -> list[Layer]:
        """What patterns may name: the layers of `model`. A pass that works on more adds it."""
        from .graph import layers

        return layers(model)

    def selected(self, layers: Iterable[Layer]) -> list[Layer]:
        """The layers that `select` and `exclude` leave, in order."""
        from .graph import matches

        return [
            layer
            for layer in layers
            if (not self.select or any(matches(layer, p) for p in self.select))
            and not any(matches(layer, p) for p in self.exclude)
        ]

    def finite_weight(self, layer: Layer) -> Tensor:
        """`weight_of(layer)`.

        Raises:
            PassError: it holds NaN or infinity.
        """
        from .computed import weight_of

        weight = weight_of(layer)
        if not bool(weight.isfinite().all()):
            raise PassError(
                f"{layer.name}: its weight holds NaN or infinity",
                at=f"pass {self.name()}",
                fix="train or load the model anew, or leave the layer out with `exclude:`",
            )
        return weight

    def check_patterns(self, layers: Iterable[Layer], *options: str, earlier: bool = False) -> None:
        """Raises RecipeError, with the nearest names, where a pattern in one of `options` matches none of `layers`; if
        that is asked of an `earlier` model, only where no layer that passes make of these could match either."""
        from .graph import could_match, matches

        layers = list(layers)
        for option in options:
            for pattern in getattr(self, option):
                known = any(matches(layer, pattern) for layer in layers)
                if not known and not (earlier and could_match(layers, pattern)):
                    raise RecipeError(
                        f"{option}: {pattern!r} matches no layer{_close(pattern, layers)}",
                        at=f"pass {self.name()}",
                        fix="`surgery inspect` lists the layers of the model, and its groups of channels",
                    )

    @final
    @exclusive()
    @full_precision()
    def __call__(self, model: CapturedModel, context: Context) -> tuple[CapturedModel, PassReport]:
        """Run the pass under the contract: the edited copy and its report. `model` is not changed.

        Raises:
            PassError: the pass cannot do what it is asked for, or its result has other outputs or is not exact where it
                says so; CrashError, which is one: it raised something else.
            PluginError: the pass broke the contract: wrong return, a report that does not match what it did, weights
                written in place, an edit or skip without a reason.
        """
        from . import contract
        from .tracing import user_line

        try:
            self.check_data(context.data, context.plugins)
            self.check_patterns(self.nameable(model), *self.patterns)
            edited = contract.snapshot(model)
            watch = contract.Watch(model, context)
            report = contract.applied(self, edited, context)
            watch.check(self)
            report = contract.check_result(self, model, edited, report)
        except SurgeryError:
            raise
        except (Exception, SystemExit) as error:
            raise CrashError(
                contract.in_short(error),
                at=", ".join(filter(None, [f"pass {self.name()}", user_line(error)])),
                fix="the model is unchanged; exclude the layer with `exclude:`, or report this to the plugin's author",
            ) from error
        return edited, report


def check_class(cls: Any, place: str) -> type[Pass]:
    """`cls` as a pass class that keeps the rules for definitions; PluginError quotes what is wrong."""
    problem = _definition_problem(cls)
    if problem:
        raise PluginError(f"{getattr(cls, '__name__', cls)!s}: {problem}", at=place, fix="see docs/plugins.md")
    assert isinstance(cls, type)
    return cls


def _definition_problem(cls: Any) -> str | None:
    if not (isinstance(cls, type) and issubclass(cls, Pass)):
        return "is not a subclass of surgery.Pass"
    parameters = getattr(cls, "__dataclass_params__", None)
    if "__dataclass_fields__" not in cls.__dict__ or parameters is None or not parameters.frozen:
        return "is not a frozen dataclass (@dataclass(frozen=True, kw_only=True))"
    if not cls.summary() or cls.summary().startswith(f"{cls.__name__}("):
        return "has no docstring; its first line is the pass's summary"
    options = {option.name for option in fields(cls)}
    if taken := (options - {"select", "exclude"}) & vars(Pass).keys():
        return f"has an option {min(taken)!r}, which is a name of surgery.Pass itself"
    for trait in ("gives", "marks", "clears"):
        names = getattr(cls, trait)
        if not (isinstance(names, set | frozenset) and all(isinstance(name, str) for name in names)):
            return f"{trait} is {names!r}, no set of names"
    for table in ("refuses", "strength"):
        if not isinstance(getattr(cls, table), Mapping):
            return f"{table} is {getattr(cls, table)!r}, no mapping"
    if unknown := cls.strength.keys() - options:
        return f"strength names no option: {', '.join(sorted(unknown))}"
    if cls.name() in RESERVED:
        return f"is named {cls.name()!r}, which is a key of recipes"
    if cls.__abstractmethods__:
        return f"does not define {', '.join(sorted(cls.__abstractmethods__))}"
    return None


def _halfway(value: Any, least: float) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    middle = (value + least) / 2
    if isinstance(value, float):
        return middle
    return ceil(middle) if least > value else floor(middle)


def _close(pattern: str, layers: list[Layer]) -> str:
    return did_you_mean(pattern, sorted({n for layer in layers for n in (layer.name, layer.type)}))
