"""What the hooks see: rows, weights of parts, and nothing that was not differentiated."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.utils.checkpoint import checkpoint

from kronewton import KFAC, filing, structure
from kronewton.batches import Batches
from kronewton.capture import Watcher
from kronewton.errors import CriterionError
from kronewton.factors import Factors, batch_factors, reduced_factors, with_corrected
from kronewton.fisher import Fisher
from kronewton.layers import find_layers
from kronewton.options import criteria_of
from kronewton.rows import by_layer
from kronewton.whole import CHECKED

pytestmark = pytest.mark.usefixtures("float64")


DETERMINISTIC = ("exact", "empirical")


def watch(model: nn.Module, criterion: nn.Module | None, fisher: str = "exact") -> Watcher:
    found = find_layers(model, {id(p) for p in model.parameters() if p.requires_grad})
    generator = torch.Generator().manual_seed(0)
    return Watcher(model, criteria_of(criterion), found, Fisher(fisher, 1, generator), True)


def gathered(watcher: Watcher, sharing: str = "expand") -> dict[str, Factors]:
    """The factors of everything that was committed since the last call."""
    parts, _ = watcher.collect()
    seen = by_layer((part.statistics, part.weight) for part in parts)
    build = reduced_factors if sharing == "reduce" else batch_factors
    return {name: build(found) for name, found in seen.items()}


def seen_by(
    model: nn.Module,
    criterion: nn.Module | None,
    loop: Callable[[], None],
    fisher: str = "exact",
    sharing: str = "expand",
) -> dict[str, Factors]:
    watcher = watch(model, criterion, fisher)
    model.zero_grad()
    loop()
    found = gathered(watcher, sharing)
    watcher.close()
    return found


def assert_same(found: dict[str, Factors], wanted: dict[str, Factors], scale: float = 1) -> None:
    assert found.keys() == wanted.keys()
    assert found
    for name in found:
        A, B = found[name].A.mean, found[name].B.mean
        torch.testing.assert_close(A, wanted[name].A.mean, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(B, scale * wanted[name].B.mean, rtol=1e-10, atol=1e-13)


def dense_block(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, layer: str) -> Tensor:
    """J'ΛJ of one linear layer, its bias as the last column of its matrix, row by row."""
    module = model.get_submodule(layer)
    prefix = f"{layer}." if layer else ""
    values = {prefix + k: p.detach() for k, p in module.named_parameters()}
    output = model(x).detach()
    J = jacrev(lambda p: functional_call(model, p, (x,)).flatten())(values)
    parts = [J[f"{prefix}weight"]]
    if f"{prefix}bias" in J:
        parts.append(J[f"{prefix}bias"].unsqueeze(-1))
    rows = torch.cat(parts, -1).flatten(1)
    H = hessian(lambda z: criterion(z.reshape(output.shape), y))(output.flatten())
    return rows.T @ H @ rows


