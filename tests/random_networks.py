"""Random small networks: a list of steps, each on values that earlier steps made. Any numbers make a valid network.

RandomNetwork([Step("conv", 0, 0, 3), Step("cat", 1, 0, 0)])     images 3×4×4 → 5 classes

Every value is (batch, channels, 4, 4), in double precision, so that rounding cannot be mistaken for a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 4


class Step(NamedTuple):
    kind: str
    source: int
    """Which of the values so far it is applied to, counted from the newest."""
    other: int
    """The same for a second operand."""
    option: int
    """Chooses sizes, modulo how many choices there are."""


class Do(nn.Module):
    """`function(parts, *values)`, where `parts` are modules and parameters by name."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *values: Tensor) -> Tensor:
        return self.function(self, *values)


Made = tuple[nn.Module, int]
"""A step's module and the number of channels that it gives."""


def pick(choices, option):
    return choices[option % len(choices)]


def divisor(n, option, most=None):
    return pick([d for d in range(1, n + 1) if n % d == 0 and d <= (most or n)], option)


def conv(c, n) -> Made:
    out = pick((6, 4, 8, 3, 12), n)
    return nn.Conv2d(c, out, *pick(((1,), (3, 1, 1)), n), bias=n % 3 > 0), out


def grouped(c, n) -> Made:
    groups = divisor(c, n)
    out = groups * pick((1, 2, 3), n)
    return nn.Conv2d(c, out, 3, padding=1, groups=groups, bias=n % 3 > 0), out


def depthwise(c, n) -> Made:
    out = c * pick((1, 2), n)
    return nn.Conv2d(c, out, 3, padding=1, groups=c), out


def transposed(c, n) -> Made:
    groups = divisor(c, n)
    out = groups * pick((2, 1, 3), n)
    return nn.ConvTranspose2d(c, out, 3, padding=1, groups=groups), out


def batch_norm(c, n) -> Made:
    return nn.BatchNorm2d(c, affine=n % 4 > 0), c


def group_norm(c, n) -> Made:
    return nn.GroupNorm(divisor(c, n), c, affine=n % 4 > 0), c


def instance_norm(c, n) -> Made:
    return nn.InstanceNorm2d(c, affine=n % 2 > 0), c


def layer_norm(c, n) -> Made:
    norm = pick((nn.LayerNorm, nn.RMSNorm), n)(c, elementwise_affine=n % 3 > 0)
    return Do(lambda m, x: m.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), norm=norm), c


def function(c, n) -> Made:
    names = ("relu", "sigmoid", "gelu", "silu", "hardswish", "exp", "cos", "square", "abs", "tanh", "neg")
    name = pick(names, n)
    return Do(lambda m, x: getattr(torch, name)(x) if hasattr(torch, name) else getattr(F, name)(x)), c


def prelu(c, n) -> Made:
    return nn.PReLU(pick((c, 1), n)), c


def merged(c, d, n) -> Made:
    """A sum or another elementwise product of two values; the second is projected where the channels differ."""
    project = nn.Conv2d(d, c, 1) if c != d else nn.Identity()
    name = pick(("add", "mul", "sub", "maximum"), n)
    return Do(lambda m, x, y: getattr(torch, name)(x, m.project(y)), project=project), c


def cat(c, d, n) -> Made:
    return Do(lambda m, x, y: torch.cat(pick(([x, y], [y, x]), n), 1)), c + d


def piece(c, n) -> Made:
    at = 1 + n % max(1, c - 1)
    taken = pick((slice(None, at), slice(at - 1, None), slice(-at, None)), n)
    return Do(lambda m, x: x[:, taken]), len(range(c)[taken])


def swapped(c, n) -> Made:
    at = n % c
    return Do(lambda m, x: torch.cat(x.split([at, c - at], 1)[::-1], 1)), c


def chunked(c, n) -> Made:
    """Pieces of equal channels gated by each other."""
    parts = divisor(c, n, c)
    return Do(lambda m, x: math.prod(x.chunk(parts, 1))), c // parts


def strided(c, n) -> Made:
    step = divisor(c, n, 4)
    return Do(lambda m, x: x[:, n % step :: step]), c // step


