"""What stands around the step: precision, scaling, accumulation, clipping, compilation and more."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from kronewton import KFAC, Preconditioner
from kronewton.errors import KronewtonWarning, UnsupportedError

ALL_FISHERS = pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
PINNED = {"lr": 0.5, "momentum": 0.3, "damping": 0.05, "trust_region": None}
Batch = tuple[Tensor, Tensor]


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def batches(count: int, N: int = 6) -> list[Batch]:
    torch.manual_seed(2)
    return [(torch.randn(N, 3).double(), torch.randint(0, 4, (N,))) for _ in range(count)]


def vector(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Scaled:
    """A training with a GradScaler, or without one."""

    def __init__(self, scale: float | None, criterion: bool = True, **options) -> None:
        self.model, self.criterion = net(), nn.CrossEntropyLoss()
        self.optimizer = KFAC(self.model, self.criterion if criterion else None, **options)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1, enabled=bool(scale))

    def backward(self, x: Tensor, y: Tensor, part: float = 1.0) -> None:
        self.scaler.scale(self.criterion(self.model(x), y) * part).backward()

    def step(self, *parts: Batch, clip: float = 0.0, zero: bool = True) -> Tensor:
        if zero:
            self.optimizer.zero_grad()
        else:
            self.model.zero_grad()
        N = sum(len(y) for _, y in parts)
        for x, y in parts:
            self.backward(x, y, len(y) / N)
        if clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return vector(self.model)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("options", [{}, PINNED, {"basis": "adam"}, {"refine": 2}])
@pytest.mark.parametrize(
    ("fisher", "criterion"),
    [("exact", True), ("sampled", True), ("empirical", True), ("empirical", False)],
)
def test_a_grad_scaler_changes_nothing(fisher, criterion, options, clip):
    if options.get("refine") and not criterion:
        pytest.skip("the dial needs a criterion")
    plain, scaled = (Scaled(s, criterion, fisher=fisher, **options) for s in (None, 1024.0))
    for batch in batches(5):
        one, other = plain.step(batch, clip=clip), scaled.step(batch, clip=clip)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("N", [6, 600])  # in sums over the second half precision overflows
@ALL_FISHERS
def test_the_first_scale_of_a_scaler_is_infinite_in_half_precision(fisher, N):
    run = Scaled(2.0**16, fisher=fisher)
    run.model.float()
    x, y = batches(1, N)[0]
    losses = []
    for _ in range(8):
        run.optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = run.criterion(run.model(x.float()), y)
        run.scaler.scale(loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error", KronewtonWarning)  # nothing is unwatched here
            run.scaler.step(run.optimizer)
        run.scaler.update()
        losses.append(float(loss.detach()))
    told = run.optimizer.diagnostics()
    assert losses[-1] < 0.95 * losses[0]
    assert told["predicted"] < 0
    assert not told["skipped"]


@ALL_FISHERS
def test_a_scaler_and_unequal_parts_are_the_batch(fisher):
    plain, scaled = (Scaled(s, fisher=fisher, **PINNED) for s in (None, 2.0**16))
    for x, y in batches(3):
        parts = [(x[:2], y[:2]), (x[2:], y[2:])]
        one, other = plain.step(*parts), scaled.step(*parts)
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("zero", [True, False])
@ALL_FISHERS
def test_a_step_that_a_scaler_leaves_out_commits_no_statistics(fisher, zero):
    options = {"fisher": fisher, "factor_every": 1, "inverse_every": 1, **PINNED}
    clean, hurt = (Scaled(s, **options) for s in (None, 1024.0))
    data = batches(4)
    for number, batch in enumerate(data):
        clean.step(batch, zero=zero)
        if number == 2:
            state = copy.deepcopy(hurt.optimizer.state_dict())
            before = vector(hurt.model)
            hurt.model.zero_grad() if not zero else hurt.optimizer.zero_grad()
            hurt.backward(*data[0])
            next(hurt.model.parameters()).grad[0, 0] = math.inf  # as an overflow leaves it
            hurt.scaler.step(hurt.optimizer)
            hurt.scaler.update()
            assert vector(hurt.model).equal(before)
            assert hurt.scaler.get_scale() == 512
            now = hurt.optimizer.state_dict()["state"]
            for index, entries in state["state"].items():
                for key in set(entries) - {"kfac_generator"}:
                    assert torch.equal(now[index][key].nan_to_num(), entries[key].nan_to_num())
        hurt.step(batch, zero=zero)
        if fisher != "sampled":  # whose draws for the batch that was left out are gone
            torch.testing.assert_close(
                vector(clean.model), vector(hurt.model), rtol=1e-7, atol=1e-9
            )
    assert bool(torch.isfinite(vector(hurt.model)).all())


def test_the_scale_of_the_next_step_is_its_own():
    run, plain = Scaled(1024.0, fisher="exact", **PINNED), Scaled(None, fisher="exact", **PINNED)
    for number, batch in enumerate(batches(4)):
        plain.step(batch)
        if number % 2:  # a step without the scaler in between
            run.optimizer.zero_grad()
            run.criterion(run.model(batch[0]), batch[1]).backward()
            run.optimizer.step()
        else:
            run.step(batch)
        torch.testing.assert_close(vector(run.model), vector(plain.model), rtol=1e-7, atol=1e-9)
    assert run.optimizer._step_supports_amp_scaling is False


# Autocast.


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm, self.head = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 4)
        self.mix = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x.reshape(-1, 4, 4))
        g = self.norm(h)
        y: Tensor = self.head((h + self.mix(g, g, g, need_weights=False)[0]).mean(1))
        return y


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "dense": lambda: nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 4)),
    "convolutional": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(),
        nn.Flatten(), nn.Linear(96, 4),
    ),
    "attentive": Attentive,
}  # fmt: skip


def learnt(
    name: str, dtype: torch.dtype | None, steps: int, **options
) -> tuple[float, float, KFAC]:
    """Losses before and after some steps on all of a task with noise, which ends above zero."""
    torch.manual_seed(0)
    X = torch.randn(4096, 16)
    Y = (X @ torch.randn(16, 4) + 2 * torch.randn(4096, 4)).argmax(1)
    model, criterion = NETWORKS[name](), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, **options)
    first = float(criterion(model(X), Y).detach())
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            loss = criterion(model(X), Y)
        loss.backward()
        optimizer.step()
    return first, float(criterion(model(X), Y).detach()), optimizer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_batch_that_is_run_again_is_run_in_the_precision_of_its_forward(dtype):
    torch.manual_seed(0)
    model, criterion = NETWORKS["dense"](), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion)
    x, y = torch.randn(64, 16), torch.randint(0, 4, (64,))
    with torch.autocast("cpu", dtype=dtype):
        loss = criterion(model(x), y)
    loss.backward()
    parts, _ = optimizer._watcher.collect()
    planner = optimizer._planner
    nowhere = [torch.zeros_like(p) for p in model.parameters()]
    again = planner.batches.trial(parts, nowhere)
    assert again.loss == float(loss.detach())
    assert again.bend == 0


def test_a_criterion_outside_autocast_is_tried_outside_it(monkeypatch):
    """As on an accelerator, where BCELoss refuses autocast."""
    seen = []

    class Picky(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return nn.functional.binary_cross_entropy(output, target)

    torch.manual_seed(0)
    model, criterion = nn.Sequential(nn.Linear(16, 1), nn.Sigmoid()), Picky()
    optimizer = KFAC(model, criterion, basis="adam")
    x, y = torch.randn(64, 16), torch.randint(0, 2, (64, 1)).float()
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu"):
            output = model(x)
        criterion(output.float(), y).backward()
        with torch.autocast("cpu"):  # nor does the step's own surrounding count
            optimizer.step()
    assert not any(seen)
    assert len(seen) > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_under_autocast_the_loss_is_within_five_per_cent(name, dtype):
    first, plain, _ = learnt(name, None, 12)
    _, cast, optimizer = learnt(name, dtype, 12)
    assert plain < 0.9 * first
    assert cast == pytest.approx(plain, rel=0.05)
    told = optimizer.diagnostics()
    assert float(told["skipped"]) == float(told["dropped_statistics"]) == 0
    for layer in optimizer._layers:
        kept = optimizer._curvature.tensors(layer.name)
        assert {t.dtype for t in kept.values()} == {torch.float32}, layer.name


# Around the model.


def run_with(
    wrap: Callable[[nn.Module], Callable[[Tensor], Tensor]],
    model: nn.Module,
    data: list[Batch],
    **options,
) -> Tensor:
    """Train `model` by calls of what is made of it."""
    criterion = nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion, **options)
    run = wrap(model)
    for x, y in data:
        optimizer.zero_grad()
        criterion(run(x), y).backward()
        optimizer.step()
    return vector(model)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def test_a_graph_of_a_step_is_refused(monkeypatch):
    """As a CUDA graph would be that is being captured."""
    (x, y), *_ = batches(1)
    model, criterion = net(), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion)
    criterion(model(x), y).backward()
    before = vector(model)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(UnsupportedError, match=r"KFAC\.step\(\) can't be captured .*reduce-over"):
        optimizer.step()
    with pytest.raises(UnsupportedError, match=r"model that is watched .*reduce-overhead"):
        model(x)
    with pytest.raises(UnsupportedError, match=r"Preconditioner\.step\(\) can't be captured"):
        Preconditioner(net(), criterion).step()
    monkeypatch.undo()
    optimizer.step()
    assert not vector(model).equal(before)


COMPILED = {"after": torch.compile, "in place": compiled_in_place}
NO_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


@NO_COMPILER
@pytest.mark.parametrize(
    "options", [{}, pytest.param({"basis": "adam"}, marks=pytest.mark.slow),
                pytest.param({"fisher": "empirical"}, marks=pytest.mark.slow),
                pytest.param({"refine": 2}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_a_model_that_was_compiled_before_makes_the_same_steps(options):
    torch.compiler.reset()
    plain, data = net(), batches(6)
    inner = copy.deepcopy(plain)
    model = torch.compile(inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)  # the quadratic model is there
        run_with(lambda m: m, model, data, **options)
    wanted = run_with(lambda m: m, plain, data, **options)
    torch.testing.assert_close(vector(inner), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@NO_COMPILER
@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("how", COMPILED)
def test_a_model_that_is_compiled_afterwards_makes_the_same_steps(how, fisher):
    torch.compiler.reset()
    plain, data = net(), batches(6)
    model = copy.deepcopy(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        found = run_with(COMPILED[how], model, data, fisher=fisher)
    wanted = run_with(lambda m: m, plain, data, fisher=fisher)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Sequential, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant:
            x = x.detach().requires_grad_()  # which that kind needs
        h = checkpoint(self.model[:2], x, use_reentrant=self.reentrant)
        return self.model[2](h)


@pytest.mark.parametrize("options", [{}, PINNED])
@ALL_FISHERS
def test_checkpointing_changes_nothing(fisher, options):
    data = batches(5)
    wanted = run_with(lambda m: m, net(), data, fisher=fisher, **options)
    found = run_with(lambda m: m, Checkpointed(net(), False), data, fisher=fisher, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_reentrant_checkpointing_goes_without_a_criterion_and_is_warned_of_with_one():
    with pytest.warns(KronewtonWarning, match="layer 'model.0' has a gradient, but nothing in the"):
        run_with(lambda m: m, Checkpointed(net(), True), batches(1))
    model, criterion = Checkpointed(net(), True), nn.CrossEntropyLoss()
    optimizer = KFAC(model)
    losses = []
    (x, y), *_ = batches(1)
    for _ in range(16):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@ALL_FISHERS
def test_function_transforms_of_the_model_beside_it_leave_no_trace(fisher):
    criterion = nn.CrossEntropyLoss()

    def beside(model: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            parameters = {name: p.detach() for name, p in model.named_parameters()}

            def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
                output = functional_call(model, p, (x.unsqueeze(0),))
                return criterion(output, torch.zeros(1, dtype=torch.long))

            each = vmap(grad(loss), (None, 0))(parameters, x)
            assert each["0.weight"].shape == (len(x), 8, 3)
            jacrev(lambda p: functional_call(model, p, (x,)))(parameters)
            return model(x)

        return run

    data = batches(4)
    wanted = run_with(lambda m: m, net(), data, fisher=fisher)
    found = run_with(beside, net(), data, fisher=fisher)
    assert found.equal(wanted)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Whatever is made without a device has no numbers: a step that makes such tensors fails."""
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("options", [{}, PINNED, {"basis": "adam"}, {"basis": "corrected"},
                                     {"refine": 2}, {"sharing": "best"}])  # fmt: skip
