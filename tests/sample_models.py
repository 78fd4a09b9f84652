"""Small models that between them use every kind of structure a capture can hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResidualNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.Sequential(Residual(8, 8), Residual(8, 16, 2), nn.Dropout2d(0.2), Residual(16, 16))
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor) -> Tensor:
        return self.head(self.layers(self.stem(image)).mean((2, 3)))


def resnet18() -> nn.Module:
    """He et al. 2016 (arXiv:1512.03385), table 1: 11,689,512 parameters."""
    widths = [64, 64, 128, 256, 512]
    blocks = [nn.Sequential(Residual(a, b, 1 if a == b else 2), Residual(b, b)) for a, b in pairwise(widths)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


class Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Conv2d(3, 4, k, padding="same") for k in (1, 3, 5, 7)])
        self.merge = nn.Conv2d(16, 4, 1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(torch.cat([F.gelu(branch(x)) for branch in self.branches], 1))


class Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        x = self.conv(x).view(n, 4, c // 4, h, w).transpose(1, 2).reshape(n, c, h, w)
        first, second = x.chunk(2, 1)
        return torch.cat([second[:, :, 1:-1, ::2], first[..., 1:-1, ::2]], dim=1)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 7, 16))
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True, norm_first=True),
            2,
            enable_nested_tensor=False,
        )
        self.gamma = nn.Parameter(torch.full((16,), 0.1))

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.position
        return (self.blocks(tokens) * self.gamma)[:, 0]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(16, 5, batch_first=True)
        self.rnn = nn.RNN(5, 4, nonlinearity="relu", batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, (h, c) = self.lstm(x)
        x, state = self.gru(x)
        x, _ = self.rnn(x)
        return x, state, h + c


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.norm(self.embed(input_ids)))


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)

    def forward(self, a: Tensor, other: dict[str, Tensor], *, scale: Tensor) -> dict[str, Any]:
        total = self.left(a) + self.right(other["b"]) * scale
        return {"sum": total, "parts": (total[:, :2], [total.exp()]), "none": None}


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class NamedOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"a-b": nn.Linear(4, 4), "0": nn.Linear(4, 4)})
        self.items = nn.Linear(4, 4)  # a method of nn.ModuleDict has this name
        self.add_module("0", nn.Linear(4, 4))

    def forward(self, x: Tensor) -> OrderedDict[str, Any]:
        x = self.get_submodule("0")(self.items(self.inner["a-b"](self.inner["0"](x))))
        return OrderedDict(pair=Pair(x.clamp(max=0), x.clamp(min=0)), top=x.max(1)[0])


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.PReLU(4))
        self.again = self.encode[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.encode(self.encode(x))) - x


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]), persistent=False)
        self.register_buffer("steps", torch.arange(3))
        self.table = torch.tensor([0.5, 2.0, -1.0])
        self.up = nn.ConvTranspose2d(3, 2, 4, 2, 1, output_padding=1, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.mask * self.table + self.steps)[None, :, None, None]
        x = self.up(F.pad(x * scale, (1, 0, 0, 1), value=0.5)) + torch.tensor(0.25)
        x = x + torch.arange(x.shape[-1], dtype=x.dtype, device=x.device)
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).requires_grad_(False)
        self.head = nn.Linear(4, 2)
        self.head.bias.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)) * self.scale


class Sequence(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"), nn.GroupNorm(2, 4), nn.Hardswish())


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(3, affine=True)
        self.mix = nn.Bilinear(5, 5, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.mix(x, x.flip(1)).float()


def _ids() -> Tensor:
    return torch.randint(0, 11, (2, 5))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "residual": (ResidualNet, lambda: torch.randn(2, 3, 8, 8)),
    "concat": (Concat, lambda: torch.randn(2, 3, 6, 6)),
    "shuffle": (Shuffle, lambda: torch.randn(2, 8, 6, 6)),
    "transformer": (Transformer, lambda: torch.randn(2, 7, 16)),
    "recurrent": (Recurrent, lambda: torch.randn(2, 5, 6)),
    "tied_head": (TiedHead, _ids),
    "dict_output": (
        DictOutput,
        lambda: {"a": torch.randn(2, 4), "other": {"b": torch.randn(2, 3)}, "scale": torch.randn(2, 1)},
    ),
    "named_output": (NamedOutput, lambda: torch.randn(2, 4)),
    "shared": (Shared, lambda: torch.randn(3, 4)),
    "constants": (Constants, lambda: torch.randn(2, 3, 5, 5)),
    "frozen": (Frozen, lambda: torch.randn(2, 4)),
    "sequence": (Sequence, lambda: torch.randn(2, 2, 5, 5)),
    "double": (Double, lambda: torch.randn(2, 3, 5, dtype=torch.float64)),
}


def build(name: str) -> tuple[nn.Module, Any]:
    """The model, with BatchNorm statistics that are not those of a fresh one, and inputs; the same on every call."""
    torch.manual_seed(0)
    make, inputs = MODELS[name]
    model = make()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval(), inputs()
