"""Models of today's kinds, small: transformers, an LSTM, a U-Net, a residual net, a VAE.

Each is written as its users write it, with the layers that torch has for it and no thought for
K-FAC. All draw their initial weights from torch's random stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SelfAttention(nn.Module):
    """Every position attends to itself and to those before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(-1, (3, self.heads, -1))  # (N, T, 3, heads, d)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (N, heads, T, d)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended: Tensor = self.out(mixed.transpose(1, 2).flatten(2))  # (N, T, width)
        return attended


class Block(nn.Module):
    """Attention, then an MLP, each on its normalised input and added to it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x))
        mixed: Tensor = x + self.mlp(self.before_mlp(x))
        return mixed


class CharGPT(nn.Module):
    """From characters to the logits of the next one, classes before positions: (N, C, T).

    Initial weights are GPT-2's (Radford et al. 2019): normal with 0.02, and smaller by the root of
    the number of residual additions where a branch ends. torch's embeddings have deviation 1, so
    that what the branches add would be lost in them for long.
    """

    def __init__(self, characters: int, context: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * depth))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        h = self.tokens(x) + self.positions(places)  # (N, T, width)
        logits: Tensor = self.head(self.norm(self.blocks(h)))  # (N, T, C)
        return logits.mT


class CharLSTM(nn.Module):
    """From characters to the logits of the next one, classes before positions: (N, C, T)."""

    def __init__(self, characters: int, embedded: int, hidden: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(characters, embedded)
        self.lstm = nn.LSTM(embedded, hidden, depth, batch_first=True)
        self.head = nn.Linear(hidden, characters)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.lstm(self.tokens(x))  # (N, T, hidden)
        logits: Tensor = self.head(states)  # (N, T, C)
        return logits.mT


class DigitsViT(nn.Module):
    """8×8 images in 16 patches of 2×2 through torch's encoder layers; the class token is read."""

    def __init__(self, width: int, heads: int, depth: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 17, width))
        # One by one and not as nn.TransformerEncoder, which copies one layer's initial weights.
        self.blocks = nn.Sequential(*(self._block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    @staticmethod
    def _block(width: int, heads: int) -> nn.Module:
        return nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT  # (N, 16, width)
        first = self.class_token.expand(len(x), -1, -1)
        h = torch.cat([first, tokens], 1) + self.positions  # (N, 17, width)
        logits: Tensor = self.head(self.norm(self.blocks(h))[:, 0])
        return logits


def _convolution(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()
    )


class DigitsUNet(nn.Module):
    """8×8 images down to 4×4 and 2×2 and up again, with what was seen on the way down beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fine = _convolution(1, width)
        self.middle = _convolution(width, 2 * width)
        self.coarse = _convolution(2 * width, 4 * width)
        self.to_middle = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.middle_again = _convolution(4 * width, 2 * width)
        self.to_fine = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.fine_again = _convolution(2 * width, width)
        self.image = nn.Conv2d(width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)  # (N, width, 8, 8)
        middle = self.middle(F.max_pool2d(fine, 2))  # (N, 2 width, 4, 4)
        coarse = self.coarse(F.max_pool2d(middle, 2))  # (N, 4 width, 2, 2)
        h = self.middle_again(torch.cat([self.to_middle(coarse), middle], 1))
        h = self.fine_again(torch.cat([self.to_fine(h), fine], 1))
        cleaned: Tensor = self.image(h)
        return cleaned


class _Residual(nn.Module):
    """Two convolutions, added to their input; a 1×1 convolution takes that to another shape."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.skip = nn.Sequential()
        if channels != out:
            self.skip.append(nn.Conv2d(channels, out, 1, stride, bias=False))
            self.skip.append(nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.branch(x) + self.skip(x))


class DigitsResNet(nn.Module):
    """He et al.'s ResNet-20 (2016) on 8×8 images: three stages, 8×8, 4×4 and 2×2."""

    def __init__(self, width: int, blocks: int, classes: int) -> None:
        super().__init__()
        stages: list[nn.Module] = [_convolution(1, width)]
        for channels, out in ((width, width), (width, 2 * width), (2 * width, 4 * width)):
            stages.append(_Residual(channels, out, stride=1 if channels == out else 2))
            stages += [_Residual(out, out, stride=1) for _ in range(blocks - 1)]
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.stages(x).mean((2, 3)))
        return logits


class DigitsVAE(nn.Module):
    """A variational autoencoder (Kingma & Welling 2014): pixels' logits, and the code's law."""

    def __init__(self, hidden: int, code: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, 2 * code))
        self.decoder = nn.Sequential(nn.Linear(code, hidden), nn.Tanh(), nn.Linear(hidden, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        law = self.encoder(x)  # (N, 2 code): means, then log variances
        mean, log_variance = law.chunk(2, 1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decoder(code), law


class Divergence(nn.Module):
    """Kullback-Leibler divergence of the code's law from the standard normal, a mean."""

    def forward(self, law: Tensor) -> Tensor:
        mean, log_variance = law.chunk(2, 1)
        each = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return each.sum(1).mean()


class ELBO(nn.Module):
    """Minus the evidence lower bound of an image: Bernoulli pixels, summed, and the divergence."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.pixel = nn.BCEWithLogitsLoss()
        self.divergence = Divergence()

    def forward(self, output: tuple[Tensor, Tensor], target: Tensor) -> Tensor:
        logits, law = output
        bound: Tensor = self.pixels * self.pixel(logits, target) + self.divergence(law)
        return bound