def net(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(sizes):
        layers += [nn.Linear(d_in, d_out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def backward(model: nn.Module, criterion: nn.Module, x: Tensor, y: Tensor, c: float = 1) -> None:
    (c * criterion(model(x), y)).backward()


# Against the dense block.


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("criterion", [nn.MSELoss, nn.CrossEntropyLoss])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_one_example_gives_the_exact_block(criterion, reduction, layer):
    model, x, criterion = net(3, 4, 5), torch.randn(1, 3), criterion(reduction=reduction)
    y = torch.tensor([2]) if isinstance(criterion, nn.CrossEntropyLoss) else torch.randn(1, 5)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y))[layer]
    dense = dense_block(model, criterion, x, y, layer)
    torch.testing.assert_close(
        torch.kron(found.B.mean, found.A.mean), dense, rtol=1e-10, atol=1e-13
    )


@pytest.mark.parametrize("lead", [(), (6,), (6, 3), (6, 3, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_every_leading_shape_of_a_linear_layer_is_exact(lead, bias):
    model, criterion = nn.Linear(3, 2, bias=bias), nn.MSELoss()
    x, y = torch.randn(*lead, 3), torch.randn(*lead, 2)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y))[""]
    torch.testing.assert_close(
        torch.kron(found.B.mean, found.A.mean),
        dense_block(model, criterion, x, y, ""),
        rtol=1e-10,
        atol=1e-13,
    )


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_mutant_of_one_per_cent_in_the_second_moment_is_caught(fisher, monkeypatch):
    model, criterion, x, y = nn.Linear(3, 2), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 2)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    real = structure.second_moment
    monkeypatch.setattr(structure, "second_moment", lambda *args: 1.01 * real(*args))
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    with pytest.raises(AssertionError, match="not close"):
        assert_same(found, wanted)


def test_empirical_rows_are_the_training_gradients():
    model, criterion, x, y = net(3, 4, 5), nn.CrossEntropyLoss(), torch.randn(6, 3), torch.arange(6)
    y = y % 5
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), "empirical")
    for name in ("0", "2"):
        B = 0
        for xi, yi in zip(x, y, strict=True):
            grads = torch.autograd.grad(criterion(model(xi[None]), yi[None]), model[int(name)].bias)
            B = B + torch.outer(grads[0], grads[0]) / len(x)
        torch.testing.assert_close(found[name].B.mean, B, rtol=1e-10, atol=1e-13)


def test_draws_average_to_the_exact_factor():
    model, criterion, x = net(3, 4, 5), nn.CrossEntropyLoss(), torch.randn(8, 3)
    y = torch.arange(8) % 5
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y))["2"].B.mean
    errors = []
    for draws in (100, 1600):
        found = find_layers(model, {id(p) for p in model.parameters()})
        fisher = Fisher("sampled", draws, torch.Generator().manual_seed(1))
        watcher = Watcher(model, criteria_of(criterion), found, fisher, True)
        backward(model, criterion, x, y)
        found = gathered(watcher)["2"].B.mean
        watcher.close()
        errors.append(float((found - wanted).norm() / wanted.norm()))
    assert errors[0] < 0.3
    assert errors[1] < 0.08


# Invariants over a batch.


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("sizes", [(2, 4), (3, 3), (1, 1, 4)])
def test_micro_batches_with_their_share_of_the_loss_are_the_batch(fisher, sharing, sizes):
    model, criterion = net(3, 4, 2), nn.MSELoss()
    x, y = torch.randn(6, 3, 3), torch.randn(6, 3, 2)
    whole = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher, sharing)

    def parts():
        for xi, yi in zip(x.split(sizes), y.split(sizes), strict=True):
            backward(model, criterion, xi, yi, len(xi) / 6)

    assert_same(seen_by(model, criterion, parts, fisher, sharing), whole)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("style", ["divide", "in_place", "one_backward", "all_forwards_first"])
def test_ways_to_write_accumulation(fisher, style):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    whole = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    sizes = (2, 4)

    def parts():
        pieces = list(zip(x.split(sizes), y.split(sizes), strict=True))
        if style == "all_forwards_first":
            outputs = [model(xi) for xi, _ in pieces]
            losses = [criterion(z, yi) for z, (_, yi) in zip(outputs, pieces, strict=True)]
            sum(loss * n / 6 for loss, n in zip(losses, sizes, strict=True)).backward()
        elif style == "one_backward":
            sum(criterion(model(xi), yi) * (len(xi) / 6) for xi, yi in pieces).backward()
        else:
            for xi, yi in pieces:
                loss = criterion(model(xi), yi)
                if style == "in_place":
                    loss *= len(xi)
                    loss /= 6
                else:
                    loss = loss * len(xi) / 6
                loss.backward()

    assert_same(seen_by(model, criterion, parts, fisher), whole)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_backward_in_the_other_order_than_forward(fisher):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    whole = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)

    def parts():
        first = criterion(model(x[:2]), y[:2]) * (2 / 6)
        second = criterion(model(x[2:]), y[2:]) * (4 / 6)
        second.backward()
        first.backward()

    assert_same(seen_by(model, criterion, parts, fisher), whole)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_a_duplicated_batch_is_the_batch(fisher):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    whole = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    x, y = torch.cat([x, x]), torch.cat([y, y])
    assert_same(seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher), whole)


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("c", [2.0, 1e-3])
def test_the_loss_times_c_is_the_curvature_times_c(fisher, c):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    one = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    scaled = seen_by(model, criterion, lambda: backward(model, criterion, x, y, c), fisher)
    assert_same(scaled, one, c)


