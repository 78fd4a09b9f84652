"""Attention whose queries share keys and values, and attention with masks: heads or features go, or the reason says."""

from __future__ import annotations

import pytest
import torch
from random_networks import Do
from removal import assert_removed_is_masked, found, reasons, sizes
from surgery_plugins.prune_filters import PruneFilters
from torch import nn
from torch.nn import functional as F

import surgery
from surgery import Context


def repeated(how, x, times):
    """(n, g, l, d) with every head `times` times, one after the other."""
    if how == "repeat_interleave":
        return x.repeat_interleave(times, 1)
    n, groups, length, size = x.shape
    return x[:, :, None].expand(n, groups, times, length, size).reshape(n, groups * times, length, size)


def grouped(how, groups, heads=8, size=4):
    def run(m, x):
        q, k, v = (f(x).unflatten(-1, (-1, size)).transpose(1, 2) for f in (m.q, m.k, m.v))
        if how == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        elif how == "broadcast":
            y = (q @ k.mT * 0.3).softmax(-1) @ v
        else:
            k, v = (repeated(how, t, heads // groups) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v)
        return m.head(m.o(y.transpose(1, 2).flatten(2)).mean(1))

    width = heads * size
    parts = {"q": nn.Linear(16, width), "k": nn.Linear(16, groups * size), "v": nn.Linear(16, groups * size)}
    return Do(run, **parts, o=nn.Linear(width, 16), head=nn.Linear(16, 3)), torch.randn(2, 6, 16)


SPELLINGS = ["enable_gqa", "repeat_interleave", "expand"]


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("groups", [2, 4, 8])
def test_a_head_of_keys_and_values_goes_with_the_queries_that_it_serves(how, groups):
    channels = found(*grouped(how, groups), heads=True)
    (group,) = [g for g in channels.groups if g.name == "q"]
    assert group.size == groups
    rows = {m.layer: len(m.positions) // groups for m in group.of("output")}
    assert rows == {"q": 8 // groups * 4, "k": 4, "v": 4}
    assert_removed_is_masked(channels)


@pytest.mark.parametrize("how", [*SPELLINGS, "broadcast"])
def test_of_one_head_of_keys_and_values_only_queries_go_or_nothing_and_the_reason_says_so(how):
    channels = found(*grouped(how, 1), heads=True)
    of = sizes(channels)
    assert of.get("q") == (None if how == "repeat_interleave" else 8)
    assert {"k", "v"}.isdisjoint(of)
    assert how == "broadcast" or "grouped queries" in " ".join(reasons(channels).values())
    assert_removed_is_masked(channels)


@pytest.mark.parametrize("how", SPELLINGS)
@pytest.mark.parametrize("groups", [1, 2])
def test_without_heads_every_query_head_and_its_keys_lose_the_same_features(how, groups):
    channels = found(*grouped(how, groups))
    assert sizes(channels)["q"] == 4
    assert_removed_is_masked(channels)


def turned(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


@pytest.mark.parametrize("heads", [False, True])
def test_norms_and_rotations_between_keys_and_queries_are_passed(heads):
    def run(m, x):
        n, length, _ = x.shape
        q, k, v = (f(x).view(n, length, -1, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
        q, k = (turned(norm(t), m.cos, m.sin) for norm, t in ((m.qn, q), (m.kn, k)))
        k, v = (repeated("expand", t, 4) for t in (k, v))
        y = (q @ k.mT * 0.5 + torch.full((length, length), -9.0).triu(1)).softmax(-1) @ v
        return m.o(y.transpose(1, 2).reshape(n, length, -1))

    parts = {name: nn.Linear(16, width) for name, width in (("q", 32), ("k", 8), ("v", 8))}
    parts |= {name: nn.Parameter(torch.randn(6, 4)) for name in ("cos", "sin")}
    net = Do(run, **parts, qn=nn.RMSNorm(4), kn=nn.RMSNorm(4), o=nn.Linear(32, 3))
    channels = found(net, torch.randn(2, 6, 16), heads=heads)
    assert sizes(channels) == ({"q": 2} if heads else {"q": 2, "v": 4})
    assert_removed_is_masked(channels)


def masked(kind):
    def run(m, x):
        n, length, _ = x.shape
        q, k, v = (f(x).view(n, length, 4, 4).transpose(1, 2) for f in (m.q, m.k, m.v))
        padding = (x[..., 0] < 0.5)[:, None, None]
        mask = padding if "boolean" in kind else torch.zeros_like(padding, dtype=x.dtype).masked_fill(~padding, -9.0)
        if "every" in kind:
            mask = mask.expand(n, 4, length, length)
        written = "written" in kind
        y = (q @ k.mT + mask).softmax(-1) @ v if written else F.scaled_dot_product_attention(q, k, v, mask)
        return m.o(y.transpose(1, 2).reshape(n, length, 16))

    return Do(run, **{name: nn.Linear(8, 16) for name in "qkv"}, o=nn.Linear(16, 3)), torch.rand(2, 5, 8)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(
    "kind", ["boolean", "additive", "boolean, every head", "additive, every head", "written, every head"]
)
def test_attention_with_a_mask_loses_heads_and_features(kind, heads):
    channels = found(*masked(kind), heads=heads)
    assert sizes(channels)["q"] == 4
    assert_removed_is_masked(channels)


class Padded(nn.Module):
    """PyTorch's own attention with padding. The first feature tells which tokens count."""

    def __init__(self, weights, encoder):
        super().__init__()
        self.first, self.weights = nn.Linear(8, 16), weights
        make = nn.TransformerEncoderLayer if encoder else nn.MultiheadAttention
        self.attend = make(16, 4, **({"dim_feedforward": 24} if encoder else {}), batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        padding, y = x[..., 0] < 0.2, self.first(x)
        if isinstance(self.attend, nn.TransformerEncoderLayer):
            return self.head(self.attend(y, src_key_padding_mask=padding))
        return self.head(self.attend(y, y, y, key_padding_mask=padding, need_weights=self.weights)[0])


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize(("weights", "encoder"), [(False, False), (True, False), (False, True)])
def test_the_attention_of_pytorch_with_padded_keys_loses_heads_and_features(weights, encoder, heads):
    x = torch.rand(3, 5, 8)
    x[:, 0, 0] = 1
    channels = found(Padded(weights, encoder).eval(), x, heads=heads)
    assert 4 in [group.size for group in channels.groups if "in_proj" in group.name or "attend" in group.name]
    assert_removed_is_masked(channels)


def test_queries_keys_and_values_that_one_weight_holds_are_told_of_by_its_name():
    def run(m, x):
        memory = m.memory(x)
        return m.head(m.attend(m.first(x), memory, memory)[0])

    parts = {name: nn.Linear(8, 16) for name in ("first", "memory")}
    net = Do(run, **parts, attend=nn.MultiheadAttention(16, 4, batch_first=True), head=nn.Linear(16, 3)).eval()
    captured = surgery.capture(net, torch.rand(2, 5, 8))
    pruned, report = PruneFilters(ratio=0.5)(captured, Context(captured))
    told = {edit.layer: edit.numbers["channels_after"] for edit in report.edits}
    assert told == {"first": 8, "memory": 8, "attend.in_proj_weight": 24, "attend.out_proj": 8}
    assert pruned.get_parameter("attend.in_proj_weight").shape == (24, 8)
