"""The problems behind the tasks: data that never changes, and a model drawn by a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from kronewton.lab import texts
from kronewton.lab.networks import (
    ELBO,
    CharGPT,
    CharLSTM,
    DigitsResNet,
    DigitsUNet,
    DigitsVAE,
    DigitsViT,
)

DATA_SEED = 2017
WIDTH = 8  # channels of the residual network's first stage
CONTEXT = 64  # characters that a model of text sees


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, one row each."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def every(self, stride: int) -> Examples:
        """One of so many rows, from all parts of the set."""
        return Examples(self.x[::stride], self.y[::stride])

    def to(self, device: torch.device) -> Examples:
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Problem:
    """A model at its initial weights, its criterion and its data, on one device.

    floor: the criterion's least training loss, where it is known in closed form. measured: the
    training examples on which a run is evaluated, always the same; None means all of them. terms:
    the loss modules within the criterion, where it adds up several.
    """

    model: nn.Module
    criterion: nn.Module
    train: Examples
    test: Examples
    floor: float = 0.0
    measured: Examples | None = None
    terms: tuple[nn.Module, ...] = ()


@contextmanager
def drawn_by(seed: int) -> Iterator[None]:
    """Draw torch's default initial weights by a seed, and leave the random stream alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def network(widths: tuple[int, ...], kind: type[nn.Module], seed: int) -> nn.Sequential:
    """Linear layers with a nonlinearity between them, at torch's default initial weights."""
    with drawn_by(seed):
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), kind()]
    return nn.Sequential(*layers[:-1])


def sigmoid_autoencoder(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """A sigmoid after every layer, the last one too, as in the note.

    Weights are Xavier normal and biases zero: under torch's default, sigmoids this deep forget
    their input, and all that a first-order method could learn is the mean image.
    """
    model = network(widths, nn.Sigmoid, seed).append(nn.Sigmoid())
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


Split = tuple[Tensor, Tensor, Tensor, Tensor]  # x and y to train on, x and y to test on


def _digits() -> Split:
    """The 8×8 digits that come with scikit-learn, split 1437 to 360, pixels in [0, 1]."""
    from sklearn.datasets import load_digits  # no command that only prints waits for it

    bunch = load_digits()
    x = torch.from_numpy(bunch.data).float() / 16
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(DATA_SEED))
    train, test = order[:1437], order[1437:]
    return x[train], y[train], x[test], y[test]


def _classified(model: nn.Module, split: Split, device: torch.device) -> Problem:
    """Tell the classes of digits apart."""
    x, y, x_test, y_test = split
    train, test = Examples(x, y).to(device), Examples(x_test, y_test).to(device)
    return Problem(model.to(device), nn.CrossEntropyLoss(), train, test)


def digits_mlp(seed: int, device: torch.device) -> Problem:
    return _classified(network((64, 128, 128, 10), nn.ReLU, seed), _digits(), device)


def digits_autoencoder(seed: int, device: torch.device) -> Problem:
    x, _, x_test, _ = _digits()
    model = sigmoid_autoencoder((64, 32, 16, 8, 16, 32, 64), seed).to(device)
    return Problem(
        model, nn.MSELoss(), Examples(x, x).to(device), Examples(x_test, x_test).to(device)
    )


def _digit_images() -> Split:
    x, y, x_test, y_test = _digits()
    return x.view(-1, 1, 8, 8), y, x_test.view(-1, 1, 8, 8), y_test