@pytest.mark.parametrize("fisher", ["exact"])  # what arrives twice cannot be told from one call
def test_a_second_backward_through_the_same_loss_counts_twice(fisher):
    model, criterion, x, y = net(3, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    one = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)

    def twice():
        loss = criterion(model(x), y)
        loss.backward(retain_graph=True)
        loss.backward()

    assert_same(seen_by(model, criterion, twice, fisher), one, 2)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_an_example_of_class_weight_two_is_that_example_twice(fisher):
    model, x, y = net(3, 4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0]))
    found = seen_by(model, weighted, lambda: backward(model, weighted, x, y), fisher)
    twice, plain = [0, 1, 1, 2, 3, 3], nn.CrossEntropyLoss()
    wanted = seen_by(model, plain, lambda: backward(model, plain, x[twice], y[twice]), fisher)
    assert_same(found, wanted)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_ignored_positions_are_absent(fisher):
    model, criterion = net(3, 4, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 3), torch.tensor([0, -100, 2, 1, -100, 1])
    kept = y >= 0
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x[kept], y[kept]), fisher)
    assert_same(found, wanted)
    assert float(found["0"].A.mean[-1, -1]) == pytest.approx(1.0)


# Which forwards count.


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("stray", ["no_grad", "inference", "eval", "loss", "forward", "logged"])
def test_what_is_not_differentiated_is_not_counted(fisher, stray):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    other, target = torch.randn(9, 3) * 7, torch.randn(9, 5)

    def loop():
        if stray == "no_grad":
            with torch.no_grad():
                criterion(model(other), target)
        elif stray == "inference":
            with torch.inference_mode():
                criterion(model(other), target)
        elif stray == "eval":
            model.eval()
            criterion(model(other), target)
            model.train()
        elif stray == "loss":
            criterion(model(other), target)
        elif stray == "forward":
            model(other)
        output = model(x)
        loss = criterion(output, y)
        if stray == "logged":
            with torch.no_grad():
                criterion(output, y)
            criterion(model(other), target)
        loss.backward()

    assert_same(seen_by(model, criterion, loop, fisher), wanted)


def test_strays_alone_commit_nothing():
    model, criterion = net(3, 4, 5), nn.MSELoss()
    watcher = watch(model, criterion)
    criterion(model(torch.randn(6, 3)), torch.randn(6, 5))
    assert watcher.collect() == ([], "")
    watcher.close()


def test_strays_do_not_pile_up():
    model, criterion = net(3, 4, 5), nn.MSELoss()
    watcher = watch(model, criterion)
    batches = []
    for _ in range(60):
        x = torch.randn(6, 3)
        batches.append(weakref.ref(x))
        criterion(model(x), torch.randn(6, 5))
    del x
    alive = sum(ref() is not None for ref in batches)
    watcher.close()
    assert alive <= 20  # of an evaluation that forgot torch.no_grad()


def test_what_was_committed_is_forgotten_after_it_was_collected():
    model, criterion = net(3, 4, 5), nn.MSELoss()
    watcher = watch(model, criterion)
    backward(model, criterion, torch.randn(6, 3), torch.randn(6, 5))
    assert len(gathered(watcher)) == 2
    assert not gathered(watcher)
    watcher.close()


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_a_layer_that_is_not_used_is_not_seen(fisher):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model, criterion = Half(), nn.MSELoss()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    assert set(found) == {"used"}


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_a_layer_whose_output_is_thrown_away_is_not_seen(fisher):
    class Wasteful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.wasted = nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            self.wasted(x)
            return self.used(x)

    model, criterion = Wasteful(), nn.MSELoss()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    assert set(found) == {"used"}


