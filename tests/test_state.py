from __future__ import annotations

import copy
import dataclasses
import functools
import json
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sample_models import MODELS, build
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_leaves, tree_unflatten

from surgery import Registry, hookimpl
from surgery.captured import CapturedModel, capture
from surgery.channels import ChannelRule
from surgery.constructors import class_path, constructor, shortest
from surgery.errors import ExportError, RunError
from surgery.graph import propagate
from surgery.state import Known, containers_of, digest, load_state, save_state
from surgery.state.encoding import decode, encode, encode_target
from surgery.state.structure import decode_structure, encode_structure

FILES = ("graph.json", "weights.safetensors", "inputs.safetensors")


@functools.cache
def _captured(name: str) -> CapturedModel:
    return capture(*build(name))


def captured(name: str) -> CapturedModel:
    return copy.deepcopy(_captured(name))


def content(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


def outputs(model: CapturedModel) -> list[Tensor]:
    torch.manual_seed(1)
    return [v for v in tree_leaves(model(*model.inputs.args, **model.inputs.kwargs)) if isinstance(v, Tensor)]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_exactly_as_it_was(name: str, tmp_path: Path) -> None:
    model = captured(name)
    save_state(model, tmp_path / "1")
    loaded = load_state(tmp_path / "1")
    save_state(loaded, tmp_path / "2")
    assert content(tmp_path / "1") == content(tmp_path / "2")
    assert loaded.code == model.code
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert all(map(torch.equal, outputs(model), outputs(loaded)))
    propagate(model, model.inputs)
    assert [n.name for n in loaded.graph.nodes] == [n.name for n in model.graph.nodes]
    assert repr([n.meta.get("tensor_meta") for n in loaded.graph.nodes]) == repr(
        [n.meta.get("tensor_meta") for n in model.graph.nodes]
    )
    assert (loaded.dynamic_batch, loaded.notes) == (model.dynamic_batch, model.notes)
    assert loaded.capture_error == model.capture_error


def test_training_flags_ties_strides_and_frozen_parameters_survive(tmp_path: Path) -> None:
    model = captured("tied_head").train()
    model.get_submodule("norm").eval()
    model.get_parameter("norm.bias").requires_grad_(False)
    model.get_parameter("embed.weight").data = model.get_parameter("embed.weight").data.t().contiguous().t()
    save_state(model, tmp_path)
    loaded = load_state(tmp_path)
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]
    assert loaded.get_parameter("head.weight") is loaded.get_parameter("embed.weight")
    assert loaded.get_parameter("embed.weight").stride() == (1, 11)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_non_persistent_buffers_stay_out_of_the_state_dict(tmp_path: Path) -> None:
    save_state(captured("constants"), tmp_path)
    loaded = load_state(tmp_path)
    assert "mask" not in loaded.state_dict()
    assert torch.equal(loaded.get_buffer("mask"), torch.tensor([1.0, 0.0, 1.0]))


def test_loading_neither_changes_statistics_nor_the_random_state(tmp_path: Path) -> None:
    model = captured("residual").train()
    save_state(model, tmp_path)
    before = torch.random.get_rng_state()
    loaded = load_state(tmp_path)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, model.buffers(), loaded.buffers()))


def test_new_nodes_get_the_names_they_would_have_got_without_the_stop(tmp_path: Path) -> None:
    model = captured("sequence")
    last = next(n for n in model.graph.nodes if n.target is torch.ops.aten.hardswish.default)
    for _ in range(2):
        with model.graph.inserting_after(last):
            gone = model.graph.call_function(torch.ops.aten.relu.default, (last,))
        model.graph.erase_node(gone)
    save_state(model, tmp_path)
    loaded = load_state(tmp_path)
    names = []
    for graph in (model.graph, loaded.graph):
        with graph.inserting_after(next(n for n in graph.nodes if n.name == last.name)):
            names.append(graph.call_function(torch.ops.aten.relu.default, (last,)).name)
    assert names[0] == names[1]


def test_a_copy_is_saved_to_the_same_bytes(tmp_path: Path) -> None:
    model = captured("constants")
    save_state(model, tmp_path / "1")
    save_state(copy.deepcopy(model), tmp_path / "2")
    assert content(tmp_path / "1")[1:] == content(tmp_path / "2")[1:]


