"""Models and loops that go wrong: one clear sentence, and a right step or an unharmed model."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import _get_current_function_mode_stack

import kronewton as kn
from kronewton.errors import KronewtonError, KronewtonWarning, ModelError, UnsupportedError

V, D = 11, 8  # tokens, width
BASES = ("factored", "eigen", "corrected", "adam", "orthogonal")
Loss = Callable[[], Tensor]
FISHERS = ["empirical", "exact", "sampled"]


class Text(nn.Module):
    """Embedding, attention, LSTM, LayerNorm, a lone parameter, a head that may be tied."""

    def __init__(self, tied: bool = True, width: int = D, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(V, width)
        self.place = nn.Parameter(0.1 * torch.randn(4, width))
        self.attention = nn.MultiheadAttention(width, 2, dropout, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, V)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens) + self.place[: tokens.shape[1]]
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.lstm(self.norm(h))[0]
        return self.head(h).mean(1)


def sentences(seed: int = 0, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(V, (count, 4), generator=generator)
    return tokens, torch.randint(V, (count,), generator=generator)


def points(seed: int = 0, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 5, generator=generator)
    return x, torch.randint(3, (count,), generator=generator)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in model.parameters()])


def made(optimizer: kn.KFAC, loss: Loss) -> float:
    optimizer.zero_grad()
    found = loss()
    found.backward()
    optimizer.step()
    return float(found.detach())


def trained(model: nn.Module, criterion: nn.Module, data: Any, steps: int = 3, **options: Any):
    optimizer = kn.KFAC(model, criterion, **options)
    x, y = data
    for _ in range(steps):
        made(optimizer, lambda: criterion(model(x), y))
    return optimizer


def outcome(model: nn.Module, run: Callable[[], Any]) -> list[str]:
    """The sentences said: each once, all warnings or one refusal; and the weights stay finite."""
    refused = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = values(model)
        try:
            run()
        except KronewtonError as error:
            refused = [str(error)]
            assert torch.equal(values(model), before) or len(before) != len(values(model))
    found = [str(w.message) for w in caught if issubclass(w.category, KronewtonWarning)]
    assert len(set(found)) == len(found)
    assert bool(torch.isfinite(values(model)).all())
    return found + refused


def modes() -> list[Any]:
    return list(_get_current_function_mode_stack())


@pytest.fixture(autouse=True)
def _no_mode_is_left():
    yield
    left = modes()
    for mode in reversed(left):
        mode.__exit__(None, None, None)


# What the forward pass does.


class Partly(nn.Module):
    """A frozen-by-no_grad trunk, an output that is not in the loss."""

    def __init__(self, hidden: bool, extra: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.other = nn.Linear(7, 2)
        self.hidden, self.extra = hidden, extra

    def forward(self, x: Tensor) -> Any:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hidden):
            h = self.first(x).tanh()
        y = self.last(h)
        return (y, self.other(h)) if self.extra else y


def test_a_module_under_no_grad_does_not_move() -> None:
    model, criterion, (x, y) = Partly(True, False), nn.CrossEntropyLoss(), points()
    optimizer = kn.KFAC(model, criterion)
    start, losses = copy.deepcopy(model.state_dict()), []

    def run() -> None:
        losses.extend(made(optimizer, lambda: criterion(model(x), y)) for _ in range(6))

    assert outcome(model, run) == []
    assert torch.equal(model.first.weight, start["first.weight"])
    assert torch.equal(model.other.weight, start["other.weight"])
    assert losses[-1] < 0.7 * losses[0]


def test_an_output_that_is_not_in_the_loss_does_not_move() -> None:
    model, alone, (x, y) = Partly(False, True), Partly(False, False), points()
    criterion, another = nn.CrossEntropyLoss(), nn.CrossEntropyLoss()
    optimizer, other = kn.KFAC(model, criterion), kn.KFAC(alone, another)
    start = model.other.weight.clone()
    said = outcome(
        model, lambda: [made(optimizer, lambda: criterion(model(x)[0], y)) for _ in range(5)]
    )
    for _ in range(5):
        made(other, lambda: another(alone(x), y))
    assert said == []
    assert torch.equal(model.other.weight, start)
    torch.testing.assert_close(values(model), values(alone))


@pytest.mark.parametrize("warm", [False, True])
def test_a_criterion_on_what_is_not_the_models_output(warm: bool) -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    optimizer = trained(model, criterion, (x, y)) if warm else kn.KFAC(model, criterion)
    free = torch.randn(12, 3, requires_grad=True)

    def run() -> None:
        optimizer.zero_grad()
        (criterion(free, y) + model(x).square().mean()).backward()
        optimizer.step()

    (sentence,) = outcome(model, run)
    assert "CrossEntropyLoss" in sentence


# A structure that changes.


class Changing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def changed(change: Callable[[Changing], None], steps: int = 12) -> tuple[Changing, list[str], Any]:
    model, criterion, (x, y) = Changing(), nn.CrossEntropyLoss(), points()
    optimizer = trained(model, criterion, (x, y))
    change(model)
    losses: list[float] = []

    def run() -> None:
        for _ in range(steps):
            losses.append(made(optimizer, lambda: criterion(model(x), y)))

    return model, outcome(model, run), losses


def test_a_model_that_is_not_called_itself_is_said() -> None:
    """As a LightningModule whose training_step calls what it is made of."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    torch.manual_seed(0)
    x, y, criterion = torch.randn(9, 3), torch.randint(0, 2, (9,)), nn.CrossEntropyLoss()
    for called in (True, False):
        whole = Whole()
        optimizer = kn.KFAC(whole, criterion)
        criterion((whole if called else whole.inner)(x), y).backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        said = [w for w in caught if "Whole itself was not called" in str(w.message)]
        assert len(said) == (not called)
        assert bool(optimizer.diagnostics()["predicted"].isfinite()) == called
        optimizer.close()


