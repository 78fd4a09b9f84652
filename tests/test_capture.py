"""A captured model is the model: same outputs, gradients, names and statistics, bit for bit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from equality import assert_captured, assert_same, assert_trains_alike, call
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm, weight_norm

from surgery.captured import capture
from surgery.graph import shape
from surgery.names import tensors
from surgery.testing import NETWORKS, randomise


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS.keys())
def test_every_wiring_is_captured_bit_for_bit(network):
    captured = assert_captured(network.model(), network.inputs(2), network.inputs(5, seed=1))
    assert captured.dynamic_batch
    assert captured.notes == ()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_any_example_batch_leaves_the_batch_free(batch):
    network = NETWORKS["channel_shuffle"]
    model = network.model()
    captured = capture(model, network.inputs(batch))
    assert captured.dynamic_batch
    for other in (1, 2, 7):
        assert_same(call(captured, network.inputs(other)), call(model, network.inputs(other)))


def test_shapes_on_the_nodes_are_those_of_the_example():
    captured = NETWORKS["plain_cnn"].captured()
    assert {shape(n)[0] for n in captured.graph.nodes if n.op == "call_module"} == {2}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_callers_gradient_mode_does_not_matter(mode):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                x = self.first(x)
            return self.second(x)

    model, x = Frozen(), torch.randn(3, 4)
    with mode():
        captured = capture(model, x)
    assert_trains_alike(captured, model, x)


# Layers


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
        (nn.LSTM, {"proj_size": 2, "batch_first": True}),
        (nn.GRU, {"num_layers": 2, "batch_first": True}),
        (nn.GRU, {"bidirectional": True, "bias": False}),
        (nn.RNN, {"bidirectional": True, "batch_first": True}),
        (nn.RNN, {"num_layers": 2, "nonlinearity": "relu"}),
    ],
)
def test_recurrent_layers(cls, options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = cls(3, 4, **options)

        def forward(self, x):
            return self.layer(x if "batch_first" in options else x.transpose(0, 1))

    captured = assert_captured(Model(), torch.randn(2, 3, 3), torch.randn(4, 3, 3))
    assert type(captured.layer) is cls


def test_a_recurrent_layer_with_a_given_state():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LSTM(3, 4, batch_first=True)

        def forward(self, x, h, c):
            output, (h, c) = self.layer(x, (h.transpose(0, 1), c.transpose(0, 1)))
            return output, h

    assert_captured(Model(), *((torch.randn(b, 2, 3), torch.randn(b, 1, 4), torch.randn(b, 1, 4)) for b in (2, 3)))


def test_recurrent_dropout_is_trained_alike():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(3, 4, num_layers=2, dropout=0.5, batch_first=True)

        def forward(self, x):
            return self.layer(x)[0]

    assert assert_captured(Model(), torch.randn(2, 3, 3)).layer.dropout == 0.5


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_padding_modes(rank):
    conv = getattr(nn, f"Conv{rank}d")
    modes = ("zeros", "reflect", "replicate", "circular")
    model = nn.Sequential(*(conv(2, 2, 3, padding=1, padding_mode=mode) for mode in modes))
    captured = assert_captured(model, torch.randn(2, 2, *[4] * rank), torch.randn(3, 2, *[4] * rank))
    assert [(type(m), m.padding_mode) for m in captured.children()] == [(conv, "zeros")] * 4


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolution_options(rank):
    conv, transposed = getattr(nn, f"Conv{rank}d"), getattr(nn, f"ConvTranspose{rank}d")
    model = nn.Sequential(
        conv(2, 4, 3, padding="same", dilation=2, bias=False),
        conv(4, 4, 3, padding="valid"),
        transposed(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        transposed(6, 2, 2, dilation=2, bias=False),
    )
    captured = assert_captured(model, torch.randn(2, 2, *[5] * rank), torch.randn(3, 2, *[5] * rank))
    assert [type(m) for m in captured.children()] == [conv, conv, transposed, transposed]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, affine=False, eps=1e-3)],
        [nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4, affine=False, track_running_stats=False)],
        [nn.InstanceNorm2d(4), nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm2d(4, True, track_running_stats=True)],
        [nn.GroupNorm(2, 4), nn.GroupNorm(2, 4, affine=False), nn.LocalResponseNorm(2)],
        [nn.LayerNorm((4, 3, 3)), nn.LayerNorm(3, bias=False), nn.LayerNorm(3, elementwise_affine=False)],
        [nn.RMSNorm(3), nn.RMSNorm(3, eps=1e-3, elementwise_affine=False), nn.PReLU(4), nn.PReLU(), nn.Softmax(1)],
    ],
    ids=lambda layers: type(layers[0]).__name__,
)
def test_normalisation_and_activation_layers(layers):
    model = randomise(nn.Sequential(nn.Conv2d(2, 4, 1), *layers))
    captured = assert_captured(model, torch.randn(2, 2, 3, 3), torch.randn(3, 2, 3, 3))
    for name, module in model.named_children():
        if next(module.parameters(), None) is not None:
            assert repr(captured.get_submodule(name)) == repr(module)


@pytest.mark.parametrize(
    "dropout",
    [
        nn.Dropout(0.3),
        nn.Dropout(0.3, inplace=True),
        nn.Dropout1d(0.3),
        nn.Dropout2d(0.3),
        nn.Dropout3d(0.3),
        nn.AlphaDropout(0.3),
        nn.FeatureAlphaDropout(0.3),
    ],
    ids=str,
)
def test_dropout_is_raised_and_drops_in_training(dropout):
    shapes = {nn.Dropout1d: (4, 6), nn.Dropout3d: (4, 2, 3, 3)}
    model = nn.Sequential(nn.Linear(3, 3), dropout, nn.Linear(3, 3))
    x = torch.randn(2, *shapes.get(type(dropout), (4, 6, 3))[:-1], 3)
    captured = assert_captured(model, x)
    assert type(captured.get_submodule("1")) is type(dropout)
    assert not torch.equal(captured.train()(x), captured.eval()(x))


def test_functional_dropout_is_raised_beside_the_layers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            x = F.dropout(self.linear(x), 0.4, self.training)
            return F.dropout(x, 0.2, self.training)

    captured = assert_captured(Model(), torch.randn(2, 4))
    assert sorted(m.p for m in captured.modules() if isinstance(m, nn.Dropout)) == [0.2, 0.4]


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"batch_first": False},
        {"batch_first": True, "bias": False},
        {"batch_first": True, "kdim": 6, "vdim": 5},
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
    ],
    ids=str,
)
def test_multihead_attention(options):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, **options)

        def forward(self, q, k, v):
            if not options["batch_first"]:
                q, k, v = (t.transpose(0, 1) for t in (q, k, v))
            fused, _ = self.attention(q, k, v, need_weights=False)
            return fused, *self.attention(q, k, v)

    def draw(batch):
        kdim, vdim = options.get("kdim", 8), options.get("vdim", 8)
        return torch.randn(batch, 4, 8), torch.randn(batch, 5, kdim), torch.randn(batch, 5, vdim)

    assert_captured(randomise(Model()), draw(2), draw(3))


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    assert_captured(model, torch.randn(2, 5, 8), torch.randn(3, 5, 8))


def test_embeddings():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(9, 4, padding_idx=-1)
            self.bags = nn.EmbeddingBag(9, 4, mode="mean")

        def forward(self, ids):
            return self.words(ids).mean(1) * self.bags(ids)

    ids = [torch.randint(0, 9, (b, 5)) for b in (2, 3)]
    captured = assert_captured(Model(), *ids)
    assert captured.words.padding_idx == 8
    assert_captured(Model(), ids[0].int(), ids[1].int())


def test_bilinear():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = nn.Bilinear(3, 4, 2)

        def forward(self, a, b):
            return self.pair(a, b)

    assert type(assert_captured(Model(), (torch.randn(2, 3), torch.randn(2, 4))).pair) is nn.Bilinear


def test_a_layer_with_a_forward_of_its_own_keeps_its_weights_as_operands():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return F.conv2d(x, weight, self.bias)

    class LowRank(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)
            self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x):
            return super().forward(x) + x @ self.down.T @ self.up.T

    model = nn.Sequential(Standardised(2, 4, 1), nn.Flatten(2), nn.Linear(9, 4), LowRank())
    assert_captured(model, torch.randn(2, 2, 3, 3), torch.randn(3, 2, 3, 3))


@pytest.mark.parametrize("layer", [nn.Linear(3, 2), nn.Conv1d(3, 2, 1), nn.LayerNorm(3)], ids=str)
def test_a_lone_layer(layer):
    assert_captured(layer, torch.randn(2, 3, 3), torch.randn(5, 3, 3))


def test_a_batchnorm_that_is_no_layer_is_noted():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))
            self.register_buffer("variance", torch.ones(3))

        def forward(self, x):
            return F.batch_norm(x, self.mean, self.variance, training=self.training)

    captured = assert_captured(nn.Sequential(Own()), torch.randn(2, 3), trains=False)
    assert captured.notes == ("0: normalises with its running statistics in training mode too",)


# Sharing


def test_tied_weights_stay_one_parameter():
    captured = NETWORKS["tied_weights"].captured()
    assert captured.decode.weight is captured.embed.weight
    assert len(list(captured.parameters())) == len(list(NETWORKS["tied_weights"].model().parameters()))


def test_a_module_called_twice_is_one_module():
    captured = NETWORKS["shared_module"].captured()
    assert [n.target for n in captured.graph.nodes].count("shared") == 2


def test_a_module_of_two_names_keeps_both():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = self.two = nn.Linear(3, 3)

        def forward(self, x):
            return self.two(self.one(x))

    captured = assert_captured(Model(), torch.randn(2, 3))
    assert captured.one.weight is captured.two.weight


# Inputs and outputs


class Pair(NamedTuple):
    total: torch.Tensor
    rest: dict[str, torch.Tensor]


class Nested(nn.Module):
    """Everything a signature may hold."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, first, pair, *, options, scale=2.0, mask=None):
        x = self.linear(first) * scale + pair[0] - pair[1]["deep"][0]
        x = x + options["shift"]
        x = x if mask is None else x.masked_fill(mask, 0)
        return Pair(x, {"constant": 3, "nothing": None, "parts": [x.sum(1), (x.mean(1),)]})


