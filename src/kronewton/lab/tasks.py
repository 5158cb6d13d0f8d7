"""What is trained: small problems of different kinds, each fixed by its name and a seed.

The data of a task never changes; the seed draws the initial weights and the order of batches.
A run is trained on the criterion's loss times `scale`, which is in the task's unit; what is shown
is the same loss above its floor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kronewton.errors import OptionError
from kronewton.lab import numeric, problems
from kronewton.lab.images import read_images
from kronewton.lab.problems import Examples, Problem

NOTE_WIDTHS = (784, 1024, 1024, 1024, 196, 1024, 1024, 1024, 784)
SMALL_WIDTHS = (784, 256, 256, 64, 256, 256, 784)
TEST_IMAGES = 1000
MNIST = MNIST_LARGE, MNIST_SMALL = ("mnist-autoencoder", "mnist-autoencoder-small")


@dataclass(frozen=True)
class Metric:
    """A second measure of the test set, from the model's output and the target."""

    name: str
    of: Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Task:
    """A problem to build, and how long it is worth training.

    batch_size None means the whole training set in every step. targets: training losses to
    reach, in the task's unit, the last one the lowest.
    scale: what the criterion's loss is multiplied with, for torch's mean over all outputs has a
    gradient so small that the absolute epsilons of Adam and its kin would hold them back.
    explained: of how many examples `explain` draws its ladder, where a batch would take minutes.
    """

    name: str
    summary: str
    build: Callable[[int, torch.device], Problem]
    steps: int
    targets: tuple[float, ...]
    batch_size: int | None = None
    dtype: torch.dtype = torch.float32
    metric: Metric | None = None
    scale: float = 1.0
    unit: str = "loss"
    explained: int | None = None

    @property
    def target(self) -> float:
        """The last of the targets."""
        return self.targets[-1]

    def described(self) -> str:
        """The task in one line."""
        batch = "full batch" if self.batch_size is None else f"batch {self.batch_size}"
        return f"{self.name}: {self.summary}, {batch}"


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
    if name in MNIST:
        task = _mnist_autoencoder(replace(options, small=options.small or name == MNIST_SMALL))
    elif name not in TASKS:
        allowed = ", ".join([*TASKS, *MNIST])
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
        model = problems.sigmoid_autoencoder(widths, seed).to(device)
        return Problem(model, nn.MSELoss(), train.to(device), test.to(device))

    return Task(
        MNIST_SMALL if options.small else MNIST_LARGE,
        f"{count} MNIST digits through {'-'.join(map(str, widths))}, all sigmoid",
        build,
        steps=500,
        targets=(2.0, 1.0),
        scale=392.0,
        unit="half the squared error per image",
    )