class Local(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_layer_class_that_cannot_be_found_again_is_refused(tmp_path: Path) -> None:
    class Hidden(Local):
        pass

    model = captured("sequence")
    model.add_module("2", Hidden())
    with pytest.raises(ExportError, match="Hidden") as caught:
        save_state(model, tmp_path / "state")
    assert "top level" in caught.value.fix
    assert not (tmp_path / "state").exists()


# Damage


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "graph.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(
    folder: Path, change: Callable[[dict[str, Tensor]], object], name: str = "weights.safetensors"
) -> None:
    tensors = load_file(folder / name)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / name)


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-30]) and None  # type: ignore[func-returns-value]


def node(data: dict[str, Any], op: str) -> dict[str, Any]:
    return next(n for n in data["nodes"] if n["op"] == op)


def nested(depth: int) -> dict[str, Any]:
    return {"tuple": [nested(depth - 1)]} if depth else {"tuple": []}


LSTM = {
    "class": "torch.nn.modules.rnn:LSTM",
    "arguments": {"input_size": 1, "hidden_size": 1, "num_layers": 10**9},
}

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda f: (f / "graph.json").unlink(), "no graph.json"),
    "no weights": (lambda f: (f / "weights.safetensors").unlink(), "no weights.safetensors"),
    "no inputs": (lambda f: (f / "inputs.safetensors").unlink(), "no inputs.safetensors"),
    "cut graph": (cut("graph.json"), "no JSON"),
    "cut weights": (cut("weights.safetensors"), "damaged"),
    "cut inputs": (cut("inputs.safetensors"), "damaged"),
    "graph of another kind": (lambda f: (f / "graph.json").write_text("[]"), "valid"),
    "deep nesting": (lambda f: (f / "graph.json").write_text("[" * 100_000), "no JSON"),
    "another version": (lambda f: edit(f, lambda d: d.update(version=1)), "version"),
    "unknown field": (lambda f: edit(f, lambda d: d["nodes"][0].update(code="1")), "code"),
    "unknown operator": (
        lambda f: edit(f, lambda d: node(d, "call_function").update(target="aten.evil.default")),
        "evil",
    ),
    "operator that writes": (
        lambda f: edit(f, lambda d: node(d, "call_function").update(target="aten.relu_.default")),
        "may call",
    ),
    "operator that opens files": (
        lambda f: edit(f, lambda d: node(d, "call_function").update(target="aten.from_file.default")),
        "may call",
    ),
    "operator of TorchScript alone": (
        lambda f: edit(f, lambda d: node(d, "call_function").update(target="aten.save.default")),
        "may call",
    ),
    "function that is no operator": (
        lambda f: edit(f, lambda d: node(d, "call_function").update(target="operator.methodcaller")),
        "no operator",
    ),
    "code in a module name": (
        lambda f: edit(f, lambda d: node(d, "call_module").update(target='x"); import os; ("')),
        "no name of a module",
    ),
    "code in a node name": (
        lambda f: edit(f, lambda d: node(d, "call_module").update(name="a = 1; b")),
        "no name of a node",
    ),
    "code in an argument name": (lambda f: edit(f, lambda d: d.update(names=["x=print()"])), "no name"),
    "code in an input name": (
        lambda f: edit(f, lambda d: node(d, "placeholder").update(target="x=print()")),
        "no name",
    ),
    "layer that is none": (lambda f: edit(f, lambda d: d["modules"][1].update({"class": "os:system"})), "os:system"),
    "layer that copies another": (
        lambda f: edit(
            f, lambda d: d["modules"][1].update({"class": "torch.nn.parallel.distributed:DistributedDataParallel"})
        ),
        "no layer class",
    ),
    "layer on a device of its own": (
        lambda f: edit(f, lambda d: d["modules"][1]["arguments"].update(device="cpu")),
        "no argument 'device'",
    ),
    "layer of a billion layers": (
        lambda f: edit(f, lambda d: d["modules"][1].update(LSTM)),
        "more tensors than the document lists",
    ),
    "layer of a module not imported": (
        lambda f: edit(f, lambda d: d["modules"][1].update({"class": "antigravity:Layer"})),
        "antigravity",
    ),
    "layer with wrong arguments": (
        lambda f: edit(f, lambda d: d["modules"][1].update(arguments={"in_channels": 2})),
        "out_channels",
    ),
    "layer of another size": (
        lambda f: edit(f, lambda d: d["modules"][1]["arguments"].update(out_channels=8)),
        "no parameter of shape",
    ),
    "layer twice": (lambda f: edit(f, lambda d: d["modules"].append(d["modules"][1])), "twice"),
    "missing tensor": (lambda f: edit_tensors(f, lambda t: t.pop("0.bias")), "not among the weights"),
    "unlisted tensor": (lambda f: edit(f, lambda d: d["tensors"].pop(0)), "belongs to no layer"),
    "further tensor": (lambda f: edit_tensors(f, lambda t: t.update(z=torch.ones(1))), "'z' belongs to no layer"),
    "tensor of another shape": (lambda f: edit_tensors(f, lambda t: t.update({"0.bias": torch.ones(3)})), "of shape"),
    "strides with gaps": (lambda f: edit(f, lambda d: d["tensors"][1].update(strides=[2])), "strides"),
    "node twice": (lambda f: edit(f, lambda d: d["nodes"].insert(1, d["nodes"][0])), "twice"),
    "node used before it is there": (lambda f: edit(f, lambda d: d["nodes"].reverse()), "before"),
    "no output": (lambda f: edit(f, lambda d: d["nodes"].pop()), "output|list"),
    "value of no kind": (
        lambda f: edit(f, lambda d: node(d, "output").update(args=[{"eval": "1"}])),
        "no stored value",
    ),
    "structure that is none": (lambda f: edit(f, lambda d: d.update(outputs={})), "structure"),
    "structure that names a class": (lambda f: edit(f, lambda d: d.update(outputs={"os:system": []})), "no kind"),
    "structure without end": (lambda f: edit(f, lambda d: d.update(outputs=nested(200))), "nested too deeply"),
    "code in a keyword": (
        lambda f: edit(f, lambda d: d.update(inputs={"tuple": [{"tuple": []}, {"dict": [["'+print()+'", None]]}]})),
        "names do not match",
    ),
    "code in a named tuple": (
        lambda f: edit(f, lambda d: d.update(outputs={"named": ["N", [["x=print()", None]]]})),
        "identifier",
    ),
    "value without end": (
        lambda f: edit(f, lambda d: node(d, "output").update(args=[nested(200)])),
        "nested too deeply",
    ),
    "another number of outputs": (
        lambda f: edit(f, lambda d: node(d, "output").update(args=[{"tuple": []}])),
        "structure",
    ),
    "further input": (
        lambda f: edit_tensors(f, lambda t: t.update({"7": torch.ones(1)}), "inputs.safetensors"),
        "no input",
    ),
    "inputs of another shape": (
        lambda f: edit_tensors(f, lambda t: t.update({"0": torch.ones(2, 5)}), "inputs.safetensors"),
        "running it on the example",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_refused_naming_file_and_place(damage: str, tmp_path: Path) -> None:
    save_state(captured("sequence"), tmp_path)
    change, problem = DAMAGE[damage]
    change(tmp_path)
    with pytest.raises(RunError, match=problem) as caught:
        load_state(tmp_path)
    assert str(tmp_path) in caught.value.at
    assert caught.value.fix


# Values


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([torch.float16, torch.strided]),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
)