def nested(batch, **more):
    x = torch.randn(batch, 3)
    return {"first": x, "pair": (x * 2, {"deep": [x + 1]}), "options": {"shift": x.sin()}, **more}


def test_nested_arguments_and_results():
    assert_captured(Nested(), nested(2), nested(4))


def test_numbers_and_masks_as_arguments():
    captured = assert_captured(*(Nested(), *(nested(b, scale=3.0, mask=torch.rand(b, 3) > 0.5) for b in (2, 4))))
    assert captured.dynamic_batch


def test_positional_named_and_mapped_arguments_are_the_same_call():
    class Model(nn.Module):
        def forward(self, a, b):
            return a - b

    a, b = torch.randn(2, 3), torch.randn(2, 3)
    forms = [(a, b), [a, b], {"a": a, "b": b}, {"b": b, "a": a}]
    assert all(torch.equal(capture(Model(), form)(a, b), a - b) for form in forms)
    assert torch.equal(capture(Model(), (a, b))(a, b=b), a - b)


def test_a_tensor_made_in_the_forward():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            x = x * torch.tensor([1.0, 2.0, 3.0]) + torch.arange(3) + torch.zeros(x.shape[0], 1)
            return self.linear(x) + torch.ones_like(x)

    assert_captured(Model(), torch.randn(2, 3), torch.randn(4, 3))