# How modules are called.


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(self.cell(x))


def test_a_module_called_twice_is_summed():
    model, criterion, x, y = Twice(), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 3)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y))["cell"]
    h, W = model.cell(x), model.cell.weight.detach()
    rows = torch.cat([torch.cat([r, torch.ones(6, 1)], 1) for r in (x, h.detach())])
    torch.testing.assert_close(found.A.mean, rows.T @ rows / 12)
    scale = 2 / 18 * 6
    torch.testing.assert_close(found.B.mean, scale * (torch.eye(3) + W.T @ W))


@pytest.mark.parametrize("positions", [1, 4])
def test_corrected_eigenvalues_of_a_module_called_twice_have_the_blocks_trace(positions):
    model, criterion = Twice(), nn.MSELoss()
    x, y = torch.randn(6, positions, 3), torch.randn(6, positions, 3)
    watcher = watch(model, criterion)
    backward(model, criterion, x, y)
    parts, _ = watcher.collect()
    watcher.close()
    seen = by_layer((part.statistics, part.weight) for part in parts)["cell"]
    found = with_corrected(batch_factors(seen), seen, torch.eye(4), torch.eye(3)).s
    dense = dense_block(model, criterion, x, y, "cell")
    torch.testing.assert_close(found.mean.sum(), dense.trace(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_an_in_place_function_after_the_layer(fisher):
    first, second = nn.Linear(3, 4), nn.Linear(4, 5)
    inplace = nn.Sequential(first, nn.ReLU(inplace=True), second)
    plain = nn.Sequential(first, nn.ReLU(), second)
    criterion, x, y = nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    found = seen_by(inplace, criterion, lambda: backward(inplace, criterion, x, y), fisher)
    wanted = seen_by(plain, criterion, lambda: backward(plain, criterion, x, y), fisher)
    assert_same(found, wanted)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_a_layer_called_by_keyword(fisher):
    class Keyword(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            for module in self.inner:
                x = module(input=x)
            return x

    inner, criterion = net(3, 4, 5), nn.MSELoss()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    model = Keyword(inner)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    wanted = seen_by(inner, criterion, lambda: backward(inner, criterion, x, y), fisher)
    assert_same({k.removeprefix("inner."): f for k, f in found.items()}, wanted)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("way", ["keywords", "mixed"])
def test_a_criterion_called_by_keyword(fisher, way):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)

    def loop():
        if way == "keywords":
            criterion(target=y, input=model(x)).backward()
        else:
            criterion(model(x), target=y).backward()

    assert_same(seen_by(model, criterion, loop, fisher), wanted)


class KeywordOnly(nn.Module):
    """A criterion of a user whose target can be given by name only."""

    def forward(self, output: Tensor, *, target: Tensor) -> Tensor:
        return (output - target).square().mean()


def test_a_criterion_with_a_target_by_name_only():
    model, criterion, x, y = net(3, 4, 5), KeywordOnly(), torch.randn(6, 3), torch.randn(6, 5)
    watcher = watch(model, criterion)
    with pytest.raises(CriterionError, match=r"KeywordOnly takes target by name only; .*by posit"):
        criterion(model(x), target=y)
    watcher.close()


@pytest.mark.parametrize(
    "fisher", ["exact"]
)  # without the model's own call parts are not told apart
def test_submodules_called_one_by_one_instead_of_the_model(fisher):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    whole = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)

    def loop():
        for xi, yi in zip(x.split((2, 4)), y.split((2, 4)), strict=True):
            h = model[1](model[0](xi))
            (criterion(model[2](h), yi) * (len(xi) / 6)).backward()

    assert_same(seen_by(model, criterion, loop, fisher), whole)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_checkpointed_layers_count_once(fisher):
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.inner[:2], x, use_reentrant=False)
            return self.inner[2](h)

    inner, criterion = net(3, 4, 5), nn.MSELoss()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    model = Checkpointed(inner)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    wanted = seen_by(inner, criterion, lambda: backward(inner, criterion, x, y), fisher)
    assert_same({k.removeprefix("inner."): f for k, f in found.items()}, wanted)


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("bias", [True, False])
def test_a_batch_in_a_buffer_that_is_used_again(fisher, bias):
    model, criterion = nn.Linear(3, 5, bias=bias), nn.MSELoss()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    whole = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)

    def loop():
        at, to = torch.empty(3, 3), torch.empty(3, 5)
        for xi, yi in zip(x.split(3), y.split(3), strict=True):
            backward(model, criterion, at.copy_(xi), to.copy_(yi), 1 / 2)

    assert_same(seen_by(model, criterion, loop, fisher), whole)


