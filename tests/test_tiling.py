"""Where a kernel is laid: windows, positions and the tiling matrix against torch's own modules."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronewton import tiling
from kronewton.errors import ModelError
from kronewton.tiling import Tying, geometry, tied_calls, tied_convolution

pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
]
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
Case = tuple[nn.Module, tuple[int, ...]]


def random_case(rng: random.Random) -> Case:
    """A convolution with any options, and an input that may be too small for it."""
    dims = rng.randint(1, 3)

    def several(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randint(low, high) for _ in range(dims))

    groups = rng.choice([1, 1, 2, 3])
    channels = groups * rng.randint(1, 2), groups * rng.randint(1, 2)
    kernel, stride, dilation, bias = several(1, 4), several(1, 3), several(1, 2), rng.random() < 0.5
    size = several(1, 7 if dims < 3 else 4)
    if rng.random() < 0.4:
        conv = TRANSPOSED[dims - 1](
            *channels, kernel, stride, several(0, 3), several(0, 2), groups, bias, dilation
        )
    else:
        padding = rng.choice(["valid", "same", "number", "number"])
        stride = (1,) * dims if padding == "same" else stride
        pads = several(0, 3) if padding == "number" else padding
        mode = rng.choice(["zeros", "circular", "reflect", "replicate"])
        conv = CONVS[dims - 1](*channels, kernel, stride, pads, dilation, groups, bias, mode)
    return conv, (channels[0], *size)


def runs(conv: nn.Module, shape: tuple[int, ...]) -> bool:
    try:
        conv(torch.zeros(1, *shape))
    except RuntimeError:
        return False
    return True


def cases(count: int, seed: int = 0) -> list[Case]:
    """Convolutions that torch runs."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        case = random_case(rng)
        found += [case] if runs(*case) else []
    return found


def apart(conv: nn.Module, shape: tuple[int, ...]) -> float:
    """How far W x + bias is from conv(x), relatively."""
    tying, x = tied_convolution(conv, shape), torch.randn(2, *shape)
    m, n = tying.shape
    with torch.no_grad():
        y, zero = conv(x).flatten(1), conv(torch.zeros_like(x)).flatten(1)
        W = (tying.matrix() @ conv.weight.flatten()).reshape(n, m).mT
        # The bias may be all there is, where a kernel only meets padding.
        return float((x.flatten(1) @ W.mT + zero - y).norm() / (y.norm() or 1.0))


def test_any_convolution_is_its_tiling_matrix() -> None:
    assert max(apart(*case) for case in cases(200)) <= 1e-12


@pytest.mark.slow
def test_so_do_thousands_more() -> None:
    assert max(apart(*case) for case in cases(4000)) <= 1e-12


def test_what_torch_runs_is_taken_and_nothing_else() -> None:
    rng = random.Random(1)
    for _ in range(400):
        conv, shape = random_case(rng)
        try:
            tied_convolution(conv, shape)
        except ModelError:
            assert not runs(conv, shape), (conv, shape)
        else:
            assert runs(conv, shape), (conv, shape)


def test_windows_are_torchs_unfold() -> None:
    conv, x = nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2), (1, 2)), torch.randn(4, 2, 6, 5)
    cut = geometry(conv, (6, 5))
    windows = cut.windows(cut.prepared(x))  # (N, C, 3, 7, 3, 2)
    unfolded = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)
    assert torch.equal(windows.permute(0, 1, 4, 5, 2, 3).reshape(unfolded.shape), unfolded)
    assert cut.locations((6, 5)) == unfolded.shape[2]


def test_positions_add_up_to_the_matrix() -> None:
    """W = Σ_s R_s' U C_s, with R_s and C_s as they read identity matrices."""
    for conv, shape in cases(30, seed=2):
        tying, u = tied_convolution(conv, shape), conv.weight.detach().flatten()
        m, n = tying.shape
        R, C = tying.made(torch.eye(m)), tying.read(torch.eye(n))
        W = torch.einsum("gsom,goi,gsin->mn", R, tying.small(u), C)
        assert torch.allclose(W, (tying.matrix() @ u).reshape(n, m).mT, rtol=0, atol=1e-14)
        assert torch.equal(tying.flat(tying.small(u)), u)


