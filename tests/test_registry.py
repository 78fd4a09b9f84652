from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from surgery import Pass, PassReport, PluginError, Registry, hookimpl


def make_pass(name="Trim", doc="Trims.", frozen=True, bases=(Pass,), apply=lambda self, model, context: PassReport()):
    cls = type(name, bases, {"__doc__": doc, "apply": apply, "__annotations__": {}})
    return dataclass(frozen=frozen, kw_only=True)(cls) if frozen is not None else cls


def plugin(*classes, name="surgery_passes"):
    return type("Plugin", (), {name: hookimpl(lambda self: list(classes))})()


def test_a_pass_is_found_by_its_class_name_in_snake_case():
    registry = Registry([plugin(make_pass("TrimTwoEnds"))])
    assert list(registry.passes) == ["trim_two_ends"]
    assert registry.provider("trim_two_ends") == "Plugin"


def test_two_plugins_with_one_pass_name_are_refused_naming_both():
    first, second = plugin(make_pass()), plugin(make_pass())
    first.__name__, second.__name__ = "alpha", "beta"
    with pytest.raises(PluginError, match="'trim': alpha and beta"):
        Registry([first, second])


def test_a_plugin_that_is_installed_may_be_given_again():
    from surgery_plugins import fold_batchnorm

    assert Registry.load([fold_batchnorm]).passes == Registry.load().passes


def test_a_misspelt_hook_is_refused_with_the_right_name():
    with pytest.raises(PluginError, match=r"surgery_pases(.|\n)*surgery_passes"):
        Registry([plugin(make_pass(), name="surgery_pases")])


def test_a_hook_without_its_marker_but_misspelt_is_refused_too():
    bare = type("Plugin", (), {"surgery_passs": lambda self: []})()
    with pytest.raises(PluginError, match="did you mean surgery_passes"):
        Registry([bare])


def test_a_hook_that_wants_unknown_arguments_is_refused():
    wrong = type("Plugin", (), {"surgery_passes": hookimpl(lambda self, colour: [])})()
    with pytest.raises(PluginError, match="colour"):
        Registry([wrong])


def test_a_hook_that_raises_names_the_plugin():
    def surgery_passes(self):
        raise RuntimeError("no luck")

    with pytest.raises(PluginError, match=r"no luck\n.*plugin Plugin"):
        Registry([type("Plugin", (), {"surgery_passes": hookimpl(surgery_passes)})()])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (int, "not a subclass"),
        (make_pass(frozen=False, bases=(object,)), "not a subclass"),
        (make_pass(frozen=None), "not a frozen dataclass"),
        (make_pass(doc=None), "no docstring"),
        (make_pass(apply=Pass.apply), "does not define apply"),
    ],
)
def test_a_class_that_breaks_the_rules_is_refused(bad, message):
    with pytest.raises(PluginError, match=message):
        Registry([plugin(bad)])


@pytest.fixture
def site(tmp_path: Path):
    """A folder that looks like an installed distribution with one entry point."""

    def install(code: str, module: str = "third_party_plugin", name: str = "third") -> Path:
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[surgery]\n{name} = {module}\n")
        (tmp_path / f"{module}.py").write_text(code)
        return tmp_path

    return install


def surgery(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(path)!r}); sys.argv = ['surgery', *{arguments!r}]; "
        "from surgery.cli import main; main()"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


THIRD_PARTY = '''
from dataclasses import dataclass
from surgery import Pass, PassReport, hookimpl

@dataclass(frozen=True, kw_only=True)
class NoOperation(Pass):
    """Does nothing, from another package."""

    def apply(self, model, context):
        return PassReport()

@hookimpl
def surgery_passes():
    return [NoOperation]
'''


def test_an_installed_third_party_pass_is_listed_beside_the_built_in_ones(site):
    result = surgery(site(THIRD_PARTY), "passes", "--json")
    assert result.returncode == 0, result.stderr
    assert "no_operation" in result.stdout
    assert "fold_batchnorm" in result.stdout


@pytest.mark.parametrize(
    ("code", "words"),
    [("import not_there_at_all", "No module named 'not_there_at_all'"), ("raise SystemExit(3)", "SystemExit: 3")],
)
def test_an_installed_plugin_that_does_not_import_is_named_with_its_package_and_remedy(site, code, words):
    result = surgery(site(code), "passes")
    assert result.returncode == 2
    assert words in result.stderr
    assert "uninstall third_party_plugin" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_installed_pass_with_a_built_in_name_is_refused(site):
    result = surgery(site(THIRD_PARTY.replace("NoOperation", "FoldBatchnorm")), "passes")
    assert result.returncode == 2
    assert "two plugins offer 'fold_batchnorm'" in result.stderr
    assert "third_party_plugin" in result.stderr


def test_listing_passes_does_not_import_torch():
    code = "import sys; from surgery import Registry; Registry.load(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"refuses": {"shared"}}, "refuses is .* no mapping"),
        ({"marks": "shared"}, "marks is 'shared', no set"),
        ({"strength": ("x",)}, "strength is .* no mapping"),
        ({"check": 1, "__annotations__": {"check": int}}, "an option 'check', which is a name of surgery.Pass"),
    ],
)
def test_attributes_of_another_form_are_refused(attributes, message):
    cls = type("Trim", (Pass,), {"__doc__": "Trims.", "apply": lambda *a: PassReport(), **attributes})
    with pytest.raises(PluginError, match=message):
        Registry([plugin(dataclass(frozen=True, kw_only=True)(cls))])


def test_a_recipe_that_is_no_file_is_refused(tmp_path):
    for given in ("some.yaml", tmp_path / "missing.yaml"):
        giver = type("Giver", (), {"surgery_recipes": hookimpl(lambda self, given=given: [given])})()
        with pytest.raises(PluginError, match=r"no path of a \.yaml file"):
            Registry([giver])
