from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Annotated, ClassVar

import pytest
from pydantic import Field

from surgery import Edit, Pass, PassReport, RecipeError, Registry, hookimpl
from surgery.errors import PathError
from surgery.recipe import load_yaml, resolve, schema


@dataclass(frozen=True, kw_only=True)
class Shave(Pass):
    """Takes a little off."""

    amount: Annotated[float, Field(gt=0, lt=1, description="share taken off")] = 0.5
    rounds: Annotated[int, Field(ge=1, description="how often")] = 1
    strength: ClassVar[dict[str, float]] = {"amount": 0.0, "rounds": 1}

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
        (recipe({"shave": [1]}), "options [1] are no mapping"),
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


TENS = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a0: &a0 [x]\n" + "".join(TENS), "more than 20,000 values"),
        ("a0: &a0 {x: 1}\n" + "".join(TENS).replace("[", "{<<: [").replace("]", "]}"), "more than 20,000 values"),
        ("[" * 100_000, "nested deeper than 32"),
        ("- " * 50_000, "nested deeper than 32"),
        ("a: &a [*a]", "in a circle"),
        ("&a {*a : 1}", "in a circle"),
        ("#" * 300_000, "300,000 characters"),
        ("a: 2001-99-99", "month must be in 1..12"),
        ("a: 1" + ":1" * 100, "an integer beyond 64 bits"),
    ],
    ids=["aliases", "merges", "lists", "blocks", "circle", "key", "length", "date", "integer"],
)
def test_yaml_takes_no_more_work_than_its_length_warrants(text, message):
    start = time.process_time()
    with pytest.raises(RecipeError, match=message) as caught:
        load_yaml(text, "file.yaml")
    assert time.process_time() - start < 2
    assert len(str(caught.value)) < 300


def test_a_dict_without_end_is_no_recipe(registry):
    circle, deep = recipe("shave"), recipe()
    circle["passes"].append(circle)
    inner = deep["passes"]
    for _ in range(10_000):
        inner.append([])
        inner = inner[0]
    for raw in (circle, deep):
        with pytest.raises(RecipeError, match="nested deeper than 32, or in a circle"):
            resolve(raw, registry)


def test_recipes_that_use_each_other_have_an_end(tmp_path, registry):
    fan = {f"fan{i}": f"passes: [{', '.join([f'use: fan{i + 1}.yaml'] * 10)}]" for i in range(9)}
    write(tmp_path, fan9="passes: [shave]", round=f"passes: [use: ../{tmp_path.name}/round.yaml]", **fan)
    for name, message in (("fan0", "more than 200 passes"), ("round", "deeper than 16")):
        with pytest.raises(RecipeError, match=message):
            resolve(tmp_path / f"{name}.yaml", registry)


@pytest.mark.parametrize("bound", [{"sqnr_db": float("nan")}, {"sqnr_db": float("inf")}, {"parity": float("inf")}])
def test_bounds_are_finite_numbers(bound, registry):
    with pytest.raises(RecipeError, match="finite number"):
        resolve(recipe("shave", budget=bound), registry)


@pytest.mark.parametrize("given", ["", "a\0b", "x" * 5000])
def test_what_is_no_path_is_no_recipe(given, registry):
    with pytest.raises(PathError, match="no usable path"):
        resolve(given, registry)


def test_text_of_a_recipe_is_not_taken_for_its_path(registry):
    with pytest.raises(RecipeError, match="text of several lines"):
        resolve("name: x\npasses: [shave]\n", registry)


def test_an_error_quotes_no_megabyte(registry):
    with pytest.raises(RecipeError) as caught:
        resolve(recipe("x" * 1_000_000), registry)
    assert len(str(caught.value)) < 4000


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
    assert offered == {"shave", "freeze", "widen", "use", "with", "on_break"}
    shave = next(
        s["properties"]["shave"]["anyOf"][0]
        for s in document["properties"]["passes"]["items"]["anyOf"]
        if "shave" in s.get("properties", {})
    )
    assert shave["properties"]["amount"]["exclusiveMaximum"] == 1
    assert shave["additionalProperties"] is False


def write(folder, **recipes):
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(f"name: {name}\n{text}")


def test_a_recipe_uses_another_with_changed_options(tmp_path, registry):
    write(
        tmp_path,
        inner="seed: 7\npasses: [widen, {shave: {amount: 0.1, rounds: 3}}]\nbudget: {sqnr_db: 99.0}",
        outer="passes:\n  - use: inner.yaml\n    with: {shave: {amount: 0.2}}\n  - freeze",
    )
    plan = resolve(tmp_path / "outer.yaml", registry)
    assert [step.name() for step in plan.steps] == ["widen", "shave", "freeze"]
    assert (plan.steps[1].options["amount"], plan.steps[1].options["rounds"]) == (0.2, 3)
    assert (plan.recipe.seed, plan.recipe.budget.sqnr_db) == (0, None)  # of the outer recipe
    assert resolve(plan.lock, registry).hash == plan.hash


def test_one_of_two_passes_of_a_name_is_changed_by_its_index(tmp_path, registry):
    write(
        tmp_path,
        inner="passes: [{shave: {amount: 0.1}}, {shave: {amount: 0.1}}, widen]",
        outer="passes: [widen, {use: inner.yaml, with: {1: {amount: 0.2}}}]",
    )
    steps = resolve(tmp_path / "outer.yaml", registry).steps
    assert [step.options["amount"] for step in steps if step.name() == "shave"] == [0.1, 0.2]


