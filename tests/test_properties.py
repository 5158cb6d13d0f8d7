"""Random small networks of all kinds, losses and shapes: what must hold whatever they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import kronewton as kn

D = 4  # width of everything between the first and the last layer
PINNED = {
    "lr": 1.0, "momentum": 0.0, "trust_region": None, "damping": 0.05,
    "factor_every": 1, "inverse_every": 1,
}  # fmt: skip


class Attends(nn.Module):
    """Attention over positions, or over one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class Recurs(nn.Module):
    """A recurrent layer's outputs at all positions."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.cell = kind(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


class Scales(nn.Module):
    """A parameter of its own, and a matrix that a function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.W = nn.Parameter(torch.ones(D)), nn.Parameter(0.5 * torch.randn(D, D))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((self.scale * x) @ self.W)


class Pairs(nn.Module):
    """A bilinear layer of the input with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Bilinear(D, D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.pair(x, x))


class Channels(nn.Module):
    """Something that has its channels before its positions."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(1, 2)).transpose(1, 2)


MIDDLES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()),
    "no bias": lambda: nn.Sequential(nn.Linear(D, D, bias=False), nn.GELU()),
    "layer norm": lambda: nn.LayerNorm(D),
    "RMS norm": lambda: nn.RMSNorm(D),
    "group norm": lambda: Channels(nn.GroupNorm(2, D)),
    "PReLU": lambda: nn.PReLU(),
    "conv": lambda: Channels(nn.Sequential(nn.Conv1d(D, D, 3, padding=1), nn.Tanh())),
    "attention": Attends,
    "LSTM": lambda: Recurs(nn.LSTM),
    "GRU": lambda: Recurs(nn.GRU),
    "own": Scales,
    "bilinear": Pairs,
}


class Net(nn.Module):
    """Tokens or vectors, some layers, then an output at each position or for each example."""

    def __init__(self, drawn: Drawn) -> None:
        super().__init__()
        self.first = nn.Embedding(5, D) if drawn.tokens else nn.Linear(3, D)
        self.middle = nn.Sequential(*[MIDDLES[name]() for name in drawn.middles])
        self.last = nn.Linear(D, 3)
        self.pooled = drawn.pooled

    def forward(self, x: Tensor) -> Tensor:
        h = self.middle(self.first(x))
        h = self.last(h.mean(1) if self.pooled else h)
        return h if self.pooled else h.transpose(1, 2)


@dataclass(frozen=True)
class Drawn:
    """A network and a batch."""

    tokens: bool
    middles: tuple[str, ...]
    pooled: bool
    classes: bool
    sums: bool
    N: int
    S: int
    seed: int

    def made(self) -> tuple[Net, nn.Module, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        model = Net(self)
        x = torch.randint(0, 5, (self.N, self.S)) if self.tokens else torch.randn(self.N, self.S, 3)
        at = (self.N,) if self.pooled else (self.N, self.S)
        reduction = "sum" if self.sums else "mean"
        if self.classes:
            return model, nn.CrossEntropyLoss(reduction=reduction), x, torch.randint(0, 3, at)
        return model, nn.MSELoss(reduction=reduction), x, torch.randn(self.N, 3, *at[1:])


networks = st.builds(
    Drawn,
    tokens=st.booleans(),
    middles=st.lists(st.sampled_from(sorted(MIDDLES)), min_size=0, max_size=3).map(tuple),
    pooled=st.booleans(),
    classes=st.booleans(),
    sums=st.booleans(),
    N=st.integers(1, 4),
    S=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
often = settings(max_examples=40, deadline=None, derandomize=True)


def step(drawn: Drawn, parts: list[tuple[Tensor, Tensor]], **options: object) -> dict[str, Tensor]:
    """What the first step changes."""
    model, criterion, _, _ = drawn.made()
    optimizer = kn.KFAC(model, criterion, **{**PINNED, **options})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    total = sum(len(x) for x, _ in parts)
    for x, y in parts:
        share = 1.0 if drawn.sums else len(x) / total
        (criterion(model(x), y) * share).backward()
    optimizer.step()
    optimizer.close()
    return {name: p.detach() - before[name] for name, p in model.named_parameters()}


@often
@given(networks, st.sampled_from(["factored", "eigen", "corrected"]))
def test_a_batch_in_parts_is_the_batch(drawn: Drawn, basis: str) -> None:
    """Fact 9; auto may choose by one of several examples, so that sharing is given."""
    torch.set_default_dtype(torch.float64)
    try:
        _, _, x, y = drawn.made()
        options = {"fisher": "exact", "basis": basis, "sharing": "expand"}
        whole = step(drawn, [(x, y)], **options)
        parts = step(drawn, [(x[n : n + 1], y[n : n + 1]) for n in range(len(x))], **options)
        for name in whole:
            if "scale" not in name:  # its own gradient is an estimate, in the exact mode too
                torch.testing.assert_close(parts[name], whole[name], rtol=1e-6, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)


@often
@given(networks, st.sampled_from(["exact", "sampled", "empirical"]))
def test_the_defaults_run_and_move_everything(drawn: Drawn, fisher: str) -> None:
    model, criterion, x, y = drawn.made()
    optimizer = kn.KFAC(model, criterion, fisher=fisher)
    before = copy.deepcopy(dict(model.named_parameters()))
    moving: set[str] = set()
    for _ in range(3):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        moving |= {name for name, p in model.named_parameters() if bool(p.grad.any())}
        optimizer.step()
    now = dict(model.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in now.values())
    if int(optimizer.diagnostics()["skipped"]) == 0 and int(optimizer.diagnostics()["undone"]) == 0:
        assert not {name for name in moving if torch.equal(now[name], before[name])}
    assert [row.parameter for row in optimizer.coverage().rows] == list(now)
    assert all(row.method for row in optimizer.coverage().rows)
    optimizer.close()
