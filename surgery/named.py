"""Classes that recipes know by name: passes and criteria."""

from __future__ import annotations

import re


class Named:
    """The name is the class name in snake case, the summary the first line of the docstring."""

    @classmethod
    def name(cls) -> str:
        """What a recipe calls it."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def summary(cls) -> str:
        return (cls.__doc__ or "").strip().split("\n")[0]
