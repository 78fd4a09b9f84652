from __future__ import annotations

import copy
import functools
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sample_models import MODELS, Sequence, build
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import surgery
from surgery.captured import CapturedModel, capture
from surgery.errors import ExportError, ModelError
from surgery.export.source import export_source, source
from surgery.names import set_module
from surgery.state import Known, load_state, save_state

# Runs where neither this SDK nor the models' classes can be imported.
_ELSEWHERE = """
import json, sys, types
from pathlib import Path
for name in ("surgery", "surgery_plugins", "surgery_recipes", "sample_models"):
    sys.modules[name] = None
import torch
from torch.utils._pytree import tree_leaves
torch.set_num_threads(1)
folder = Path(sys.argv[1])
for path in sorted(folder.iterdir()):
    module = types.ModuleType("model")
    module.__file__ = str(path / "model.py")
    exec(compile((path / "model.py").read_text(), "model.py", "exec"), module.__dict__)
    args, kwargs = torch.load(path / "inputs.pt", weights_only=True)
    model = module.load()
    assert not model.training
    with torch.no_grad():
        outputs = [v for v in tree_leaves(model(*args, **kwargs)) if isinstance(v, torch.Tensor)]
    model.train()
    torch.manual_seed(3)
    trained = [v for v in tree_leaves(model(*args, **kwargs)) if isinstance(v, torch.Tensor)]
    sum(v.double().square().mean() for v in trained).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    result = {"outputs": outputs, "trained": [v.detach() for v in trained], "grads": grads, "frozen": frozen,
              "state": dict(model.state_dict()), "keys": list(model.state_dict())}
    torch.save(result, path / "result.pt")
"""


load = functools.partial(surgery.load, trust=True)


@functools.cache
def _captured(name: str) -> CapturedModel:
    return capture(*build(name))


def captured(name: str) -> CapturedModel:
    return copy.deepcopy(_captured(name))


def tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(actual) == len(expected) and all(map(torch.equal, actual, expected))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every sample model exported, and run by an interpreter that knows only torch."""
    folder = tmp_path_factory.mktemp("exported")
    for name in MODELS:
        model = captured(name)
        export_source(model, folder / name)
        torch.save((model.inputs.args, model.inputs.kwargs), folder / name / "inputs.pt")
    run = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", _ELSEWHERE, str(folder)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_the_source_alone_gives_bit_identical_outputs_and_gradients(exported: Path, name: str) -> None:
    model = captured(name)
    result = torch.load(exported / name / "result.pt", weights_only=True)
    inputs = model.inputs
    with torch.no_grad():
        assert same(result["outputs"], tensors(model(*inputs.args, **inputs.kwargs)))
    model.train()
    torch.manual_seed(3)
    trained = tensors(model(*inputs.args, **inputs.kwargs))
    sum(v.double().square().mean() for v in trained).backward()
    assert same(result["trained"], trained)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert list(result["grads"]) == list(grads)
    assert same([*result["grads"].values()], [*grads.values()])
    assert same([*result["state"].values()], [*model.state_dict().values()])


@pytest.mark.parametrize("name", MODELS)
def test_the_source_keeps_state_dict_keys_and_frozen_parameters(exported: Path, name: str) -> None:
    original, _ = build(name)
    result = torch.load(exported / name / "result.pt", weights_only=True)
    model = captured(name)
    assert result["keys"] == list(model.state_dict())
    assert set(result["keys"]) <= set(original.state_dict())
    assert result["frozen"] == [n for n, p in model.named_parameters() if not p.requires_grad]


@pytest.mark.parametrize("trust", [True, False], ids=["source", "data"])
@pytest.mark.parametrize("name", MODELS)
def test_source_and_data_give_the_same_bits_at_another_batch_size(exported: Path, name: str, trust: bool) -> None:
    model = captured(name)
    inputs = model.inputs.with_batch(5 if model.dynamic_batch else model.inputs.batch_size)
    loaded = surgery.load(exported / name, trust=trust)
    with torch.no_grad():
        expected, actual = (m(*inputs.args, **inputs.kwargs) for m in (model, loaded))
    assert same(tensors(actual), tensors(expected))
    assert repr(tree_map(lambda _: 0, actual)) == repr(tree_map(lambda _: 0, expected))
    assert [*loaded.state_dict()] == [*model.state_dict()]
    assert not loaded.training


@pytest.mark.parametrize("name", MODELS)
def test_the_source_is_written_anew_from_the_data(exported: Path, name: str) -> None:
    loaded = surgery.load(exported / name)
    assert isinstance(loaded, CapturedModel)
    assert source(loaded) == (exported / name / "model.py").read_text()


@pytest.mark.parametrize("name", MODELS)
def test_the_source_is_formatted_and_free_of_lint(exported: Path, name: str) -> None:
    ruff = [sys.executable, "-m", "ruff"]
    path = str(exported / name / "model.py")
    for command in (
        ["format", "--isolated", "--line-length", "120", "--check"],
        ["check", "--isolated", "--select", "F,I"],
    ):
        run = subprocess.run([*ruff, *command, path], capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first = export_source(captured("transformer"), tmp_path / "a", header={"recipe": "sha256:00"})
    second = export_source(captured("transformer"), tmp_path / "b", header={"recipe": "sha256:00"})
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert "recipe: sha256:00" in first[0].read_text()


def test_tied_weights_stay_tied_and_are_stored_once(exported: Path) -> None:
    model = load(exported / "tied_head")
    assert model.head.weight is model.embed.weight
    size = (exported / "tied_head" / "model.safetensors").stat().st_size
    assert size < 11 * 8 * 4 + 1000


def test_two_models_load_side_by_side_and_leave_no_module_behind(exported: Path) -> None:
    before = set(sys.modules)
    first, second = load(exported / "residual"), load(exported / "shuffle" / "model.py")
    assert type(first) is not type(second)
    assert not [name for name in set(sys.modules) - before if "model" in name]


def test_the_file_is_an_ordinary_module(exported: Path) -> None:
    spec = importlib.util.spec_from_file_location("resnet_of_mine", exported / "residual" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert isinstance(module.load(), module.Model)
    assert isinstance(module.Model(), nn.Module)


def test_it_reads_like_code_written_by_hand() -> None:
    text = source(captured("residual"))
    assert 'self.stem["0"] = nn.Conv2d(3, 8, 3, padding=1)\n' in text
    assert "    def forward(self, image: Tensor) -> Tensor:\n" in text
    assert '        block = self.layers["1"]\n        y = block.conv1(x)\n' in text
    assert "        x = F.relu(x)\n" in text
    assert "torch.ops" not in text


def test_no_value_is_kept_longer_than_it_is_needed(tmp_path: Path) -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(40)])

        def forward(self, x: Tensor) -> Tensor:
            parts = [layer(x) for layer in self.layers]
            x = torch.stack(parts).sum(0)
            for layer in self.layers:
                x = layer(x).relu()
            return x

    text = source(capture(Growing(), torch.randn(2, 4)))
    deleted = next(line for line in text.splitlines() if line.strip().startswith("del "))
    assert len(deleted.split(",")) > 30


class Scaled(nn.Module):
    """A layer as a plugin defines it."""

    def __init__(self, features: int, factor: float = 2.0, bias: bool = True) -> None:
        super().__init__()
        self.features, self.factor = features, factor
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _scale(x, self.weight, self.factor) + (0 if self.bias is None else self.bias)


def _scale(x: Tensor, weight: Tensor, factor: float) -> Tensor:
    return x * weight * factor + OFFSET


OFFSET = 0.5


class Dependent(Scaled):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * len(json.dumps({}))


class Forgetful(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def with_layer(layer: nn.Module) -> CapturedModel:
    """A captured model whose second layer is `layer`."""
    model = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4))
    set_module(model, "1", layer)
    model.recompile()
    return model


def test_the_class_of_a_plugin_layer_is_embedded_with_what_it_uses(tmp_path: Path) -> None:
    model = with_layer(Scaled(4, factor=3.0, bias=False))
    path, *_ = export_source(model, tmp_path)
    text = path.read_text()
    assert 'self["1"] = Scaled(4, factor=3.0, bias=False)' in text
    assert text.index("OFFSET = 0.5") < text.index("def _scale") < text.index("class Scaled(nn.Module)")
    x = torch.randn(3, 4)
    assert torch.equal(load(tmp_path)(x), model(x))


@pytest.mark.parametrize(
    ("layer", "problem"),
    [(Dependent(4), "uses 'json'"), (Forgetful(4), "'features'")],
    ids=["needs another package", "forgets an argument"],
)
def test_a_layer_class_that_cannot_stand_alone_is_refused(layer: nn.Module, problem: str, tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text("old")
    with pytest.raises(ExportError, match=problem) as caught:
        export_source(with_layer(layer), tmp_path)
    assert type(layer).__name__ in caught.value.problem
    assert "author must" in caught.value.fix
    assert [path.name for path in tmp_path.iterdir()] == ["model.py"]
    assert (tmp_path / "model.py").read_text() == "old"


class Ordered(nn.Module):
    """Its constructor computes with values, which the meta device cannot."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.order = torch.arange(size).flip(0).tolist()
        self.register_buffer("scale", torch.tensor([float(v) for v in self.order]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.order] * self.scale


def test_arguments_with_the_names_of_helpers_are_kept(tmp_path: Path) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)])

        def forward(self, block: Tensor, batch: Tensor, x: Tensor, q: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x) + block
            return x + batch + q + torch.zeros(x.shape[0], 4, device=x.device)

    inputs = {name: torch.randn(2, 4) for name in ("block", "batch", "x", "q")}
    model = capture(Named(), inputs)
    export_source(model, tmp_path)
    assert torch.equal(load(tmp_path)(**inputs), model(**inputs))


