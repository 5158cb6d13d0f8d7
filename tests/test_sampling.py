"""Statistics from a small pass of some examples are those that the training's own pass has."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import kronewton as kn
from kronewton import sampling
from kronewton.part import Part
from kronewton.replay import ModelCall
from kronewton.sampling import Sampler

N, D = 1200, 5  # examples: a quarter of them has more rows than are enough


class Named(nn.Module):
    """Takes its input by name, in a nest, and returns a dictionary of time steps."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(D, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, given: dict[str, list[Tensor]]) -> dict[str, Tensor]:
        return {"logits": self.head(self.lstm(given["x"][0])[0])}


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(D, 6), *between, nn.Tanh(), nn.Linear(6, 3))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * D, 3),
    )  # fmt: skip


def plain(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def by_name(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model(given={"x": [torch.stack([x, x.flip(1)], 1)]})["logits"]
    return found.flatten(0, 1)  # the criterion has the positions of all examples in a row


class Twice(nn.Module):
    """One layer called two times: two positions of an example."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(torch.tanh(self.body(x)))))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "mlp": (mlp, plain),
    "convolution": (conv, plain),
    "LSTM, by name, flattened": (Named, by_name),
    "twice": (Twice, plain),
}


class Training:
    """A loop with new examples in every step, as noise has it."""

    def __init__(
        self, make: Callable[[], nn.Module], called: Any = plain, examples: int = N, **options: Any
    ) -> None:
        torch.manual_seed(0)
        self.model, self.called, self.examples = make(), called, examples
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = kn.KFAC(self.model, self.criterion, **{"basis": "adam", **options})
        self.captured: list[bool] = []  # by the training's own pass, step by step

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(step)
        x = torch.randn(self.examples, D)
        return x, (x[:, :3] + 0.5 * torch.randn_like(x[:, :3])).argmax(1)

    def step(self, step: int, after_forward: Callable[[Tensor], Any] | None = None) -> None:
        x, y = self.batch(step)
        self.captured.append(self.optimizer._watcher.capturing)
        output = self.called(self.model, x)
        y = y.repeat_interleave(len(output) // len(x))
        self.optimizer.zero_grad()
        self.criterion(output, y).backward()
        if after_forward is not None:
            after_forward(x)
        self.optimizer.step()

    def steps(self, count: int) -> Training:
        for step in range(count):
            self.step(step)
        return self


def factors(training: Training) -> dict[str, list[Tensor]]:
    return {term: [f.A.mean, f.B.mean] for term, f in training.optimizer._curvature.factors.items()}


@pytest.fixture(autouse=True)
def every_fourth_step(monkeypatch):
    """Renewals as on a network where they are cheap."""
    monkeypatch.setattr("kronewton.curvature.DEAR", math.inf)


@pytest.fixture
def sampled(monkeypatch) -> list[bool]:
    """What came of each sample."""
    found: list[bool] = []
    own = Sampler.sample

    def counted(self: Sampler, *given: Any) -> bool:
        found.append(own(self, *given))
        return found[-1]

    monkeypatch.setattr(Sampler, "sample", counted)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_sample_has_the_statistics_of_the_whole_pass(case, sampled, monkeypatch):
    one = Training(*CASES[case], lr=0.001).steps(14)
    assert sampled == [True] * 3  # 4, 8 and 12
    assert one.captured == [step in (0, 1, 2) for step in range(14)]
    monkeypatch.setattr(Sampler, "pays", lambda *_: False)
    other = Training(*CASES[case], lr=0.001).steps(14)
    assert len(sampled) == 3
    assert sum(other.captured) == 6
    for term, wanted in factors(other).items():
        for A, B in zip(factors(one)[term], wanted, strict=True):
            assert torch.allclose(A, B, rtol=1e-3, atol=1e-3 * float(B.abs().max()))
    assert one.optimizer._curvature.rows == other.optimizer._curvature.rows


def test_factors_that_a_sample_shifts_are_noticed(sampled, monkeypatch):
    """The comparison above sees examples that are taken from another place."""
    own = sampling._cut
    monkeypatch.setattr(sampling, "_same", lambda *_: True)  # which would have refused it
    monkeypatch.setattr(sampling, "_cut", lambda v, n, w: own(v, n, slice(0, w.stop - w.start)))
    one = Training(mlp, lr=0.001).steps(14)
    monkeypatch.setattr(Sampler, "pays", lambda *_: False)
    other = Training(mlp, lr=0.001).steps(14)
    (A, _), (B, _) = (factors(training)["0"] for training in (one, other))
    assert not torch.allclose(A, B, rtol=1e-3, atol=1e-3 * float(B.abs().max()))


@pytest.mark.parametrize(
    "module",
    [nn.BatchNorm1d(6, track_running_stats=False), nn.Dropout(0.1), nn.AlphaDropout(0.1)],
    ids=["batch normalisation without running moments", "dropout", "alpha dropout"],
)
def test_what_mixes_or_draws_is_captured_in_its_own_pass(module, sampled):
    training = Training(lambda: mlp(copy.deepcopy(module))).steps(9)
    assert not sampled
    assert sum(training.captured) == 5
    if not isinstance(module, nn.BatchNorm1d):
        training.model.eval()  # then it draws nothing
        training.captured.clear()
        training.steps(9)
        assert not any(training.captured[1:])
        assert sampled


def normalised(momentum: float | None) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, D)), nn.Conv1d(1, 4, 3, padding=1),
        nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.Flatten(), nn.Linear(4 * D, 6),
        nn.BatchNorm1d(6, momentum=momentum), nn.Tanh(), nn.Linear(6, 3),
    )  # fmt: skip


@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
def test_batch_normalisation_has_the_moments_of_the_whole_batch(momentum, sampled, monkeypatch):
    one = Training(lambda: normalised(momentum), lr=0.001).steps(14)
    assert sampled == [True] * 3
    monkeypatch.setattr(Sampler, "pays", lambda *_: False)
    other = Training(lambda: normalised(momentum), lr=0.001).steps(14)
    for term, (A, B) in factors(other).items():
        own = factors(one)[term]
        assert torch.allclose(own[0], A, rtol=0.02, atol=0.02 * float(A.abs().max()))
        assert (own[1] - B).norm() < 0.1 * B.norm()  # what flows back through them is left out
    for a, b in zip(one.model.buffers(), other.model.buffers(), strict=True):
        assert torch.allclose(a, b, rtol=0.01, atol=1e-3)


def test_the_running_moments_stay_as_the_training_left_them(sampled):
    training = Training(lambda: normalised(0.1)).steps(4)
    kept: list[Tensor] = []
    training.step(4, lambda _: kept.extend(b.clone() for b in training.model.buffers()))
    assert sampled == [True]
    assert all(torch.equal(a, b) for a, b in zip(training.model.buffers(), kept, strict=True))
    assert all(module.training for module in training.model.modules())


class Again(nn.Module):
    """One batch normalisation for two places: its running moments have followed both."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(D, D), nn.BatchNorm1d(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.body(self.norm(x)))))


@pytest.mark.parametrize("make", [Again, lambda: normalised(0.0)], ids=["twice", "fixed"])
def test_moments_that_are_not_to_be_had_are_missed(make, sampled):
    training = Training(make).steps(9)
    assert sampled == [False] * 2
    assert sum(training.captured) == 4


def test_training_gradients_as_rows_are_captured_in_their_own_pass(sampled):
    torch.manual_seed(0)
    model, criterion = mlp(), nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, None, basis="adam", lr=0.01)  # which makes it the empirical Fisher
    for _ in range(10):
        optimizer.zero_grad()
        output, y = model(torch.randn(N, D)), torch.randint(3, (N,))
        optimizer.observe(output, y, criterion)
        criterion(output, y).backward()
        optimizer.step()
    assert not sampled


def test_few_examples_are_captured_in_their_own_pass(sampled):
    training = Training(mlp, examples=400).steps(9)
    assert not sampled
    assert sum(training.captured) == 5


class Centred(nn.Module):
    """Subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return h - h.mean(0) + h[0]


class Masked(nn.Module):
    """With a square matrix for all positions that has as many rows as there are examples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mask = mlp(), torch.eye(N)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return mask @ self.body(x)


class Refusing(nn.Module):
    """Takes batches of one size only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != N:
            raise ValueError("another size")
        return self.body(x)


class Drawing(nn.Module):
    """Dropout by a function, which no module shows."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(F.dropout(x, 0.1))


@pytest.mark.parametrize(
    ("make", "called"),
    [
        (Centred, plain),
        (Masked, lambda model, x: model(x, torch.eye(len(x)))),
        (Refusing, plain),
        (Drawing, plain),
    ],
    ids=["centred", "masked", "refusing", "drawing"],
)
def test_where_a_sample_is_another_function_the_next_pass_is_captured(make, called, sampled):
    training = Training(make, called).steps(10)
    assert sampled == [False] * 2
    assert [i for i, own in enumerate(training.captured) if own] == [0, 1, 2, 5, 9]


class Attributes(dict):
    """A dictionary whose items are attributes, as many loaders' batches are."""

    __getattr__ = dict.__getitem__


class Asking(nn.Module):
    """Takes such a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()

    def forward(self, given: Attributes) -> Tensor:
        return self.body(given.x)


class Strict(Refusing):
    """Refuses with an error of its own."""

    def forward(self, x: Tensor) -> Tensor:
        try:
            return super().forward(x)
        except ValueError as error:
            raise Exception("of no kind") from error


class TimeFirst(nn.Module):
    """What stands first is time: the first outputs are those of the first steps alone."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(D, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(40, -1, D))[0])


class Offset(Drawing):
    """Draws, and its outputs are all but the same: a thousand."""

    def forward(self, x: Tensor) -> Tensor:
        return 1000 + super().forward(x)


class Features(nn.Module):
    """Is called for its features, and the loop calls the head, or another module first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(D, D), nn.Linear(D, D)
        self.head = nn.Linear(D, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(x))


class Tokens(nn.Module):
    """The loop multiplies with its table: a matrix that is used in ways that nobody sees."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.body = nn.Embedding(3, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.body(self.table(x[:, :3].argmax(1)) + x))


def several_times(model: nn.Module, x: Tensor) -> Tensor:
    for _ in range(3):
        x = model(x)
    return x


ELSEWHERE = {
    "by attribute": (Asking, lambda model, x: model(Attributes(x=x))),
    "an error of its own": (Strict, plain),
    "time first": (TimeFirst, lambda model, x: model(x).flatten(0, 1)),
    "drawing beside a constant": (Offset, plain),
    "a head that the loop calls": (
        Features,
        lambda model, x: model.head(model(model.first(x).data)),
    ),
    "a table that the loop uses": (Tokens, lambda model, x: model(x) @ model.table.weight.T),
    "several times": (lambda: nn.Sequential(nn.Linear(D, D), nn.Tanh()), several_times),
}


@pytest.mark.filterwarnings("ignore::kronewton.errors.KronewtonWarning")
@pytest.mark.parametrize("case", ELSEWHERE)
def test_what_a_pass_of_the_model_does_not_show_is_captured_in_the_next(case, sampled):
    training = Training(*ELSEWHERE[case], lr=1e-4).steps(18)
    assert sampled == [False] * 4  # one for each turn of the examples
    assert [i for i, own in enumerate(training.captured) if own] == [0, 1, 2, 5, 9, 13, 17]


def test_a_layer_before_the_model_is_captured_in_its_own_pass(sampled):
    training = Training(Features, lambda model, x: model(model.first(x)), lr=1e-4).steps(10)
    assert sampled == [False] * 2
    assert sum(training.captured) == 5


def test_a_batch_with_fewer_rows_than_are_enough_is_no_sample(sampled):
    training = Training(mlp).steps(4)
    training.examples = 20  # the last of an epoch
    training.step(4)
    assert sampled == [False]
    training.examples = N
    training.step(5)
    assert training.captured[-1]


def test_weights_go_with_their_examples(sampled, monkeypatch):
    def trained() -> Training:
        one = Training(*CASES["LSTM, by name, flattened"], lr=0.001)
        one.criterion.weight = torch.tensor([1.0, 9.0, 0.0])
        one.criterion.label_smoothing = 0.1
        return one.steps(14)

    one = trained()
    assert sampled == [True] * 3
    monkeypatch.setattr(Sampler, "pays", lambda *_: False)
    for term, wanted in factors(trained()).items():
        for A, B in zip(factors(one)[term], wanted, strict=True):
            assert torch.allclose(A, B, rtol=1e-3, atol=1e-3 * float(B.abs().max()))


class Checkpointed(nn.Module):
    """Batch normalisation that is run again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = normalised(1.0)[:6], nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(checkpoint(self.body, x, use_reentrant=False)))


def test_checkpointed_batch_normalisation_is_left_alone(sampled):
    training = Training(Checkpointed).steps(4)
    kept: list[Tensor] = []
    training.step(4, lambda _: kept.extend(b.clone() for b in training.model.buffers()))
    assert sampled == [False]
    assert all(torch.equal(a, b) for a, b in zip(training.model.buffers(), kept, strict=True))
    training.step(5)
    assert training.captured[-1]


class Interrupted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.body(x))
        if len(x) < N:
            raise KeyboardInterrupt
        return self.head(h)


def test_an_interrupt_leaves_nothing_behind(sampled):
    training = Training(Interrupted).steps(4)
    with pytest.raises(KeyboardInterrupt):
        training.step(4)
    watcher = training.optimizer._watcher
    assert not watcher.capturing
    assert not watcher.inert
    assert not watcher.calls
    assert not torch.overrides._get_current_function_mode_stack()
    assert not training.model.norm._forward_pre_hooks
    assert training.model.norm.training


@pytest.mark.parametrize(
    ("given", "divides"),
    [
        ([torch.zeros(8, 2)], True),
        ([torch.zeros(8, 2), torch.zeros(8, dtype=torch.bool)], True),
        ([torch.zeros(8, dtype=torch.long), torch.zeros(8, 3, dtype=torch.long)], True),
        ([torch.zeros(8, 2), torch.zeros(2, 9, dtype=torch.long)], False),
        ([torch.zeros(8, 2), torch.zeros(8, 9, dtype=torch.long)], False),
        ([torch.zeros(8, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)], False),
        ([torch.zeros(2, 8)], False),
    ],
)
def test_what_may_be_an_index_of_examples_is_not_cut_on_a_device(given, divides):
    """Out of its range it would end the process there."""
    call = ModelCall(tuple(given), {}, (torch.empty(0), []))
    part = Part(nn.MSELoss(), torch.zeros(8, 1, device="meta"), (), [], call=call)
    assert sampling._divides(part, 8) == divides
    on_host = dataclasses.replace(part, output=torch.zeros(8, 1))
    assert sampling._divides(on_host, 8) == any(len(t) == 8 for t in given)


@pytest.mark.parametrize("what", ["input", "criterion twice"])
def test_a_batch_that_is_gone_is_captured_the_next_time(what, sampled):
    training = Training(mlp).steps(4)

    def spoil(x: Tensor) -> None:
        if what == "input":
            x.zero_()  # a loop that loads its next batch into the same tensor
        else:
            more, y = training.batch(100)
            training.criterion(training.model(more), y).backward()

    training.step(4, spoil)
    assert sampled == [False]
    training.step(5)
    assert training.captured == [True, True, True, False, False, True]


def test_a_sample_leaves_no_trace(sampled):
    def make() -> nn.Module:
        model = mlp(nn.LayerNorm(6))
        model.register_buffer("count", torch.zeros(()))
        model.register_forward_pre_hook(lambda m, _: m.count.add_(1) and None)
        return model

    training = Training(make).steps(4)
    model, watcher = training.model, training.optimizer._watcher
    before: list[Tensor] = []

    def keep(_: Tensor) -> None:
        before[:] = [torch.get_rng_state(), *(p.grad.clone() for p in model.parameters())]

    training.step(4, keep)
    assert sampled == [True]
    after = [torch.get_rng_state(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert float(model.count) == 5
    assert not watcher.capturing
    assert not watcher.pending
    assert not watcher.calls
    assert not watcher._outputs


def test_another_optimizer_of_the_same_model_does_not_see_it(sampled):
    training = Training(mlp).steps(4)
    other = kn.KFAC(training.model, training.criterion)
    training.step(4)
    assert sampled == [True]
    assert len(other._watcher._outputs) == 1  # of the training's own forward
    assert len(other._watcher.calls) <= 2


def test_a_sample_says_what_a_capture_says(sampled):
    training = Training(mlp).steps(4)
    training.model.append(nn.Linear(3, 3))
    with pytest.warns(kn.errors.KronewtonWarning, match="was not in the model"):
        training.step(4)
    assert sampled == [True]


def test_bfloat16_outputs_may_differ_by_their_rounding(sampled):
    training = Training(mlp)

    def called(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float()

    training.called = called
    training.steps(9)
    assert sampled == [True, True]


def test_it_goes_on_bit_for_bit(sampled):
    whole = Training(mlp).steps(13)
    first = Training(mlp).steps(8)  # the next one is sampled
    again = Training(mlp)
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    for step in range(8, 13):
        again.step(step)
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