@given(VALUES)
def test_every_value_survives_json(value: object) -> None:
    assert repr(decode(json.loads(json.dumps(encode(value), allow_nan=False)))) == repr(value)


@pytest.mark.parametrize(
    "value",
    [slice(0, None, 2), ..., 2 - 1j, torch.device("cpu"), torch.channels_last, torch.Size([2, 3]), float("-inf")],
)
def test_torch_values_survive_json(value: object) -> None:
    back = decode(json.loads(json.dumps(encode(value), allow_nan=False)))
    assert back == value


@pytest.mark.parametrize("value", [object(), torch.ones(1), print, {1, 2}], ids=["object", "tensor", "function", "set"])
def test_other_values_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="cannot store"):
        encode(value)


def test_a_target_is_an_operator_and_nothing_else() -> None:
    known = Known()
    for name in ("aten.conv2d.default", "operator.getitem", "torch.sym_max", "math.floor"):
        assert encode_target(known.operator(name)) == name
    for name in ("os.system", "builtins.eval", "operator.attrgetter", "torch.load", "aten.add", "math.__loader__", ""):
        with pytest.raises(ValueError, match="operator"):
            known.operator(name)
    with pytest.raises(TypeError):
        encode_target(print)


RULE = ChannelRule(lambda call: None)