# Between the model and the criterion.


class Heads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.trunk = kind, nn.Linear(3, 4)
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor):
        h = self.trunk(x).tanh()
        left, right = self.left(h), self.right(h)
        if self.kind == "dict":
            return {"left": left, "heads": [right]}
        return Output(left, right) if self.kind == "named" else (left, right)


class Output(NamedTuple):
    left: Tensor
    right: Tensor


def right_of(output) -> Tensor:
    return output["heads"][0] if isinstance(output, dict) else output[1]


@pytest.mark.parametrize("kind", ["dict", "tuple", "named"])
def test_outputs_in_a_nest_are_found_and_can_be_run_again(kind):
    model, criterion, x, y = Heads(kind), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    watcher = watch(model, criterion)
    criterion(right_of(model(x)), y).backward()
    (part,), _ = watcher.collect()
    watcher.close()
    assert part.call is not None
    assert part.bridge is None
    assert set(part.statistics) == {"trunk", "right"}
    torch.testing.assert_close(right_of(model(x)).detach(), part.output)


def test_two_heads_of_one_forward_are_two_parts():
    model, criterion, x = Heads("tuple"), nn.MSELoss(), torch.randn(1, 3)
    y, z = torch.randn(1, 2), torch.randn(1, 5)

    def loop():
        left, right = model(x)
        (criterion(left, y) + 0.3 * criterion(right, z)).backward()

    found = seen_by(model, criterion, loop)["trunk"]

    class Head(nn.Module):
        def __init__(self, at: int) -> None:
            super().__init__()
            self.model, self.at = model, at

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)[self.at]

    dense = dense_block(Head(0), criterion, x, y, "model.trunk")
    dense = dense + 0.3 * dense_block(Head(1), criterion, x, z, "model.trunk")
    torch.testing.assert_close(
        torch.kron(found.B.mean, found.A.mean), dense, rtol=1e-10, atol=1e-13
    )


BETWEEN = {
    "same": lambda z: z,
    "view": lambda z: z.view(-1, 5),
    "flatten": lambda z: z.flatten(0, 1),
    "slice": lambda z: z[:, 1:],
    "shifted": lambda z: z[:, :-1].reshape(-1, 5),
    "permute": lambda z: z.permute(0, 2, 1),
    "indexed": lambda z: z[:, torch.tensor([2, 0])],
    "scaled": lambda z: z * 0.5,
    "mean": lambda z: z.mean(1),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_linear_function_between_the_model_and_the_criterion_can_be_run_again(name):
    model, criterion, x = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3, 3)
    y = torch.zeros_like(BETWEEN[name](model(x)))
    watcher = watch(model, criterion)
    criterion(BETWEEN[name](model(x)), y).backward()
    (part,), _ = watcher.collect()
    watcher.close()
    assert part.call is not None, "the model's output was lost"
    assert part.bridge is None or part.bridge.linear
    output = model(x).detach()
    pushed = output if part.bridge is None else part.bridge.push(output)
    torch.testing.assert_close(pushed, part.output)