def test_parts_of_a_batch_stay_dynamic():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 3)

        def forward(self, x):
            b, c = x.shape[:2]
            x = x.reshape(b * c, 4).softmax(1).view(b, -1)
            return self.linear(x) / b + x.new_zeros(b, 3)

    assert_captured(Model(), torch.randn(2, 3, 4), torch.randn(5, 3, 4))


def test_a_fixed_batch_is_captured_and_said():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return self.linear(x).view(4, 3) + torch.ones(4, 1)

    captured = assert_captured(Fixed(), torch.randn(4, 3))
    assert not captured.dynamic_batch
    assert captured.notes[0].startswith("batch size fixed at 4: ")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.tensor(x.tolist()).sum(),
        lambda x: x + torch.zeros(len(x), 1),
        lambda x: x / len(x),
        lambda x: x.view(2, 3, 1) if x.shape[0] == 2 else x.sum(),
    ],
    ids=["list", "len", "divided", "other_path"],
)
def test_what_holds_for_one_batch_size_alone_fixes_the_batch(function, batch):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    captured = assert_captured(Model(), torch.randn(batch, 3), trains=False)
    assert not captured.dynamic_batch
    assert captured.notes[0].startswith(f"batch size fixed at {batch}: ")


def test_an_input_without_batch():
    class Model(nn.Module):
        def forward(self, x, table):
            return x @ table

    assert_captured(Model(), (torch.randn(2, 3), torch.randn(3, 5)), trains=False)