def test_calls_stand_on_the_diagonal() -> None:
    linear, tying = nn.Linear(3, 2, bias=False), tied_calls(2, 3, 4)
    x, u = torch.randn(5, 4, 3), linear.weight.detach().flatten()
    m, n = tying.shape
    W = (tying.matrix() @ u).reshape(n, m).mT
    assert torch.equal(W, torch.block_diag(*[linear.weight.detach()] * 4))
    assert torch.allclose(x.flatten(1) @ W.mT, linear(x).detach().flatten(1), atol=1e-14)
    assert torch.equal(tying.flat(tying.small(u)), u)


def test_a_matrix_of_ones_coalesced_in_the_dtype_asked_for() -> None:
    K = tied_convolution(nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)).matrix(torch.float32)
    assert K.is_coalesced()
    assert K.dtype == torch.float32
    assert K.shape == (3 * 16 * 2 * 16, 2 * 3 * 9)
    assert set(K.values().tolist()) == {1.0}


def test_a_window_that_wraps_around_reads_one_input_twice() -> None:
    """Circular, size 2, kernel 3: two entries of the kernel meet in one entry of W."""
    conv = nn.Conv1d(1, 1, 3, padding=1, padding_mode="circular")
    K = tied_convolution(conv, (1, 2)).matrix().to_dense()
    assert K.tolist() == [[0, 1, 0], [1, 0, 1], [1, 0, 1], [0, 1, 0]]
    assert apart(conv, (1, 2)) <= 1e-12


def test_a_batch_size_in_front_is_ignored() -> None:
    conv = nn.Conv2d(2, 3, 3)
    one, batch = tied_convolution(conv, (2, 4, 4)), tied_convolution(conv, (7, 2, 4, 4))
    assert one.shape == batch.shape
    assert torch.equal(one.inputs, batch.inputs)


def test_more_may_be_cut_off_than_there_was_at_first() -> None:
    """A transposed convolution whose padding removes all inputs: only zeros are left."""
    conv = nn.ConvTranspose1d(1, 1, 1, stride=6, padding=2, output_padding=5)
    tying = tied_convolution(conv, (1, 1))
    assert tying.shape == (2, 1)
    assert tying.matrix().values().numel() == 0


# Planted mistakes: each must move what the tests above compare.


def shifted(tying: Tying) -> Tying:
    return Tying(tying.shape, tying.inputs.roll(1, 1), tying.outputs, tying.entries)


def flipped(tying: Tying) -> Tying:
    return Tying(tying.shape, tying.inputs, tying.outputs, tying.entries.flip(2))


def transposed(tying: Tying) -> Tying:
    return Tying(tying.shape[::-1], tying.outputs, tying.inputs, tying.entries.mT)