def test_recipes_nest_and_each_keeps_what_it_does_with_a_broken_budget(tmp_path, registry):
    write(
        tmp_path,
        a="on_break: undo\npasses: [shave, {shave: null, on_break: stop}]",
        b="passes: [{use: a.yaml}, widen]",
        c="on_break: soften\npasses: [{use: b.yaml}, {use: a.yaml, on_break: continue}, shave]",
    )
    assert resolve(tmp_path / "c.yaml", registry).on_break == (
        "undo", "stop", "soften", "continue", "continue", "soften",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{use: other.yaml}", "other.yaml uses"),
        ("{use: me.yaml}", "uses each other in a circle|in a circle: .*me.yaml uses .*me.yaml"),
        ("{use: nowhere.yaml}", "cannot be read"),
        ("{use: nowhere}", "no recipe named 'nowhere'"),
        ("{use: 3}", "3 is no name or path"),
        ("{use: fine.yaml, whith: {}}", "unknown key 'whith' beside `use`"),
        (
            "{use: fine.yaml, with: {shav: {}}}",
            r"with: there is no pass 'shav' \(did you mean shave\?\) in .*fine.yaml",
        ),
        ("{use: twice.yaml, with: {shave: {}}}", r"with: 2 passes are named 'shave' in .*twice.yaml"),
        ("{use: twice.yaml, with: {2: {}}}", r"with: there is no pass '2' in .*twice.yaml"),
        ("{use: twice.yaml, with: {null: {}}}", "with: there is no pass 'None'"),
        ("{use: twice.yaml, with: {1: {amuont: 1}}}", r"me.yaml with the passes it uses, passes.1 \(shave\)"),
        ("{shave: {1: 2}}", "1 is no name of an option"),
        ("{shave: 2}", "options 2 are no mapping"),
        ("{1: {}}", r"passes.0.1: .* string"),
        ("{use: fine.yaml, with: {shave: 3}}", "does not map passes to options"),
        ("{use: fine.yaml, with: {shave: {amuont: 1}}}", "did you mean amount"),
        ("{use: wrong.yaml}", "unknown key 'bugdet'"),
        ("{shave: {}, on_break: udno}", "on_break: 'udno'"),
        ("{freeze: {}, on_break: soften}", "freeze has no strength"),
    ],
)
def test_a_wrong_use_says_what_and_where(item, message, tmp_path, registry):
    write(
        tmp_path,
        me=f"passes: [{item}]",
        other="passes: [{use: me.yaml}]",
        fine="passes: [shave]",
        twice="passes: [shave, shave]",
        wrong="passes: [shave]\nbugdet: {}",
    )
    with pytest.raises(RecipeError, match=message) as caught:
        resolve(tmp_path / "me.yaml", registry)
    assert ".yaml" in str(caught.value)


def test_overrides_go_by_index_by_name_and_by_key(registry):
    raw = recipe("widen", {"shave": {"amount": 0.1}}, budget={"sqnr_db": 3.0})
    overrides = {
        "passes.1.amount": 0.3,
        "passes.shave.rounds": 2,
        "passes.shave.on_break": "undo",
        "budget.parity": 0.5,
        "seed": 4,
        "on_break": "stop",
    }
    plan = resolve(raw, registry, overrides)
    assert (plan.steps[1].options["amount"], plan.steps[1].options["rounds"]) == (0.3, 2)
    assert plan.on_break == ("stop", "undo")
    assert (plan.recipe.seed, plan.recipe.budget.sqnr_db, plan.recipe.budget.parity) == (4, 3.0, 0.5)
    assert raw == recipe("widen", {"shave": {"amount": 0.1}}, budget={"sqnr_db": 3.0})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("passes.3.amount", r"no pass '3'.*passes.0 \(shave\), passes.1 \(widen\), passes.2 \(shave\)"),
        ("passes.melt.amount", "no pass 'melt'"),
        ("passes.shave.amount", "2 passes are named 'shave'"),
        ("passes.0", "names a pass and no option"),
        ("passes.0.amuont", "did you mean amount"),
        ("passes.-1.amount", "no pass '-1'"),
        ("pases.0.amount", "did you mean passes"),
        ("budget.sqnr", "sqnr"),
        ("seed.low", "seed"),
        (3, "a recipe has no '3'"),
    ],
)
def test_an_override_of_nothing_says_what_there_is(path, message, registry):
    with pytest.raises(RecipeError, match=f"(?s){message}"):
        resolve(recipe("shave", "widen", "shave"), registry, {path: 0.3})


def test_softening_goes_halfway_to_where_the_pass_does_least(registry):
    step = resolve(recipe({"shave": {"amount": 0.5, "rounds": 4}}), registry).steps[0]
    softer = []
    while (step := step.softened()) is not None and len(softer) < 4:
        softer.append((step.amount, step.rounds))
    assert softer == [(0.25, 2), (0.125, 1), (0.0625, 1), (0.03125, 1)]
    assert resolve(recipe("freeze"), registry).steps[0].softened() is None


def test_a_criterion_that_no_plugin_offers_is_refused_before_anything_runs():
    recipe = {"name": "r", "passes": ["fold_batchnorm", {"prune_filters": {"criterion": "reconstuction"}}]}
    with pytest.raises(
        RecipeError, match=r"unknown criterion 'reconstuction' \(did you mean reconstruction\?\)"
    ) as caught:
        resolve(recipe, Registry.load())
    assert "passes.1 (prune_filters)" in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"passes": [{"shave": {"on_break": "undo"}}]}, r"write on_break beside the pass"),
        ({"passes": ["shave"], "budget": {"sqnr": 3.0}}, r"did you mean sqnr_db\?"),
        ({"passes": [{"use": "edge_int"}]}, r"no recipe named 'edge_int'.*\n  at:  recipe t, passes\.0"),
    ],
)
def test_what_is_meant_instead_is_said(registry, recipe, words):
    with pytest.raises(RecipeError, match=words):
        resolve({"name": "t", **recipe}, registry)