# Weights that are computed


@pytest.mark.parametrize(
    "normalise",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        parametrizations.orthogonal,
        weight_norm,
        spectral_norm,
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm", "old_spectral_norm"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_parametrisations_are_baked_exactly(normalise):
    model, x = nn.Sequential(normalise(nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2)).eval(), torch.randn(2, 3)
    before = {name: t.clone() for name, t in tensors(model).items()}
    captured = capture(model, x)
    assert_same(call(captured, x), call(model, x))
    assert captured.state_dict().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert type(captured.get_submodule("0")) is nn.Linear
    assert len(captured.notes) == 1
    assert captured.notes[0].startswith("0.weight: ")
    assert all(torch.equal(t, before[name]) for name, t in tensors(model).items())


def test_a_parametrisation_of_ones_own_is_baked():
    class Symmetric(nn.Module):
        def forward(self, w):
            return w.triu() + w.triu(1).T

    linear = nn.Linear(3, 3)
    parametrize.register_parametrization(linear, "weight", Symmetric())
    captured = capture(nn.Sequential(linear), torch.randn(2, 3))
    weight = captured.get_submodule("0").weight
    assert isinstance(weight, nn.Parameter)
    assert torch.equal(weight, weight.T)


# Types of numbers


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("plain_cnn", torch.float64),
        ("plain_cnn", torch.bfloat16),
        ("fused_qkv", torch.float16),
        ("lstm", torch.bfloat16),
    ],
)
def test_other_precisions(name, dtype):
    network = NETWORKS[name]
    model = network.model().to(dtype)
    captured = assert_captured(model, network.inputs(2).to(dtype), network.inputs(3, seed=1).to(dtype))
    assert {p.dtype for p in captured.parameters()} == {dtype}


class Strides(nn.Module):
    """Numbers out of buffers, also by arithmetic."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.register_buffer("stride", torch.tensor([8.0, 16.0]))

    def forward(self, x):
        return self.conv(x) * self.stride[1].item() + torch.full((8, 1, 1), self.stride[0] * 2)


def test_numbers_that_are_taken_out_of_buffers_are_constants_of_the_graph():
    model, x = Strides(), torch.randn(5, 3, 4, 4)
    captured = capture(model, x[:2])
    assert_same(call(captured, x), call(model, x))
    assert captured.notes == ("stride: no operator of eval mode reads it, left out",)
    targets = [str(node.target) for node in captured.graph.nodes if node.op != "placeholder"]
    assert targets == ["conv", "aten.mul.Tensor", "aten.full.default", "aten.add.Tensor", "output"]


class PerSample(nn.Module):
    """A filter per sample: as many groups as the batch has samples."""

    def __init__(self):
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(6, 4, 3, 3)), nn.Linear(4, 4)

    def forward(self, x):
        n = x.shape[0]
        weight = self.weight * self.style(x.mean((2, 3)))[:, None, :, None, None]
        y = F.conv2d(x.reshape(1, n * 4, 5, 5), weight.reshape(n * 6, 4, 3, 3), padding=1, groups=n)
        return y.reshape(n, 6, 5, 5)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_layer_with_the_batch_size_among_its_options_fixes_it(batch):
    x = torch.randn(batch, 4, 5, 5)
    captured = assert_captured(PerSample(), x)
    assert captured.notes[0] == f"batch size fixed at {batch}: the groups of aten.conv2d.default depend on it"
