from __future__ import annotations

from dataclasses import replace

import pytest

import surgery
from surgery import Data, ModelError, Registry
from surgery.recipe import resolve
from surgery.testing.networks import networks

REGISTRY = Registry.load()
RECIPES = sorted(REGISTRY.recipes)
WITHOUT_CHANNELS = {"lstm"}
"""Nothing can be removed: recipes that remove channels say so, and leave the model alone."""


def untimed(step):
    """Without measuring which layers are faster, which takes long and differs from run to run."""
    return replace(step, only_if_faster=False) if hasattr(step, "only_if_faster") else step


def test_the_recipes_that_are_promised_are_there():
    promised = {
        "fold_only",
        "edge_int8",
        "small_and_int8",
        "low_rank",
        "deep_compression",
        "hashed",
        "compact",
        "everything",
    }
    assert promised <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_no_layer_of_one_architecture_and_says_when_to_use_it(name):
    plan = resolve(name, REGISTRY)
    assert all(not step.select and not step.exclude for step in plan.steps)
    assert any(word in plan.recipe.description for word in ("Use it", "For the small CNN"))
    assert plan.recipe.name == name


@pytest.mark.parametrize(
    "network", networks("residual", "grouped_depthwise", "attention", "two_inputs", "lstm"), ids=str
)
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_on_any_kind_of_model_or_says_what_stands_in_its_way(name, network):
    steps = [untimed(step) for step in resolve(name, REGISTRY).steps]
    original = model = network.captured()
    data = Data(calibration=network.calibration())
    for number, step in enumerate(steps):
        context = surgery.Context(original, data, seed=number, registry=REGISTRY)
        if network.name in WITHOUT_CHANNELS and step.name() == "prune_filters":
            with pytest.raises(ModelError, match="nothing can be removed"):
                step(model, context)
            return
        model, _ = step(model, context)
    assert surgery.measure(model, model.inputs).macs <= surgery.measure(original, original.inputs).macs
