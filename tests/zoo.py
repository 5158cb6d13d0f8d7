"""Models as people write them, each small, with its criterion, a batch and the loss of its loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import kronewton as kn

VOCABULARY, CLASSES, WIDTH, LENGTH, COUNT = 11, 4, 8, 6, 12
Loss = Callable[[Any, Any, Any], Tensor]


def usual(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    """The loss of most loops."""
    x, y = batch
    return criterion(model(x), y)


@dataclass(frozen=True)
class Entry:
    """One model with what its training loop needs."""

    name: str
    make: Callable[[], tuple[nn.Module, Any]]  # the model, and a criterion, several, or None
    batch: Callable[[], Any]
    loss: Loss | tuple[Loss, ...] = usual  # one for each part
    parts: tuple[str, ...] = ("",)  # submodules with an optimizer of their own; "": the model
    warns: tuple[str, ...] = ()  # patterns of the warnings that are in order
    rises: bool = False  # a game's losses may rise
    fails: str = ""  # what is wrong today
    refused: str = ""  # what it is refused with, if it is
    needs: tuple[str, str] | None = None  # a package, and what to install
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trained:
    """What a run of the loop left."""

    model: nn.Module
    optimizers: list[kn.KFAC]
    losses: list[list[float]]  # of each step, one number for each part
    before: dict[str, Tensor]
    moving: set[str]  # names of the parameters that a gradient other than zero arrived at
    modules: nn.ModuleList  # the model and its criteria
    hooks: list[Any]  # theirs, before there was an optimizer


def hooks_of(modules: nn.Module) -> list[Any]:
    """All hooks on all modules and parameters."""
    stores = [v for m in modules.modules() for k, v in vars(m).items() if k.endswith("_hooks")]
    stores += [p._backward_hooks for p in modules.parameters()]
    return [hook for store in stores if store for hook in store.values()]


def train(
    entry: Entry, steps: int = 6, device: torch.device | None = None, **options: Any
) -> Trained:
    """The loop: full batch, defaults except for the entry's options and those given here.

    device: where all is made that no device is said for, now and in reruns.
    The last losses are those after the last step.
    """
    place = torch.get_default_device() if device is None else device
    torch.manual_seed(0)
    with place:
        model, criterion = entry.make()
        torch.manual_seed(1)
        batch = entry.batch()
    losses_of = entry.loss if isinstance(entry.loss, tuple) else (entry.loss,)
    chosen = {**entry.options, **options}
    criteria = criterion if isinstance(criterion, tuple) else (criterion,)
    modules = nn.ModuleList([model, *(c for c in criteria if c is not None)])
    hooks = hooks_of(modules)
    optimizers = [kn.KFAC(model.get_submodule(p), criterion, **chosen) for p in entry.parts]
    before: dict[str, Tensor] = {}
    moving: set[str] = set()
    losses: list[list[float]] = []
    for _ in range(steps):
        losses.append([])
        for optimizer, loss_of in zip(optimizers, losses_of, strict=True):
            optimizer.zero_grad()
            with place:
                loss = loss_of(model, criterion, batch)
            loss.backward()
            before = before or {n: p.detach().clone() for n, p in model.named_parameters()}
            moving |= {
                n for n, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())
            }
            with place:
                optimizer.step()
            losses[-1].append(float(loss.detach()))
    with place:
        losses.append([float(loss_of(model, criterion, batch).detach()) for loss_of in losses_of])
    return Trained(model, optimizers, losses, before, moving, modules, hooks)


# Batches.


def images(size: int = 8, channels: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(COUNT, channels, size, size), torch.randint(CLASSES, (COUNT,))


def vectors(width: int = WIDTH) -> tuple[Tensor, Tensor]:
    return torch.randn(COUNT, width), torch.randint(CLASSES, (COUNT,))


def regression() -> tuple[Tensor, Tensor]:
    x = torch.linspace(-1, 1, 20).unsqueeze(1)
    return x, torch.sin(3 * x)


def text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (COUNT, LENGTH + 1))
    return tokens[:, :-1], tokens[:, 1:]


def labelled_text() -> tuple[Tensor, Tensor]:
    return torch.randint(VOCABULARY, (COUNT, LENGTH)), torch.randint(CLASSES, (COUNT,))


def sequences() -> tuple[Tensor, Tensor]:
    return torch.randn(COUNT, LENGTH, WIDTH), torch.randint(CLASSES, (COUNT,))


def per_token(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    x, y = batch
    logits = model(x)
    return criterion(logits.view(-1, logits.size(-1)), y.reshape(-1))


def classified(model: type[nn.Module] | Callable[[], nn.Module]) -> Callable[[], Any]:
    """The model with cross entropy."""
    return lambda: (model(), nn.CrossEntropyLoss())


def squared(model: type[nn.Module] | Callable[[], nn.Module]) -> Callable[[], Any]:
    """The model with the squared error."""
    return lambda: (model(), nn.MSELoss())


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in pairwise(widths):
        layers += [nn.Linear(d_in, d_out), activation()]
    return nn.Sequential(*layers[:-1])


# Images.


class BasicBlock(nn.Module):
    def __init__(self, d_in: int, d_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(d_in, d_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(d_out)
        self.conv2 = nn.Conv2d(d_out, d_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(d_out)
        self.relu = nn.ReLU(inplace=True)
        self.down = (
            nn.Sequential(nn.Conv2d(d_in, d_out, 1, stride, bias=False), nn.BatchNorm2d(d_out))
            if stride > 1 or d_in != d_out
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.layers = nn.Sequential(BasicBlock(4, 4, 1), BasicBlock(4, 6, 2))
        self.fc = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.adaptive_avg_pool2d(self.layers(self.stem(x)), 1)
        return self.fc(torch.flatten(x, 1))


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 3, 3, padding=1, bias=False))
            for c in (4, 7, 10)
        )
        self.norm, self.fc = nn.BatchNorm2d(13), nn.Linear(13, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for block in self.blocks:
            features.append(block(torch.cat(features, 1)))
        return self.fc(F.relu(self.norm(torch.cat(features, 1))).mean((2, 3)))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self.double(3, 4), self.double(4, 6)
        self.up, self.merge = nn.ConvTranspose2d(6, 4, 2, 2), self.double(8, 4)
        self.out = nn.Conv2d(4, CLASSES, 1)

    @staticmethod
    def double(d_in: int, d_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(d_in, d_out, 3, padding=1),
            nn.BatchNorm2d(d_out),
            nn.ReLU(inplace=True),
            nn.Conv2d(d_out, d_out, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down1(x)
        deep = self.down2(F.max_pool2d(skip, 2))
        return self.out(self.merge(torch.cat([skip, self.up(deep)], 1)))


def segmentation() -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 8, 8), torch.randint(CLASSES, (4, 8, 8))


class ConvNeXtBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.dwconv = nn.Conv2d(d, d, 3, padding=1, groups=d)
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.gamma = nn.Parameter(0.1 * torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 2, 2),
        ConvNeXtBlock(6),
        ConvNeXtBlock(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.LayerNorm(6),
        nn.Linear(6, CLASSES),
    )


def mobilenet() -> nn.Module:
    def separable(d_in: int, d_out: int, stride: int) -> list[nn.Module]:
        return [
            nn.Conv2d(d_in, d_in, 3, stride, 1, groups=d_in, bias=False),
            nn.BatchNorm2d(d_in),
            nn.ReLU6(inplace=True),
            nn.Conv2d(d_in, d_out, 1, bias=False),
            nn.BatchNorm2d(d_out),
            nn.ReLU6(inplace=True),
        ]

    body = separable(4, 6, 1) + separable(6, 8, 2)
    stem = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def inplace_activations() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3),
        nn.LeakyReLU(0.1, inplace=True),
        nn.Flatten(),
        nn.Linear(64, 8),
        nn.SiLU(inplace=True),
        nn.Linear(8, CLASSES),
    )


def norms() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.InstanceNorm2d(4, affine=True),
        nn.PReLU(),
        nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def weight_normed(old: bool = False) -> nn.Module:
    norm = nn.utils.weight_norm if old else parametrizations.weight_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(144, CLASSES))
    )


def spectrally_normed(old: bool = False) -> nn.Module:
    norm = nn.utils.spectral_norm if old else parametrizations.spectral_norm
    return nn.Sequential(
        norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(144, CLASSES))
    )


def lazy() -> nn.Module:
    return nn.Sequential(
        nn.LazyConv2d(4, 3),
        nn.LazyBatchNorm2d(),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


def lazy_after_a_dry_run() -> nn.Module:
    model = lazy()
    model(torch.randn(2, 3, 8, 8))
    return model


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos = nn.Parameter(0.02 * torch.randn(1, 5, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 16, 0.0, F.gelu, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.pos
        return self.head(self.norm(self.encoder(tokens)[:, 0]))


class MixerBlock(nn.Module):
    def __init__(self, tokens: int, d: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.tokens = mlp(tokens, 8, tokens, activation=nn.GELU)
        self.channels = mlp(d, 12, d, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.Sequential(MixerBlock(4, WIDTH), MixerBlock(4, WIDTH))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(1))


class WindowAttention(nn.Module):
    """Swin's: windows of 2 × 2, a table of biases by relative position."""

    def __init__(self, d: int, heads: int, window: int = 2) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.table = nn.Parameter(0.02 * torch.randn((2 * window - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        apart = at[:, None] - at[None] + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        N, H, W, d = x.shape
        w, P = self.window, self.window**2
        x = x.view(N, H // w, w, W // w, w, d).transpose(2, 3).reshape(-1, P, d)
        q, k, v = self.qkv(x).reshape(len(x), P, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = (q * (d // self.heads) ** -0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(P, P, -1).permute(2, 0, 1)
        x = ((scores + bias).softmax(-1) @ v).transpose(1, 2).reshape(-1, P, d)
        x = self.proj(x).view(N, H // w, W // w, w, w, d).transpose(2, 3)
        return x.reshape(N, H, W, d)


class Swin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 2, 2)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = WindowAttention(WIDTH, 2)
        self.mlp = mlp(WIDTH, 12, WIDTH, activation=nn.GELU)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).permute(0, 2, 3, 1)
        shifted = torch.roll(self.norm1(x), (-1, -1), (1, 2))
        x = x + torch.roll(self.attention(shifted), (1, 1), (1, 2))
        x = x + self.mlp(self.norm2(x))
        return self.head(x.mean((1, 2)))


# Text.


class CausalBlock(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = mlp(d, 2 * d, d, activation=nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        N, T, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).split(d, 2)
        q, k, v = (t.view(N, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(N, T, d))
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    """Its head is a layer of its own, tied to the embedding, or a function of the embedding."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(CausalBlock(WIDTH, 2) for _ in range(2))
        self.ln = nn.LayerNorm(WIDTH)
        if head != "functional":
            self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if head == "tied":
            self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.size(1), device=tokens.device))
        for block in self.blocks:
            x = block(x)
        x = self.ln(x)
        return self.head(x) if hasattr(self, "head") else F.linear(x, self.wte.weight)


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight (d_in, d_out)."""

    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.nf = d_out
        self.weight = nn.Parameter(0.2 * torch.randn(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        size = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size)


class GPT2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.c_fc, self.c_out = Conv1D(2 * WIDTH, WIDTH), Conv1D(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens)
        q, k, v = self.c_attn(self.ln1(x)).split(WIDTH, 2)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        x = x + self.c_out(F.gelu(self.c_fc(self.ln2(x))))
        return self.head(x)


class BERT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.position = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.size(1)]
        return self.decoder(self.encoder(x, src_key_padding_mask=tokens == 0))


def masked_text() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(2, VOCABULARY, (COUNT, LENGTH))
    tokens[::2, -2:] = 0
    labels = tokens.clone()
    labels[torch.rand(labels.shape) > 0.4] = -100
    labels[tokens == 0] = -100
    labels[0, 0] = tokens[0, 0]
    return tokens.masked_fill(labels != -100, 1), labels


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = (nn.Embedding(VOCABULARY, WIDTH) for _ in range(2))
        self.transformer = nn.Transformer(WIDTH, 2, 1, 1, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.size(1))
        y = self.transformer(
            self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True
        )
        return self.out(y)


def translation() -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randint(VOCABULARY, (COUNT, 5)), *text())


def translation_loss(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    source, target, labels = batch
    return criterion(model(source, target).transpose(1, 2), labels)


class DecoderOnly(nn.Module):
    """One nn.TransformerDecoderLayer over a memory that a linear layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.embed = nn.Linear(3, WIDTH), nn.Embedding(VOCABULARY, WIDTH)
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 16, 0.0, batch_first=True)
        self.out = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, features: Tensor, tokens: Tensor) -> Tensor:
        mask = torch.ones(tokens.size(1), tokens.size(1), dtype=torch.bool).triu(1)
        return self.out(self.layer(self.embed(tokens), self.memory(features), tgt_mask=mask))


def captions() -> tuple[Tensor, Tensor, Tensor]:
    return (torch.randn(COUNT, 4, 3), *text())


class T5RMSNorm(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class T5(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.heads = nn.Embedding(VOCABULARY, WIDTH), 2
        self.relative = nn.Embedding(2 * LENGTH - 1, self.heads)
        self.norm1, self.norm2, self.norm3 = (T5RMSNorm(WIDTH) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.wi0, self.wi1 = (nn.Linear(WIDTH, 12, bias=False) for _ in range(2))
        self.wo, self.head = nn.Linear(12, WIDTH, bias=False), nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        x, (N, T) = self.shared(tokens), tokens.shape
        place = torch.arange(T)
        bias = self.relative(place[None] - place[:, None] + LENGTH - 1).permute(2, 0, 1)
        h = self.norm1(x)
        q, k, v = (
            f(h).view(N, T, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = (q @ k.transpose(2, 3) + bias).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).reshape(N, T, WIDTH))
        h = self.norm2(x)
        x = x + self.wo(F.gelu(self.wi0(h)) * self.wi1(h))
        return self.head(self.norm3(x).mean(1))


class LSTMLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lstm = nn.LSTM(WIDTH, 8, num_layers=2, batch_first=True)
        self.out = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(tokens))[0])


class TiedGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, VOCABULARY)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(self.gru(self.embed(tokens))[0])


class PackedTagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
        self.lstm = nn.LSTM(WIDTH, 6, bidirectional=True, batch_first=True)
        self.out = nn.Linear(12, CLASSES)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(
            self.embed(tokens), lengths, batch_first=True, enforce_sorted=False
        )
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.out(hidden)


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    lengths = torch.tensor([3, 6, 2, 5, 6, 4], device="cpu")  # where torch wants them
    labels = torch.randint(CLASSES, (6, LENGTH))
    there = torch.arange(LENGTH) < lengths.to(labels.device)[:, None]
    tokens = torch.randint(1, VOCABULARY, (6, LENGTH)) * there
    return tokens, lengths, labels.masked_fill(~there, -100)


def tagging_loss(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    tokens, lengths, labels = batch
    return criterion(model(tokens, lengths).transpose(1, 2), labels)


class CellLoop(nn.Module):
    """A loop over time written by hand."""

    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = cell(WIDTH, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for t in range(x.size(1)):
            state = self.cell(x[:, t], state)
        return self.out(state[0] if isinstance(state, tuple) else state)


class Acoustic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(4, 8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0]).log_softmax(-1)  # (T, N, C)


def speech() -> tuple[Tensor, ...]:
    lengths = torch.full((4,), 8), torch.tensor([3, 2, 3, 1])
    return (torch.randn(8, 4, 4), torch.randint(1, 5, (4, 3)), *lengths)


def ctc(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    x, targets, input_lengths, target_lengths = batch
    return criterion(model(x), targets, input_lengths, target_lengths)


class BagClassifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, WIDTH, mode="mean")
        self.fc = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        return self.fc(self.bag(tokens, offsets))


def bags() -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randint(VOCABULARY, (20,)),
        torch.tensor([0, 3, 7, 8, 14]),
        torch.randint(CLASSES, (5,)),
    )


def two_inputs(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    first, second, y = batch
    return criterion(model(first, second), y)


# Sound.


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv1d(VOCABULARY, WIDTH, 1)
        self.dilations = (1, 2, 4)
        self.gates = nn.ModuleList(nn.Conv1d(WIDTH, 12, 2, dilation=d) for d in self.dilations)
        self.mixes = nn.ModuleList(nn.Conv1d(6, WIDTH, 1) for _ in self.dilations)
        self.skips = nn.ModuleList(nn.Conv1d(6, WIDTH, 1) for _ in self.dilations)
        self.out = nn.Conv1d(WIDTH, VOCABULARY, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(F.one_hot(tokens, VOCABULARY).float().transpose(1, 2))
        total = torch.zeros_like(x)
        for d, gate, mix, skip in zip(
            self.dilations, self.gates, self.mixes, self.skips, strict=True
        ):
            a, b = gate(F.pad(x, (d, 0))).chunk(2, 1)
            h = torch.tanh(a) * torch.sigmoid(b)
            total = total + skip(h)
            x = x + mix(h)
        return self.out(F.relu(total))


# Generative models.


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.discriminator = mlp(4, 8, 2), mlp(2, 8, 1, activation=nn.Tanh)


def points() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 2) + 1, torch.randn(16, 4)


def discriminator_loss(model: GAN, criterion: Any, batch: Any) -> Tensor:
    real, noise = batch
    ones = torch.ones(len(real), 1)
    fake = model.generator(noise).detach()
    return criterion(model.discriminator(real), ones) + criterion(
        model.discriminator(fake), torch.zeros_like(ones)
    )


def generator_loss(model: GAN, criterion: Any, batch: Any) -> Tensor:
    _, noise = batch
    score = model.discriminator(model.generator(noise))
    return criterion(score, torch.ones_like(score))


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 12), nn.ReLU())
        self.mu, self.logvar = nn.Linear(12, 2), nn.Linear(12, 2)
        self.decoder = mlp(2, 12, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.randn_like(mu) * (0.5 * logvar).exp()
        return self.decoder(z), mu, logvar


def divergence(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1).mean()


class ELBO(nn.Module):
    """Takes what the model returns, a tuple."""

    def forward(self, outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
        reconstruction, mu, logvar = outputs
        return F.binary_cross_entropy_with_logits(reconstruction, x) + 0.1 * divergence(mu, logvar)


class SpreadELBO(nn.Module):
    """Takes what the model returns, one after the other."""

    def forward(self, reconstruction: Tensor, x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(reconstruction, x) + 0.1 * divergence(mu, logvar)


def bits() -> Tensor:
    return (torch.rand(COUNT, WIDTH) > 0.5).float()


def spread(model: nn.Module, criterion: Any, x: Tensor) -> Tensor:
    reconstruction, mu, logvar = model(x)
    return criterion(reconstruction, x, mu, logvar)


def half_watched(model: nn.Module, criterion: Any, x: Tensor) -> Tensor:
    reconstruction, mu, logvar = model(x)
    return criterion(reconstruction, x) + 0.1 * divergence(mu, logvar)


class Coupling(nn.Module):
    def __init__(self, flipped: bool) -> None:
        super().__init__()
        self.flipped, self.net = flipped, mlp(2, 12, 4, activation=nn.Tanh)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.chunk(2, 1)[:: -1 if self.flipped else 1]
        shift, scale = self.net(a).chunk(2, 1)
        scale = torch.tanh(scale)
        b = b * scale.exp() + shift
        return torch.cat([b, a] if self.flipped else [a, b], 1), scale.sum(1)


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Coupling(bool(i % 2)) for i in range(4))

    def forward(self, x: Tensor) -> Tensor:
        total = x.new_zeros(len(x))
        for layer in self.layers:
            x, log_determinant = layer(x)
            total = total + log_determinant
        return torch.cat([x, total.unsqueeze(1)], 1)


class FlowNLL(nn.Module):
    def forward(self, out: Tensor) -> Tensor:
        z, log_determinant = out[:, :-1], out[:, -1]
        return (0.5 * z.square().sum(1) - log_determinant).mean()


class Generator(nn.Module):
    """DCGAN's, trained as the decoder of given codes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 2, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(True),
            nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(True),
            nn.ConvTranspose2d(4, 1, 4, 2, 1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z.view(len(z), -1, 1, 1))


def codes() -> tuple[Tensor, Tensor]:
    return torch.randn(8, 4), torch.tanh(torch.randn(8, 1, 8, 8))


# Odd shapes of models.


class MixtureOfExperts(nn.Module):
    """Each example goes to one expert of four; the last one is never chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        with torch.no_grad():
            self.router.bias[-1] = -100.0
        self.experts = nn.ModuleList(mlp(WIDTH, 6, WIDTH) for _ in range(4))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        share, chosen = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            at = (chosen == i).nonzero().squeeze(1)
            if len(at):
                out = out.index_add(0, at, share[at].unsqueeze(1) * expert(x[at]))
        return self.head(out)


class GraphConvolution(nn.Module):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_in, d_out) * d_in**-0.5)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ (x @ self.weight) + self.bias


class GCN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = GraphConvolution(WIDTH, 6), GraphConvolution(6, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x, adjacency)), adjacency)


def graph() -> tuple[Tensor, ...]:
    edges = (torch.rand(15, 15) < 0.2).float()
    edges = ((edges + edges.t()) > 0).float() + torch.eye(15)
    root = edges.sum(1).rsqrt()
    labelled = torch.arange(15) < 9
    normal = root[:, None] * edges * root
    return torch.randn(15, WIDTH), normal, labelled, torch.randint(CLASSES, (15,))


def on_labelled_nodes(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    x, adjacency, labelled, y = batch
    return criterion(model(x, adjacency)[labelled], y[labelled])


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(WIDTH, 8, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.net(a) - self.net(b)


class Contrastive(nn.Module):
    """Hadsell's: near for pairs that belong together, a margin apart for others."""

    def forward(self, difference: Tensor, same: Tensor) -> Tensor:
        distance = (difference.square().sum(1) + 1e-6).sqrt()
        return (same * distance.square() + (1 - same) * F.relu(1 - distance).square()).mean()


def pairs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(COUNT, WIDTH), torch.randn(COUNT, WIDTH), (torch.rand(COUNT) > 0.5).float()


def triplets() -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(3, COUNT, WIDTH).unbind())  # type: ignore[return-value]


def of_triplets(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    anchor, positive, negative = (model(x) for x in batch)
    return criterion(anchor, positive, negative)


class HyperNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.task = nn.Parameter(torch.randn(1, 3))
        self.hyper = mlp(3, 6, WIDTH * CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, 0.3 * self.hyper(self.task).view(CLASSES, WIDTH))


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (x @ self.A.t() @ self.B.t()) * 2.0


def adapted() -> nn.Module:
    return nn.Sequential(
        LoRA(nn.Linear(WIDTH, 12)), nn.ReLU(), LoRA(nn.Linear(12, 12)), nn.ReLU(),
        nn.Linear(12, CLASSES),
    )  # fmt: skip


class Repeated(nn.Module):
    """One block applied several times, as to a fixed point."""

    def __init__(self) -> None:
        super().__init__()
        self.inject, self.block = nn.Linear(WIDTH, 6), nn.Linear(6, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        injected, z = self.inject(x), x.new_zeros(len(x), 6)
        for _ in range(5):
            z = torch.tanh(self.norm(self.block(z) + injected))
        return self.head(z)


class Sine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(3 * x)


class Residual(nn.Module):
    """Returns u' + u at its points: its derivative is a part of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(1, 10, 10, 1, activation=nn.Tanh)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            u = self.net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return slope + u


def physics(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    """u'' = −9u with u(0) = 1, none of it through a criterion."""
    x = batch[0].clone().requires_grad_()
    u = model(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x, create_graph=True)
    return (bend + 9 * u).square().mean() + (model(torch.zeros(1, 1)) - 1).square().mean()


class NTXent(nn.Module):
    """SimCLR's, on the embeddings of both views one after the other."""

    def forward(self, z: Tensor) -> Tensor:
        z, N = F.normalize(z, dim=1), len(z) // 2
        scores = (z @ z.t() / 0.5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -1e9)
        return F.cross_entropy(scores, torch.arange(2 * N).roll(N))


def views() -> Tensor:
    x = torch.randn(COUNT, WIDTH)
    return torch.cat([x, x + 0.1 * torch.randn_like(x)])


class CLIP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = mlp(WIDTH, 8, 4), mlp(5, 8, 4)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(5.0)))

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = F.normalize(self.image(image), dim=1), F.normalize(self.text(text), dim=1)
        return self.logit_scale.exp() * image @ text.t()


def both_ways(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    logits = model(*batch)
    labels = torch.arange(len(logits))
    return (criterion(logits, labels) + criterion(logits.t(), labels)) / 2


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem, self.head = nn.Linear(WIDTH, 8), nn.Linear(8, CLASSES)
        self.blocks = nn.ModuleList(mlp(8, 12, 8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x)


class DictOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 8), nn.Linear(5, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        hidden = torch.relu(self.left(left) + self.right(right))
        return {"logits": self.head(hidden), "hidden": hidden}


def of_logits(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    *inputs, y = batch
    out = model(*inputs)
    return criterion(out["logits"], y)


def two_vectors() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(COUNT, WIDTH), torch.randn(COUNT, 5), torch.randint(CLASSES, (COUNT,))


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Bilinear(WIDTH, 5, 6), nn.Linear(6, CLASSES)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(left, right)))


class TwoTasks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU())
        self.classes, self.value = nn.Linear(8, CLASSES), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.classes(h), self.value(h)


def tasks() -> tuple[Tensor, Tensor, Tensor]:
    return (*vectors(), torch.randn(COUNT, 1))


def weighted_sum(model: nn.Module, criteria: Sequence[Any], batch: Any) -> Tensor:
    x, y, value = batch
    logits, predicted = model(x)
    return criteria[0](logits, y) + 0.5 * criteria[1](predicted, value)


class OwnLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = mlp(WIDTH, 8, CLASSES), nn.CrossEntropyLoss()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.net(x), y)


class OwnFunctionalLoss(nn.Module):
    """nanoGPT's and Hugging Face's way: logits and loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(WIDTH, 8, CLASSES)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.net(x)
        return logits, F.cross_entropy(logits, y)


def with_own_criterion() -> tuple[nn.Module, Any]:
    model = OwnLoss()
    return model, model.criterion


class HalfWithFloatHead(nn.Module):
    """All parameters bfloat16; the loss is taken in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))
        self.bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.bfloat16()).float()


def compiled(backend: str) -> Callable[[], Any]:
    return lambda: (
        torch.compile(mlp(WIDTH, 8, 8, CLASSES), backend=backend),
        nn.CrossEntropyLoss(),
    )


# Models of other packages.


def hugging_face_gpt2() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=8, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config), nn.CrossEntropyLoss()


def hugging_face_bert() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=LENGTH, num_labels=CLASSES,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), nn.CrossEntropyLoss()


def of_model_output(model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    x, y = batch
    logits = model(input_ids=x).logits
    return criterion(logits.reshape(-1, logits.size(-1)), y.reshape(-1))


def timm_resnet() -> tuple[nn.Module, Any]:
    import timm

    sizes = {"layers": (1, 1, 1, 1), "channels": (4, 4, 8, 8)}
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, num_classes=CLASSES, stem_width=4, **sizes
    )
    return model, nn.CrossEntropyLoss()


def timm_vit() -> tuple[nn.Module, Any]:
    import timm

    model = timm.models.vision_transformer.VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=CLASSES
    )
    return model, nn.CrossEntropyLoss()


