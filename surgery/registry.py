"""Finds plugins by entry point and keeps what they contribute, by name. Built where it is used; there is no global
one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.resources.abc import Traversable
from typing import Any

import pluggy

from . import hooks
from .criteria import Criterion
from .errors import PluginError, RecipeError, did_you_mean
from .named import checked
from .packing.codec import Codec
from .passes import Pass, check_class
from .quantizers import WeightQuantizer
from .targets import Target

GROUP = "surgery"


@dataclass(frozen=True)
class Provided:
    """A contribution and the plugin module it came from."""

    value: Any
    plugin: str


class Registry:
    """Passes, recipes, criteria, codecs, targets, quantisers of weights and channel rules, by name."""

    def __init__(self, plugins: Iterable[object] = ()) -> None:
        """Only the given plugin objects (modules or instances with hook implementations)."""
        self._manager = pluggy.PluginManager("surgery")
        self._manager.add_hookspecs(hooks)
        for plugin in plugins:
            self._register(plugin, getattr(plugin, "__name__", type(plugin).__name__))
        self._collect()

    @classmethod
    def load(cls, extra: Iterable[object] = ()) -> Registry:
        """Every installed plugin, and those of `extra` that are not installed.

        Raises:
            PluginError: a plugin does not import, misspells a hook, or offers a name another plugin has.
        """
        modules = [_import(point) for point in sorted(entry_points(group=GROUP), key=lambda p: (p.name, p.value))]
        return cls([*modules, *(plugin for plugin in extra if plugin not in modules)])

    @property
    def passes(self) -> dict[str, type[Pass]]:
        return {name: provided.value for name, provided in sorted(self._passes.items())}

    @property
    def recipes(self) -> dict[str, Traversable]:
        return {name: provided.value for name, provided in sorted(self._recipes.items())}

    @property
    def criteria(self) -> dict[str, type[Criterion]]:
        return {name: provided.value for name, provided in sorted(self._criteria.items())}

    @property
    def codecs(self) -> dict[str, type[Codec]]:
        return {name: provided.value for name, provided in sorted(self._codecs.items())}

    @property
    def targets(self) -> dict[str, Target]:
        return {name: provided.value for name, provided in sorted(self._targets.items())}

    @property
    def weight_quantizers(self) -> dict[str, type[WeightQuantizer]]:
        return {name: provided.value for name, provided in sorted(self._weight_quantizers.items())}

    @property
    def channel_rules(self) -> dict[Any, Any]:
        """By operator or class of module."""
        rules: dict[Any, Any] = {}
        for name, given in self._contributions("surgery_channel_rules"):
            if not isinstance(given, Mapping):
                raise PluginError(f"surgery_channel_rules gives {type(given).__name__}", at=f"plugin {name}")
            rules = {**given, **rules}
        return rules

    def provider(self, name: str) -> str:
        """Import name of the plugin that offers the pass `name`."""
        return self._passes[name].plugin

    def find_pass(self, name: str) -> type[Pass]:
        """The pass class; RecipeError with the nearest names and the whole list where there is none."""
        if name not in self._passes:
            raise RecipeError(
                f"unknown pass {name!r}{did_you_mean(name, self._passes)}",
                fix=f"known passes: {', '.join(self.passes)}",
            )
        return self.passes[name]

    def find_criterion(self, name: str) -> type[Criterion]:
        """The criterion's class; RecipeError with the nearest names and the whole list where there is none."""
        if name not in self._criteria:
            raise RecipeError(
                f"unknown criterion {name!r}{did_you_mean(name, self._criteria)}",
                fix=f"known criteria: {', '.join(self.criteria)}",
            )
        return self.criteria[name]

    def find_target(self, name: str) -> Target:
        """The target of this name; RecipeError with the nearest names and the whole list where there is none."""
        if name not in self._targets:
            raise RecipeError(
                f"unknown runtime {name!r}{did_you_mean(name, self._targets)}",
                fix=f"known runtimes: {', '.join(self.targets)}",
            )
        return self.targets[name]

    def find_weight_quantizer(self, name: str) -> type[WeightQuantizer]:
        """The quantiser's class; RecipeError with the nearest names and the whole list where there is none."""
        if name not in self._weight_quantizers:
            raise RecipeError(
                f"unknown quantizer {name!r}{did_you_mean(name, self._weight_quantizers)}",
                fix=f"known quantizers: {', '.join(self.weight_quantizers)}",
            )
        return self.weight_quantizers[name]

    def find_recipe(self, name: str) -> Traversable:
        if name not in self._recipes:
            raise RecipeError(
                f"no recipe named {name!r}, and no such file{did_you_mean(name, self._recipes)}",
                fix=f"known recipes: {', '.join(self.recipes)}; or give the path of a .yaml file",
            )
        return self.recipes[name]

    def _register(self, plugin: object, name: str) -> None:
        try:
            self._manager.register(plugin, name)
        except (ValueError, pluggy.PluginValidationError) as error:
            raise PluginError(
                str(error), at=f"plugin {name}", fix="see docs/plugins.md for the hooks and their arguments"
            ) from error

    def _collect(self) -> None:
        try:
            self._manager.check_pending()
        except pluggy.PluginValidationError as error:
            known = ", ".join(sorted(n for n in vars(hooks) if n.startswith("surgery_")))
            raise PluginError(str(error), fix=f"the hooks are {known}") from error
        for plugin in self._manager.get_plugins():
            misspelt = [n for n in dir(plugin) if n.startswith("surgery_") and n not in vars(hooks)]
            if misspelt:
                raise PluginError(
                    f"{misspelt[0]} is no hook{did_you_mean(misspelt[0], vars(hooks))}",
                    at=f"plugin {self._manager.get_name(plugin)}",
                )
        self._passes = self._gather("surgery_passes", _pass_name)
        self._recipes = self._gather("surgery_recipes", _recipe_name)
        self._criteria = self._gather("surgery_criteria", _criterion_name)
        self._codecs = self._gather("surgery_codecs", _codec_name)
        self._targets = self._gather("surgery_targets", _target_name)
        self._weight_quantizers = self._gather("surgery_weight_quantizers", _weight_quantizer_name)

    def _gather(self, hook: str, name_of: Any) -> dict[str, Provided]:
        found: dict[str, Provided] = {}
        for plugin, values in self._contributions(hook):
            for value in values:
                name = name_of(value, plugin)
                if name in found:
                    raise PluginError(
                        f"two plugins offer {name!r}: {found[name].plugin} and {plugin}",
                        fix="uninstall one, or rename its class",
                    )
                found[name] = Provided(value, plugin)
        return found

    def _contributions(self, hook: str) -> Iterator[tuple[str, Any]]:
        """What each plugin gives, by its name, in the order of the names."""
        for implementation in sorted(getattr(self._manager.hook, hook).get_hookimpls(), key=lambda i: i.plugin_name):
            try:
                given = implementation.function()
                given = given if isinstance(given, Mapping) else list(given)
            except Exception as error:
                raise PluginError(
                    f"{hook} fails: {type(error).__name__}: {error}",
                    at=f"plugin {implementation.plugin_name}",
                    fix="it has to return a list, see docs/plugins.md",
                ) from error
            yield implementation.plugin_name, given