_ALL = (
    Task(
        "digits-mlp",
        "8×8 digits through 64-128-128-10, ReLU, cross-entropy",
        problems.digits_mlp,
        steps=200,
        targets=(0.1, 0.01),
        batch_size=128,
        unit="cross-entropy",
        metric=Metric("accuracy", _accuracy),
    ),
    Task(
        "digits-autoencoder",
        "8×8 digits through 64-32-16-8-16-32-64, all sigmoid",
        problems.digits_autoencoder,
        steps=200,
        targets=(0.5,),
        scale=32.0,
        unit="half the squared error per image",
    ),
    Task(
        "digits-cnn",
        "8×8 digits through two convolutions of 16 and 32 channels, ReLU, cross-entropy",
        problems.digits_cnn,
        steps=200,
        targets=(0.01,),
        batch_size=128,
        unit="cross-entropy",
        metric=Metric("accuracy", _accuracy),
    ),
    Task(
        "digits-bn-cnn",
        "8×8 digits through two convolutions of 16 and 32 channels with batch normalisation",
        problems.digits_bn_cnn,
        steps=100,
        targets=(0.1, 0.01),
        batch_size=128,
        unit="cross-entropy",
        metric=Metric("accuracy", _accuracy),
    ),
    Task(
        "digits-resnet",
        "8×8 digits through a ResNet-20 of 8, 16 and 32 channels, batch normalisation",
        problems.digits_resnet,
        steps=150,
        targets=(0.1, 0.01),
        batch_size=128,
        unit="cross-entropy",
        metric=Metric("accuracy", _accuracy),
        explained=16,
    ),
    Task(
        "digits-vae",
        "8×8 digits through a variational autoencoder, 64-64-8 and back, tanh",
        problems.digits_vae,
        steps=200,
        targets=(25.5, 24.8),
        batch_size=128,
        unit="negative evidence bound per image",
    ),
    Task(
        "digits-conv-autoencoder",
        "8×8 digits through two convolutions to 4 maps of 2×2 and back, tanh",
        problems.digits_conv_autoencoder,
        steps=200,
        targets=(1.0,),
        scale=64.0,
        unit="squared error per image",
    ),
    Task(
        "linear-regression",
        "200×7 with column scales from 1 to 0.03, a bias and noise",
        numeric.linear_regression,
        steps=25,
        targets=(1e-8,),
        dtype=torch.float64,
        unit="squared error above least squares",
    ),
    Task(
        "deep-linear",
        "16-32-32-32-8 without nonlinearity, column scales from 1 to 0.01",
        numeric.deep_linear,
        steps=100,
        targets=(1e-2, 1e-4),
        dtype=torch.float64,
        unit="squared error above least squares",
    ),
    Task(
        "circular-deconvolution",
        "blurred 16×16 colour images through one circular 5×5 convolution, nearly singular",
        numeric.circular_deconvolution,
        steps=25,
        targets=(1e-8,),
        dtype=torch.float64,
        scale=3.0,
        unit="squared error per location above least squares",
    ),
    Task(
        "smooth-regression",
        "sin πx · sin 2πy on a square through 2-64-64-64-1, tanh",
        numeric.smooth_regression,
        steps=400,
        targets=(1e-4, 1e-5),
        dtype=torch.float64,
        unit="squared error",
    ),
    Task(
        "scaled-logistic",
        "1000×40 with column scales from 1 to 0.001, overlapping classes",
        numeric.scaled_logistic,
        steps=100,
        targets=(1e-4, 1e-8),
        dtype=torch.float64,
        unit="binary cross-entropy above its least",
        metric=Metric("accuracy", _sign_accuracy),
    ),
    Task(
        "two-spirals",
        "two spirals through 2-64-64-1, tanh, binary cross-entropy",
        problems.two_spirals,
        steps=200,
        targets=(0.01,),
        unit="binary cross-entropy",
        metric=Metric("accuracy", _sign_accuracy),
    ),
    Task(
        "digits-vit",
        "8×8 digits in patches of 2×2 through four transformer layers of width 64, cross-entropy",
        problems.digits_vit,
        steps=200,
        targets=(0.1, 0.01),
        batch_size=128,
        unit="cross-entropy",
        metric=Metric("accuracy", _accuracy),
        explained=16,
    ),
    Task(
        "digits-unet",
        "8×8 digits freed from noise by a U-Net of 16, 32 and 64 channels, batch normalisation",
        problems.digits_unet,
        steps=200,
        targets=(1.0,),
        batch_size=128,
        scale=64.0,
        unit="squared error per image",
        explained=16,
    ),
    Task(
        "char-gpt",
        "Python's help texts, next character after up to 64, three transformer layers of width 128",
        problems.char_gpt,
        steps=300,
        targets=(2.0, 1.7),
        batch_size=32,
        unit="cross-entropy per character",
        metric=Metric("accuracy", _accuracy),
        explained=2,
    ),
    Task(
        "char-lstm",
        "Python's help texts, next character after up to 64, two LSTM layers of width 128",
        problems.char_lstm,
        steps=300,
        targets=(1.6, 1.2),
        batch_size=32,
        unit="cross-entropy per character",
        metric=Metric("accuracy", _accuracy),
    ),
)
TASKS = {task.name: task for task in _ALL}