@pytest.mark.parametrize("name", BETWEEN)
def test_statistics_do_not_depend_on_where_the_function_is(name):
    class Inside(nn.Module):
        def __init__(self, inner: nn.Sequential) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return BETWEEN[name](self.inner(x))

    inner, criterion, x = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3, 3)
    y = torch.randn_like(BETWEEN[name](inner(x)))
    model = Inside(inner)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y))
    found = seen_by(inner, criterion, lambda: criterion(BETWEEN[name](inner(x)), y).backward())
    assert_same(found, {k.removeprefix("inner."): f for k, f in wanted.items()})


def test_a_difference_of_two_forwards_is_not_taken_for_one():
    model, criterion = net(3, 5), nn.MSELoss()
    watcher = watch(model, criterion)
    z = model(torch.randn(6, 3)) - model(torch.randn(6, 3))
    criterion(z, torch.randn(6, 5)).backward()
    (part,), _ = watcher.collect()
    watcher.close()
    assert part.call is None or not part.bridge.linear
    assert [stats.a.dense().shape for stats in part.statistics["0"]] == [(6, 1, 4)] * 2


def corrected_and_reduced(model: nn.Module, criterion: nn.Module | None, loop) -> list[Tensor]:
    """What depends on which rows belong to one example."""
    fisher = "exact" if criterion is not None else "empirical"
    reduced = seen_by(model, criterion, loop, fisher, "reduce")["0"]
    watcher = watch(model, criterion, fisher)
    model.zero_grad()
    loop()
    parts, _ = watcher.collect()
    watcher.close()
    seen = by_layer((part.statistics, part.weight) for part in parts)["0"]
    s = with_corrected(batch_factors(seen), seen, torch.eye(4), torch.eye(4)).s
    return [reduced.A.mean, reduced.B.mean, s.mean]


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4)])
def test_outputs_of_two_forwards_put_together_are_more_examples_not_more_positions(sizes):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = corrected_and_reduced(model, criterion, lambda: backward(model, criterion, x, y))

    def loop():
        criterion(torch.cat([model(xi) for xi in x.split(sizes)]), y).backward()

    for f, w in zip(corrected_and_reduced(model, criterion, loop), wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("sizes", [(3, 3), (2, 4)])
def test_micro_batches_without_a_criterion_are_more_examples_not_more_positions(sizes):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = corrected_and_reduced(model, None, lambda: backward(model, criterion, x, y))

    def loop():
        for xi, yi in zip(x.split(sizes), y.split(sizes), strict=True):
            backward(model, criterion, xi, yi, len(xi) / 6)

    for f, w in zip(corrected_and_reduced(model, None, loop), wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-13)


# Observed losses.


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("shape", [(6,), (6, 4)])
def test_an_observed_loss_is_a_watched_one(fisher, shape):
    model, criterion = net(3, 4, 5), nn.MSELoss()
    x, y = torch.randn(*shape, 3), torch.randn(*shape, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y, 0.7), fisher)
    watcher = watch(model, None, fisher)
    output = model(x)
    watcher.observe(nn.MSELoss(), output, (y,))
    (0.7 * (output - y).square().mean()).backward()
    found = gathered(watcher)
    watcher.close()
    assert_same(found, wanted)


def test_an_observed_loss_without_backward_commits_nothing():
    model = net(3, 4, 5)
    watcher = watch(model, None)
    watcher.observe(nn.MSELoss(), model(torch.randn(6, 3)), (torch.randn(6, 5),))
    assert watcher.collect() == ([], "")
    watcher.close()


def test_without_a_criterion_the_loss_is_taken_for_a_mean_over_examples():
    model, criterion = net(3, 4, 5), nn.CrossEntropyLoss()
    x, y = torch.randn(6, 3), torch.arange(6) % 5
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y), "empirical")
    found = seen_by(model, None, lambda: backward(model, criterion, x, y), "empirical")
    assert_same(found, wanted)


# What the user's training must not notice.