def _cnn(normalised: bool, seed: int) -> nn.Module:
    """Two convolutions, each with batch normalisation behind it or not, and a linear layer."""

    def norm(channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(channels)] if normalised else []

    with drawn_by(seed):
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            *norm(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),  # (N, 32, 4, 4)
            *norm(32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


def digits_cnn(seed: int, device: torch.device) -> Problem:
    return _classified(_cnn(False, seed), _digit_images(), device)


def digits_bn_cnn(seed: int, device: torch.device) -> Problem:
    return _classified(_cnn(True, seed), _digit_images(), device)


def digits_resnet(seed: int, device: torch.device) -> Problem:
    with drawn_by(seed):
        model = DigitsResNet(width=WIDTH, blocks=3, classes=10)
    return _classified(model, _digit_images(), device)


def digits_vae(seed: int, device: torch.device) -> Problem:
    x, _, x_test, _ = _digits()
    with drawn_by(seed):
        model = DigitsVAE(hidden=64, code=8).to(device)
    criterion = ELBO(pixels=64)
    train, test = Examples(x, x).to(device), Examples(x_test, x_test).to(device)
    return Problem(model, criterion, train, test, terms=(criterion.pixel, criterion.divergence))


def digits_conv_autoencoder(seed: int, device: torch.device) -> Problem:
    x, _, x_test, _ = _digit_images()
    with drawn_by(seed):
        model = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(16, 4, 3, stride=2, padding=1),  # (N, 4, 2, 2), the code
            nn.Tanh(),
            nn.ConvTranspose2d(4, 16, 4, stride=2, padding=1),
            nn.Tanh(),
            nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1),
        ).to(device)
    train, test = Examples(x, x).to(device), Examples(x_test, x_test).to(device)
    return Problem(model, nn.MSELoss(), train, test)


def digits_vit(seed: int, device: torch.device) -> Problem:
    with drawn_by(seed):
        model = DigitsViT(width=64, heads=4, depth=4, classes=10)
    return _classified(model, _digit_images(), device)


def _noisy(clean: Tensor, seed: int) -> Examples:
    """Images under noise of deviation 0.3, drawn once, and the images themselves."""
    generator = torch.Generator().manual_seed(seed)
    return Examples(clean + 0.3 * torch.randn(clean.shape, generator=generator), clean)


def digits_unet(seed: int, device: torch.device) -> Problem:
    x, _, x_test, _ = _digit_images()
    with drawn_by(seed):
        model = DigitsUNet(width=16).to(device)
    train, test = _noisy(x, DATA_SEED), _noisy(x_test, DATA_SEED + 1)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device))


def _on_text(model: nn.Module, device: torch.device) -> Problem:
    """Predict every next character.

    128 windows of all parts of the text are 8192 predictions: enough to tell two runs apart, and
    100 evaluations take less time than the training between them.
    """
    train, test = (
        Examples(cut[:, :-1], cut[:, 1:]).to(device)
        for cut in texts.windows(CONTEXT, train=4096, test=192)
    )
    measured = train.every(32)
    return Problem(model.to(device), nn.CrossEntropyLoss(), train, test, measured=measured)


def char_gpt(seed: int, device: torch.device) -> Problem:
    with drawn_by(seed):
        model = CharGPT(texts.CHARACTERS, CONTEXT, width=128, heads=4, depth=3)
    return _on_text(model, device)


def char_lstm(seed: int, device: torch.device) -> Problem:
    with drawn_by(seed):
        model = CharLSTM(texts.CHARACTERS, embedded=64, hidden=128, depth=2)
    return _on_text(model, device)


def _spirals(count: int, generator: torch.Generator) -> Examples:
    """Two arms that wind one and a half times around each other, with a little noise."""
    label = torch.arange(count) % 2
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    turned = angle + math.pi * label
    arm = torch.stack([turned.cos(), turned.sin()], 1) * (angle / (3 * math.pi)).unsqueeze(1)
    x = arm + 0.01 * torch.randn(count, 2, generator=generator)
    return Examples(x, label.float().unsqueeze(1))


def two_spirals(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    train, test = _spirals(500, generator), _spirals(500, generator)
    model = network((2, 64, 64, 1), nn.Tanh, seed).to(device)
    return Problem(model, nn.BCEWithLogitsLoss(), train.to(device), test.to(device))
