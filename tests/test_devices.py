"""On accelerators, where this machine has one: the same steps as on the CPU, and nothing misplaced.

`pytest --device cuda` runs the rest of the suite there.
"""

from __future__ import annotations

import io
import shutil
import warnings

import pytest
import torch
from torch import Tensor, nn

import kronewton as kn
from kronewton import drift
from zoo import ZOO, Entry, Trained, train

DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
pytestmark = pytest.mark.skipif(DEVICE is None, reason="there is no accelerator")

PINNED = {"damping": 1e-2, "lr": 0.1, "momentum": 0.5}
OPTIONS = [
    {},
    PINNED,
    {"basis": "adam"},
    {"basis": "factored"},
    {"basis": "corrected", "damping": 1e-2},
    {"refine": 2},
    {"fisher": "empirical"},
    {"sharing": "best"},
    {"averaging": 0.9},
]


def net(norm: bool = False) -> nn.Sequential:
    """Without a norm, which mixes examples: then it makes no difference what a device draws."""
    torch.manual_seed(3)
    conv, fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4 * 9, 5)
    middle = nn.BatchNorm2d(4) if norm else nn.Tanh()
    return nn.Sequential(conv, middle, nn.ReLU(), nn.Flatten(), fc)


def batches(n: int) -> list[tuple[Tensor, Tensor]]:
    """More examples than the head has inputs: between those of none a basis may be any."""
    torch.manual_seed(4)
    return [(torch.randn(64, 1, 3, 3), torch.randint(5, (64,))) for _ in range(n)]


def run(device, steps: int, **options):
    """Train on the same few batches; the weights afterwards, on the CPU, and what made them."""
    model, criterion = net().to(device, torch.float64), nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **{"fisher": "exact", **options})  # nothing is drawn
    for x, y in batches(steps):
        optimizer.zero_grad()
        criterion(model(x.to(device, torch.float64)), y.to(device)).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach().cpu(), optimizer, model


@pytest.fixture
def alike(monkeypatch):
    """Bases of normalised steps are found by products on every device, and not on GPUs alone."""
    monkeypatch.setattr(drift, "by_products", lambda M: True)


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_steps_as_on_the_cpu(options):
    ours, optimizer, _ = run(DEVICE, 8, **options)
    theirs, _, _ = run("cpu", 8, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    for p, kept in optimizer.state.items():
        assert all(t.device == p.device for t in kept.values() if t.dim())


def test_normalised_steps_take_no_eigendecomposition(monkeypatch):
    monkeypatch.setattr(torch.linalg, "eigh", None)
    weights, optimizer, _ = run(DEVICE, 8)
    assert weights.isfinite().all()
    assert not optimizer.diagnostics()["failed_inversions"]


@pytest.mark.usefixtures("alike")
@pytest.mark.parametrize("options", [{}, PINNED, {"basis": "adam"}], ids=str)
def test_a_state_goes_from_one_device_to_the_other(options):
    _, optimizer, model = run(DEVICE, 4, **options)
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream, map_location="cpu", weights_only=True)
    ends = []
    for device in (DEVICE, "cpu"):
        other, criterion = net().to(device, torch.float64), nn.CrossEntropyLoss()
        other.load_state_dict(saved["model"])
        resumed = kn.KFAC(other, criterion, **{"fisher": "exact", **options})
        resumed.load_state_dict(saved["optimizer"])
        for x, y in batches(8)[4:]:
            resumed.zero_grad()
            criterion(other(x.to(device, torch.float64)), y.to(device)).backward()
            resumed.step()
        ends.append(nn.utils.parameters_to_vector(other.parameters()).detach().cpu())
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(ends[0], run(DEVICE, 8, **options)[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, PINNED, {"basis": "adam"}], ids=str)
def test_autocast_and_the_scaler(options, half):
    model, criterion = net(norm=True).to(DEVICE), nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion, **options)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=half == torch.float16)
    x, y = (t.to(DEVICE) for t in batches(1)[0])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with torch.autocast(DEVICE.type, half):
            loss = criterion(model(x), y)
        scaler.scale(loss).backward()
        with warnings.catch_warnings():
            warnings.simplefilter("error", kn.errors.KronewtonWarning)
            scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    assert not optimizer.diagnostics()["skipped"]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_compiled(when, mode):
    if shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    torch.compiler.reset()
    ends = []
    for compiles in (False, True):
        model, criterion = net(norm=True).to(DEVICE, torch.float64), nn.CrossEntropyLoss()
        run = torch.compile(model, mode=mode) if compiles and when == "before" else model
        optimizer = kn.KFAC(run, criterion, fisher="exact")
        run = torch.compile(model, mode=mode) if compiles and when == "after" else run
        for x, y in batches(8):
            optimizer.zero_grad()
            criterion(run(x.to(DEVICE, torch.float64)), y.to(DEVICE)).backward()
            optimizer.step()
        ends.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    assert (ends[0] - ends[1]).norm() <= 1e-5 * ends[0].norm()


@pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])
@pytest.mark.parametrize("kind", [nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.RNN, nn.GRU, nn.LSTM])
def test_fused_recurrences(kind, fisher):
    with DEVICE:
        torch.manual_seed(0)
        cell, out, start = kind(4, 6), nn.Linear(6, 3), torch.zeros(5, 6)
        model, criterion = nn.ModuleList([cell, out]), nn.CrossEntropyLoss()
        x, y = torch.randn(7, 5, 4), torch.randint(3, (5,))

    def run(model: nn.ModuleList) -> Tensor:
        cell, out = model
        if not isinstance(cell, nn.RNNCellBase):
            return out(cell(x)[0][-1])
        state = (start, start) if isinstance(cell, nn.LSTMCell) else start
        for t in x:
            state = cell(t, state)
        return out(state[0] if isinstance(state, tuple) else state)

    model.forward = lambda: run(model)  # type: ignore[method-assign]
    optimizer = kn.KFAC(model, criterion, fisher=fisher)
    losses = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", kn.errors.KronewtonWarning)
        warnings.filterwarnings("ignore", "torch has no forward mode")
        for _ in range(10):
            optimizer.zero_grad()
            loss = criterion(model(), y)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def _case(entry: Entry):
    marks = [pytest.mark.xfail(reason=entry.fails, strict=False)] if entry.fails else []
    return pytest.param(entry, id=entry.name, marks=marks)


@pytest.mark.parametrize("entry", [_case(entry) for entry in ZOO if not entry.refused])
def test_the_zoo(entry: Entry) -> None:
    if entry.needs:
        package, how = entry.needs
        pytest.importorskip(package, reason=f"{package} is not installed: {how}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained: Trained = train(entry, device=DEVICE)
    now = dict(trained.model.named_parameters())
    assert all(p.device.type == DEVICE.type and bool(p.isfinite().all()) for p in now.values())
    same = {n for n, p in now.items() if torch.equal(p, trained.before[n])}
    assert same == now.keys() - trained.moving
    if not entry.rises:
        first, last = trained.losses[0], trained.losses[-1]
        assert all(b <= a + 0.2 * abs(a) for a, b in zip(first, last, strict=True))
