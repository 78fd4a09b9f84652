"""Classes of plugins that are known by name: passes, criteria, codecs."""

from __future__ import annotations

import re
from typing import Any

from .errors import PluginError


class Named:
    """The name is the class name in snake case, the summary the first line of the docstring."""

    @classmethod
    def name(cls) -> str:
        """What a recipe calls it."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().split("\n")[0]


def checked(given: Any, kind: Any, place: str) -> type[Named]:
    """What a plugin gives, as a class of this kind; PluginError says what is wrong with it."""
    what = kind.__name__
    problem = None
    cls: Any = given
    if not (isinstance(given, type) and issubclass(given, kind)):
        problem = f"is not a subclass of surgery.{what}"
    elif not cls.summary():
        problem = f"has no docstring; its first line is the {what.lower()}'s summary"
    elif missing := getattr(cls, "__abstractmethods__", ()):
        problem = f"does not define {', '.join(sorted(missing))}"
    if problem:
        raise PluginError(f"{getattr(given, '__name__', given)!s}: {problem}", at=place, fix="see docs/plugins.md")
    found: type[Named] = cls
    return found