def test_a_criterion_without_a_model_is_said() -> None:
    parameters, criterion = list(nn.Linear(3, 2).parameters()), nn.CrossEntropyLoss()
    with pytest.warns(KronewtonWarning, match=r"no model.*AdamW trains all parameters"):
        kn.KFAC(parameters, criterion)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kn.KFAC(parameters)  # which asks for nothing else


def test_an_added_layer_is_said() -> None:
    added = nn.Linear(5, 5)
    start = added.weight.detach().clone()
    _, said, losses = changed(lambda m: m.body.append(added))
    assert losses[-1] < losses[0]
    assert torch.equal(added.weight, start)
    assert any("body.4" in sentence for sentence in said)


def test_an_added_layer_leaves_the_others_learning() -> None:
    _, _, losses = changed(lambda m: m.body.append(nn.Linear(5, 5)))
    assert losses[-1] < losses[0]


def test_a_layer_that_leaves_the_forward_does_not_move() -> None:
    gone: list[nn.Module] = []

    def change(model: Changing) -> None:
        gone.append(copy.deepcopy(model.body[2]))
        gone.append(model.body[2])
        model.body[2] = nn.Identity()

    _, _, losses = changed(change)
    assert torch.equal(gone[0].weight, gone[1].weight)
    assert losses[-1] < losses[0]


def test_a_replaced_sequential_is_said() -> None:
    def change(model: Changing) -> None:
        model.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh())

    _, said, _ = changed(change, steps=3)
    assert said


def test_everything_replaced_is_said() -> None:
    def change(model: Changing) -> None:
        model.body = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        model.head = nn.Linear(5, 3)

    _, said, _ = changed(change, steps=3)
    assert said


KINDS = {
    "Linear": lambda m: m.head,
    "Embedding": lambda m: m.table,
    "LayerNorm": lambda m: m.norm,
    "MultiheadAttention": lambda m: m.attention,
    "LSTM": lambda m: m.lstm,
}


@pytest.mark.parametrize(("kind", "refine"), [*((kind, 0) for kind in KINDS), ("LSTM", 2)])
def test_frozen_and_thawed_later(kind: str, refine: int) -> None:
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    optimizer = trained(model, criterion, (x, y), refine=refine)
    part = KINDS[kind](model)
    start = values(part)

    def some() -> list[float]:
        return [made(optimizer, lambda: criterion(model(x), y)) for _ in range(2)]

    losses: list[float] = []

    def frozen() -> None:
        part.requires_grad_(False)
        losses.extend(some())

    assert outcome(model, frozen) == []
    assert torch.equal(values(part), start)
    part.requires_grad_(True)
    assert outcome(model, lambda: losses.extend(some())) == []
    assert not torch.equal(values(part), start)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["before zero_grad", "after it"])
def test_frozen_when_the_optimizer_was_made_and_thawed_later(kind: str, when: str) -> None:
    """What is thawed has curvature from then on; what was known of the rest is not lost."""
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    part = KINDS[kind](model).requires_grad_(False)
    optimizer = trained(model, criterion, (x, y))
    before, start = optimizer.coverage(), values(part)
    steps, noise = optimizer._steps, optimizer.diagnostics()["noise"]
    if when == "after it":
        optimizer.zero_grad()
    part.requires_grad_(True)
    optimizer.zero_grad() if when == "before zero_grad" else None
    after = {row.parameter: row for row in optimizer.coverage().rows}
    if when == "before zero_grad":
        assert len(after) > len(before.rows)
    assert {row.parameter: row.memory for row in before.rows}.items() <= {
        name: row.memory for name, row in after.items()
    }.items()
    assert optimizer._steps == steps
    assert float(optimizer.diagnostics()["noise"]) == pytest.approx(float(noise), nan_ok=True)

    def steps_() -> list[float]:
        return [made(optimizer, lambda: criterion(model(x), y)) for _ in range(4)]

    losses: list[float] = []
    assert outcome(model, lambda: losses.extend(steps_())) == []
    assert losses[-1] < losses[0]
    assert not torch.equal(values(part), start)
    assert all(row.curved and row.method != "not yet" for row in optimizer.coverage().rows)
    resumed = kn.KFAC(model, criterion)
    resumed.load_state_dict(optimizer.state_dict())
    assert resumed.coverage() == optimizer.coverage()