def _import(point: EntryPoint) -> object:
    try:
        return point.load()
    except (Exception, SystemExit) as error:
        package = point.dist.name if point.dist else point.value
        raise PluginError(
            f"plugin {point.name!r} does not import: {type(error).__name__}: {error}",
            at=f"entry point {point.value} of package {package}",
            fix=f"repair it, or uninstall {package}",
        ) from error


def _pass_name(value: Any, plugin: str) -> str:
    return check_class(value, f"plugin {plugin}").name()


def _criterion_name(value: Any, plugin: str) -> str:
    return checked(value, Criterion, f"plugin {plugin}").name()


def _codec_name(value: Any, plugin: str) -> str:
    return checked(value, Codec, f"plugin {plugin}").name()


def _weight_quantizer_name(value: Any, plugin: str) -> str:
    return checked(value, WeightQuantizer, f"plugin {plugin}").name()


def _target_name(value: Any, plugin: str) -> str:
    if not isinstance(value, Target):
        raise PluginError(f"surgery_targets gives {type(value).__name__}, not a surgery.Target", at=f"plugin {plugin}")
    return value.name


def _recipe_name(value: Any, plugin: str) -> str:
    name = str(getattr(value, "name", value))
    if not (isinstance(value, Traversable) and value.is_file() and name.endswith(".yaml")):
        raise PluginError(
            f"recipe {str(value)!r} is no path of a .yaml file",
            at=f"plugin {plugin}",
            fix="give paths, such as those of `importlib.resources.files(package).iterdir()`",
        )
    return name.rpartition("/")[2].removesuffix(".yaml")
