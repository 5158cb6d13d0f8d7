"""The ladder of approximations: which rung is never below which, and where a rung is exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

import kronewton as kn
from kronewton.lab.verify.checks import APART, F64, AtMost, Section, Source
from kronewton.lab.verify.networks import Problem, target

SECTION = Section("The ladder, as kn.explain measures it")
# A distance is the root of a difference of squares: rounding in those is its root in a distance.
ZERO = AtMost(1e-6)
N = 5
Modules = Callable[[], Sequence[nn.Module]]
Layers = Callable[[Callable[[], nn.Module]], Sequence[nn.Module]]


class PooledTokens(nn.Module):
    """(N, S, d) → (N, d)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class PooledLocations(nn.Module):
    """(N, C, h, w) → (N, C)"""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def built(source: Source, modules: Modules) -> nn.Sequential:
    """A network at random weights and biases that leaves torch's random stream alone."""
    with torch.device("meta"):
        model = nn.Sequential(*modules())
    model = model.to(F64).to_empty(device=source.device)
    for p in model.parameters():
        p.data = source.normal(*p.shape) / 2
    return model


def regression(source: Source, modules: Modules, *example: int, count: int = N) -> Problem:
    """Squared error on random targets of the output's shape."""
    model, x = built(source, modules), source.normal(count, *example)
    with torch.no_grad():
        return Problem(model, nn.MSELoss(), x, source.normal(*model(x).shape))


def mlp(kind: Callable[[], nn.Module]) -> Sequence[nn.Module]:
    return [nn.Linear(4, 5), kind(), nn.Linear(5, 4), kind(), nn.Linear(4, 3)]


def tokens(kind: Callable[[], nn.Module]) -> Sequence[nn.Module]:
    return [nn.Linear(3, 4), kind(), nn.Linear(4, 4), kind(), PooledTokens(), nn.Linear(4, 3)]


def convolutions(kind: Callable[[], nn.Module]) -> Sequence[nn.Module]:
    conv, strided = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 2, 2)
    return [conv, kind(), strided, kind(), nn.Flatten(), nn.Linear(12, 3)]


NETWORKS: tuple[tuple[Layers, tuple[int, ...]], ...] = (
    (mlp, (4,)),
    (tokens, (6, 3)),
    (convolutions, (1, 4, 4)),
)
LINEAR: dict[str, tuple[Modules, type[nn.Module], tuple[int, ...]]] = {  # with its pooling
    "tokens": (lambda: [nn.Linear(3, 4), nn.Linear(4, 2)], PooledTokens, (6, 3)),
    "one": (lambda: [nn.Conv2d(2, 3, 3)], PooledLocations, (2, 4, 5)),
    "strided": (lambda: [nn.Conv2d(2, 2, 3, 2, 1)], PooledLocations, (2, 4, 4)),
    "1×1": (lambda: [nn.Conv2d(2, 2, 1), nn.Conv2d(2, 3, 1)], PooledLocations, (2, 3, 3)),
}


def random_networks(source: Source, *kinds: Callable[[], nn.Module]) -> Iterator[Problem]:
    """Every architecture with each nonlinearity, squared error and softmax."""
    for layers, example in NETWORKS:
        for kind in kinds:
            for criterion in (nn.MSELoss(), nn.CrossEntropyLoss()):
                model = built(source, lambda layers=layers, kind=kind: layers(kind))  # type: ignore[misc]
                y = target(source, criterion, 3, N)
                yield Problem(model, criterion, source.normal(N, *example), y)


def explained(problem: Problem) -> kn.Explanation:
    return kn.explain(problem.model, problem.criterion, (problem.x, problem.y))


def of(problem: Problem, *rungs: str) -> list[float]:
    """The farthest of some rungs in each layer."""
    rows = explained(problem).rows
    return [max(getattr(row.distances, rung) for rung in rungs) for row in rows]


@SECTION.check("best is never farther than expand or reduce, in squares")
def _best_is_best(source: Source) -> Iterator[float]:
    for problem in random_networks(source, nn.Tanh, nn.ReLU):
        for d in (row.distances for row in explained(problem).rows):
            yield max(0.0, d.best**2 - min(d.expand, d.reduce) ** 2)