@pytest.mark.parametrize("mistake", [shifted, flipped, transposed])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_comparison_catches(
    mistake: Callable[[Tying], Tying], kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    conv = kind(2, 2, 3, padding=1)  # W is square: only its numbers can tell
    assert apart(conv, (2, 4, 4)) <= 1e-12
    wrong = mistake(tied_convolution(conv, (2, 4, 4)))
    monkeypatch.setitem(apart.__globals__, "tied_convolution", lambda conv, shape: wrong)
    assert apart(conv, (2, 4, 4)) > 0.1


def test_comparison_catches_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = Tying.matrix
    monkeypatch.setattr(Tying, "matrix", lambda *given: 1.01 * matrix(*given))
    assert apart(nn.Conv2d(2, 2, 3, bias=False), (2, 4, 4)) > 1e-3


# What is refused, and in which words.


@pytest.mark.parametrize(
    ("conv", "shape", "message"),
    [
        (nn.Linear(3, 2), (3,), r"a module of type Linear is given; nn.Conv1d.*see tied_calls"),
        (nn.LazyConv2d(3, 3), (2, 5, 5), r"LazyConv2d has a weight without numbers \(lazy, or"),
        (
            nn.Conv2d(2, 3, 3, device="meta"),
            (2, 5, 5),
            r"Conv2d has a weight without numbers.*to_empty\(device=…\)",
        ),
        (
            nn.Conv2d(2, 3, 3),
            (3, 5, 5),
            r"=\(3, 5, 5\) is given for Conv2d.*\(2, H, W\)",
        ),
        (nn.Conv2d(2, 3, 3), (5, 5), r"input_shape=\(5, 5\) is given.*with a batch size in front"),
        (nn.Conv2d(2, 3, 3), (1, 1, 2, 5, 5), r"input_shape=\(1, 1, 2, 5, 5\) is given"),
        (nn.Conv1d(2, 3, 3), (2, 0), r"input_shape=\(2, 0\) is given .*; \(2, W\) is allowed"),
        (nn.Conv3d(2, 3, 3), (), r"input_shape=\(\) is given .*; \(2, D, H, W\) is allowed"),
        (nn.Conv2d(2, 3, 3), (2, 2, 5), r"\(2, 2, 5\) is too small .*from \(2, 3, 3\) on is allow"),
        (
            nn.Conv2d(2, 3, 3, padding=(0, 2), padding_mode="reflect"),
            (2, 5, 2),
            r"is too small .*from \(2, 3, 3\) on is allowed",
        ),
        (
            nn.Conv1d(2, 3, 3, padding=4, padding_mode="circular"),
            (2, 3),
            r"is too small .*from \(2, 4\) on is allowed. Give a larger input, or",
        ),
        (nn.ConvTranspose1d(2, 3, 3, padding=3), (2, 3), r"is too small .*from \(2, 5\) on"),
        (
            nn.ConvTranspose1d(2, 3, 3, output_padding=1),
            (2, 3),
            r"has an output_padding as large as its stride and its dilation.*Make it smaller",
        ),
    ],
)
def test_convolutions_without_a_tying(
    conv: nn.Module, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        tied_convolution(conv, shape)


def test_a_lazy_convolution_is_taken_once_it_has_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        conv = nn.LazyConv2d(3, 3)
        conv(torch.randn(1, 2, 5, 5))
    assert apart(conv, (2, 5, 5)) <= 1e-12


def test_too_large_a_matrix_is_refused_before_it_is_built() -> None:
    """Here 20 bytes an entry: two indices and a float32."""
    conv = nn.Conv2d(64, 64, 3, padding=1, dtype=torch.float32)
    size = 20 * 64 * 64 * 9 * 224 * 224
    with pytest.raises(ModelError, match=rf"would take {size:,} bytes \(34.5 GiB\); up to 4 GiB"):
        tied_convolution(conv, (64, 224, 224))
    with pytest.raises(ModelError, match=r"Give a smaller input, or products with the curvature"):
        tied_calls(10**4, 10**4, 10**2)


def test_the_size_foreseen_is_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    conv = nn.Conv2d(2, 3, 3)
    K = tied_convolution(conv, (2, 5, 5)).matrix()
    size = K.values().numel() * (16 + 8)
    monkeypatch.setattr(tiling, "LIMIT", size)
    tied_convolution(conv, (2, 5, 5))
    monkeypatch.setattr(tiling, "LIMIT", size - 1)
    with pytest.raises(ModelError, match=f"would take {size:,} bytes"):
        tied_convolution(conv, (2, 5, 5))


@pytest.mark.parametrize("sides", [(0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_calls_of_nothing(sides: tuple[int, int, int]) -> None:
    with pytest.raises(ModelError, match=r"calls=\d are given; whole numbers from 1 up are"):
        tied_calls(*sides)
