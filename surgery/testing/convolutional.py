"""Convolutional networks, one for each way in which channels depend on each other. Images are 3×8×8."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import Network


def images(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=generator)


def conv(inputs: int, outputs: int, size: int = 3, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU; the spatial size stays, up to a stride."""
    convolution = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5))


def plain() -> nn.Module:
    second = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
    return nn.Sequential(conv(3, 8), nn.MaxPool2d(2), second, nn.Dropout(0.1), nn.Flatten(), nn.Linear(12 * 16, 5))


class Residual(nn.Module):
    """A block with identity and a block with a projected, strided shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.first = nn.Sequential(conv(8, 8), nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.second = nn.Sequential(conv(8, 12, stride=2), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.shortcut = nn.Sequential(nn.Conv2d(8, 12, 1, stride=2, bias=False), nn.BatchNorm2d(12))
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.first(x))
        y: Tensor = self.head(F.relu(self.shortcut(x) + self.second(x)))
        return y


class Concatenation(nn.Module):
    """Dense connections: BatchNorm over concatenated channels, so it cannot be folded backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=1))
        self.second = nn.Sequential(nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 4, 3, padding=1))
        self.norm = nn.BatchNorm2d(14)
        self.head = head(14)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        features.append(self.first(features[0]))
        features.append(self.second(torch.cat(features, 1)))
        y: Tensor = self.head(F.relu(self.norm(torch.cat(features, 1))))
        return y


class ChannelShuffle(nn.Module):
    """Half of the channels pass by; the others are interleaved with them afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.branch = nn.Sequential(conv(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4))
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.stem(x).chunk(2, dim=1)
        x = torch.cat((kept, self.branch(changed)), dim=1)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        y: Tensor = self.head(x)
        return y


def grouped() -> nn.Module:
    """Grouped and depthwise convolutions in an inverted bottleneck."""
    bottleneck = nn.Sequential(conv(8, 16, 1), conv(16, 16, groups=16), nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8))
    return nn.Sequential(conv(3, 8), conv(8, 8, groups=2), bottleneck, nn.Hardswish(), head(8))


class SqueezeExcite(nn.Module):
    """Channels gated by what a small bottleneck makes of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(F.silu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        y: Tensor = self.head(x * gate)
        return y


class ZeroPaddedShortcut(nn.Module):
    """The shortcut of the CIFAR ResNets: every second pixel, and zeros for the channels that are new."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.branch = nn.Sequential(conv(8, 12, stride=2), nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.head = head(12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        y: Tensor = self.head(F.relu(shortcut + self.branch(x)))
        return y


class SharedModule(nn.Module):
    """One convolution and its BatchNorm, each called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            x = F.relu(self.norm(self.shared(x)))
        y: Tensor = self.head(x)
        return y


class FunctionalConvolution(nn.Module):
    """Convolutions on bare parameters, as in hypernetworks and re-parametrised layers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 3, 3, 3) / 5)
        self.pointwise = nn.Parameter(torch.randn(8, 8, 1, 1) / 3)
        self.shift = nn.Parameter(torch.zeros(8))
        self.norm = nn.BatchNorm2d(8)
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.conv2d(x, self.weight, padding=1))
        y: Tensor = self.head(F.relu(F.conv2d(F.relu(x), self.pointwise, self.shift)))
        return y


class InPlace(nn.Module):
    """In-place activations, an in-place sum, and a write through a view."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardtanh(-1, 1, inplace=True))
        self.head = head(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        total = x.clone()
        total += self.branch(x)
        total[:, 2:4].mul_(0.5)
        y: Tensor = self.head(total.relu_())
        return y


class Views(nn.Module):
    """Reshapes whose sizes are written as numbers, and a constant grid concatenated as one more channel."""

    grid: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.register_buffer("grid", torch.linspace(-1, 1, 64).view(1, 1, 8, 8), persistent=False)
        self.mix = nn.Linear(64, 16)
        self.after = nn.Conv2d(9, 6, 1)
        self.classify = nn.Linear(6 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat((self.stem(x), self.grid.expand(x.shape[0], 1, 8, 8)), 1)
        x = self.mix(x.view(-1, 9, 64)).view(-1, 9, 4, 4)
        y: Tensor = self.classify(F.relu(self.after(x)).permute(0, 2, 3, 1).reshape(-1, 96))
        return y


class Pixels(nn.Module):
    """Pixels become channels and channels pixels; the channels are shuffled between, slopes are learnt per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(), nn.PixelUnshuffle(2))
        self.mix = nn.Sequential(nn.Conv2d(16, 16, 1), nn.PReLU(16), nn.ChannelShuffle(4))
        self.spread = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.PixelShuffle(2))
        self.after = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(self.spread(self.mix(self.stem(x))))
        return y


def normalised() -> nn.Module:
    """GroupNorm over groups and over single channels, InstanceNorm with and without weights."""
    first = [nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU()]
    second = [nn.Conv2d(8, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True), nn.SiLU()]
    third = [nn.Conv2d(6, 8, 1), nn.GroupNorm(8, 8), nn.Conv2d(8, 6, 1), nn.InstanceNorm2d(6), nn.ReLU()]
    return nn.Sequential(*first, *second, *third, nn.Flatten(), nn.Linear(6 * 64, 5))


class Slices(nn.Module):
    """Unequal pieces of one convolution gate each other and are taken up at different depths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 12)
        self.middle = nn.Conv2d(5, 3, 1)
        self.head = head(7)

    def forward(self, x: Tensor) -> Tensor:
        early, gate, value = self.stem(x).split([4, 3, 5], dim=1)
        y: Tensor = self.head(torch.cat((self.middle(value) * gate.sigmoid(), early), 1))
        return y


def transposed() -> nn.Module:
    """Down and up again, one transposed convolution grouped."""
    up = nn.Sequential(nn.ConvTranspose2d(12, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    grouped_up = nn.ConvTranspose2d(8, 8, 3, padding=1, groups=2)
    return nn.Sequential(conv(3, 12, stride=2), up, grouped_up, nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1))


def one_dimensional() -> nn.Module:
    first = [nn.Conv1d(3, 8, 5, padding=2, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2)]
    second = [nn.Conv1d(8, 12, 3, dilation=2), nn.BatchNorm1d(12), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(12, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5))


def three_dimensional() -> nn.Module:
    first = [nn.Conv3d(2, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU(), nn.AvgPool3d(2)]
    second = [nn.Conv3d(6, 8, (1, 3, 3)), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten()]
    return nn.Sequential(*first, *second, nn.Linear(8, 5))


CONVOLUTIONAL = (
    Network("plain_cnn", plain, images),
    Network("residual", Residual, images),
    Network("concatenation", Concatenation, images),
    Network("channel_shuffle", ChannelShuffle, images),
    Network("grouped_depthwise", grouped, images),
    Network("squeeze_excite", SqueezeExcite, images),
    Network("zero_padded_shortcut", ZeroPaddedShortcut, images),
    Network("shared_module", SharedModule, images),
    Network("functional_conv", FunctionalConvolution, images),
    Network("in_place", InPlace, images),
    Network("constant_views", Views, images),
    Network("pixels", Pixels, images),
    Network("normalised", normalised, images),
    Network("slices", Slices, images),
    Network("transposed_conv", transposed, images),
    Network("conv_1d", one_dimensional, lambda batch, generator: torch.randn(batch, 3, 16, generator=generator)),
    Network("conv_3d", three_dimensional, lambda batch, generator: torch.randn(batch, 2, 4, 6, 6, generator=generator)),
)