TRANSFORMERS = ("transformers", "pip install transformers")
TIMM = ("timm", "pip install timm")
TWICE_BACKWARD = "torch has no forward mode for a part of this model"
DEPRECATED = "weight_norm` is deprecated"

ZOO = (
    Entry("ResNet", classified(ResNet), images),
    Entry("DenseNet", classified(DenseNet), images),
    Entry("U-Net", classified(UNet), segmentation),
    Entry("ConvNeXt", classified(convnext), images),
    Entry("MobileNet", classified(mobilenet), images),
    Entry("WaveNet", classified(WaveNet), text),
    Entry(
        "GAN",
        lambda: (GAN(), nn.BCEWithLogitsLoss()),
        points,
        (discriminator_loss, generator_loss),
        ("discriminator", "generator"),
        rises=True,
    ),
    Entry(
        "VAE, criterion on a tuple",
        lambda: (VAE(), ELBO()),
        bits,
        lambda model, criterion, x: criterion(model(x), x),
        refused="with tuple as its first argument; a watched criterion takes the model's output",
    ),
    Entry(
        "VAE, criterion on three outputs",
        lambda: (VAE(), SpreadELBO()),
        bits,
        spread,
        warns=("is given a second argument that the model computes",),
    ),
    Entry(
        "VAE, watched reconstruction",
        lambda: (VAE(), nn.BCEWithLogitsLoss()),
        bits,
        half_watched,
        warns=("the loss has terms that were not watched",),
    ),
    Entry(
        "VAE, no criterion",
        lambda: (VAE(), None),
        bits,
        lambda model, _, x: ELBO()(model(x), x),
    ),
    Entry(
        "normalising flow",
        lambda: (Flow(), FlowNLL()),
        lambda: torch.randn(24, 4) * 2 + 1,
        lambda model, criterion, x: criterion(model(x)),
    ),
    Entry("GPT, untied", classified(lambda: GPT("own")), text, per_token),
    Entry("GPT, tied", classified(lambda: GPT("tied")), text, per_token),
    Entry("GPT, functional head", classified(lambda: GPT("functional")), text, per_token),
    Entry("GPT-2, Conv1D", classified(GPT2), text, per_token),
    Entry(
        "BERT",
        classified(BERT),
        masked_text,
        per_token,
    ),
    Entry("nn.Transformer", classified(Translator), translation, translation_loss),
    Entry("nn.TransformerDecoderLayer", classified(DecoderOnly), captions, translation_loss),
    Entry("T5", classified(T5), labelled_text),
    Entry("ViT", classified(ViT), images),
    Entry("MLP-Mixer", classified(Mixer), images),
    Entry("Swin", classified(Swin), images),
    Entry(
        "LSTM language model",
        classified(LSTMLanguageModel),
        text,
        per_token,
        warns=(TWICE_BACKWARD,),
    ),
    Entry("GRU, tied", classified(TiedGRU), text, per_token),
    Entry(
        "packed bidirectional tagger",
        classified(PackedTagger),
        ragged,
        tagging_loss,
        warns=(TWICE_BACKWARD,),
    ),
    Entry("RNNCell", classified(lambda: CellLoop(nn.RNNCell)), sequences),
    Entry("LSTMCell", classified(lambda: CellLoop(nn.LSTMCell)), sequences),
    Entry("GRUCell", classified(lambda: CellLoop(nn.GRUCell)), sequences),
    Entry(
        "CTC",
        lambda: (Acoustic(), nn.CTCLoss()),
        speech,
        ctc,
    ),
    Entry("mixture of experts", classified(MixtureOfExperts), vectors),
    Entry("graph convolution", classified(GCN), graph, on_labelled_nodes),
    Entry("siamese", lambda: (Siamese(), Contrastive()), pairs, two_inputs),
    Entry(
        "triplet, three calls",
        lambda: (mlp(WIDTH, 8, 3), nn.TripletMarginLoss()),
        triplets,
        of_triplets,
    ),
    Entry("hypernetwork", classified(HyperNetwork), vectors),
    Entry("LoRA", classified(adapted), vectors),
    Entry("repeated block", classified(Repeated), vectors),
    Entry("SIREN", squared(lambda: mlp(1, 12, 12, 1, activation=Sine)), regression),
    Entry(
        "PINN, no criterion",
        lambda: (mlp(1, 10, 10, 1, activation=nn.Tanh), None),
        regression,
        physics,
    ),
    Entry(
        "PINN, returns the residual",
        squared(Residual),
        regression,
        warns=("do not give its gradient",),
    ),
    Entry(
        "SimCLR",
        lambda: (mlp(WIDTH, 8, 4), NTXent()),
        views,
        lambda model, criterion, x: criterion(model(x)),
    ),
    Entry(
        "CLIP",
        classified(CLIP),
        lambda: (torch.randn(COUNT, WIDTH), torch.randn(COUNT, 5)),
        both_ways,
    ),
    Entry(
        "checkpoint, reentrant",
        classified(lambda: Checkpointed(True)),
        vectors,
        refused="checkpointed with use_reentrant=True.* use_reentrant=False",
    ),
    Entry("checkpoint, not reentrant", classified(lambda: Checkpointed(False)), vectors),
    Entry("compiled, eager", compiled("eager"), vectors),
    Entry("compiled, aot_eager", compiled("aot_eager"), vectors),
    Entry("in-place activations", classified(inplace_activations), images),
    Entry("several inputs, dict output", classified(DictOutput), two_vectors, of_logits),
    Entry(
        "EmbeddingBag",
        classified(BagClassifier),
        bags,
        two_inputs,
    ),
    Entry("Bilinear", classified(Bilinear), two_vectors, two_inputs),
    Entry("PReLU, InstanceNorm, GroupNorm", classified(norms), images),
    Entry("weight_norm", classified(weight_normed), images, warns=(TWICE_BACKWARD,)),
    Entry(
        "weight_norm, with hooks",
        classified(lambda: weight_normed(old=True)),
        images,
        warns=(TWICE_BACKWARD, DEPRECATED),
    ),
    Entry("spectral_norm", classified(spectrally_normed), images, warns=(TWICE_BACKWARD,)),
    Entry(
        "spectral_norm, with hooks",
        classified(lambda: spectrally_normed(old=True)),
        images,
        warns=(TWICE_BACKWARD,),
    ),
    Entry("lazy, after a dry run", classified(lazy_after_a_dry_run), images),
    Entry("lazy, before a dry run", classified(lazy), images),
    Entry(
        "two tasks",
        lambda: (TwoTasks(), (nn.CrossEntropyLoss(), nn.MSELoss())),
        tasks,
        weighted_sum,
    ),
    Entry(
        "loss in the model, criterion given",
        with_own_criterion,
        vectors,
        lambda model, _, batch: model(*batch),
    ),
    Entry(
        "loss in the model, no criterion",
        lambda: (OwnFunctionalLoss(), None),
        vectors,
        lambda model, _, batch: model(*batch)[1],
    ),
    Entry("transposed convolutions", squared(Generator), codes),
    Entry("bfloat16", classified(HalfWithFloatHead), vectors),
    Entry("transformers: GPT-2", hugging_face_gpt2, text, of_model_output, needs=TRANSFORMERS),
    Entry(
        "transformers: BERT", hugging_face_bert, labelled_text, of_model_output, needs=TRANSFORMERS
    ),
    Entry("timm: ResNet", timm_resnet, lambda: images(32), needs=TIMM),
    Entry("timm: ViT", timm_vit, images, needs=TIMM),
)