@ALL_FISHERS
def test_the_default_device_is_not_asked(fisher, options, request):
    data = batches(4)
    wanted = run_with(lambda m: m, net(), data, fisher=fisher, **options)
    model = net()
    request.getfixturevalue("elsewhere")
    found = run_with(lambda m: m, model, data, fisher=fisher, **options)
    assert found.equal(wanted)


class Elsewhere:
    """The generator of a device that this machine need not have."""

    device = torch.device("cuda", 0)

    def initial_seed(self) -> int:
        return 0

    def get_state(self) -> Tensor:
        return torch.zeros(16, dtype=torch.uint8)


@pytest.mark.parametrize("fisher", ["exact", "sampled"])
def test_draws_follow_a_model_that_has_been_moved(fisher):
    """Accelerate moves it when the optimizer is made, and so do many loops."""
    data, criterion = batches(4), nn.CrossEntropyLoss()
    wanted = run_with(lambda m: m, net(), data, fisher=fisher)
    model = net()
    optimizer = KFAC(model, criterion, fisher=fisher)
    optimizer._watched.fisher.generator = Elsewhere()  # as if the model had been there
    optimizer.load_state_dict(optimizer.state_dict())  # which Accelerate does, too
    for x, y in data:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert vector(model).equal(wanted)


