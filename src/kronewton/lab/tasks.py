"""What is trained: small problems of different kinds, each fixed by its name and a seed.

The data of a task never changes; the seed draws the initial weights and the order of the batches.
Losses are shown as `(loss - floor) * scale`, in the task's unit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from kronewton.errors import OptionError
from kronewton.lab.images import read_images

DATA_SEED = 2017
NOTE_WIDTHS = (784, 1024, 1024, 1024, 196, 1024, 1024, 1024, 784)
SMALL_WIDTHS = (784, 256, 256, 64, 256, 256, 784)
TEST_IMAGES = 1000


@dataclass(frozen=True)
class Examples:
    """Inputs and targets, one row each."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Examples:
        return Examples(self.x.to(device), self.y.to(device))


@dataclass(frozen=True)
class Problem:
    """A model at its initial weights, its criterion and its data, on one device.

    floor: the least training loss there is, where it is known in closed form.
    """

    model: nn.Module
    criterion: nn.Module
    train: Examples
    test: Examples
    floor: float = 0.0


@dataclass(frozen=True)
class Metric:
    """A second measure of the test set, from the model's output and the target."""

    name: str
    of: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Task:
    """A problem to build, and how long it is worth training.

    batch_size None means the whole training set in every step. target is in the task's unit.
    """

    name: str
    summary: str
    build: Callable[[int, torch.device], Problem]
    steps: int
    target: float
    batch_size: int | None = None
    dtype: torch.dtype = torch.float32
    metric: Metric | None = None
    scale: float = 1.0
    unit: str = "loss"

    def described(self) -> str:
        """The task in one line."""
        batch = "full batch" if self.batch_size is None else f"batch {self.batch_size}"
        return f"{self.name}: {self.summary}, {batch}"

    def shown(self, loss: float, floor: float = 0.0) -> float:
        """A loss of the criterion in the task's unit."""
        return (loss - floor) * self.scale


@dataclass(frozen=True)
class Options:
    """What the command line may change about a task; None leaves it as it is."""

    batch_size: int | None = None
    data: Path | None = None
    small: bool = False
    examples: int | None = None


def find_task(name: str, options: Options | None = None) -> Task:
    """The task of that name. Raises OptionError if there is none or if it lacks an option."""
    options = options or Options()
    if name == "mnist-autoencoder":
        task = _mnist_autoencoder(options)
    elif name not in TASKS:
        allowed = ", ".join([*TASKS, "mnist-autoencoder"])
        raise OptionError(f"there is no task {name!r}; the tasks are {allowed}.")
    elif options.data or options.small or options.examples:
        raise OptionError(f"{name} takes no --data, --small or --examples; mnist-autoencoder does.")
    else:
        task = TASKS[name]
    return task if options.batch_size is None else replace(task, batch_size=options.batch_size)


def _accuracy(output: Tensor, target: Tensor) -> float:
    return float((output.argmax(1) == target).double().mean())


def _sign_accuracy(output: Tensor, target: Tensor) -> float:
    return float(((output > 0) == (target > 0.5)).double().mean())


def _network(widths: tuple[int, ...], kind: type[nn.Module], seed: int) -> nn.Sequential:
    """Linear layers with a nonlinearity between them, at torch's default initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(widths):
            layers += [nn.Linear(d_in, d_out), kind()]
    return nn.Sequential(*layers[:-1])


def _sigmoid_autoencoder(widths: tuple[int, ...], seed: int) -> nn.Sequential:
    """Sigmoid between the layers, a linear output.

    Weights are Xavier normal and biases zero: under torch's default, sigmoids this deep forget
    their input, and all that a first-order method could learn is the mean image.
    """
    model = _network(widths, nn.Sigmoid, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)
    return model


def _digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The 8×8 digits that come with scikit-learn, split 1437 to 360, pixels in [0, 1]."""
    bunch = load_digits()
    x = torch.from_numpy(bunch.data).float() / 16
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(DATA_SEED))
    train, test = order[:1437], order[1437:]
    return x[train], y[train], x[test], y[test]


def _build_digits_mlp(seed: int, device: torch.device) -> Problem:
    x, y, x_test, y_test = _digits()
    model = _network((64, 128, 128, 10), nn.ReLU, seed).to(device)
    train, test = Examples(x, y).to(device), Examples(x_test, y_test).to(device)
    return Problem(model, nn.CrossEntropyLoss(), train, test)


def _build_digits_autoencoder(seed: int, device: torch.device) -> Problem:
    x, _, x_test, _ = _digits()
    model = _sigmoid_autoencoder((64, 32, 16, 8, 16, 32, 64), seed).to(device)
    return Problem(
        model, nn.MSELoss(), Examples(x, x).to(device), Examples(x_test, x_test).to(device)
    )


