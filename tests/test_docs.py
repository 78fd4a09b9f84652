from __future__ import annotations

import ast
import importlib
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import surgery
from surgery import Data, Registry, hooks
from surgery.testing import check_pass, contract_cases, edited_networks

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def code_blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = code_blocks("README.md", "python")
    namespace: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), namespace)
    assert (tmp_path / "runs" / "mine" / "model.onnx").exists()
    smaller, example = namespace["smaller"], namespace["example"]
    assert smaller(**example)["logits"].shape == (1, 10)
    assert "dB" in capsys.readouterr().out


def test_the_plugin_of_the_docs_works_and_keeps_the_contract(monkeypatch):
    plugin_code, _, _, test_code = code_blocks("docs/plugins.md", "python")
    plugin = ModuleType("round_weights")
    monkeypatch.setitem(sys.modules, "round_weights", plugin)
    exec(compile(plugin_code, "docs/plugins.md", "exec"), plugin.__dict__)
    registry = Registry.load([plugin])
    assert "round_weights" in registry.passes
    shared = torch.nn.Linear(4, 4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), shared, shared)
    recipe = {"name": "d", "passes": [{"round_weights": {"bits": 4}}]}
    operation = surgery.operate(model, torch.rand(1, 4), recipe, registry=registry, latency_rounds=0)
    [report] = operation.reports
    assert [edit.layer for edit in report.edits] == ["0"]
    assert [skip.layer for skip in report.skips] == ["1", "2"]
    tests: dict[str, object] = {}
    exec(compile(test_code, "docs/plugins.md", "exec"), tests)
    for case in tests["test_contract"].pytestmark[0].args[1][:4]:
        tests["test_contract"](*case.values)
    tests["test_the_contract_was_put_to_the_test"]()


def test_the_pass_of_the_docs_that_removes_channels_keeps_the_contract(monkeypatch):
    _, code, *_ = code_blocks("docs/plugins.md", "python")
    plugin = ModuleType("drop_smallest")
    monkeypatch.setitem(sys.modules, "drop_smallest", plugin)
    exec(compile(code, "docs/plugins.md", "exec"), plugin.__dict__)
    cases = contract_cases([plugin.DropSmallest()])
    for case in cases[:6]:
        check_pass(*case.values)
    assert len(list(edited_networks(plugin.DropSmallest(), [case.values[1] for case in cases[:6]]))) >= 5


def test_the_recipes_of_the_docs_are_recipes():
    from surgery.recipe import overrides_from, resolve

    plain, using = (yaml.safe_load(text) for text in code_blocks("docs/recipes.md", "yaml"))
    assert len(resolve(plain, Registry.load()).steps) == 2
    assert resolve(using, Registry.load()).steps[0].macs == 0.7
    settings = re.findall(r"--set (\S+)", "".join(code_blocks("docs/recipes.md", "sh")))
    assert len(settings) == 4
    plan = resolve("half_the_macs", Registry.load(), overrides_from(settings))
    assert (plan.steps[0].macs, plan.steps[0].steps, plan.on_break) == (0.7, 2, ("soften",))


def docs_plugin(monkeypatch, code: str) -> ModuleType:
    plugin = ModuleType("docs_plugin")
    monkeypatch.setitem(sys.modules, "docs_plugin", plugin)
    exec(compile(code, "docs/pruning.md", "exec"), plugin.__dict__)
    return plugin


def test_the_recipe_of_the_pruning_page_is_a_recipe():
    from surgery.recipe import resolve

    [text] = code_blocks("docs/pruning.md", "yaml")
    assert resolve(yaml.safe_load(text), Registry.load()).steps[0].macs == 0.5


def test_the_recipe_and_the_python_of_the_low_rank_page_run(tmp_path, monkeypatch, capsys):
    from surgery.recipe import resolve

    [text] = code_blocks("docs/low_rank.md", "yaml")
    assert [step.name() for step in resolve(yaml.safe_load(text), Registry.load()).steps] == ["tucker", "svd"]
    [code] = code_blocks("docs/low_rank.md", "python")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    exec(compile(code, "docs/low_rank.md", "exec"), namespace)
    operation = namespace["operation"]
    assert 0.48 < operation.after.macs / operation.before.macs <= 0.505
    assert "rank_out" in capsys.readouterr().out


def test_the_low_rank_page_explains_every_option_of_every_pass():
    from surgery_plugins.low_rank.options import LowRank

    text = (ROOT / "docs" / "low_rank.md").read_text()
    passes = [cls for cls in Registry.load().passes.values() if issubclass(cls, LowRank)]
    assert len(passes) == 6
    for cls in passes:
        assert f"| `{cls.name()}` |" in text
        missing = [f.name for f in fields(cls) if not re.search(rf"`(\w+: {{)?{f.name}\b", text)]
        assert not missing, cls.name()


