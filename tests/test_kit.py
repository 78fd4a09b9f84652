"""The contract kit passes a good pass and catches every kind of bad one, saying which rule is broken where."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import nn

import surgery.testing
from surgery import Edit, Pass, PassReport, Skip, layers, set_module
from surgery.names import tensors
from surgery.testing import NETWORKS, RULES, Network, check_pass, contract_cases, edited_networks, networks

LINE = Network(
    "line",
    lambda: nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)),
    lambda batch, generator: torch.randn(batch, 3, generator=generator),
)


def replace_weight(layer, value):
    layer.module.weight = nn.Parameter(value.detach())


@dataclass(frozen=True, kw_only=True)
class Coarsen(Pass):
    """Rounds weights to a grid: a good pass."""

    steps: Annotated[int, Field(ge=1, description="grid points per unit")] = 8

    def grid(self, layer):
        return (layer.module.weight * self.steps).round() / self.steps

    def apply(self, model, context):
        chosen = [layer for layer in self.selected(layers(model)) if layer.type == "Linear"]
        edits, skips = [], []
        for layer in chosen:
            if torch.equal(self.grid(layer), layer.module.weight):
                skips.append(Skip(layer.name, "lies on the grid already"))
                continue
            replace_weight(layer, self.grid(layer))
            edits.append(Edit(layer.name, f"rounded to 1/{self.steps}"))
        return PassReport(tuple(edits), tuple(skips))


def test_a_good_pass_keeps_every_rule():
    report = check_pass(Coarsen(), LINE)
    assert [edit.layer for edit in report.edits] == ["0", "2"]
    assert list(edited_networks(Coarsen(), [LINE])) == ["line"]


def test_a_pass_without_edits_keeps_every_rule():
    @dataclass(frozen=True, kw_only=True)
    class Idle(Pass):
        """Does nothing."""

        def apply(self, model, context):
            return PassReport(skips=(Skip("0", "lazy"),))

    assert not check_pass(Idle(), LINE).modified
    assert list(edited_networks(Idle(), [LINE])) == []


class Bad(Pass):
    """Base of the bad passes below; `edit` is what each does to the layer it is given."""

    report: ClassVar[Any] = PassReport((Edit("0", "doubled"),))

    def edit(self, model, context, layer):
        replace_weight(layer, layer.module.weight * 2)

    def apply(self, model, context):
        self.edit(model, context, layers(model)[0])
        return self.report


def bad(rule, why):
    """A pass that must break `rule`; `why` stands in the message."""

    def decorate(cls):
        BAD[cls.__name__] = (dataclass(frozen=True, kw_only=True)(cls), rule, why)
        return cls

    return decorate


BAD: dict[str, tuple[type[Pass], str, str]] = {}


@bad("keeps_the_contract", "an edit names relu, where the pass changed nothing")
class NamesAnotherLayer(Bad):
    """Names what it left alone."""

    report = PassReport((Edit("0", "doubled"), Edit("relu", "doubled")))


@bad("keeps_the_contract", "the pass changed 2, which no edit names")
class NamesOneOfTwo(Bad):
    """Changes two layers, and tells of one."""

    def edit(self, model, context, layer):
        for one in layers(model)[:2]:
            replace_weight(one, one.module.weight * 2)


@bad("keeps_the_contract", "reports 1 edits but changed nothing")
class LiesAboutEdits(Bad):
    """Says it edited."""

    def edit(self, model, context, layer):
        pass


@bad("keeps_the_contract", "reports no edit but changed 0.weight")
class EditsInSilence(Bad):
    """Reports nothing."""

    report = PassReport()


@bad("keeps_the_contract", "0.weight of the model before the pass was written in place")
class WritesInPlace(Bad):
    """Writes where it should replace."""

    def edit(self, model, context, layer):
        with torch.no_grad():
            layer.module.weight.mul_(2)


@bad("keeps_the_contract", "0.weight of the model before the pass was written in place")
class WritesBehindTorch(Bad):
    """Writes through NumPy, which leaves no trace in torch."""

    def edit(self, model, context, layer):
        layer.module.weight.detach().numpy()[:] *= 2
        super().edit(model, context, layer)


@bad("leaves_its_input_alone", "the graph or a module of the captured model was changed")
class EditsTheOriginal(Bad):
    """Edits what the context gives for comparison."""

    def edit(self, model, context, layer):
        super().edit(model, context, layer)
        set_module(context.original, "extra", nn.ReLU())


@bad("is_idempotent", "the second application reports Edit(layer='0'")
class DoublesAgain(Bad):
    """Never ends."""

    def apply(self, model, context):
        excluded = self.exclude
        if excluded:
            return PassReport()
        return super().apply(model, context)


@bad("keeps_the_contract", "lacks its layer or its reason")
class GivesNoReason(Bad):
    """Does not say why."""

    report = PassReport((Edit("0", ""),))


@bad("reasons_are_given", "has none")
class GivesABlankReason(Bad):
    """Says nothing at length."""

    report = PassReport((Edit("0", "doubled"),), (Skip("2", "  "),))


@bad("keeps_the_contract", "an edit names nowhere, where the pass changed nothing")
class NamesNoLayer(Bad):
    """Edits a place that is not there."""

    report = PassReport((Edit("nowhere", "doubled"),))


@bad("keeps_the_contract", "error as nan, which is no finite number")
class ReportsNaN(Bad):
    """Measures badly."""

    report = PassReport((Edit("0", "doubled", {"error": float("nan")}),))


@bad("keeps_the_contract", "declared exact but moves an output")
class IsNotExact(Bad):
    """Claims to be exact."""

    exact = True


@bad("keeps_the_contract", "ZeroDivisionError: division by zero")
class Raises(Bad):
    """Fails."""

    def edit(self, model, context, layer):
        1 / 0  # noqa: B018


@bad("keeps_the_contract", "apply returned NoneType, not a PassReport")
class ReturnsNone(Bad):
    """Forgets the report."""

    report = None


@bad("is_deterministic", "0.weight differs between two runs")
class IsRandom(Bad):
    """Takes random numbers from anywhere."""

    def edit(self, model, context, layer):
        replace_weight(layer, torch.randn_like(layer.module.weight))


@bad("edited_layers_can_be_excluded", "exclude=('0',) does not exclude it")
class IgnoresExclude(Bad):
    """Takes all."""

    idempotent = False


@bad("keeps_the_contract", "the outputs change from [(2, 2)] to [(2, 4)]")
class ChangesTheOutput(Bad):
    """Forgets the last layer."""

    def edit(self, model, context, layer):
        last = next(node for node in model.graph.nodes if node.target == "2")
        last.replace_all_uses_with(last.args[0])


@bad("keeps_the_contract", "gives NaN on the example inputs")
class BreaksTheNumbers(Bad):
    """Divides by nothing."""

    def edit(self, model, context, layer):
        replace_weight(layer, layer.module.weight / 0)


class Opaque(nn.Linear):
    """A layer that cannot be written as source: it does not keep what it was built with."""

    def __init__(self, secret):
        super().__init__(3, 4)
        self.hidden = secret


class Idempotent(Bad):
    """Base of bad passes that would be idempotent: `selected` and a second application are taken care of."""

    def apply(self, model, context):
        if self.exclude or "edited" in model.meta:
            return PassReport()
        model.meta["edited"] = True
        return super().apply(model, context)


@bad("survives_a_restart", "does not keep its constructor argument 'secret'")
class PutsInAnOpaqueLayer(Idempotent):
    """Uses a layer that cannot be built anew."""

    def edit(self, model, context, layer):
        torch.manual_seed(0)
        set_module(model, layer.name, Opaque("secret").eval())


def python_function(x):
    return x * 2


@bad("survives_a_restart", "cannot be stored")
class CallsPython(Idempotent):
    """Puts a Python function into the graph."""

    def edit(self, model, context, layer):
        with model.graph.inserting_after(layer.nodes[0]):
            call = model.graph.call_function(python_function, (layer.nodes[0],))
        layer.nodes[0].replace_all_uses_with(call, lambda user: user is not call)


@bad("trains", "no parameter has a gradient")
class FreezesEverything(Idempotent):
    """Leaves nothing to train."""

    def edit(self, model, context, layer):
        super().edit(model, context, layer)
        for name, parameter in list(model.named_parameters()):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, nn.Parameter(parameter.detach(), requires_grad=False))


@bad("exports_to_onnx", "cannot be translated to ONNX")
class UsesAnOperatorWithoutOnnx(Idempotent):
    """Puts in an operator that ONNX does not have."""

    def edit(self, model, context, layer):
        with model.graph.inserting_after(layer.nodes[0]):
            call = model.graph.call_function(torch.ops.aten.special_i0e.default, (layer.nodes[0],))
        layer.nodes[0].replace_all_uses_with(call, lambda user: user is not call)


@bad("repr_round_trips", "gives")
class HidesAnOption(Idempotent):
    """Keeps an option out of its repr."""

    depth: Annotated[int, Field(description="depth")] = field(default=1, repr=False)


@bad("options_survive_json", "(1+2j) is not JSON")
class TakesAnObject(Idempotent):
    """Has an option that no file can hold."""

    depth: Annotated[Any, Field(description="depth")] = complex(1, 2)


@bad("options_are_described", "no description: depth")
class DescribesNothing(Idempotent):
    """Does not say what its option means."""

    depth: int = 1


@bad("follows_the_rules_for_definitions", "has no docstring")
class HasNoSummary(Idempotent):
    pass


NEEDS_AN_OPTION = {"HidesAnOption": {"depth": 2}}


@pytest.mark.parametrize("name", BAD)
def test_the_kit_catches(name):
    cls, rule, why = BAD[name]
    step = cls(**NEEDS_AN_OPTION.get(name, {}))
    with pytest.raises(AssertionError) as caught:
        check_pass(step, LINE)
    message = str(caught.value)
    assert f"breaks the rule {rule!r}" in message
    assert why in message
    assert name in message
    assert "on network line" in message


def test_a_network_is_whole_again_after_a_pass_has_damaged_it():
    for name in ("WritesBehindTorch", "WritesInPlace"):
        with pytest.raises(AssertionError):
            check_pass(BAD[name][0](), LINE)
    check_pass(Coarsen(), LINE)


def test_every_rule_has_words_and_a_unique_name():
    assert all(rule.__doc__ for rule in RULES)
    assert len({rule.__name__ for rule in RULES}) == len(RULES)


def test_cases_are_every_step_on_every_network_with_readable_names():
    cases = contract_cases([Coarsen(), Coarsen(steps=4)], networks("lstm", "gru"))
    names = ["coarsen-lstm", "coarsen-gru", "coarsen[steps=4]-lstm", "coarsen[steps=4]-gru"]
    assert [case.id for case in cases] == names
    assert cases[2].values == (Coarsen(steps=4), NETWORKS["lstm"])
    assert len(contract_cases([Coarsen()])) == len(NETWORKS)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_a_network_is_the_same_every_time_and_nothing_in_it_is_vacuous(network):
    state = torch.get_rng_state()
    first, second = network.model(), network.model()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, tensors(second)[name]) for name, t in tensors(first).items())
    assert not first.training
    for name, parameter in tensors(first).items():
        if parameter.is_floating_point() and parameter.numel() > 1:
            assert parameter.std() > 0, f"{name} is constant"
    outputs = torch.utils._pytree.tree_leaves(network.call(first, network.inputs(8)))
    assert all(t.isfinite().all() and 1e-3 < t.std() < 20 for t in outputs)


def test_calibration_batches_are_new_data():
    network = NETWORKS["plain_cnn"]
    example, batches = network.inputs(), network.calibration(batches=3, batch=4)
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert not any(torch.equal(batch[:2], example) for batch in batches)


def test_the_kit_imports_no_test_framework_until_it_needs_one():
    for file in Path(surgery.testing.__file__).parent.glob("*.py"):
        top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not any("pytest" in ast.unparse(node) for node in top), file