def test_thawed_where_gradients_are_let_go_between_forward_and_backward() -> None:
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    model.head.requires_grad_(False)
    optimizer, start = kn.KFAC(model, criterion), values(model.head)

    def run() -> None:
        for step in range(5):
            if step == 2:
                model.head.requires_grad_(True)
            loss = criterion(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    assert outcome(model, run) == []
    assert not torch.equal(values(model.head), start)
    assert len(optimizer.coverage().rows) == len(list(model.parameters()))


def test_thawed_but_not_listed_stays_where_it_is() -> None:
    """Another optimizer's, or nobody's: KFAC was given the other parameters alone."""
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    model.head.requires_grad_(False)
    optimizer = kn.KFAC([p for p in model.parameters() if p.requires_grad], criterion, model=model)
    model.head.requires_grad_(True)
    start = values(model.head)
    outcome(model, lambda: [made(optimizer, lambda: criterion(model(x), y)) for _ in range(3)])
    assert torch.equal(values(model.head), start)


def test_added_while_frozen_and_thawed_later_is_covered() -> None:
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
    optimizer = kn.KFAC(rest, criterion, model=model)
    model.head.requires_grad_(False)
    optimizer.add_param_group({"params": list(model.head.parameters())})
    made(optimizer, lambda: criterion(model(x), y))
    model.head.requires_grad_(True)
    for _ in range(3):
        made(optimizer, lambda: criterion(model(x), y))
    rows = {row.parameter: row.method for row in optimizer.coverage().rows}
    assert rows["head.weight"].startswith("K-FAC")


def test_the_preconditioner_says_what_is_thawed() -> None:
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    model.head.requires_grad_(False)
    preconditioner = kn.Preconditioner(model, criterion)
    model.head.requires_grad_(True)
    criterion(model(x), y).backward()
    said = "'head.weight' was not in the model, or was frozen, when Preconditioner was made"
    with pytest.warns(KronewtonWarning, match=said):
        preconditioner.step()


# Copies, compiled models, several models.


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_copy_does_not_disturb(fisher: str) -> None:
    def trial(copies: bool) -> Tensor:
        model, criterion, (x, y) = Text(), nn.CrossEntropyLoss(), sentences()
        optimizer = kn.KFAC(model, criterion, fisher=fisher)
        average = copy.deepcopy(model)
        for _ in range(4):
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            if copies:
                criterion(average(x), y).backward()
            loss.backward()
            if copies:
                criterion(average(x), y).backward()
            optimizer.step()
        return values(model)

    results = [trial(copies) for copies in (False, True)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_compiled_after_the_optimizer_was_made() -> None:
    def trial(compiles: bool) -> Tensor:
        model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
        optimizer = trained(model, criterion, (x, y), fisher="exact")
        run = torch.compile(model, backend="eager") if compiles else model
        outcome(model, lambda: [made(optimizer, lambda: criterion(run(x), y)) for _ in range(3)])
        return values(model)

    results = [trial(compiles) for compiles in (False, True)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_an_evaluation_between_forward_and_backward(fisher: str) -> None:
    def trial(evaluates: bool) -> Tensor:
        model, criterion, (x, y) = Text(dropout=0.2), nn.CrossEntropyLoss(), sentences()
        optimizer = kn.KFAC(model, criterion, fisher=fisher)
        for k in range(4):
            optimizer.zero_grad()
            torch.manual_seed(k)
            loss = criterion(model(x), y)
            if evaluates:
                model.eval()
                with torch.no_grad():
                    criterion(model(x[:2]), y[:2])
                if fisher == "empirical":  # "exact" draws signs, for any call with gradients
                    criterion(model(x[:2]), y[:2])
                model.train()
            loss.backward()
            optimizer.step()
        return values(model)

    results = [trial(evaluates) for evaluates in (False, True)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fisher", FISHERS)
def test_a_second_model_with_the_same_criterion(fisher: str) -> None:
    def trial(two: bool) -> Tensor:
        model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
        other = copy.deepcopy(net())
        optimizer = kn.KFAC(model, criterion, fisher=fisher)
        sgd = torch.optim.SGD(other.parameters(), 0.1)

        def run() -> None:
            for _ in range(4):
                optimizer.zero_grad()
                sgd.zero_grad()
                if two:
                    criterion(other(x), y).backward()
                criterion(model(x), y).backward()
                if two:
                    criterion(other(x), y).backward()
                    sgd.step()
                optimizer.step()

        assert outcome(model, run) == []
        return values(model)

    results = [trial(two) for two in (False, True)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("fisher", FISHERS)
def test_two_optimizers_on_two_models(fisher: str, together: bool) -> None:
    def trial(pair: bool) -> Tensor:
        a, b, criterion, (x, y) = net(), net(), nn.CrossEntropyLoss(), points()
        # Newton's steps: normalised ones make much of what rounding left of a gradient.
        first = kn.KFAC(a, criterion, fisher=fisher, basis="factored")
        second = kn.KFAC(b, criterion, fisher=fisher, basis="factored") if pair else None

        def run() -> None:
            for _ in range(4):
                first.zero_grad()
                losses = [criterion(a(x), y)]
                if second is not None:
                    second.zero_grad()
                    losses.append(criterion(b(x), y))
                if together:
                    sum(losses).backward()
                else:
                    for loss in losses:
                        loss.backward()
                first.step()
                if second is not None:
                    second.step()

        assert outcome(a, run) == []
        if pair:
            # Where the two lie in memory decides how torch's sums round.
            torch.testing.assert_close(values(b), values(a), rtol=1e-3, atol=1e-5)
        return values(a)

    results = [trial(pair) for pair in (False, True)]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


class Within(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.criterion = Text(), nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, y: Tensor) -> Tensor:
        return self.criterion(self.body(tokens), y)


def hooks(model: nn.Module) -> int:
    return sum(
        len(getattr(m, name))
        for m in model.modules()
        for name in vars(m)
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
    )


def test_close_removes_every_hook() -> None:
    model = Within()
    before = hooks(model)
    optimizer, (x, y) = kn.KFAC(model, model.criterion), sentences()
    made(optimizer, lambda: model(x, y))
    assert hooks(model) > before
    optimizer.close()
    assert hooks(model) == before
    model(x, y).backward()
    assert modes() == []


# Exceptions inside a forward.


class Raising(nn.Module):
    """Raises what it is told to, in its own forward or inside its attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.head = nn.Linear(D, 3)
        self.error: BaseException | None = None
        self.inside = False

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None and not self.inside:
            raise self.error
        if self.error is not None:
            with mock.patch.object(F, "scaled_dot_product_attention", side_effect=self.error):
                return self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_no_function_mode(inside: bool, error: type[BaseException]) -> None:
    model, criterion = Raising(), nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion)
    model.error, model.inside = error("stop"), inside
    with pytest.raises(error, match="stop"):
        model(torch.randn(4, 3, D))
    if error is KeyboardInterrupt:  # torch runs no hook then: the next call of ours puts it right
        optimizer.close()
    assert modes() == []
    optimizer.close()


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_training_goes_on_after_an_exception(inside: bool, error: type[BaseException]) -> None:
    def trial(raises: bool) -> Tensor:
        model, criterion = Raising(), nn.CrossEntropyLoss()
        x, y = torch.randn(4, 3, D, generator=torch.Generator()), torch.tensor([0, 1, 2, 0])
        optimizer = kn.KFAC(model, criterion)
        if raises:
            model.error, model.inside = error("stop"), inside
            with pytest.raises(error, match="stop"):
                model(x)
            model.error = None

        def run() -> None:
            for _ in range(3):
                made(optimizer, lambda: criterion(model(x), y))

        assert outcome(model, run) == []
        return values(model)

    results = [trial(raises) for raises in (False, True)]
    assert torch.equal(results[0], results[1])


def test_other_code_is_not_watched_after_an_interrupt() -> None:
    model = Raising()
    optimizer = kn.KFAC(model, nn.CrossEntropyLoss())
    model.error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, 3, D))
    optimizer.close()
    other = nn.Linear(D, D)
    for _ in range(5):
        other(torch.randn(2, D))
    assert optimizer._watcher is not None
    assert optimizer._watcher._uses == []


def test_a_refusal_inside_the_model_leaves_no_function_mode() -> None:
    model, (x, y) = Within(), sentences()
    optimizer = kn.KFAC(model, model.criterion)
    with pytest.raises(KronewtonError):
        model(x, y[:2])
    assert modes() == []
    assert outcome(model, lambda: made(optimizer, lambda: model(x, y))) == []


# Batches of text.


def test_token_ids_out_of_range() -> None:
    model, criterion, (x, y) = Text(), nn.CrossEntropyLoss(), sentences()
    optimizer = trained(model, criterion, (x, y))
    start = values(model)
    with pytest.raises(IndexError):
        made(optimizer, lambda: criterion(model(x + V), y))
    assert torch.equal(values(model), start)
    assert modes() == []
    assert outcome(model, lambda: made(optimizer, lambda: criterion(model(x), y))) == []


@pytest.mark.parametrize("mode", ["mean", "sum"])
@pytest.mark.parametrize(
    "all_empty",
    [False, True],
)
def test_empty_bags(mode: str, all_empty: bool) -> None:
    torch.manual_seed(0)
    bag, head = nn.EmbeddingBag(V, D, mode=mode), nn.Linear(D, 3)

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.head = bag, head

        def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
            return self.head(self.bag(tokens, offsets))

    model, criterion = Bags(), nn.CrossEntropyLoss()
    tokens = torch.tensor([], dtype=torch.long) if all_empty else torch.tensor([1, 2, 3])
    offsets = torch.tensor([0, 0, 0]) if all_empty else torch.tensor([0, 0, 3])
    optimizer, y = kn.KFAC(model, criterion), torch.tensor([0, 1, 2])
    outcome(
        model,
        lambda: [made(optimizer, lambda: criterion(model(tokens, offsets), y)) for _ in range(3)],
    )


def test_a_batch_of_padding_only() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(V, D, padding_idx=0), nn.Flatten(), nn.Linear(4 * D, V))
    criterion, (x, y) = nn.CrossEntropyLoss(), sentences()
    optimizer = kn.KFAC(model, criterion)
    nothing = torch.zeros_like(x)

    def run() -> None:
        for batch in (nothing, nothing, x, nothing, x):
            made(optimizer, lambda b=batch: criterion(model(b), y))

    outcome(model, run)
    assert not bool(model[0].weight[0].any())


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_target_that_is_ignored_everywhere(warm: bool, reduction: str) -> None:
    model, criterion = Text(), nn.CrossEntropyLoss(ignore_index=-1, reduction=reduction)
    x, y = sentences()
    optimizer = trained(model, criterion, (x, y)) if warm else kn.KFAC(model, criterion)
    start = values(model)
    nothing = torch.full_like(y, -1)
    said = outcome(model, lambda: made(optimizer, lambda: criterion(model(x), nothing)))
    if reduction == "mean":  # the loss is NaN
        assert torch.equal(values(model), start)
        assert said
    outcome(model, lambda: made(optimizer, lambda: criterion(model(x), y)))


def test_packed_sequences_of_length_one() -> None:
    torch.manual_seed(0)

    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(5, D), nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            packed = pack_sequence([row[None] for row in x])
            return self.head(self.lstm(packed)[1][0][-1])

    model, criterion, (x, y) = Packed(), nn.CrossEntropyLoss(), points()
    optimizer, losses = kn.KFAC(model, criterion), []
    outcome(
        model,
        lambda: losses.extend(made(optimizer, lambda: criterion(model(x), y)) for _ in range(5)),
    )
    assert losses[-1] < losses[0]


# Options.


@pytest.mark.parametrize(
    "options",
    [
        {"sharing": {"nothing*": "reduce"}},
        {"largest_side": {"nothing*": 7}},
        {"sharing": {"*": "shrink"}},
        {"sharing": {}},
        {"sharing": {3: "reduce"}},
        {"sharing": "shrink"},
        {"sharing": ["reduce"]},
        {"largest_side": {"*": 0}},
        {"largest_side": {"*": 2.5}},
        {"largest_side": {"*": True}},
        {"largest_side": -1},
        {"largest_side": None},
    ],
    ids=str,
)
def test_patterns_and_values_that_are_none(options: dict[str, Any]) -> None:
    if options == {"sharing": {}}:
        kn.KFAC(net(), nn.CrossEntropyLoss(), **options)  # nothing is said of any layer
        return
    with pytest.raises(KronewtonError) as caught:
        kn.KFAC(net(), nn.CrossEntropyLoss(), **options)
    assert next(iter(options)) in str(caught.value)


def test_criteria_that_are_none() -> None:
    c, d = nn.CrossEntropyLoss(), nn.MSELoss()
    for wrong, word in (((c, c), "twice"), ((d, F.mse_loss), "mse_loss")):
        with pytest.raises(KronewtonError, match=word):
            kn.KFAC(net(), wrong)
    with pytest.raises(KronewtonError):
        kn.KFAC(net(), [], fisher="exact")


def test_a_list_with_none_in_it() -> None:
    with pytest.raises(KronewtonError, match="criterion"):
        kn.KFAC(net(), [None])


def test_an_empty_list_of_criteria_is_no_criterion() -> None:
    def trial(criterion: Any) -> Tensor:
        model, (x, y) = net(), points()
        optimizer = kn.KFAC(model, criterion)
        for _ in range(3):
            made(optimizer, lambda m=model: F.cross_entropy(m(x), y))
        return values(model)

    results = [trial(criterion) for criterion in ([], None)]
    assert torch.equal(results[0], results[1])


# Parameters that become others.


@pytest.mark.parametrize("steps", [0, 3])
def test_tied_weights_that_are_untied_later(steps: int) -> None:
    model, criterion, (x, y) = Text(), nn.CrossEntropyLoss(), sentences()
    optimizer = trained(model, criterion, (x, y), steps=steps)
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())

    def run() -> None:
        for _ in range(3):
            made(optimizer, lambda: criterion(model(x), y))

    said = outcome(model, run)
    assert any("head" in sentence for sentence in said)


@pytest.mark.parametrize("name", ["place", "attention.in_proj_weight", "norm.weight", "head.bias"])
def test_a_replaced_parameter_is_refused(name: str) -> None:
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    optimizer = trained(model, criterion, (x, y))
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, last, nn.Parameter(getattr(module, last).detach().clone()))
    said = outcome(model, lambda: made(optimizer, lambda: criterion(model(x), y)))
    assert any(last in sentence for sentence in said)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("refine", [0, 2])
def test_another_precision_after_some_steps(dtype: torch.dtype, refine: int) -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    optimizer = trained(model, criterion, (x, y), refine=refine)
    model.to(dtype)
    losses: list[float] = []

    def run() -> None:
        for _ in range(4):
            losses.append(made(optimizer, lambda: criterion(model(x.to(dtype)), y)))

    said = outcome(model, run)
    assert said or losses[-1] < losses[0]


def test_another_precision_of_every_kind() -> None:
    model, criterion, (x, y) = Text(), nn.CrossEntropyLoss(), sentences()
    optimizer = trained(model, criterion, (x, y))
    model.double()
    losses: list[float] = []

    def run() -> None:
        for _ in range(4):
            losses.append(made(optimizer, lambda: criterion(model(x), y)))

    said = outcome(model, run)
    assert said or losses[-1] < losses[0]


# The state.


@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize(("tied", "refine"), [(False, 0), (True, 2)])
def test_a_resumed_training_of_every_kind(basis: str, tied: bool, refine: int) -> None:
    data = [sentences(k) for k in range(5)]
    options = {"basis": basis, "refine": 0 if basis in ("adam", "orthogonal") else refine}

    def run(model: nn.Module, c: nn.Module, optimizer: kn.KFAC, batches: Any) -> None:
        for x, y in batches:
            made(optimizer, lambda x=x, y=y: c(model(x), y))

    model, criterion = Text(tied), nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)
    run(model, criterion, optimizer, data[:3])
    weights, state = copy.deepcopy(model.state_dict()), optimizer.state_dict()
    run(model, criterion, optimizer, data[3:])
    again, other = Text(tied), nn.CrossEntropyLoss()
    again.load_state_dict(weights)
    resumed = kn.KFAC(again, other, **options)
    resumed.load_state_dict(state)
    run(again, other, resumed, data[3:])
    assert torch.equal(values(again), values(model))


@pytest.mark.parametrize(
    ("basis", "tied"), list(zip(BASES, (False, True, True, True, False), strict=True))
)
def test_a_state_of_other_sizes_is_refused(basis: str, tied: bool) -> None:
    criterion = nn.CrossEntropyLoss()
    state = trained(Text(tied), criterion, sentences(), basis=basis).state_dict()
    model = Text(tied, 2 * D)
    start, optimizer = values(model), kn.KFAC(model, criterion, basis=basis)
    with pytest.raises(KronewtonError, match=r"another model"):
        optimizer.load_state_dict(state)
    assert torch.equal(values(model), start)
    x, y = sentences()
    assert math.isfinite(made(optimizer, lambda: criterion(model(x), y)))


@pytest.mark.parametrize("saved", [False, True])
def test_a_state_of_a_tied_model_in_an_untied_one_is_refused(saved: bool) -> None:
    criterion = nn.CrossEntropyLoss()
    state = trained(Text(saved), criterion, sentences()).state_dict()
    with pytest.raises(KronewtonError, match=r"another model"):
        kn.KFAC(Text(not saved), criterion).load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"basis": "factored"}, {"refine": 2}])
@pytest.mark.parametrize("full", [True, False])
def test_a_weight_of_the_loss_that_the_output_does_not_depend_on_is_adamws(
    options: dict[str, Any], full: bool
) -> None:
    """No quadratic model knows of it: Newton's lr once sent it to a hundred thousand."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3))
    model.log_scale, criterion = nn.Parameter(torch.zeros(())), nn.CrossEntropyLoss()
    x = torch.randn(120, 6)
    y = x[:, :3].argmax(1)
    alone = nn.Parameter(torch.zeros(()))
    adamw = torch.optim.AdamW([alone], lr=1e-3, weight_decay=0.0)
    optimizer = kn.KFAC(model, criterion, **options)
    said = "'log_scale' has a gradient, but nothing .* can be seen: until it does, AdamW trains it"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(40):
            some = slice(None) if full else torch.randint(120, (32,))
            optimizer.zero_grad()
            loss = criterion(model(x[some]), y[some])
            (loss * torch.exp(-model.log_scale) + model.log_scale).backward()
            gradient = model.log_scale.grad.clone()
            alone.grad = gradient
            adamw.step()
            if step:
                optimizer.step()
            else:
                with pytest.warns(KronewtonWarning, match=said):
                    optimizer.step()
    assert float(loss.detach()) < 0.5
    assert float(alone.detach()) != 0
    torch.testing.assert_close(model.log_scale.detach(), alone.detach())
    row = next(row for row in optimizer.coverage().rows if row.parameter == "log_scale")
    assert (row.method, row.curved) == ("AdamW", False)
    assert row.why == "nothing in the loss that was watched depends on it"
    twin, its_criterion, copied = copy.deepcopy((model, criterion, optimizer))
    for _ in range(3):
        for m, c, o in ((model, criterion, optimizer), (twin, its_criterion, copied)):
            o.zero_grad()
            (c(m(x), y) * torch.exp(-m.log_scale) + m.log_scale).backward()
            o.step()
    assert torch.equal(values(twin), values(model))


def test_what_is_outside_of_the_watched_loss_decays_once() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    model.beside, alone = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = kn.KFAC(model, criterion, weight_decay=0.5)
    adamw = torch.optim.AdamW([alone], lr=1e-3, weight_decay=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        for _ in range(5):
            made(optimizer, lambda: criterion(model(x), y) + model.beside.square().sum())
            alone.grad = 2 * alone.detach()
            adamw.step()
    torch.testing.assert_close(model.beside.detach(), alone.detach(), rtol=1e-5, atol=1e-6)


def test_a_head_that_enters_the_watched_loss_later_is_covered_then() -> None:
    model, criterion, (x, y) = Partly(False, True), nn.CrossEntropyLoss(), points()
    optimizer = kn.KFAC(model, criterion)

    def loss(watched: bool) -> Tensor:
        first, second = model(x)
        return criterion(first, y) + (criterion if watched else F.cross_entropy)(second, y % 2)

    def method() -> str:
        rows = optimizer.coverage().rows
        return next(row.method for row in rows if row.parameter == "other.weight")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        for _ in range(4):
            made(optimizer, lambda: loss(False))
        assert method() == "AdamW"
        for _ in range(6):
            made(optimizer, lambda: loss(True))
    assert method().startswith("K-FAC")
    assert optimizer._fallback.step() is None  # nothing is lent any more


@pytest.mark.parametrize("basis", ["factored", "eigen"])
def test_a_converged_training_goes_on_without_a_word(basis: str) -> None:
    torch.manual_seed(1)
    model, criterion = (
        nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)),
        nn.CrossEntropyLoss(),
    )
    x = torch.randn(64, 6)
    y = x[:, :3].argmax(1)
    optimizer = kn.KFAC(model, criterion, basis=basis, damping=1e-9)
    for _ in range(450):
        made(optimizer, lambda: criterion(model(x), y))
    assert float(optimizer.diagnostics()["skipped"]) == 0


def test_what_a_thaw_keeps() -> None:
    """Averages, counts, AdamW's moments, and the curvature of what is frozen now."""
    model, criterion, (x, y) = Text(tied=False), nn.CrossEntropyLoss(), sentences()
    model.odd = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    model.head.requires_grad_(False)
    optimizer = kn.KFAC(model, criterion, averaging=0.9)

    def loss() -> Tensor:
        return criterion(model(x), y) + (model.odd - 3).abs().square().sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", KronewtonWarning)
        for _ in range(4):
            made(optimizer, loss)
        lstm = next(name for name in optimizer._curvature.layers if name.startswith("lstm"))
        model.lstm.requires_grad_(False)
        model.head.requires_grad_(True)
        averages = optimizer._averages
        moments = optimizer._fallback.adamw.state[model.odd]["exp_avg"].clone()
        optimizer._curvature.dropped, optimizer._watcher.capturing = 7, False
        optimizer.zero_grad()
        assert optimizer._watcher.capturing
        assert optimizer._averages is averages
        assert float(optimizer.diagnostics()["dropped_statistics"]) == 7
        assert torch.equal(optimizer._fallback.adamw.state[model.odd]["exp_avg"], moments)
        assert optimizer._curvature.terms(lstm)
        made(optimizer, loss)
    assert {row.parameter for row in optimizer.coverage().rows} == {
        name for name, _ in model.named_parameters()
    }


def test_a_thawed_part_of_a_layer_makes_it_another_layer() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    model[0].bias.requires_grad_(False)
    optimizer = trained(model, criterion, (x, y))
    inner = optimizer._curvature.terms("2")
    model[0].bias.requires_grad_(True)
    optimizer.zero_grad()
    assert optimizer._curvature.terms("0") == []
    assert optimizer._curvature.terms("2") == inner == ["2"]
    assert outcome(model, lambda: made(optimizer, lambda: criterion(model(x), y))) == []


def test_a_state_is_filed_under_the_first_parameter_that_is_trained() -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    model[0].requires_grad_(False)
    optimizer = trained(model, criterion, (x, y))
    state = optimizer.state_dict()["state"]
    assert "kfac_scalars" in state[2]
    assert not {0, 1} & state.keys()
    other = kn.KFAC(model, criterion)
    other.load_state_dict(optimizer.state_dict())
    assert other.coverage() == optimizer.coverage()


def test_torchscript_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(net())
    with pytest.raises(ModelError, match=r"the model is TorchScript.*before torch.jit.script"):
        kn.KFAC(scripted, nn.CrossEntropyLoss())
    with pytest.raises(ModelError, match=r"module '0' is TorchScript, which Preconditioner"):
        kn.Preconditioner(nn.Sequential(scripted, nn.Linear(3, 3)), nn.CrossEntropyLoss())


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_parameter_of_another_shape_is_named(steps: int) -> None:
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    optimizer = trained(model, criterion, (x, y), steps=steps)
    last = [m for m in model if isinstance(m, nn.Linear)][-1]
    name = f"{len(model) - 1}.weight"
    before = tuple(last.weight.shape)
    last.weight.data = torch.zeros(before[0] + 2, before[1])
    last.bias.data = torch.zeros(before[0] + 2)
    said = rf"parameter '{name}' has the shape \({before[0] + 2}, .* had \({before[0]}, .*KFAC was"
    with pytest.raises(ModelError, match=said):
        made(optimizer, lambda: criterion(model(x), y))


def test_several_processes_are_refused_and_doubted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kronewton.concerns.processes", lambda: 2)
    model, criterion, (x, y) = net(), nn.CrossEntropyLoss(), points()
    optimizer = kn.KFAC(model, criterion)
    said = outcome(model, lambda: [made(optimizer, lambda: criterion(model(x), y)) for _ in "ab"])
    assert len(said) == 1
    assert "torch.distributed has 2 processes" in said[0]

    class Parallel(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

        def __getstate__(self) -> None:
            raise NotImplementedError

    for make in (kn.KFAC, kn.Preconditioner):
        parallel = Parallel(net())
        other = make(parallel, criterion)
        criterion(parallel(x), y).backward()
        with pytest.raises(UnsupportedError, match=r"in DistributedDataParallel: each of 2 proc"):
            other.step()
        other.close()


def test_two_criteria_on_one_output_are_no_mistake() -> None:
    class Second(nn.CrossEntropyLoss):
        pass

    model, (x, y) = net(), points()
    first, second = nn.CrossEntropyLoss(), Second(label_smoothing=0.5)
    optimizer = kn.KFAC(model, (first, second))

    def loss() -> Tensor:
        output = model(x)
        return first(output, y) + 0.1 * second(output, y)

    assert outcome(model, lambda: [made(optimizer, loss) for _ in range(3)]) == []

    def twice() -> Tensor:
        output = model(x)
        return first(output, y) + second(output, y) + second(output, y)

    (said,) = outcome(model, lambda: made(optimizer, twice))
    assert said.startswith("Second was called more than once on the same output")


@pytest.mark.parametrize("order", ["derivative first", "derivative last"])
def test_a_derivative_of_the_model_may_be_observed_beside_its_output(order: str) -> None:
    """As in a network that solves a differential equation: u' = 1 inside, u = 0 at the edge."""
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    optimizer = kn.KFAC(model)
    x, edge = torch.linspace(0, 1, 20).double()[:, None], torch.zeros(4, 1).double()
    first, second, losses = nn.MSELoss(), nn.MSELoss(), []
    for step in range(60):
        optimizer.zero_grad()
        inside = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(inside).sum(), inside, create_graph=True)
        at_edge = model(edge)
        observed = [(at_edge, torch.zeros_like(edge), second)]
        if step % 3 < 2:  # not in every step
            observed.insert(0, (slope, torch.ones_like(x), first))
        for one in observed if order == "derivative first" else observed[::-1]:
            optimizer.observe(*one)
        loss = F.mse_loss(slope, torch.ones_like(x)) + F.mse_loss(at_edge, torch.zeros_like(edge))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