def test_an_argument_that_hides_torch_is_refused(tmp_path: Path) -> None:
    class Hiding(nn.Linear):
        def forward(self, F: Tensor) -> Tensor:
            return super().forward(F)

    with pytest.raises(ExportError, match="argument named 'F'"):
        export_source(capture(Hiding(4, 4), torch.randn(2, 4)), tmp_path)


def test_a_layer_whose_constructor_needs_values_is_built_on_the_cpu(tmp_path: Path) -> None:
    model = with_layer(Ordered(4))
    model.get_buffer("1.scale").add_(1)
    export_source(model, tmp_path)
    x = torch.randn(3, 4)
    assert torch.equal(load(tmp_path)(x), model(x))
    save_state(model, tmp_path / "state")
    assert torch.equal(load_state(tmp_path / "state", Known(model=model))(x), model(x))


def test_quantisation_operators_are_registered_by_the_source(tmp_path: Path) -> None:
    model = capture(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4))
    last = next(n for n in model.graph.nodes if n.op == "call_module")
    quantise = Known().operator("quantized_decomposed.quantize_per_tensor.default")
    dequantise = Known().operator("quantized_decomposed.dequantize_per_tensor.default")
    with model.graph.inserting_after(last):
        q = model.graph.call_function(quantise, (last, 0.1, 3, -128, 127, torch.int8))
    with model.graph.inserting_after(q):
        d = model.graph.call_function(dequantise, (q, 0.1, 3, -128, 127, torch.int8))
    last.replace_all_uses_with(d, delete_user_cb=lambda user: user is not q)
    model.recompile()
    path, *_ = export_source(model, tmp_path)
    assert "import _decomposed" in path.read_text()
    assert torch.equal(load(tmp_path)(model.inputs.args[0]), model(model.inputs.args[0]))


def test_weights_in_channels_last_order_stay_so(tmp_path: Path) -> None:
    model = captured("residual").to(memory_format=torch.channels_last)
    export_source(model, tmp_path)
    loaded = load(tmp_path)
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in model.parameters()]


def test_a_result_that_deviates_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "surgery.export.source.source", lambda *_, **__: source(captured("shared")).replace("- x", "+ x")
    )
    with pytest.raises(ExportError, match="deviates"):
        export_source(captured("shared"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_name_and_header_cannot_break_the_source(tmp_path: Path) -> None:
    path, *_ = export_source(capture(Sequence(), torch.randn(1, 2, 5, 5)), tmp_path, header={"by": '"""\nimport os\\'})
    compile(path.read_text(), str(path), "exec")
    assert "\nimport os" not in path.read_text()


def test_missing_or_mismatched_weights_are_a_model_error(tmp_path: Path) -> None:
    export_source(captured("shared"), tmp_path / "a")
    export_source(captured("frozen"), tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").write_bytes((tmp_path / "b" / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="do not fit"):
        load(tmp_path / "a")
    (tmp_path / "b" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="missing"):
        load(tmp_path / "b")