def dropping() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 5))


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("settings", ["automatic", "numeric"])
def test_the_training_draws_the_same_numbers_with_and_without_kfac(fisher, settings):
    numeric = {"lr": 0.1, "momentum": 0.0, "damping": 1.0, "trust_region": None}

    def drawn(with_kfac: bool) -> list[Tensor]:
        torch.manual_seed(5)
        model, criterion = dropping(), nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if with_kfac:
            chosen = {} if settings == "automatic" else numeric
            optimizer = KFAC(model, criterion, fisher=fisher, **chosen)
        states = []
        for _ in range(7):
            optimizer.zero_grad()
            criterion(model(torch.randn(6, 3)), torch.randint(0, 5, (6,))).backward()
            optimizer.step()
            states.append(torch.get_rng_state())
        return states

    for plain, watched in zip(drawn(False), drawn(True), strict=True):
        assert plain.equal(watched)


def test_gradients_are_those_of_the_loss():
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    watcher = watch(model, criterion)
    backward(model, criterion, x, y)
    watcher.close()
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=0)


# Hooks and lifetimes.


def hooks(*modules: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for root in modules
        for m in root.modules()
    )


def test_hooks_are_removed_with_the_optimizer():
    model, criterion = net(3, 4, 5), nn.MSELoss()
    optimizer = KFAC(model, criterion)
    backward(model, criterion, torch.randn(6, 3), torch.randn(6, 5))
    optimizer.step()
    assert hooks(model, criterion) > 0
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    assert hooks(model, criterion) == 0


def test_hooks_are_removed_by_close_and_only_ours():
    model, criterion = net(3, 4, 5), nn.MSELoss()
    model.register_forward_hook(lambda *args: None)
    optimizer = KFAC(model, criterion)
    optimizer.close()
    optimizer.close()
    assert hooks(model, criterion) == 1


def test_a_failed_construction_leaves_no_hooks():
    model, criterion = nn.Sequential(nn.Linear(3, 4), nn.PReLU(dtype=torch.cfloat)), nn.MSELoss()
    with pytest.raises(ValueError, match="strict=True"):
        KFAC(model, criterion, strict=True)
    gc.collect()
    assert hooks(model, criterion) == 0


@pytest.mark.parametrize("fisher", DETERMINISTIC)
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_a_copy_of_the_model_does_not_write_into_the_originals_statistics(fisher, how):
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    watcher = watch(model, criterion, fisher)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    model.zero_grad()
    output = other(x)
    torch.testing.assert_close(output, model(x))
    (7 * output.square().mean()).backward()
    backward(model, criterion, x, y)
    found = gathered(watcher)
    watcher.close()
    assert_same(found, wanted)
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_does_not_keep_the_optimizer_alive(how):
    model, criterion = net(3, 4, 5), nn.MSELoss()
    optimizer = KFAC(model, criterion)
    other, other_criterion = how(model), how(criterion)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    other_criterion(other(torch.randn(6, 3)), torch.randn(6, 5)).backward()


def test_a_loss_that_outlives_the_optimizer_can_be_differentiated():
    model, criterion = net(3, 4, 5), nn.MSELoss()
    optimizer = KFAC(model, criterion)
    loss = criterion(model(torch.randn(6, 3)), torch.randn(6, 5))
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    loss.backward()
    assert model[0].weight.grad is not None


def test_two_optimizers_on_one_model_see_the_same():
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y))
    first, second = watch(model, criterion), watch(model, criterion)
    backward(model, criterion, x, y)
    assert_same(gathered(first), wanted)
    assert_same(gathered(second), wanted)
    first.close()
    second.close()


def test_a_criterion_shared_with_another_model_counts_for_each_its_own():
    model, other, criterion = net(3, 4, 5), net(3, 5), nn.MSELoss()
    x, y = torch.randn(6, 3), torch.randn(6, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y))

    def loop():
        backward(other, criterion, x, y)
        backward(model, criterion, x, y)

    assert_same(seen_by(model, criterion, loop), wanted)