def _least_squares_floor(data: Examples, bias: bool) -> float:
    """The mean squared error that no linear map of the inputs can beat."""
    x = torch.cat([data.x, torch.ones_like(data.x[:, :1])], 1) if bias else data.x
    residual = data.y - x @ torch.linalg.lstsq(x, data.y).solution
    return float(residual.square().mean())


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _build_linear_regression(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = _normal(generator, 400, 7) * torch.logspace(0, math.log10(0.03), 7, dtype=torch.float64)
    y = x @ _normal(generator, 7, 1) + 0.5 + 0.1 * _normal(generator, 400, 1)
    train, test = Examples(x[:200], y[:200]), Examples(x[200:], y[200:])
    model = _network((7, 1), nn.Identity, seed).to(device, torch.float64)
    floor = _least_squares_floor(train, bias=True)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device), floor)


def _build_deep_linear(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    x = _normal(generator, 768, 16) * torch.logspace(0, -2, 16, dtype=torch.float64)
    y = x @ _normal(generator, 16, 8) + 0.01 * _normal(generator, 768, 8)
    train, test = Examples(x[:512], y[:512]), Examples(x[512:], y[512:])
    model = _network((16, 32, 32, 32, 8), nn.Identity, seed).to(device, torch.float64)
    floor = _least_squares_floor(train, bias=True)
    return Problem(model, nn.MSELoss(), train.to(device), test.to(device), floor)


def _spirals(count: int, generator: torch.Generator) -> Examples:
    """Two arms that wind one and a half times around each other, with a little noise."""
    label = torch.arange(count) % 2
    angle = 3 * math.pi * torch.rand(count, generator=generator).sqrt()
    turned = angle + math.pi * label
    arm = torch.stack([turned.cos(), turned.sin()], 1) * (angle / (3 * math.pi)).unsqueeze(1)
    x = arm + 0.01 * torch.randn(count, 2, generator=generator)
    return Examples(x, label.float().unsqueeze(1))


def _build_two_spirals(seed: int, device: torch.device) -> Problem:
    generator = torch.Generator().manual_seed(DATA_SEED)
    train, test = _spirals(500, generator), _spirals(500, generator)
    model = _network((2, 64, 64, 1), nn.Tanh, seed).to(device)
    return Problem(model, nn.BCEWithLogitsLoss(), train.to(device), test.to(device))


def _mnist_autoencoder(options: Options) -> Task:
    images = read_images(options.data)
    count = min(2000, len(images) - 1) if options.examples is None else options.examples
    if not 1 <= count < len(images):
        raise OptionError(
            f"{count} training examples were asked for; {options.data} has {len(images)} images, "
            f"and at least one is kept for the test: give --examples 1 to {len(images) - 1}."
        )
    x = images[: count + TEST_IMAGES].flatten(1).float() / 255  # (count + tests, 784)
    train, test = Examples(x[:count], x[:count]), Examples(x[count:], x[count:])
    widths = SMALL_WIDTHS if options.small else NOTE_WIDTHS

    def build(seed: int, device: torch.device) -> Problem:
        model = _sigmoid_autoencoder(widths, seed).to(device)
        return Problem(model, nn.MSELoss(), train.to(device), test.to(device))

    return Task(
        "mnist-autoencoder",
        f"{count} MNIST digits through {'-'.join(map(str, widths))}, sigmoid",
        build,
        steps=100,
        target=10.0,
        scale=784.0,
        unit="squared error per image",
    )


_ALL = (
    Task(
        "digits-mlp",
        "8×8 digits through 64-128-128-10, ReLU, cross-entropy",
        _build_digits_mlp,
        steps=200,
        target=0.01,
        batch_size=128,
        unit="cross-entropy",
        metric=Metric("accuracy", _accuracy),
    ),
    Task(
        "digits-autoencoder",
        "8×8 digits through 64-32-16-8-16-32-64, sigmoid",
        _build_digits_autoencoder,
        steps=200,
        target=1.0,
        scale=64.0,
        unit="squared error per image",
    ),
    Task(
        "linear-regression",
        "200×7 with column scales from 1 to 0.03, a bias and noise",
        _build_linear_regression,
        steps=25,
        target=1e-8,
        dtype=torch.float64,
        unit="squared error above least squares",
    ),
    Task(
        "deep-linear",
        "16-32-32-32-8 without nonlinearity, column scales from 1 to 0.01",
        _build_deep_linear,
        steps=100,
        target=1e-4,
        dtype=torch.float64,
        unit="squared error above least squares",
    ),
    Task(
        "two-spirals",
        "two spirals through 2-64-64-1, tanh, binary cross-entropy",
        _build_two_spirals,
        steps=200,
        target=0.01,
        unit="binary cross-entropy",
        metric=Metric("accuracy", _sign_accuracy),
    ),
)
TASKS = {task.name: task for task in _ALL}