# Constructors


LAYERS = [
    nn.Conv1d(4, 6, 3, groups=2, bias=False),
    nn.Conv2d(4, 8, (3, 5), stride=2, padding=(1, 2)),
    nn.Conv2d(4, 8, 3, padding="same"),
    nn.Conv3d(1, 2, 3, dilation=2),
    nn.ConvTranspose1d(4, 2, 3),
    nn.ConvTranspose2d(3, 5, 4, stride=2, padding=1, output_padding=1, dilation=2),
    nn.ConvTranspose3d(2, 2, 2),
    nn.Linear(3, 4, bias=False),
    nn.Bilinear(2, 3, 4),
    nn.BatchNorm1d(3),
    nn.BatchNorm2d(5, eps=1e-3, momentum=None, affine=False, track_running_stats=False),
    nn.BatchNorm3d(3, momentum=0.2),
    nn.LayerNorm(4),
    nn.LayerNorm((3, 3), bias=False),
    nn.LayerNorm((2, 3), elementwise_affine=False),
    nn.GroupNorm(2, 4, affine=False),
    nn.RMSNorm(4, eps=1e-6),
    nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
    nn.InstanceNorm2d(3),
    nn.InstanceNorm3d(3, eps=1e-3),
    nn.PReLU(),
    nn.PReLU(4, init=0.1),
    nn.Embedding(10, 4, padding_idx=0, max_norm=1.0),
    nn.EmbeddingBag(10, 4, mode="sum", include_last_offset=True),
    nn.Dropout(0.1),
    nn.Dropout1d(0.1),
    nn.Dropout2d(),
    nn.Dropout3d(0.3),
    nn.AlphaDropout(0.3),
    nn.FeatureAlphaDropout(0.2),
    nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True, dropout=0.1, proj_size=2),
    nn.GRU(3, 4, bias=False),
    nn.RNN(3, 4, nonlinearity="relu"),
]


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_a_layer_is_built_anew_from_its_attributes(layer: nn.Module) -> None:
    arguments = constructor(layer)
    for chosen in (arguments, shortest(layer, arguments)):
        again = type(layer)(**chosen)
        assert again.extra_repr() == layer.extra_repr()
        assert [(n, p.shape) for n, p in again.state_dict().items()] == [
            (n, p.shape) for n, p in layer.state_dict().items()
        ]
        assert constructor(again) == arguments
    assert len(shortest(layer, arguments)) <= len(arguments)


def test_the_shortest_arguments_are_those_a_person_writes() -> None:
    layer = nn.Conv2d(3, 64, 3, padding=1)
    assert shortest(layer, constructor(layer)) == {
        "in_channels": 3,
        "out_channels": 64,
        "kernel_size": 3,
        "padding": 1,
    }