def test_a_forward_that_fails_is_forgotten():
    model, criterion, x, y = net(3, 4, 5), nn.MSELoss(), torch.randn(6, 3), torch.randn(6, 5)
    wanted = seen_by(model, criterion, lambda: backward(model, criterion, x, y))

    def loop():
        with pytest.raises(RuntimeError, match="shape"):
            model(torch.randn(6, 4))
        with pytest.raises(CriterionError, match="shape"):
            criterion(model(x), torch.randn(6, 1))
        backward(model, criterion, x, y)

    assert_same(seen_by(model, criterion, loop), wanted)


def test_reruns_of_the_planner_are_not_taken_for_training(monkeypatch):
    model, criterion = net(3, 4, 5), nn.MSELoss()
    optimizer = KFAC(model, criterion, fisher="exact", factor_every=1)
    ran = []
    real = Batches._run
    monkeypatch.setattr(Batches, "_run", lambda self, *args: ran.append(0) or real(self, *args))
    backward(model, criterion, torch.randn(6, 3), torch.randn(6, 5))
    optimizer.step()
    assert ran
    assert optimizer._watcher.collect() == ([], "")
    assert not optimizer._watcher.calls


class Pooled(nn.Module):
    """Tokens through a layer, then their mean: one output for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Linear(3, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(x).mean(1))


@pytest.mark.parametrize("fisher", DETERMINISTIC)
def test_the_weight_of_a_pooled_example_is_that_of_its_tokens(fisher):
    torch.manual_seed(3)
    model, x, y = Pooled(), torch.randn(6, 7, 3), torch.randint(0, 4, (6,))
    classes = torch.tensor([1.0, 0.0, 2.0, 0.5])
    criterion = nn.CrossEntropyLoss(weight=classes)
    found = seen_by(model, criterion, lambda: backward(model, criterion, x, y), fisher)
    rows = torch.cat([x, torch.ones(6, 7, 1)], 2)
    each = (classes[y] / classes[y].sum()).view(6, 1).expand(6, 7)
    wanted = torch.einsum("nsi,nsj,ns->ij", rows, rows, each) / each.sum()
    torch.testing.assert_close(found["tokens"].A.mean, wanted, rtol=1e-10, atol=1e-13)


def test_a_row_whose_first_entry_is_nothing_is_alive_all_the_same():
    b = torch.zeros(2, 3, 2, 2)  # (V, N, S, d_out)
    b[:, :2, :, 0] = 1
    b[1, 2, 0, 1] = 1
    assert filing._alive(b).tolist() == [[True, True], [True, True], [True, False]]


def test_looking_for_the_models_output_is_no_training_gradient():
    torch.manual_seed(3)
    model, x, y = Pooled(), torch.randn(6, 7, 3), torch.randint(0, 4, (6,))
    criterion = nn.CrossEntropyLoss()
    for several in (False, True):  # outputs that the criterion's input was made of
        optimizer = KFAC(model, criterion, fisher="empirical")
        output = model(x) + model(-x) if several else 2 * model(x)
        loss = criterion(output, y)
        assert not optimizer._watcher._arrivals
        loss.backward()
        assert len(optimizer._watcher._arrivals) == (4 if several else 2)
        optimizer.close()


def test_a_gradient_that_cancels_to_rounding_is_no_layer_that_is_used_in_unseen_ways():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).float()
    model[0].weight.requires_grad_(False)  # what is left, its bias, has no effect
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion)
    x, y = 100 + torch.randn(32, 6).float(), torch.randint(0, 3, (32,))
    criterion(model(x), y).backward()
    optimizer.step()
    assert 0 < float(model[0].bias.grad.abs().max()) < 1e-5
    assert optimizer._watcher.filing.unexplained == {}


def test_criteria_are_compared_with_the_whole_loss_in_the_first_captures_alone():
    torch.manual_seed(0)
    model, criterion = nn.Linear(6, 3), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, basis="eigen", factor_every=1)
    left = []
    for _ in range(CHECKED + 2):
        optimizer.zero_grad()
        criterion(model(torch.randn(8, 6)), torch.randint(0, 3, (8,))).backward()
        optimizer.step()
        left.append(optimizer._watcher.whole.left)
    assert left == [*range(CHECKED - 1, 0, -1), 0, 0, 0]
