from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from surgery import Edit, Pass, PassReport, RecipeError, Registry, hookimpl
from surgery.recipe import load_yaml, resolve, schema


@dataclass(frozen=True, kw_only=True)
class Shave(Pass):
    """Takes a little off."""

    amount: Annotated[float, Field(gt=0, lt=1, description="share taken off")] = 0.5
    rounds: Annotated[int, Field(ge=1, description="how often")] = 1

    def apply(self, model, context):
        return PassReport((Edit("x", "shaved"),))


@dataclass(frozen=True, kw_only=True)
class Freeze(Pass):
    """Makes weights integers."""

    gives: ClassVar[frozenset[str]] = frozenset({"int8"})
    refuses: ClassVar[dict[str, str]] = {"int8": "the model is int8 already"}

    def apply(self, model, context):
        return PassReport()


@dataclass(frozen=True, kw_only=True)
class Widen(Pass):
    """Needs float weights."""

    refuses: ClassVar[dict[str, str]] = {"int8": "channels of an int8 model cannot be widened"}

    def apply(self, model, context):
        return PassReport()


class Plugin:
    @hookimpl
    def surgery_passes(self):
        return [Shave, Freeze, Widen]


@pytest.fixture
def registry():
    return Registry([Plugin()])


def recipe(*passes, **more):
    return {"name": "r", "passes": list(passes), **more}


def test_options_left_out_stand_in_the_lock(registry):
    plan = resolve(recipe("shave", {"freeze": None}), registry)
    assert plan.lock["passes"] == [
        {"shave": {"amount": 0.5, "exclude": [], "rounds": 1, "select": []}},
        {"freeze": {"exclude": [], "select": []}},
    ]


def test_the_lock_is_itself_a_recipe_with_the_same_hash(registry):
    plan = resolve(recipe({"shave": {"amount": 0.25, "select": ["a.*"]}}, seed=3), registry)
    assert resolve(plan.lock, registry).hash == plan.hash


def test_every_option_changes_the_hash(registry):
    hashes = {
        resolve(recipe({"shave": options}, seed=seed), registry).hash
        for options in ({}, {"amount": 0.4}, {"rounds": 2}, {"select": ["a"]}, {"exclude": ["a"]})
        for seed in (0, 1)
    }
    assert len(hashes) == 10


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "empty"),
        ([], "no mapping"),
        ({"name": "r"}, "'passes' is missing"),
        ({"passes": ["shave"]}, "'name' is missing"),
        (recipe(), "at least 1 item"),
        (recipe("shav"), "did you mean shave"),
        (recipe("zzz"), "known passes: freeze, shave, widen"),
        (recipe({"shave": {"amonut": 0.3}}), "did you mean amount"),
        (recipe({"shave": {"amount": 1.5}}), "amount: input should be less than 1, got 1.5"),
        (recipe({"shave": {"amount": "0.5"}}), "amount: input should be a valid number, got '0.5'"),
        (recipe({"shave": {"amount": float("nan")}}), "amount"),
        (recipe({"shave": {"rounds": 1.5}}), "rounds"),
        (recipe({"shave": {"rounds": True}}), "rounds"),
        (recipe({"shave": {"select": "a"}}), "select"),
        (recipe({"shave": [1]}), "passes.0.shave"),
        (recipe({"shave": {}, "freeze": {}}), "2 keys"),
        (recipe(3), "passes.0"),
        (recipe("shave", seed=-1), "seed"),
        (recipe("shave", seed="0"), "seed"),
        (recipe("shave", bugdet={}), "did you mean budget"),
        (recipe("shave", budget={"accuracy_dorp": 0.1}), "accuracy_dorp"),
        (recipe("shave", budget={"accuracy_drop": 2}), "accuracy_drop"),
        (recipe("shave", export=["onxn"]), "export"),
        (recipe("freeze", "widen"), "channels of an int8 model cannot be widened"),
        (recipe("freeze", "shave", "freeze"), "already"),
    ],
)
def test_a_wrong_recipe_says_what_and_where(bad, message, registry):
    with pytest.raises(RecipeError) as caught:
        resolve(bad, registry)
    assert message in str(caught.value)


def test_an_order_that_works_is_accepted_and_the_refusal_names_it(registry):
    assert len(resolve(recipe("widen", "freeze"), registry).steps) == 2
    with pytest.raises(RecipeError, match="put widen before freeze"):
        resolve(recipe("freeze", "widen"), registry)


def test_an_error_names_the_step(registry):
    with pytest.raises(RecipeError, match=r"passes\.1 \(shave\)"):
        resolve(recipe("shave", {"shave": {"rounds": 0}}), registry)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "duplicate key 'a'"),
        ("a:\n  b: 1\n  b: 2", "line 3"),
        ("a: !!python/object/apply:os.system [ls]", "YAML tag"),
        ("a: !mine 3", "YAML tag"),
        ("a: [1", "not plain YAML"),
        ("a: b: c", "line 1"),
        ("{[1]: 2}", "not plain YAML"),
    ],
)
def test_yaml_is_plain_data(text, message):
    with pytest.raises(RecipeError, match=message):
        load_yaml(text, "file.yaml")


def test_quoted_strings_are_no_tags():
    assert load_yaml("a: \"1\"\nb: 'x'", "f") == {"a": "1", "b": "x"}


def test_a_recipe_file_is_read_by_path_and_a_missing_one_says_so(tmp_path, registry):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\npasses:\n  - shave: {amount: 0.1}\n")
    assert resolve(path, registry).steps[0].options["amount"] == 0.1
    with pytest.raises(RecipeError, match=r"missing\.yaml"):
        resolve(tmp_path / "missing.yaml", registry)
    with pytest.raises(RecipeError, match="no recipe named 'mine'"):
        resolve("mine", registry)


def test_the_schema_knows_every_installed_pass_and_its_ranges(registry):
    document = json.loads(json.dumps(schema(registry)))
    offered = {k for s in document["properties"]["passes"]["items"]["anyOf"] for k in s.get("properties", {})}
    assert offered == {"shave", "freeze", "widen"}
    shave = next(
        s["properties"]["shave"]
        for s in document["properties"]["passes"]["items"]["anyOf"]
        if "shave" in s.get("properties", {})
    )
    assert shave["properties"]["amount"]["exclusiveMaximum"] == 1
    assert shave["additionalProperties"] is False


def test_a_criterion_that_no_plugin_offers_is_refused_before_anything_runs():
    recipe = {"name": "r", "passes": ["fold_batchnorm", {"prune_filters": {"criterion": "reconstuction"}}]}
    with pytest.raises(
        RecipeError, match=r"unknown criterion 'reconstuction' \(did you mean reconstruction\?\)"
    ) as caught:
        resolve(recipe, Registry.load())
    assert "passes.1 (prune_filters)" in str(caught.value)