class Renamed(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.size = width


class Callable_(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function


class Lying(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width + 1


class Anything(nn.Module):
    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes = sizes


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        (Renamed(3), "does not keep its constructor argument 'width'"),
        (Callable_(torch.relu), "not as a plain value"),
        (Lying(3), "keeps another value"),
        (Anything(1, 2), "sizes"),
    ],
    ids=["renamed", "callable", "lying", "star"],
)
def test_a_class_that_does_not_keep_its_arguments_is_refused_telling_its_author(layer: nn.Module, problem: str) -> None:
    with pytest.raises(ExportError, match=problem.replace("*", r"\*")) as caught:
        constructor(layer)
    assert type(layer).__name__ in caught.value.problem
    assert "attribute of the same name" in caught.value.fix


@pytest.mark.parametrize(
    "path", ["os:system", "builtins:int", "torch:load", "torch.nn:functional", "sample_models:Residual", ""]
)
def test_only_layer_classes_of_a_list_are_found_by_path(path: str) -> None:
    with pytest.raises(ValueError, match="no layer class"):
        Known().layer(path)


@torch.library.custom_op("state_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


def test_what_a_plugin_describes_may_be_named_and_so_may_what_the_model_at_hand_has() -> None:
    target, path = torch.ops.state_tests.twice.default, class_path(Local)
    plugin = type("P", (), {"surgery_channel_rules": hookimpl(lambda self: {target: RULE, Local: RULE})})()
    model = captured("sequence")
    model.add_module("2", Local())
    model.graph.call_function(target)
    for known in (Known(Registry([plugin])), Known(Registry(), model)):
        assert known.operator("state_tests.twice.default") is target
        assert known.layer(path) is Local
    with pytest.raises(ValueError, match="surgery_channel_rules"):
        Known().operator("state_tests.twice.default")


# Containers


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Point:
    x: Any
    y: Any


class Bag(OrderedDict[str, Any]):
    """A dict of a class of its own, as transformers has them."""


torch.export.register_dataclass(Point)
register_pytree_node(
    Bag, lambda bag: ([*bag.values()], [*bag]), lambda values, keys: Bag(zip(keys, values, strict=True))
)


@pytest.mark.parametrize(
    ("made", "plain"),
    [
        ((1, [2, {"a": 3, 4: 5}], None), (1, [2, {"a": 3, 4: 5}], None)),
        (OrderedDict(b=1, a=(2,)), OrderedDict(b=1, a=(2,))),
        (defaultdict(list, a=1), {"a": 1}),
        (Point(1, [2]), {"x": 1, "y": [2]}),
        (Bag(a=1), {"a": 1}),
        ([Pair(1, 2)], [(1, 2)]),
    ],
    ids=["plain", "ordered", "default", "dataclass", "registered", "named"],
)
def test_a_structure_from_a_file_has_plain_containers(made: Any, plain: Any) -> None:
    leaves, spec = tree_flatten(made)
    again = tree_unflatten(leaves, decode_structure(json.loads(json.dumps(encode_structure(spec)))))
    assert again == plain
    assert type(again) is type(plain)


def test_a_named_tuple_from_a_file_is_a_class_of_its_own() -> None:
    leaves, spec = tree_flatten(Pair(1, 2))
    again = tree_unflatten(leaves, decode_structure(encode_structure(spec)))
    assert (again.first, again.second, type(again).__name__) == (1, 2, "Pair")
    assert type(again) is not Pair


class Boxed(nn.Linear):
    def forward(self, pair: Pair) -> Point:  # type: ignore[override]
        return Point(super().forward(pair.first), Pair(pair.second, pair.first))


def test_the_classes_of_the_model_at_hand_come_back(tmp_path: Path) -> None:
    model = capture(Boxed(4, 4), (Pair(torch.rand(2, 4), torch.rand(2, 1)),))
    save_state(model, tmp_path)
    loaded = load_state(tmp_path, containers=lambda: containers_of(model))
    output = loaded(*loaded.inputs.args)
    assert isinstance(loaded.inputs.args[0], Pair)
    assert isinstance(output, Point)
    assert isinstance(output.y, Pair)
    assert set(load_state(tmp_path)(*load_state(tmp_path).inputs.args)) == {"x", "y"}


def test_the_digest_of_a_state_sees_every_byte(tmp_path: Path) -> None:
    assert save_state(captured("sequence"), tmp_path) == digest(tmp_path)
    for name in FILES:
        data = (tmp_path / name).read_bytes()
        before = digest(tmp_path)
        (tmp_path / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        assert digest(tmp_path) != before
    (tmp_path / FILES[1]).unlink()
    assert digest(tmp_path) is None


# Names


@pytest.mark.parametrize("name", ["it's", "größe", "{0}", "a b", "x" * 4000])
def test_odd_names_are_kept(name: str, tmp_path: Path) -> None:
    model = capture(Keyed(name), torch.rand(2, 2))
    save_state(model, tmp_path)
    loaded = load_state(tmp_path)
    assert [*loaded.state_dict()] == [*model.state_dict()]
    assert all(map(torch.equal, outputs(model), outputs(loaded)))


@pytest.mark.parametrize("name", ["__metadata__", "x" * 5000, 'a"b', "a\\b", "a\nb"])
def test_names_that_files_cannot_hold_are_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    model = captured("sequence")
    model.register_buffer(name, torch.ones(1))
    with pytest.raises(ExportError, match="cannot be stored") as caught:
        save_state(model, tmp_path / "state")
    assert caught.value.fix == "rename it in the model"
    assert not (tmp_path / "state").exists()


class Keyed(nn.Module):
    """Its only layer has this name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(2, 2)})

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers.values():
            x = layer(x)
        return x