def shuffle(c, n) -> Made:
    g = divisor(c, n)
    if n % 3 == 0:
        return nn.ChannelShuffle(g), c
    return Do(lambda m, x: x.view(-1, g, c // g, SIDE, SIDE).transpose(1, 2).reshape(-1, c, SIDE, SIDE)), c


def gate(c, n) -> Made:
    squeeze = pick((2, 4), n)
    both = nn.Sequential(nn.Conv2d(c, squeeze, 1), nn.ReLU(), nn.Conv2d(squeeze, c, 1), nn.Sigmoid())
    return Do(lambda m, x: x * m.both(x.mean((2, 3), keepdim=True)), both=both), c


def parameter(c, n) -> Made:
    """LayerScale, or a position embedding."""
    shape = pick(((1, c, 1, 1), (c, SIDE, SIDE), (c, 1, 1), (1, 1, SIDE, SIDE)), n)
    name = pick(("mul", "add"), n)
    return Do(lambda m, x: getattr(torch, name)(x, m.weight), weight=nn.Parameter(torch.randn(shape))), c


def padded(c, n) -> Made:
    left, right = pick(((1, 1), (0, 2), (2, 1)), n)
    value = pick((0.0, 0.0, 0.7), n)
    return Do(lambda m, x: F.pad(x, (0, 0, 0, 0, left, right), value=value)), left + c + right


def rolled(c, n) -> Made:
    if n % 4 == 0:
        return Do(lambda m, x: x.roll(1, 1)), c
    return Do(lambda m, x: x.roll((n, 1), (2, 3)).flip(n % 3 + 1)), c


def repeated(c, n) -> Made:
    return Do(lambda m, x: x.repeat_interleave(2, 1) if n % 2 else x.repeat(1, 2, 1, 1)), 2 * c


def pixels(c, n) -> Made:
    """Channels to pixels and back in another order, or the reverse."""
    if c % 4 == 0 and n % 2:
        return Do(lambda m, x: F.avg_pool2d(F.pixel_shuffle(x, 2), 2)), c // 4
    return Do(lambda m, x: F.pixel_unshuffle(x, 2).repeat(1, 1, 2, 2)), 4 * c


def halved(c, n) -> Made:
    """Gated linear units, along the channels or along the pixels."""
    if c % 2 == 0 and n % 2:
        return Do(lambda m, x: F.glu(x, 1)), c // 2
    return Do(lambda m, x: F.glu(torch.cat([x, x.flip(2)], 3), 3)), c


def placed(c, n) -> Made:
    """Maxima put back to where they were, or their places beside them."""

    def run(m, x):
        small, where = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(small, where, 2) if n % 2 else F.pad(torch.cat([small, where.to(x)], 1), (1, 1, 1, 1))

    return Do(run), c if n % 2 else 2 * c


def unfolded(c, n) -> Made:
    """Windows as channels, and back."""
    if c % 4 == 0 and n % 2:
        return Do(lambda m, x: F.fold(F.adaptive_avg_pool2d(x, 2).flatten(2), (4, 4), 2, stride=2)), c // 4
    return Do(lambda m, x: F.unfold(x, 2, stride=2).unflatten(2, (2, 2)).repeat(1, 1, 2, 2)), 4 * c


def summed(c, n) -> Made:
    """A map of all channels, that weights each of them."""
    over = pick((torch.sum, torch.mean, torch.amax), n)
    return Do(lambda m, x: x + over(x, 1, keepdim=True)), c


def softmaxed(c, n) -> Made:
    return Do(lambda m, x: x * x.softmax(pick((1, 3), n))), c


def radix(c, n) -> Made:
    """Groups of channels, weighted against each other and summed, as in ResNeSt."""
    g = divisor(c, n)

    def run(m, x):
        parts = x.view(-1, g, c // g, SIDE, SIDE)
        return ((parts * parts.softmax(1)) if n % 2 else parts).sum(1 + n % 3 // 2)

    return Do(run), (c // g, c // g, g)[n % 3]


def mixed(c, n) -> Made:
    """All pixels of all channels through one matrix."""
    out = pick((4, 6), n)
    mix = nn.Linear(c * SIDE * SIDE, out * SIDE * SIDE)
    return Do(lambda m, x: m.mix(x.flatten(1)).view(-1, out, SIDE, SIDE), mix=mix), out


def tokens(c, n) -> Made:
    """A matrix along the channels or along the pixels."""
    mix = nn.Linear(c, 6) if n % 2 else nn.Linear(SIDE * SIDE, SIDE * SIDE)

    def run(m, x):
        x = x.flatten(2).transpose(1, 2) if n % 2 else x.flatten(2)
        return (m.mix(x).transpose(1, 2) if n % 2 else m.mix(x)).unflatten(2, (SIDE, SIDE))

    return Do(run, mix=mix), 6 if n % 2 else c


def attention(c, n) -> Made:
    """Pixels attend to pixels, or, as in XCiT, channels to channels."""
    heads, inner = pick((1, 2, 4), n), 8

    def run(m, x):
        q, k, v = m.qkv(x).view(-1, 3, heads, inner // heads, SIDE * SIDE).transpose(3, 4).unbind(1)
        if n % 5 == 4:
            y = torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k).softmax(-1), v)
        elif n % 5 == 3:
            y = (v @ (q.transpose(2, 3) @ k).softmax(-1)) if n % 2 else v @ (q.transpose(2, 3) @ k)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return m.project(y.transpose(2, 3).reshape(-1, inner, SIDE, SIDE))

    return Do(run, qkv=nn.Conv2d(c, 3 * inner, 1), project=nn.Conv2d(inner, c, 1)), c


def written(c, n) -> Made:
    """Part of the channels is overwritten in place."""
    part = slice(n % c, n % c + 1 + n % 3)

    def run(m, x):
        y = x.clone()
        if n % 2:
            y[:, part] = x.flip(2)[:, part]
        else:
            y[:, part].mul_(0.5)
        return y

    return Do(run), c


def windowed(c, n) -> Made:
    """Windows of 2×2 pixels, attended or normalised in them, as in Swin."""
    norm = nn.LayerNorm(c)

    def run(m, x):
        x = x.permute(0, 2, 3, 1).roll((1, 1), (1, 2)).view(-1, 2, 2, 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        x = m.norm(x).view(-1, 2, 2, 2, 2, c).transpose(2, 3).reshape(-1, SIDE, SIDE, c)
        return x.roll((-1, -1), (1, 2)).permute(0, 3, 1, 2)

    return Do(run, norm=norm), c


def twice(c, n) -> Made:
    return Do(lambda m, x: m.conv(F.relu(m.conv(x))), conv=nn.Conv2d(c, c, 3, padding=1, groups=divisor(c, n))), c


UNARY = {
    f.__name__: f
    for f in (
        *(conv, grouped, depthwise, transposed, batch_norm, group_norm, instance_norm, layer_norm, function, prelu),
        *(piece, swapped, chunked, strided, shuffle, gate, parameter, padded, rolled, repeated, pixels, summed),
        *(halved, placed, unfolded),
        *(softmaxed, radix, mixed, tokens, attention, written, windowed, twice),
    )
}
BINARY = {"merged": merged, "cat": cat}
KINDS = (*UNARY, *BINARY)


class RandomNetwork(nn.Module):
    """A stem, the steps, and a head on the newest value; values of more than 24 channels are cut by a convolution."""

    def __init__(self, steps: list[Step], seed: int = 0) -> None:
        super().__init__()
        self.steps = steps
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(3, 8, 1)
            self.blocks, widths = nn.ModuleList(), [8]
            for step in steps:
                block, width = self._made(step, widths)
                self.blocks.append(block)
                widths.append(width)
            self.head = nn.Linear(widths[-1] * SIDE**2, 5) if len(steps) % 2 else nn.Conv2d(widths[-1], 2, 1)
        self.double()

    @staticmethod
    def _made(step: Step, widths: list[int]) -> Made:
        c, d = (widths[-1 - number % len(widths)] for number in (step.source, step.other))
        block, width = UNARY[step.kind](c, step.option) if step.kind in UNARY else BINARY[step.kind](c, d, step.option)
        return (block, width) if width <= 24 else (nn.Identity(), c)

    def forward(self, image: Tensor) -> Tensor:
        values = [self.stem(image)]
        for step, block in zip(self.steps, self.blocks, strict=True):
            x, y = (values[-1 - number % len(values)] for number in (step.source, step.other))
            values.append(block(x, y) if step.kind in BINARY and not isinstance(block, nn.Identity) else block(x))
        last = values[-1]
        return self.head(last.flatten(1)) if isinstance(self.head, nn.Linear) else self.head(last)

    def __repr__(self) -> str:
        return f"RandomNetwork({[tuple(step) for step in self.steps]})"


def image(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, SIDE, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
