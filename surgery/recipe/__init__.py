"""Recipes: strict YAML, resolved so that every step is built before the first one runs.

name, file or dict ─including→ all passes in one list, overrides applied ─form→ Recipe ─planning→ Plan
"""

from .form import Budget, OnBreak, Recipe, describe
from .including import overrides_from
from .planning import Plan, adapter, build_pass, plain, resolve, schema
from .yaml_data import load_yaml

__all__ = [
    "Budget",
    "OnBreak",
    "Plan",
    "Recipe",
    "adapter",
    "build_pass",
    "describe",
    "load_yaml",
    "overrides_from",
    "plain",
    "resolve",
    "schema",
]
