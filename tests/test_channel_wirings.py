"""How channels travel through operators: what goes together, what stays and why, and removed = masked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from random_networks import Do
from removal import assert_removed_is_masked, found, halves, outputs, reasons, removed, sizes
from torch import nn

from surgery import Inputs, export_onnx, find_channels
from surgery.parity import parity
from surgery.testing import NETWORKS

SIDE = 4


def net(function, example=None, heads=False, **parts):
    """Channels of a model that computes `function(parts, x)`, by default on images 2×3×4×4."""
    example = torch.randn(2, 3, SIDE, SIDE) if example is None else example
    return found(Do(function, **parts), example, heads=heads)


def between(function, outputs=8, inputs=None, **parts):
    """`a`, a convolution to `outputs` channels, `function(parts, x)`, and `b`, a convolution of `inputs` channels."""
    made = {"a": nn.Conv2d(3, outputs, 1), "b": nn.Conv2d(inputs or outputs, 2, 1), **parts}
    return net(lambda m, x: m.b(function(m, m.a(x))), **made)


MOVES = {
    "unequal split": (lambda m, x: torch.cat(x.split([2, 4, 2], 1)[::-1], 1), 8, 8, {"a": 8}),
    "chunk": (lambda m, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1], 8, 4, {"a": 4}),
    "slice": (lambda m, x: x[:, 1:6], 8, 5, {"a": 8}),
    "narrow": (lambda m, x: x.narrow(1, 2, 5), 8, 5, {"a": 8}),
    "narrow from the end": (lambda m, x: x.narrow(1, -5, 4), 8, 4, {"a": 8}),
    "unsafe chunk": (lambda m, x: torch.unsafe_chunk(x, 2, 1)[1], 8, 4, {"a": 8}),
    "slices that overlap": (lambda m, x: x[:, :6] + x[:, 2:], 8, 6, {"a": 2}),
    "strided slice": (lambda m, x: x[:, ::2], 8, 4, {"a": 4}),
    "strided slice with an offset": (lambda m, x: x[:, 1::4], 8, 2, {"a": 2}),
    "flip": (lambda m, x: x.flip(1), 8, 8, {"a": 8}),
    "sum with its own flip": (lambda m, x: x + x.flip(1), 8, 8, {"a": 4}),
    "repeat": (lambda m, x: x.repeat(1, 2, 1, 1), 6, 12, {"a": 6}),
    "repeat_interleave": (lambda m, x: x.repeat_interleave(2, 1), 6, 12, {"a": 6}),
    "tokens and back": (
        lambda m, x: x.flatten(2).transpose(1, 2).unflatten(1, (4, 4)).permute(0, 3, 1, 2),
        8,
        8,
        {"a": 8},
    ),
    "groups swapped": (lambda m, x: x.view(-1, 2, 4, 4, 4).transpose(1, 2).reshape(-1, 8, 4, 4), 8, 8, {"a": 8}),
    "nn.ChannelShuffle": (lambda m, x: nn.ChannelShuffle(4)(x), 12, 12, {"a": 12}),
    "pixel shuffle": (lambda m, x: F.pixel_shuffle(x, 2), 12, 3, {"a": 3}),
    "pixel unshuffle": (lambda m, x: F.pixel_unshuffle(x, 2), 6, 24, {"a": 6}),
    "windows and roll": (
        lambda m, x: x.roll((1, 1), (2, 3)).view(-1, 8, 2, 2, 2, 2).transpose(3, 4).reshape(-1, 8, 4, 2, 2).mean(2),
        8,
        8,
        {"a": 8},
    ),
    "zeros around": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2)), 8, 11, {"a": 8}),
    "sevens around": (lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2), value=7.0), 8, 11, {"a": 8}),
    "a written part": (lambda m, x: x.slice_scatter(x[:, 2:4] * 2, 1, 2, 4), 8, 8, {"a": 8}),
    "stack and sum": (lambda m, x: torch.stack([x, x.relu()], 1).sum(1), 8, 8, {"a": 8}),
    "radix groups": (lambda m, x: (x.view(-1, 2, 4, 4, 4).softmax(1) * x.view(-1, 2, 4, 4, 4)).sum(1), 8, 4, {"a": 4}),
    "sum over channels of a ReLU": (lambda m, x: x * x.relu().sum(1, keepdim=True), 8, 8, {"a": 8}),
    "pooling and resizing": (
        lambda m, x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2, mode="bilinear"),
        8,
        8,
        {"a": 8},
    ),
}


@pytest.mark.parametrize("name", MOVES)
def test_channels_are_followed_through(name):
    function, given, taken, expected = MOVES[name]
    channels = between(function, given, taken)
    assert sizes(channels) == expected
    assert reasons(channels) == {"b": "an output of the model"}
    assert_removed_is_masked(channels)


PARTS = {
    "batch norm": (8, {"p": nn.BatchNorm2d(8)}),
    "batch norm without weights": (8, {"p": nn.BatchNorm2d(8, affine=False)}),
    "group norm": (4, {"p": nn.GroupNorm(2, 8)}),
    "group norm without weights": (4, {"p": nn.GroupNorm(2, 8, affine=False)}),
    "group norm of one group": (8, {"p": nn.GroupNorm(1, 8)}),
    "group norm of single channels": (8, {"p": nn.GroupNorm(8, 8)}),
    "instance norm": (8, {"p": nn.InstanceNorm2d(8)}),
    "instance norm with weights and statistics": (
        8,
        {"p": nn.InstanceNorm2d(8, affine=True, track_running_stats=True)},
    ),
    "one slope": (8, {"p": nn.PReLU()}),
    "many slopes": (8, {"p": nn.PReLU(8)}),
    "depthwise": (8, {"p": nn.Conv2d(8, 8, 3, padding=1, groups=8)}),
    "dropout": (8, {"p": nn.Dropout2d()}),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_layer_that_keeps_channels_apart_belongs_to_its_input_s_group(name):
    size, parts = PARTS[name]
    channels = between(lambda m, x: m.p(x), **parts)
    assert sizes(channels) == {"a": size}
    assert_removed_is_masked(channels)


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), nn.LayerNorm(8, elementwise_affine=False)], ids=str)
def test_norms_over_channels_take_their_statistics_over_those_that_are_left(norm):
    channels = between(lambda m, x: m.p(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), p=norm)
    assert sizes(channels) == {"a": 8}
    assert_removed_is_masked(channels)


def test_an_rms_norm_written_by_hand_is_recognised():
    def norm(m, x):
        return m.w * x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)

    channels = between(norm, w=nn.Parameter(torch.randn(8, 1, 1)))
    assert sizes(channels) == {"a": 8}
    assert_removed_is_masked(channels)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1, 1), (1, 8, 4, 4), (8, 4, 4), (1, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("operator", [torch.mul, torch.add], ids=["layer scale", "position embedding"])
def test_a_parameter_used_as_a_tensor_shrinks_with_the_channels_it_meets(operator, shape):
    channels = between(lambda m, x: operator(x, m.w), w=nn.Parameter(torch.randn(shape)))
    assert sizes(channels) == {"a": 8}
    small = assert_removed_is_masked(channels)
    assert small.w.shape == tuple(small.a.out_channels if size == 8 else size for size in shape)


@pytest.mark.parametrize(
    ("groups", "outputs", "expected"),
    [
        (2, 8, {"a": 4, "p": 4}),
        (2, 12, {"a": 4, "p": 6}),
        (4, 8, {"a": 4}),
        (8, 8, {"a": 8}),
        (8, 16, {"a": 8}),
        (1, 6, {"a": 8, "p": 6}),
    ],
)
@pytest.mark.parametrize("cls", [nn.Conv2d, nn.ConvTranspose2d])
def test_grouped_convolutions_lose_whole_groups_or_the_same_places_of_each_whichever_are_more(
    cls, groups, outputs, expected
):
    layer = cls(8, outputs, 3, padding=1, groups=groups)
    channels = between(lambda m, x: m.p(x), 8, outputs, p=layer)
    assert sizes(channels) == expected
    small = assert_removed_is_masked(channels)
    assert small.p.groups == (groups // 2 if groups > 2 else groups)


@pytest.mark.parametrize(
    ("conv", "example"), [(nn.Conv1d, (2, 3, 6)), (nn.Conv3d, (2, 3, 4, 4, 4)), (nn.ConvTranspose1d, (2, 3, 6))]
)
def test_convolutions_of_other_ranks_are_followed(conv, example):
    layers = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 6, 1), nn.Tanh(), conv(6, 2, 1))
    channels = found(layers, torch.randn(example))
    assert sizes(channels) == {"0": 8, "2": 6}
    assert_removed_is_masked(channels)


def test_a_single_sample_without_a_batch_dimension_is_convolved_too():
    channels = net(lambda m, x: m.b(m.a(x[0]).relu()), a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    assert sizes(channels) == {"a": 8}
    assert_removed_is_masked(channels)


def test_a_flattened_channel_takes_all_its_pixels_with_it():
    channels = net(lambda m, x: m.b(m.a(x).flatten(1)), a=nn.Conv2d(3, 8, 1), b=nn.Linear(8 * SIDE**2, 3))
    (member,) = channels.groups[0].of("input")
    assert (member.layer, len(member.positions)) == ("b", 128)
    small = assert_removed_is_masked(channels)
    assert small.b.in_features == small.a.out_channels * SIDE**2


def test_a_residual_branch_and_its_stem_form_one_group():
    channels = between(lambda m, x: x + m.d(m.c(x).relu()), c=nn.Conv2d(8, 6, 1), d=nn.Conv2d(6, 8, 1))
    assert outputs(channels) == [{"a", "d"}, {"c"}]
    assert_removed_is_masked(channels)


def test_concatenated_branches_stay_groups_of_their_own():
    channels = net(
        lambda m, x: m.b(torch.cat([m.a(x), m.c(x), x], 1)),
        a=nn.Conv2d(3, 4, 1),
        c=nn.Conv2d(3, 6, 1),
        b=nn.Conv2d(13, 2, 1),
    )
    assert sizes(channels) == {"a": 4, "c": 6}
    assert_removed_is_masked(channels)


def test_a_zero_padded_shortcut_leaves_the_new_channels_free():
    found_ = find_channels(NETWORKS["zero_padded_shortcut"].captured())
    assert [group.size for group in found_.groups] == [8, 4, 12]
    only_new = [torch.zeros(8, dtype=torch.bool), torch.ones(4, dtype=torch.bool), torch.zeros(12, dtype=torch.bool)]
    small = removed(found_, only_new)
    pad = next(node for node in small.graph.nodes if "pad" in str(node.target))
    assert pad.args[1] == [0, 0, 0, 0, 0, 0]


FIXED = "add: meets a tensor whose size is fixed"
FROZEN = {
    "mean over channels": (lambda m, x: x * x.mean(1, keepdim=True), "mean: aten::mean over it"),
    "maximum over channels": (lambda m, x: x * x.amax(1, keepdim=True), "amax: aten::amax over it"),
    "softmax over channels": (lambda m, x: x.softmax(1), "softmax: aten::softmax along it"),
    "sum over channels of a sigmoid": (lambda m, x: x * x.sigmoid().sum(1, keepdim=True), "sum_1: aten::sum over it"),
    "channels rolled": (lambda m, x: x.roll(1, 1), "roll: aten::roll along it"),
    "cumulative sum": (lambda m, x: x.cumsum(1), "cumsum: aten.cumsum.default needs all positions along it"),
    "a sort": (lambda m, x: x.sort(1).values, "sort: aten.sort.default needs all positions along it"),
    "channels by index": (lambda m, x: x[:, torch.arange(7, -1, -1)], "index: positions are picked by an index"),
    "a channel selected": (lambda m, x: x * x[:, 2, None], "select: single positions are taken"),
    "an input of the model": (lambda m, x: x + m.image.repeat(1, 8, 1, 1)[: x.shape[0]], FIXED),
    "some channels by step": (
        lambda m, x: torch.cat([x[:, 0:7:3], x[:, :5]], 1),
        "slice_2: every n-th position is taken",
    ),
    "windows of channels": (lambda m, x: x.unfold(1, 1, 1).squeeze(-1), "unfold: cut into windows"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_needs_all_its_channels_keeps_them_and_says_why(name):
    function, why = FROZEN[name]
    image = nn.Parameter(torch.randn(2, 1, SIDE, SIDE), requires_grad=False)
    channels = between(function, image=image)
    assert sizes(channels) == {}
    assert reasons(channels)["a"] == why
    assert next(f.channels for f in channels.frozen if f.layer == "a") == 8


def test_a_single_channel_that_is_picked_out_stays_and_the_others_go():
    channels = between(lambda m, x: x * x[:, 2:3])
    assert sizes(channels) == {"a": 7}
    assert channels.frozen[0].channels == 1
    assert channels.frozen[0].why == "slice_2: a single position is picked out"
    assert_removed_is_masked(channels)


def test_every_output_of_the_model_stays():
    channels = net(lambda m, x: {"y": m.b(m.a(x)), "z": [m.a(x)]}, a=nn.Conv2d(3, 8, 1), b=nn.Conv2d(8, 2, 1))
    assert channels.groups == ()
    assert reasons(channels) == {"a": "an output of the model", "b": "an output of the model"}


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_keep_their_channels(cls):
    channels = net(
        lambda m, x: m.b(m.r(m.a(x))[0]), torch.randn(2, 5, 3), a=nn.Linear(3, 8), r=cls(8, 6), b=nn.Linear(6, 2)
    )
    assert channels.groups == ()
    assert reasons(channels)["a"] == f"r: {cls.__name__} takes it"


def test_in_place_writes_are_followed():
    def run(m, x):
        y = x.clone()
        y[:, 2:5] = x[:, 2:5].relu()
        y += x
        return y.relu_()

    channels = between(run)
    assert sizes(channels) == {"a": 8}
    assert_removed_is_masked(channels)


def test_functional_convolutions_shrink_their_parameters():
    channels = net(
        lambda m, x: m.b(F.conv2d(F.conv2d(x, m.w), m.d, m.e, padding=1, groups=8)),
        w=nn.Parameter(torch.randn(8, 3, 1, 1)),
        d=nn.Parameter(torch.randn(8, 1, 3, 3)),
        e=nn.Parameter(torch.randn(8)),
        b=nn.Conv2d(8, 2, 1),
    )
    assert [group.size for group in channels.groups] == [8]
    small = assert_removed_is_masked(channels)
    assert small.w.shape[0] == small.d.shape[0] == small.e.shape[0] == small.b.in_channels < 8


def test_tied_weights_shrink_once_and_stay_tied():
    channels = find_channels(NETWORKS["tied_weights"].captured())
    small = assert_removed_is_masked(channels)
    assert small.embed.weight is small.decode.weight
    assert small.decode.in_features == small.embed.embedding_dim < 16


def test_a_module_called_twice_shrinks_once():
    channels = between(lambda m, x: m.c(m.c(x).relu()), c=nn.Conv2d(8, 8, 1))
    assert outputs(channels) == [{"a", "c"}]
    small = assert_removed_is_masked(channels)
    assert small.c.in_channels == small.c.out_channels < 8


def test_the_words_of_an_embedding_stay_and_its_features_go():
    ids = torch.randint(0, 11, (2, 6))
    channels = net(lambda m, x: m.b(m.a(x)), ids, a=nn.Embedding(11, 8), b=nn.Linear(8, 2))
    assert sizes(channels) == {"a": 8}
    small = assert_removed_is_masked(channels)
    assert small.a.num_embeddings == 11


def attention(m, x, heads=4):
    q, k, v = m.qkv(x).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
    return m.project(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def attending(function=attention, heads=False, width=32):
    parts = {"a": nn.Linear(3, 6), "qkv": nn.Linear(6, 3 * width), "project": nn.Linear(width, 2)}
    return net(lambda m, x: function(m, m.a(x)), torch.randn(2, 5, 3), heads, **parts)


def test_attention_loses_the_same_features_of_every_head_and_keeps_its_scale():
    channels = attending()
    assert sizes(channels) == {"a": 6, "qkv": 8}
    assert_removed_is_masked(channels)
    half = [torch.zeros(6, dtype=torch.bool), torch.arange(8) < 4]
    small = removed(channels, half)
    node = next(n for n in small.graph.nodes if "scaled_dot" in str(n.target))
    assert node.kwargs["scale"] == pytest.approx(8**-0.5)
    assert node.args[0].meta["tensor_meta"].shape == (2, 4, 5, 4)


def test_attention_loses_whole_heads_where_they_are_asked_for():
    channels = attending(heads=True)
    assert sizes(channels) == {"a": 6, "qkv": 4}
    assert_removed_is_masked(channels)
    small = removed(channels, [torch.zeros(6, dtype=torch.bool), torch.arange(4) < 1])
    node = next(n for n in small.graph.nodes if "scaled_dot" in str(n.target))
    assert node.args[0].meta["tensor_meta"].shape == (2, 3, 5, 8)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("spelling", ["matmul", "einsum", "bmm"])
def test_attention_written_out_is_followed(spelling, heads):
    def run(m, x):
        q, k, v = m.qkv(x).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 1, 4)
        if spelling == "bmm":
            q, k, v = (t.flatten(0, 1) for t in (q, k, v))
            y = torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.3).softmax(-1), v).unflatten(0, (-1, 4))
        elif spelling == "einsum":
            y = torch.einsum("bhnm,bhmd->bhnd", torch.einsum("bhnd,bhmd->bhnm", q, k).softmax(-1), v)
        else:
            y = (q @ k.mT * 0.3).softmax(-1) @ v
        return m.project(y.transpose(1, 2).flatten(2))

    channels = attending(run, heads)
    seen = heads and spelling != "einsum"  # heads are looked for before the last two dimensions of a product
    assert sizes(channels) == {"a": 6, "qkv": 4 if seen else 8}
    assert_removed_is_masked(channels)


def test_channel_attention_keeps_what_its_softmax_is_over():
    def run(m, x):
        q, k, v = m.qkv(x).view(*x.shape[:2], 3, 4, -1).permute(2, 0, 3, 4, 1)
        return m.project(((q @ k.mT).softmax(-1) @ v).permute(0, 3, 1, 2).flatten(2))

    channels = attending(run)
    assert sizes(channels) == {"a": 6}
    assert reasons(channels)["qkv"] == "softmax: aten::softmax along it"
    channels = attending(run, heads=True)
    assert sizes(channels) == {"a": 6, "qkv": 4}
    assert_removed_is_masked(channels)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", ["attention", "fused_qkv", "windows"])
def test_attention_networks_lose_heads_or_features(name, heads):
    assert_removed_is_masked(find_channels(NETWORKS[name].captured(), heads=heads))


@pytest.mark.parametrize(
    "name", ["residual", "channel_shuffle", "grouped_depthwise", "pixels", "normalised", "windows", "transposed_conv"]
)
def test_the_removed_model_runs_in_onnx_runtime(name, tmp_path):
    channels = find_channels(NETWORKS[name].captured())
    small = removed(channels, halves(channels))
    path = export_onnx(small, small.inputs, tmp_path / "model.onnx")
    batches = [small.inputs, Inputs.of(small, NETWORKS[name].inputs(batch=3, seed=3))]
    assert parity(small, path, batches).passed
