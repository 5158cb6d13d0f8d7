"""What theory says of weights that are used at several positions: tokens and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import kronewton as kn
import oracles
from cases import PLAIN, Case
from kronewton.layers import base, convolution
from oracles import distance
from reading import PINNED, after, apart, backward, normal, read_blocks, scale_of

N = 4
EXACT = 1e-11  # of blocks with hundreds of entries, read through an inverse
DIFFERENT = 1e-3
pytestmark = pytest.mark.usefixtures("float64")


class Pooled(nn.Module):
    """The mean over all positions: (N, C, *spatial) → (N, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


class PooledTokens(nn.Module):
    """The mean over tokens: (N, S, d) → (N, d)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def network(*modules: nn.Module) -> nn.Sequential:
    model = nn.Sequential(*modules).double()
    for i, p in enumerate(model.parameters()):
        p.data = normal(*p.shape, seed=10 + i) / 2
    return model


def distances(
    model: nn.Module, x: Tensor, sharing: str, reduction: str = "mean", sizes: Sequence[int] = ()
) -> list[float]:
    """Of each layer's block from autograd's, for squared error on random targets."""
    criterion = nn.MSELoss(reduction=reduction)
    y = normal(*model(x).shape, seed=1)
    found = read_blocks(model, criterion, x, y, sizes=sizes, sharing=sharing)
    return apart(found, model, criterion, x, y)


# Fact 3: sequences through linear layers.


@pytest.mark.parametrize("sizes", [(), (1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_3_a_loss_per_token_expand_is_exact(reduction: str, sizes: Sequence[int]) -> None:
    model, x = network(nn.Linear(2, 3), nn.Linear(3, 2)), normal(N, 3, 2)
    assert max(distances(model, x, "expand", reduction, sizes)) <= EXACT
    assert max(distances(model, x, "reduce", reduction, sizes)) >= DIFFERENT


@pytest.mark.parametrize("sizes", [(), (1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_3_pooled_tokens_reduce_is_exact(reduction: str, sizes: Sequence[int]) -> None:
    model = network(nn.Linear(2, 3), nn.Linear(3, 2), PooledTokens())
    x = normal(N, 3, 2)
    assert max(distances(model, x, "reduce", reduction, sizes)) <= EXACT
    assert min(distances(model, x, "expand", reduction, sizes)) >= DIFFERENT


# Fact 4: convolutions without nonlinearity, squared error.

ONE_LAYER: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(2, 2, 3), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 2, 2), (2, 3, 3)),
    "conv2d, stride 2, padding 1": (lambda: nn.Conv2d(2, 2, 3, 2, 1), (2, 4, 4)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 2, 2, bias=False), (2, 3, 3)),
    "conv2d, groups": (lambda: nn.Conv2d(2, 2, 2, groups=2), (2, 3, 3)),
    "conv2d, reflected": (lambda: nn.Conv2d(1, 2, 3, 1, 1, padding_mode="reflect"), (1, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, padding=(1, 0, 0)), (1, 2, 3, 2)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(2, 2, 3, 2, 1, 1), (2, 3)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(2, 2, 2, 2), (2, 2, 2)),
}
per_layer = pytest.mark.parametrize("name", ONE_LAYER)


@per_layer
@pytest.mark.parametrize("sizes", [(), (1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_4_one_layer_and_pooling_reduce_is_exact(
    name: str, reduction: str, sizes: Sequence[int]
) -> None:
    make, example = ONE_LAYER[name]
    model, x = network(make(), Pooled()), normal(N, *example)
    assert distances(model, x, "reduce", reduction, sizes)[0] <= EXACT
    assert distances(model, x, "expand", reduction, sizes)[0] >= DIFFERENT


@per_layer
@pytest.mark.parametrize("sizes", [(), (1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_4_one_layer_and_a_loss_per_location_expand_is_exact(
    name: str, reduction: str, sizes: Sequence[int]
) -> None:
    make, example = ONE_LAYER[name]
    model, x = network(make()), normal(N, *example)
    assert distances(model, x, "expand", reduction, sizes)[0] <= EXACT
    assert distances(model, x, "reduce", reduction, sizes)[0] >= DIFFERENT


@pytest.mark.parametrize("depth", [1, 3])
def test_4_several_1x1_are_exact_at_every_depth(depth: int) -> None:
    layers = [nn.Conv2d(2, 2, 1) for _ in range(depth)]
    x = normal(N, 2, 2, 3)
    assert max(distances(network(*layers, Pooled()), x, "reduce")) <= EXACT
    assert max(distances(network(*layers), x, "expand")) <= EXACT
    assert min(distances(network(*layers, Pooled()), x, "expand")) >= DIFFERENT
    assert min(distances(network(*layers), x, "reduce")) >= DIFFERENT


def circular() -> nn.Module:
    return nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")


def test_4_several_circular_with_pooling_reduce_is_exact_at_every_depth() -> None:
    model, x = network(circular(), circular(), circular(), Pooled()), normal(N, 1, 4, 3)
    assert max(distances(model, x, "reduce")) <= EXACT


def test_4_several_circular_with_a_loss_per_location_expand_is_exact_for_the_last_only() -> None:
    model, x = network(circular(), circular(), circular()), normal(N, 1, 4, 3)
    *before, last = distances(model, x, "expand")
    assert last <= EXACT
    assert min(before) >= DIFFERENT


def test_4_two_zero_padded_with_pooling_reduce_is_exact_for_the_last_only() -> None:
    model = network(nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 1, 3, padding=1), Pooled())
    before, last = distances(model, normal(N, 1, 3, 4), "reduce")
    assert last <= EXACT
    assert before >= DIFFERENT


# Facts 2, 5, 9 for convolutions.


@pytest.mark.parametrize("basis", ["eigen", "corrected"])
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh])
def test_2_one_example_and_one_window_is_exact(
    activation: type[nn.Module], sharing: str, basis: str
) -> None:
    model = network(nn.Conv2d(2, 3, 2), activation(), nn.Flatten(), nn.Linear(3, 3))
    x, y = normal(1, 2, 2, 2), torch.tensor([2])
    found = read_blocks(model, nn.CrossEntropyLoss(), x, y, sharing=sharing, basis=basis)
    assert max(apart(found, model, nn.CrossEntropyLoss(), x, y)) <= EXACT


def conv_net(example: tuple[int, ...] = (1, 4, 4)) -> nn.Sequential:
    return network(
        nn.Conv2d(example[0], 2, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 4, 2, 2, groups=2),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 2, 2, 1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(18, 3),
    )


X, CLASSES = normal(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 2, 2])


@pytest.mark.parametrize("sharing", ["expand", "best"])
def test_5_corrected_is_never_farther_and_has_the_blocks_trace(sharing: str) -> None:
    model, criterion = conv_net(), nn.CrossEntropyLoss()
    read = partial(read_blocks, model, criterion, X, CLASSES, sharing=sharing)
    plain, corrected = read(), read(basis="corrected")
    exact = {layer: oracles.ggn_block(model, criterion, X, CLASSES, layer) for layer in plain}
    for layer in plain:
        better, worse = (distance(b[layer], exact[layer]) for b in (corrected, plain))
        assert better <= worse + EXACT
        assert distance(corrected[layer].trace(), exact[layer].trace()) <= EXACT


@pytest.mark.parametrize("sharing", ["expand", "reduce", "best"])
@pytest.mark.parametrize("basis", ["eigen", "corrected", "factored"])
def test_9_three_steps_do_not_know_how_the_batch_came(basis: str, sharing: str) -> None:
    model, criterion = conv_net(), nn.CrossEntropyLoss()
    damping = 0.1 * scale_of(model, criterion, X, CLASSES)
    three = partial(after, model, criterion, steps=3, basis=basis, sharing=sharing, damping=damping)
    whole = three(X, CLASSES)
    assert bool(torch.isfinite(whole).all())
    for sizes in ((2, 4), (1, 2, 3)):
        assert distance(three(X, CLASSES, sizes), whole) <= 1e-9
    for factor in (1e-2, 30.0):
        assert distance(three(X, CLASSES, factor=factor), whole) <= 1e-9
    assert distance(three(X.repeat(2, 1, 1, 1), CLASSES.repeat(2)), whole) <= 1e-9


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_every_form_of_every_kind_makes_the_contracts_step(case: Case) -> None:
    """One example through one layer, squared error at every position: expand is exact."""
    model, x = network(case.make()), normal(2, *case.example)
    criterion, y = nn.MSELoss(), normal(*model(x).shape, seed=1)
    damping = 0.1 * scale_of(model, criterion, x, y)
    wanted = oracles.damped_steps(model, criterion, x, y, damping)["0"]
    before = oracles.matrix(model, "0")
    optimizer = kn.KFAC(model, criterion, **{**PINNED, "damping": damping})
    backward(model, criterion, x, y)
    optimizer.step()
    assert optimizer.coverage().covered == 1
    assert distance(oracles.matrix(model, "0") - before, wanted) <= 1e-8


# Planted mistakes.


def test_mutants_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    make, example = ONE_LAYER["conv2d, stride 2, padding 1"]
    model, x = network(make()), normal(N, *example)
    real = convolution.second_moment

    def one_percent(*args: Tensor) -> Tensor:
        return 1.01 * real(*args)

    def wrong_order(moment: Tensor, C: int, kernel: int) -> Tensor:
        return moment

    for place, name, mutant in (
        (convolution, "second_moment", one_percent),
        (convolution, "_channels_first", wrong_order),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, mutant)
            assert distances(model, x, "expand")[0] > DIFFERENT
    assert distances(model, x, "expand")[0] <= EXACT
    with monkeypatch.context() as patch:
        first = lambda self, shares=None: base.DenseRows(self.dense()[:, :1])  # noqa: E731
        patch.setattr(base.DenseRows, "averaged", first)
        tokens = network(nn.Linear(2, 3), PooledTokens())
        assert distances(tokens, normal(N, 3, 2), "reduce")[0] > DIFFERENT


def test_unbatched_images_are_one_example() -> None:
    model, criterion = network(nn.Conv2d(2, 2, 2)), nn.MSELoss()
    x, y = normal(2, 3, 3), normal(2, 2, 2, seed=1)
    alone = read_blocks(model, criterion, x, y)["0"]
    batch = read_blocks(model, criterion, x[None], y[None])["0"]
    assert distance(alone, batch) <= EXACT


def test_channels_last_makes_the_same_steps() -> None:
    criterion = nn.CrossEntropyLoss()
    damping = 0.1 * scale_of(conv_net(), criterion, X, CLASSES)
    plain = after(conv_net(), criterion, X, CLASSES, steps=3, damping=damping)
    model = conv_net().to(memory_format=torch.channels_last)
    x = X.to(memory_format=torch.channels_last)
    assert distance(after(model, criterion, x, CLASSES, steps=3, damping=damping), plain) <= 1e-9


# Fact 8: masked locations and tokens.


def test_8_masked_images_are_cut_away() -> None:
    model, criterion = network(nn.Conv2d(1, 3, 3, padding=1)), nn.CrossEntropyLoss()
    y = torch.randint(0, 3, (6, 4, 4), generator=torch.Generator().manual_seed(0))
    masked = y.clone()
    masked[[1, 4]] = -100
    kept = [0, 2, 3, 5]
    damping = scale_of(model, criterion, X, masked)
    cut = after(model, criterion, X[kept], y[kept], damping=damping)
    assert distance(after(model, criterion, X, masked, damping=damping), cut) <= 1e-9


@pytest.mark.parametrize("bias", [True, False])
def test_8_masked_locations_weigh_nothing_in_either_factor(bias: bool) -> None:
    """One unmasked location alone is exact, wherever it is: nothing else can have been counted."""
    model, criterion = network(nn.Conv2d(2, 3, 3, padding=1, bias=bias)), nn.CrossEntropyLoss()
    x = normal(1, 2, 3, 3)
    for place in range(9):
        y = torch.full((1, 9), -100)
        y[0, place] = 1
        y = y.reshape(1, 3, 3)
        found = read_blocks(model, criterion, x, y)
        assert max(apart(found, model, criterion, x, y)) <= EXACT
