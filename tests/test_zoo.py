"""Every model of the zoo, trained by the defaults: all of it moves, and nothing stays unsaid."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

import kronewton as kn
from zoo import ZOO, Entry, Trained, hooks_of, train


def _case(entry: Entry) -> Any:
    marks = [pytest.mark.xfail(reason=entry.fails, strict=False)] if entry.fails else []
    return pytest.param(entry, id=entry.name, marks=marks)


@pytest.mark.parametrize("entry", [_case(entry) for entry in ZOO])
def test_training_by_the_defaults(entry: Entry) -> None:
    if entry.needs:
        package, how = entry.needs
        pytest.importorskip(package, reason=f"{package} is not installed: {how}")
    if entry.refused:
        with pytest.raises(kn.errors.KronewtonError, match=entry.refused):
            train(entry)
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "`torch.jit.script")  # torch's, of its own first jvp
        trained = train(entry)
    said = [str(w.message) for w in caught]
    assert not [s for s in said if not any(re.search(p, s) for p in entry.warns)]
    _check_movement(trained)
    for optimizer in trained.optimizers:
        _check_coverage(optimizer)
    if not entry.rises:
        first, last = trained.losses[0], trained.losses[-1]
        assert all(b <= a + 0.2 * abs(a) for a, b in zip(first, last, strict=True))
    _check_hooks(trained)


def _check_movement(trained: Trained) -> None:
    now = dict(trained.model.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in now.values())
    same = {n for n, p in now.items() if torch.equal(p, trained.before[n])}
    assert not same & trained.moving
    assert same == now.keys() - trained.moving


def _check_coverage(optimizer: kn.KFAC) -> None:
    rows = optimizer.coverage().rows
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    names = {row.parameter for row in rows}
    assert len(rows) == len(names) == len({id(p) for p in listed if p.requires_grad})
    for row in rows:
        assert row.method
        assert row.why or not {"AdamW", "diagonal"} & set(row.method.split(", ")), row


def _check_hooks(trained: Trained) -> None:
    for optimizer in trained.optimizers:
        optimizer.close()
    left = hooks_of(trained.modules)
    assert not [hook for hook in left if not any(hook is before for before in trained.hooks)]


BY_NAME = {entry.name: entry for entry in ZOO}


@pytest.mark.parametrize("name", ["WaveNet", "mixture of experts"])
def test_what_has_no_statistics_is_not_called_covered(name: str) -> None:
    trained = train(BY_NAME[name], 2)
    (optimizer,) = trained.optimizers
    still = [r for r in optimizer.coverage().rows if r.parameter not in trained.moving]
    assert still
    assert all(r.why and "K-FAC" not in r.method for r in still)


def test_every_output_that_a_criterion_takes_counts() -> None:
    torch.manual_seed(0)
    entry = BY_NAME["triplet, three calls"]
    model, criterion = entry.make()
    optimizer = kn.KFAC(model, criterion)
    entry.loss(model, criterion, entry.batch()).backward()
    (part,) = optimizer._watcher.parts
    assert {name: sum(s.a.counts[1] for s in found) for name, found in part.statistics.items()} == {
        "0": 3,
        "2": 3,
    }


class Stacked(torch.nn.Module):
    """The model on several inputs at once, and the criterion of what it returns for them."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *xs: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.inner(x) for x in xs], 1)


class Apart(torch.nn.Module):
    def __init__(self, criterion: torch.nn.Module) -> None:
        super().__init__()
        self.criterion, self.reduction = criterion, criterion.reduction

    def forward(self, stack: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = self.criterion(*stack.unbind(1))
        return loss


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_several_calls_have_the_block_of_one_that_returns_them_all(
    fisher: str, reduction: str
) -> None:
    # Of numbers only: with one call of the model there is a quadratic model, and with three none.
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0, "damping": 0.1, "trust_region": None}
    found = []
    for one in (False, True):
        torch.manual_seed(0)
        inner = BY_NAME["triplet, three calls"].make()[0]
        xs = torch.randn(3, 6, next(inner.parameters()).shape[1]).unbind()
        criterion = torch.nn.TripletMarginLoss(reduction=reduction, swap=True)
        model, loss = (Stacked(inner), Apart(criterion)) if one else (inner, criterion)
        optimizer = kn.KFAC(model, loss, fisher=fisher, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", kn.errors.KronewtonWarning)
            for _ in range(3):
                optimizer.zero_grad()
                (loss(model(*xs)) if one else loss(*[model(x) for x in xs])).backward()
                optimizer.step()
        factors = optimizer._curvature.factors.values()
        found.append([m.mean for f in factors for m in (f.A, f.B)])
    for several, whole in zip(*found, strict=True):
        torch.testing.assert_close(several, whole)


def test_outputs_of_two_shapes_are_said() -> None:
    class Both(torch.nn.Module):
        def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
            return first.square().mean() + second.square().mean()

    torch.manual_seed(0)
    model, criterion = torch.nn.Linear(3, 2), Both()
    optimizer = kn.KFAC(model, criterion)
    criterion(model(torch.randn(5, 3)), model(torch.randn(4, 3))).backward()
    with pytest.warns(kn.errors.KronewtonWarning, match="a second argument that the model"):
        optimizer.step()


def test_a_gradient_inside_the_loss_is_no_training_gradient() -> None:
    torch.manual_seed(0)
    entry = BY_NAME["PINN, no criterion"]
    model, _ = entry.make()
    optimizer = kn.KFAC(model, None)
    entry.loss(model, None, entry.batch())
    assert not optimizer._watcher._arrivals


class Product(torch.nn.Module):
    """x W with a parameter of its own."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(weight.t().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_a_product_with_an_own_parameter_has_the_block_of_a_linear_layer() -> None:
    torch.manual_seed(0)
    linear, x, y = torch.nn.Linear(8, 4, bias=False), torch.randn(12, 6, 8), torch.randn(12, 6, 4)
    traces = []
    for model in (linear, Product(linear.weight.detach())):
        criterion = torch.nn.MSELoss()
        optimizer = kn.KFAC(model, criterion, fisher="exact", sharing="expand", damping=0.1)
        criterion(model(x), y).backward()
        optimizer.step()
        traces += [float(f.trace()) for f in optimizer._curvature.factors.values()]
    assert traces[1] == pytest.approx(traces[0])


def test_a_replay_makes_the_output_that_was_watched() -> None:
    torch.manual_seed(0)
    entry = BY_NAME["spectral_norm"]
    model, criterion = entry.make()
    optimizer = kn.KFAC(model, criterion)
    entry.loss(model, criterion, entry.batch()).backward()
    (part,) = optimizer._watcher.parts
    with optimizer._watcher.paused():
        again = optimizer._planner.replayer.run(part.call, part.path)
    assert torch.allclose(again, part.output)