class Varied(nn.Module):
    """A packed recurrence, a bag, a tied table and a convolution of few windows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.table, self.read = nn.Embedding(5, 4), nn.LSTM(4, 4, batch_first=True)
        self.bag, self.head = nn.EmbeddingBag(5, 4), nn.Linear(4, 5, bias=False)
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.head.weight = self.table.weight
        self.lengths = torch.tensor([3, 2, 3, 1, 2, 3], device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x.abs() * 10).long() % 5
        h = self.table(tokens)
        packed = nn.utils.rnn.pack_padded_sequence(h, self.lengths, True, False)
        h = self.read(packed)[1][0][0] + self.bag(tokens)
        h = h + self.conv(h.reshape(-1, 1, 2, 2)).flatten(1)
        y: Tensor = self.head(h)
        return y


@pytest.mark.parametrize("basis", ["factored", "adam", "orthogonal", "eigen"])
def test_no_kind_of_layer_asks_for_the_default_device(basis, request):
    data = batches(3)
    wanted = run_with(lambda m: m, Varied().double(), data, basis=basis)
    model = Varied().double()
    request.getfixturevalue("elsewhere")
    found = run_with(lambda m: m, model, data, basis=basis)
    assert found.equal(wanted)


def test_states_and_what_is_told_do_not_ask_for_the_default_device_either(elsewhere):
    with torch.device("cpu"):
        model, other, data, criterion = net(), net(), batches(2), nn.CrossEntropyLoss()
    optimizer = KFAC(model, criterion)
    for x, y in data:
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    assert math.isfinite(float(optimizer.diagnostics()["lr"]))
    assert "linear" in str(optimizer.coverage())
    again = KFAC(other, criterion)
    again.load_state_dict(optimizer.state_dict())
    assert float(again.diagnostics()["step"]) == 2


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("options", [{}, {"basis": "adam"}, {"refine": 2}])
@ALL_FISHERS
def test_deterministic_algorithms_are_all_that_it_needs(fisher, options, deterministic):
    # They fill what is not initialised with NaN, too.
    data = batches(4)
    one, two = (run_with(lambda m: m, net(), data, fisher=fisher, **options) for _ in range(2))
    assert one.equal(two)
    assert bool(torch.isfinite(one).all())


def test_what_is_changed_in_place_after_a_layer_was_cast_is_kept_as_the_layer_saw_it():
    class Residual(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.first, self.norm, self.f = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8)
            self.last, self.in_place = nn.Linear(8, 3), in_place

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(self.first(x)).float() * 1.0
            if self.in_place:
                h += self.f(h)
            else:
                h = h + self.f(h)
            return self.last(h)

    x, y, found = torch.randn(16, 6), torch.arange(16) % 3, []
    for in_place in (False, True):
        torch.manual_seed(0)
        model, criterion = Residual(in_place).float(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, criterion)
        with torch.autocast("cpu", torch.bfloat16):
            loss = criterion(model(x.float()), y)
        loss.backward()
        optimizer.step()
        found.append(optimizer._curvature.factors["f"].A.mean)
    torch.testing.assert_close(found[0], found[1])