def test_the_criterion_of_the_docs_chooses_by_bias(monkeypatch):
    plugin = docs_plugin(monkeypatch, code_blocks("docs/pruning.md", "python")[0])
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
    model[0].bias.data = torch.tensor([3.0, 0.1, -2.0])
    recipe = {"name": "d", "passes": [{"prune_filters": {"ratio": 0.34, "criterion": "bias"}}]}
    operation = surgery.operate(model, torch.rand(2, 4), recipe, registry=Registry.load([plugin]), latency_rounds=0)
    assert operation.model.get_submodule("0").bias.tolist() == [3.0, -2.0]


def test_the_quantiser_of_the_docs_leaves_three_values_between_the_ends(monkeypatch):
    [code] = code_blocks("docs/finetuning.md", "python")
    registry = Registry.load([docs_plugin(monkeypatch, code)])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3))
    recipe = {"name": "d", "passes": [{"finetune": {"quantizer": "ternary", "epochs": 2}}]}
    batches = list(torch.randn(32, 4).split(8))
    trained = surgery.operate(model, batches[0], recipe, data=batches, registry=registry, latency_rounds=0).model
    counts = [len(trained.get_submodule(name).weight.unique()) for name in ("0", "2", "3")]
    assert counts == [32, 3, 24]


def test_the_channel_rule_of_the_docs_lets_channels_through(monkeypatch):
    plugin = docs_plugin(monkeypatch, code_blocks("docs/pruning.md", "python")[1])

    class Gated(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 2, 3)
            self.scale = torch.nn.Parameter(torch.rand(8))

        def forward(self, x):
            return self.second(plugin.gate(self.first(x), self.scale))

    captured = surgery.capture(Gated(), torch.rand(2, 3, 8, 8))
    assert not surgery.find_channels(captured).groups
    [group] = surgery.find_channels(captured, Registry([plugin]).channel_rules).groups
    assert group.size == 8
    assert "scale" in {member.slot.tensor for member in group.members}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_every_hook_is_typed_described_and_in_the_docs():
    names = [name for name in vars(hooks) if name.startswith("surgery_")]
    text = (ROOT / "docs" / "plugins.md").read_text()
    for name in names:
        function = getattr(hooks, name)
        assert function.__doc__, name
        assert "return" in function.__annotations__, name
        assert f"`{name}()`" in text


def test_the_readme_lists_every_built_in_pass_with_its_exactness():
    table = dict(re.findall(r"\| `(\w+)` \|.*\| (yes|no) \|", (ROOT / "README.md").read_text()))
    assert table == {name: "yes" if cls.exact else "no" for name, cls in Registry.load().passes.items()}


PUBLIC = {"surgery", *(f"surgery.{name}" for name in ("graph", "calibration", "channels", "errors", "testing"))}


def test_plugins_import_only_the_public_api():
    for file in (ROOT / "plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "surgery":
                assert node.module in PUBLIC, f"{file.name}: {node.module}"
                given = surgery.__all__ if node.module == "surgery" else vars(importlib.import_module(node.module))
                names = {alias.name for alias in node.names}
                assert names <= {name for name in given if not name.startswith("_")}, f"{file.name}: {names}"


def test_every_package_is_installed():
    import tomllib

    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    names = {"plugins": "surgery_plugins", "recipes": "surgery_recipes"}
    folders = [p.parent.relative_to(ROOT) for top in ("surgery", *names) for p in (ROOT / top).rglob("__init__.py")]
    assert sorted(declared) == sorted(".".join((names.get(f.parts[0], f.parts[0]), *f.parts[1:])) for f in folders)


def test_the_core_names_no_pass():
    names = set(Registry.load().passes)
    for file in (ROOT / "surgery").rglob("*.py"):
        found = {n for n in names if re.search(rf"\b{n}\b", file.read_text())}
        assert not found, f"{file.name}: {found}"


def test_everything_public_is_there_and_described():
    for name in surgery.__all__:
        value = getattr(surgery, name)
        assert name == "__version__" or name == "hookimpl" or value.__doc__, name


def digits_data() -> tuple[torch.nn.Module, Data]:
    from surgery.demo import digits, digits_cnn

    torch.manual_seed(0)
    images, labels = digits()
    return digits_cnn(), Data(calibration=[images[:64]], evaluation=[(images[64:128], labels[64:128])])


@pytest.mark.parametrize("name", sorted(Registry.load().recipes))
def test_every_shipped_recipe_runs_and_its_file_matches_pytorch(name):
    model, data = digits_data()
    at_once = {"on_break": "undo"} if name == "everything" else {}  # softening takes a minute, and has tests of its own
    operation = surgery.operate(model, torch.rand(1, 1, 8, 8), name, overrides=at_once, data=data, latency_rounds=0)
    assert any(report.edits for report in operation.reports)
    assert all(parity.passed for parity in operation.verification.parity)
    assert operation.plan.recipe.description
