"""Networks over tokens and time steps, and those whose inputs or outputs are more than one tensor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .convolutional import conv, head, images
from .network import Network

VOCABULARY, TOKENS, WIDTH, HEADS = 11, 6, 16, 4


def tokens(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, TOKENS), generator=generator)


def series(batch: int, generator: torch.Generator) -> Tensor:
    return torch.randn(batch, TOKENS, 5, generator=generator)


class Attention(nn.Module):
    """A transformer block of `nn.MultiheadAttention` over embedded tokens with a position parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.first_norm, self.second_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 24), nn.GELU(), nn.Linear(24, WIDTH))
        self.classify = nn.Linear(WIDTH, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions
        y = self.first_norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.second_norm(x))
        logits: Tensor = self.classify(x.mean(1))
        return logits


class FusedQKV(nn.Module):
    """Attention as vision transformers write it: patches, class token, one matrix for q, k and v, LayerScale."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.classify = nn.Linear(WIDTH, 5)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1)
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c)
        x = x + self.scale * self.project(y)
        logits: Tensor = self.classify(x[:, 0])
        return logits


class Windows(nn.Module):
    """A Swin block: windows of shifted pixels, a learnt bias by relative place, softmax written out, RMSNorm."""

    places: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 2, stride=2)
        self.norm = nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.bias = nn.Parameter(torch.randn(9, HEADS))
        self.project = nn.Linear(WIDTH, WIDTH)
        self.classify = nn.Linear(WIDTH, 5)
        row, column = torch.arange(4) // 2, torch.arange(4) % 2
        self.register_buffer("places", (row[:, None] - row + 1) * 3 + column[:, None] - column + 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).permute(0, 2, 3, 1)
        b, h, w, c = x.shape
        y = self.norm(x).roll((-1, -1), (1, 2)).view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q, k, v = self.qkv(y).view(-1, 4, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) * (c // HEADS) ** -0.5 + self.bias[self.places].permute(2, 0, 1)
        y = self.project((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c))
        y = y.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c).roll((1, 1), (1, 2))
        logits: Tensor = self.classify((x + y).mean((1, 2)))
        return logits


class Contractions(nn.Module):
    """Queries and keys of other widths than the values, in einsum; two pooled vectors meet in a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(5, 12), nn.Linear(5, 12)
        self.value = nn.Linear(5, 8)
        self.meet = nn.Bilinear(8, 8, 6)
        self.classify = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (layer(x).unflatten(-1, (3, 4)) for layer in (self.query, self.key))
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mean(1).softmax(-1)
        y = torch.einsum("bnm,bmc->bnc", weights, self.value(x)).relu()
        logits: Tensor = self.classify(self.meet(y[:, 0].contiguous(), y.mean(1)))
        return logits


class Recurrent(nn.Module):
    """The last state of a recurrent layer, projected before and classified after it."""

    def __init__(self, cls: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.project = nn.Linear(5, 8)
        self.recurrent = cls(8, 6, batch_first=True)
        self.classify = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        outputs, _ = self.recurrent(F.relu(self.project(x)))
        logits: Tensor = self.classify(outputs[:, -1])
        return logits


class TwoInputs(nn.Module):
    """An image and, by keyword, a vector that gates its channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.gate = nn.Linear(4, 8)
        self.head = head(8)

    def forward(self, image: Tensor, *, condition: Tensor) -> Tensor:
        gate = self.gate(condition).sigmoid()[:, :, None, None]
        logits: Tensor = self.head(self.stem(image) * gate)
        return logits


class DictOutput(nn.Module):
    """Two heads: `logits` and a `(features, norm)` pair below `auxiliary`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 8)
        self.head = head(8)
        self.auxiliary = nn.Conv2d(8, 3, 1)

    def forward(self, image: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        x = self.stem(image)
        features = self.auxiliary(x)
        return {"logits": self.head(x), "auxiliary": (features, features.square().mean((1, 2, 3)))}


class TiedWeights(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.LayerNorm(WIDTH))
        self.decode = nn.Linear(WIDTH, VOCABULARY)
        self.decode.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.decode(self.mix(self.embed(ids)))
        return logits


def gated(batch: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"image": images(batch, generator), "condition": torch.randn(batch, 4, generator=generator)}


SEQUENTIAL = (
    Network("attention", Attention, tokens),
    Network("fused_qkv", FusedQKV, images),
    Network("windows", Windows, images),
    Network("contractions", Contractions, series),
    Network("lstm", lambda: Recurrent(nn.LSTM), series),
    Network("gru", lambda: Recurrent(nn.GRU), series),
    Network("two_inputs", TwoInputs, gated),
    Network("dict_output", DictOutput, images),
    Network("tied_weights", TiedWeights, tokens),
)
