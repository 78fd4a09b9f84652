"""Every installed pass keeps the contract on every network, and the contract itself sees what it must see."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from surgery import (
    Context,
    CrashError,
    Data,
    Edit,
    InputError,
    Pass,
    PassError,
    PassReport,
    PluginError,
    RecipeError,
    Registry,
    Skip,
)
from surgery.changes import note_reach
from surgery.contract import snapshot
from surgery.graph import layers, shape
from surgery.names import tensors
from surgery.passes import check_class
from surgery.testing import NETWORKS, check_pass, contract_cases, edited_networks, networks

REGISTRY = Registry.load()
PASSES = REGISTRY.passes

# Options worth a test of their own, and the networks on which they do something else than the defaults.
VARIANTS = [
    ("depthwise_separable", {"include_first": True, "multiplier": 2, "calibrate": False}, ("conv_1d", "conv_3d")),
    ("depthwise_separable", {"sequential": True}, ("residual",)),
    ("depthwise_separable", {"norm_activation": True}, ("plain_cnn",)),
    ("fold_batchnorm", {"exclude": ("1",)}, ("conv_1d",)),
]


def in_turns() -> list[Any]:
    """Every plugin on every network; passes of one plugin, which share their way through a model, take turns."""
    plugins: dict[str, list[str]] = {}
    for name in PASSES:
        plugins.setdefault(REGISTRY.provider(name), []).append(name)
    turns = [
        (PASSES[names[place % len(names)]](), network)
        for names in plugins.values()
        for place, network in enumerate(NETWORKS.values())
    ]
    return [case for step, network in turns for case in contract_cases([step], [network])]


DEFAULTS = contract_cases([cls() for cls in PASSES.values()]) if os.environ.get("CONTRACT") == "all" else in_turns()
OTHERS = [
    case for name, options, where in VARIANTS for case in contract_cases([PASSES[name](**options)], networks(*where))
]


@pytest.mark.parametrize(("step", "network"), DEFAULTS + OTHERS)
def test_an_installed_pass_keeps_the_contract(step, network):
    check_pass(step, network)


SMALL = {"tensor_train": {"min_features": 1}}
"""Options without which a pass finds nothing large enough in the small networks."""


ON_EDITED = {"densify"}
"""Passes for what other passes leave; tests of their own see them edit."""


@pytest.mark.parametrize("name", [name for name in PASSES if name not in ON_EDITED])
def test_every_installed_pass_edits_some_network(name):
    assert any(edited_networks(PASSES[name](**SMALL.get(name, {}))))


@dataclass(frozen=True, kw_only=True)
class Doing(Pass):
    """Does what it is told to."""

    does: ClassVar = staticmethod(lambda model, context: PassReport())

    def apply(self, model, context):
        return type(self).does(model, context)


def doing(function, **traits):
    """A pass that applies `function(model, context)`."""
    return type("Doing", (Doing,), {"does": staticmethod(function), "__doc__": "Does.", **traits})()


@pytest.fixture
def model():
    return NETWORKS["plain_cnn"].captured()


def scaled(model, factor=2.0):
    layer = layers(model)[0]
    layer.module.weight = nn.Parameter(layer.module.weight.detach() * factor)
    return PassReport((Edit(layer.name, "scaled"),))


def apply(step, model):
    return step(model, Context(model))


def test_a_snapshot_shares_tensors_and_nothing_else(model):
    copied = snapshot(model)
    assert all(t is tensors(model)[name] for name, t in tensors(copied).items())
    assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
    assert not {id(n) for n in copied.graph.nodes} & {id(n) for n in model.graph.nodes}
    assert [shape(n) for n in copied.graph.nodes if n.op == "call_module"] == [
        shape(n) for n in model.graph.nodes if n.op == "call_module"
    ]
    assert copied.inputs.tensors[0] is model.inputs.tensors[0]


def test_meta_noted_on_a_snapshot_stays_there(model):
    copied = snapshot(model)
    next(iter(copied.graph.nodes)).meta["note"] = 1
    copied.meta["note"] = 1
    assert "note" not in next(iter(model.graph.nodes)).meta
    assert "note" not in model.meta


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_of_the_model_is_kept(model, training):
    after, _ = apply(doing(lambda m, c: scaled(m)), model.train(training))
    assert {module.training for module in after.modules()} == {training}


def test_shapes_are_fresh_after_an_edit(model):
    def widen(model, context):
        last = layers(model)[-1]
        model.get_submodule(last.name).weight = nn.Parameter(last.module.weight.detach()[:3])
        model.get_submodule(last.name).bias = nn.Parameter(last.module.bias.detach()[:3])
        return PassReport((Edit(last.name, "cut"),))

    with pytest.raises(PassError, match=r"the outputs change from \[\(2, 5\)\] to \[\(2, 3\)\]"):
        apply(doing(widen), model)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda m: setattr(m.get_submodule("0.1"), "eps", 0.5), "0.1"),
        (lambda m: setattr(m.get_submodule("3"), "p", 0.9), "3"),
        (lambda m: m.get_submodule("0.1")._buffers.update(running_mean=torch.ones(8)), "0.1.running_mean"),
        (lambda m: scaled(m), "0.0.weight"),
        (lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))) or m.graph.get_attr("more"), None),
        (lambda m: m.graph.output_node().replace_input_with(*[m.graph.output_node().args[0][0]] * 2), None),
    ],
    ids=["option", "dropout", "buffer", "weight", "unused", "nothing"],
)
def test_a_change_that_is_not_reported_is_seen(model, change, what):
    def silent(model, context):
        change(model)
        return PassReport()

    if what is None:
        assert not apply(doing(silent), model)[1].modified
        return
    with pytest.raises(PluginError, match=f"reports no edit but changed {what}"):
        apply(doing(silent), model)


def test_what_a_change_reaches_is_named_where_it_has_changed(model):
    def fold(model, context):
        scaled(model)
        model.get_submodule("0.1").weight = nn.Parameter(torch.full((8,), 2.0))
        note_reach(model, "0.0", "0.1")
        note_reach(model, "0.0", "5")
        return PassReport((Edit("0.0", "scaled"),))

    _, report = apply(doing(fold), model)
    assert report.edits == (Edit("0.0", "scaled", also=("0.1",)),)


def test_channels_that_go_are_told_of_every_layer_that_loses_them(model):
    def shrink(model, context):
        found = context.channels(model)
        marks = [torch.arange(group.size) < (number == 0) for number, group in enumerate(found.groups)]
        found.remove(marks)
        return PassReport((Edit(found.groups[0].name, "one unit less"),))

    _, report = apply(doing(shrink), model)
    [edit] = report.edits
    assert {"0.1"} < {*edit.also}


def test_an_option_changed_and_reported_is_an_edit(model):
    def relax(model, context):
        model.get_submodule("3").p = 0.9
        return PassReport((Edit("3", "drops more"),))

    assert apply(doing(relax), model)[0].get_submodule("3").p == 0.9


def test_an_error_of_a_pass_names_it_and_leaves_the_model(model):
    before = {name: t.clone() for name, t in tensors(model).items()}

    def fails(model, context):
        scaled(model)
        raise KeyError("weight")

    with pytest.raises(PassError, match=r"KeyError: 'weight'") as caught:
        apply(doing(fails), model)
    assert caught.value.at.startswith("pass doing, ")
    assert "test_contract.py" in caught.value.at
    assert "unchanged" in caught.value.fix
    assert all(torch.equal(t, before[name]) for name, t in tensors(model).items())


def test_errors_of_the_sdk_pass_through_as_they_are(model):
    def refuses(model, context):
        raise RecipeError("no")

    with pytest.raises(RecipeError, match=r"^no$"):
        apply(doing(refuses), model)


def test_a_pass_that_needs_data_is_not_begun_without(model):
    step = doing(lambda m, c: pytest.fail("was begun"), needs_calibration=True)
    with pytest.raises(InputError, match="doing needs calibration data and there is none"):
        apply(step, model)


def test_exactness_is_held_to_the_declared_bound(model):
    step = doing(lambda m, c: scaled(m, 1 + 1e-3), exact=True)
    with pytest.raises(PassError, match=r"declared exact but moves an output by .* \(bound 0.0001\)"):
        apply(step, model)
    apply(doing(lambda m, c: scaled(m, 1 + 1e-3), exact=True, exact_bound=0.1), model)


def test_nan_in_the_result_is_refused_and_in_the_original_allowed():
    class Divides(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(x) / x.sign().sum(1, keepdim=True).clamp(0, 0)

    from surgery import capture

    model = capture(Divides(), torch.zeros(2, 2))
    assert apply(doing(lambda m, c: scaled(m)), model)[1].modified
    with pytest.raises(PassError, match="NaN"):
        apply(doing(lambda m, c: scaled(m, float("nan"))), NETWORKS["plain_cnn"].captured())


def test_reports_are_modified_by_their_edits_alone():
    assert not PassReport(skips=(Skip("a", "b"),), notes=("c",)).modified
    assert PassReport((Edit("a", "b"),)).modified


class Plain:
    pass


@pytest.mark.parametrize(
    ("cls", "why"),
    [
        (Plain, "Plain: is not a subclass of surgery.Pass"),
        (3, "3: is not a subclass"),
        (type("Loose", (Doing,), {"__doc__": "Not a dataclass of its own."}), "is not a frozen dataclass"),
        (dataclass(frozen=True, kw_only=True)(type("Mute", (Doing,), {})), "has no docstring"),
        (dataclass(frozen=True, kw_only=True)(type("Lazy", (Pass,), {"__doc__": "Lazy."})), "does not define apply"),
    ],
)
def test_a_class_that_breaks_the_rules_for_definitions_is_refused(cls, why):
    with pytest.raises(PluginError, match=why) as caught:
        check_class(cls, "plugin mine")
    assert caught.value.at == "plugin mine"


def test_writing_through_data_is_seen_as_well(model):
    def writes(model, context):
        layers(model)[0].module.weight.data.mul_(2)
        return PassReport((Edit("0", "doubled"),))

    with pytest.raises(PluginError, match=r"of the model before the pass was written in place") as caught:
        apply(doing(writes), model)
    assert "replace parameters" in caught.value.fix


def test_neither_the_original_nor_the_data_may_be_written_to(model):
    original, batches = NETWORKS["plain_cnn"].captured(), NETWORKS["plain_cnn"].calibration()

    def writes_the_original(model, context):
        layers(context.original)[0].module.weight.data.neg_()
        return scaled(model)

    def writes_the_data(model, context):
        for batch in context.data.calibration:
            batch.zero_()
        return scaled(model)

    for function, words in ((writes_the_original, "of the original was"), (writes_the_data, "calibration batch 0 was")):
        with pytest.raises(PluginError, match=words):
            doing(function)(model, Context(original, Data(calibration=batches)))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), torch.tensor(1.0), "0.5"])
def test_numbers_of_an_edit_are_finite_numbers_of_python(model, number):
    def reports(model, context):
        scaled(model)
        return PassReport((Edit("0", "scaled", {"gain": number}),))

    with pytest.raises(PluginError, match=r"edit of 0 gives gain as .* no finite number"):
        apply(doing(reports), model)


def test_a_report_of_other_things_than_edits_is_refused(model):
    with pytest.raises(PluginError, match=r"not a surgery\.Skip"):
        apply(doing(lambda model, context: PassReport((), (("0", "why"),))), model)


def test_a_pass_that_exits_has_crashed(model):
    def leaves(model, context):
        raise SystemExit(0)

    with pytest.raises(CrashError, match="SystemExit"):
        apply(doing(leaves), model)


def test_a_batch_size_written_into_the_graph_is_refused(model):
    def fixes(model, context):
        output = model.graph.output_node()
        [value] = output.all_input_nodes
        with model.graph.inserting_before(output):
            fixed = model.graph.call_function(torch.ops.aten.reshape.default, (value, list(shape(value))))
        fixed.meta = dict(value.meta)
        output.replace_input_with(value, fixed)
        return PassReport((Edit("output", "reshaped"),))

    with pytest.raises(PluginError, match=r"no longer takes \d+ samples") as caught:
        apply(doing(fixes), model)
    assert "batch size" in caught.value.fix


def test_a_graph_that_does_not_run_is_told_in_short(model):
    def breaks(model, context):
        output = model.graph.output_node()
        [value] = output.all_input_nodes
        with model.graph.inserting_before(output):
            shaped = model.graph.call_function(torch.ops.aten.reshape.default, (value, [7] * 200))
        output.replace_input_with(value, shaped)
        return PassReport((Edit("output", "reshaped"),))

    with pytest.raises(PluginError, match="the edited graph does not run: RuntimeError: shape") as caught:
        apply(doing(breaks), model)
    assert len(caught.value.problem) < 400


def test_signs_that_change_through_data_are_seen(model):
    layer = next(layer for layer in layers(model) if layer.type == "Linear")
    signs = torch.tensor([1.0, -1.0]).repeat(layer.module.weight.numel() // 2)  # a sum over its bits would stay
    layer.module.weight = nn.Parameter(signs.reshape(layer.module.weight.shape))

    def flips(model, context):
        next(layer for layer in layers(model) if layer.type == "Linear").module.weight.data.neg_()
        return scaled(model)

    with pytest.raises(PluginError, match="written in place"):
        apply(doing(flips), model)


def test_data_made_in_inference_mode_is_watched_too(model):
    with torch.inference_mode():
        batches = [batch.clone() for batch in NETWORKS["plain_cnn"].calibration()]
    context = Context(model, Data(calibration=batches))
    doing(lambda model, context: scaled(model))(model, context)

    def writes(model, context):
        with torch.inference_mode():
            context.data.calibration[1].add_(1)
        return scaled(model)

    with pytest.raises(PluginError, match="calibration batch 1 was written"):
        doing(writes)(model, context)