@SECTION.check("corrected (EKFAC) is never farther than expand, in squares")
def _corrected_is_nearer(source: Source) -> Iterator[float]:
    for problem in random_networks(source, nn.Tanh, nn.ReLU):
        for d in (row.distances for row in explained(problem).rows):
            yield max(0.0, d.corrected**2 - d.expand**2)


@SECTION.check("… and with tanh neither is exact", APART)
def _neither_is_exact(source: Source) -> Iterator[float]:
    # Not with ReLU: where all examples meet the same units alive, the network is linear to them.
    for problem in random_networks(source, nn.Tanh):
        yield max(of(problem, "best"))
        yield max(of(problem, "corrected"))


ALL = ("expand", "reduce", "best", "corrected")


@SECTION.check("deep linear, squared error: all but the diagonal are exact", ZERO)
def _ladder_deep_linear(source: Source) -> Iterator[float]:
    yield from of(regression(source, lambda: mlp(nn.Identity), 4), *ALL)


@SECTION.check("a batch of one, or N copies, each weight used once: they are, too", ZERO)
def _ladder_one(source: Source) -> Iterator[float]:
    for kind in (nn.Tanh, nn.ReLU):
        model = built(source, lambda kind=kind: mlp(kind))  # type: ignore[misc]
        for criterion in (nn.MSELoss(), nn.CrossEntropyLoss()):
            one = Problem(model, criterion, source.normal(1, 4), target(source, criterion, 3, 1))
            for problem in (one, one.repeated(4)):
                yield from of(problem, *ALL)


def _per_position(source: Source) -> Iterator[Problem]:
    for modules, _, example in LINEAR.values():
        yield regression(source, modules, *example)


def _pooled(source: Source) -> Iterator[Problem]:
    for modules, pooling, example in LINEAR.values():
        yield regression(source, lambda m=modules, p=pooling: [*m(), p()], *example)  # type: ignore[misc]


@SECTION.check("tokens, one convolution, several 1×1, linear, a loss per position: expand is", ZERO)
def _ladder_per_position(source: Source) -> Iterator[float]:
    for problem in _per_position(source):
        yield from of(problem, "expand", "best", "corrected")


@SECTION.check("… and reduce is not", APART)
def _ladder_per_position_reduce(source: Source) -> Iterator[float]:
    for problem in _per_position(source):
        yield from of(problem, "reduce")


@SECTION.check("the same, pooled: reduce is", ZERO)
def _ladder_pooled(source: Source) -> Iterator[float]:
    for problem in _pooled(source):
        yield from of(problem, "reduce", "best")


@SECTION.check("… and expand is not", APART)
def _ladder_pooled_expand(source: Source) -> Iterator[float]:
    for problem in _pooled(source):
        yield from of(problem, "expand")


def _circular() -> Sequence[nn.Module]:
    return [nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular") for _ in range(3)]


def _padded() -> Sequence[nn.Module]:
    return [nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1), PooledLocations()]


@SECTION.check("several circular 3×3, pooled: reduce is, at every depth", ZERO)
def _ladder_circular(source: Source) -> Iterator[float]:
    problem = regression(source, lambda: [*_circular(), PooledLocations()], 1, 4, 3)
    yield from of(problem, "reduce", "best")


def _exact_for_the_last(source: Source) -> Iterator[list[float]]:
    yield of(regression(source, _circular, 1, 4, 3), "expand")
    yield of(regression(source, _padded, 1, 3, 4), "reduce")


@SECTION.check("circular, a loss per location: expand; padded, pooled: reduce: the last is", ZERO)
def _ladder_last(source: Source) -> Iterator[float]:
    yield from (last for *_, last in _exact_for_the_last(source))


@SECTION.check("… and those before it are not", APART)
def _ladder_before_the_last(source: Source) -> Iterator[float]:
    for *before, _ in _exact_for_the_last(source):
        yield from before


def example(seed: int, device: torch.device) -> kn.Explanation:
    """The ladder of a small convolutional net with tanh and softmax, on random data."""
    source = Source(torch.Generator().manual_seed(seed), device)
    model = built(source, lambda: convolutions(nn.Tanh))
    criterion = nn.CrossEntropyLoss()
    batch = source.normal(N, 1, 4, 4), target(source, criterion, 3, N)
    return kn.explain(model, criterion, batch)
