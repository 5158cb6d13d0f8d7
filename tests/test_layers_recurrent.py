"""Recurrent kinds: their second run, their rows, and training with them."""

from __future__ import annotations

import contextlib
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import kronewton as kn
from kronewton.errors import KronewtonWarning
from kronewton.layers import Call, Layer, Seen, find_layers, recurrent
from kronewton.layers.recurrent import Strand, frame_of, rerun, suffixes
from kronewton.losses import curvature
from kronewton.quadratic import QuadraticModel, Term
from kronewton.replay import UNFUSED, ModelCall, Replayer, random_state

pytestmark = pytest.mark.usefixtures("float64")

T, N, D, H = 5, 3, 4, 6
PINNED = {
    "lr": 1.0,
    "momentum": 0.0,
    "damping": 1e-2,
    "trust_region": None,
    "fisher": "exact",
    "basis": "eigen",
    "sharing": "expand",
    "factor_every": 1,
    "inverse_every": 1,
}
LENGTHS = [3, 5, 1]


@dataclass
class Form:
    """One way to build and to call a recurrent module."""

    kind: type[nn.Module]
    layout: str = "time first"
    options: dict[str, Any] = field(default_factory=dict)
    states: bool = False
    trained: str = ""  # only parameters whose name holds this

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        parts = (self.kind.__name__, self.layout, options, self.states * "states", self.trained)
        return "-".join(filter(None, parts)).replace(" ", "_")

    def make(self) -> nn.Module:
        module = self.kind(D, H, batch_first=True, **self.options) if self.first else None
        module = module or self.kind(D, H, **self.options)
        for name, p in module.named_parameters():
            p.requires_grad_(self.trained in name)
        return module

    @property
    def first(self) -> bool:
        return self.layout.startswith(("batch first", "packed batch first"))

    def inputs(self) -> Any:
        shapes = {
            "time first": (T, N, D),
            "batch first": (N, T, D),
            "alone": (T, D),
            "batch first alone": (T, D),
            "cell": (N, D),
            "cell alone": (D,),
        }
        if self.layout == "packed sorted":
            return pack_sequence([torch.randn(n, D) for n in sorted(LENGTHS, reverse=True)])
        if self.layout.startswith("packed"):
            x, first = torch.randn(N, T, D), self.first
            x = x if first else x.transpose(0, 1)
            return pack_padded_sequence(x, torch.tensor(LENGTHS), first, enforce_sorted=False)
        return torch.randn(shapes[self.layout])

    def arguments(self, module: nn.Module) -> tuple[Any, ...]:
        x = self.inputs()
        if not self.states:
            return (x,)
        lead = (len(suffixes(module)),) if isinstance(module, nn.RNNBase) else ()
        lead = lead if self.layout.endswith("alone") else (*lead, N)
        h = torch.randn(*lead, self.options.get("proj_size", H))
        return (x, (h, torch.randn(*lead, H)) if "LSTM" in self.kind.__name__ else h)


SEQUENCES, CELLS = (nn.RNN, nn.LSTM, nn.GRU), (nn.RNNCell, nn.LSTMCell, nn.GRUCell)
LAYOUTS = (
    "time first",
    "batch first",
    "alone",
    "batch first alone",
    "packed sorted",
    "packed",
    "packed batch first",
)
BOTH = {"num_layers": 2, "bidirectional": True}
FORMS = [
    *(Form(kind, layout, o) for kind in SEQUENCES for layout in LAYOUTS for o in ({}, BOTH)),
    *(Form(kind, layout, {}, True) for kind in CELLS for layout in ("cell", "cell alone")),
    *(Form(kind, "cell") for kind in CELLS),
    *(Form(kind, "cell", {"bias": False}, True) for kind in CELLS),
    *(Form(kind, layout, BOTH, True) for kind in SEQUENCES for layout in LAYOUTS),
    *(Form(kind, "packed", {**BOTH, "bias": False}) for kind in SEQUENCES),
    *(Form(nn.LSTM, lay, {**BOTH, "proj_size": 2}, True) for lay in LAYOUTS),
    Form(nn.LSTM, "time first", {"proj_size": 2}, trained="weight_hr"),
    Form(nn.LSTM, "time first", {"proj_size": 2, "num_layers": 2}, trained="weight_hr_l1"),
    Form(nn.RNN, "packed", {**BOTH, "nonlinearity": "relu"}, True),
    Form(nn.RNNCell, "cell", {"nonlinearity": "relu"}, True),
    *(
        Form(kind, "packed", BOTH, True, trained)
        for kind in SEQUENCES
        for trained in ("bias", "weight", "_l1", "hh_l0_reverse", "bias_ih_l1", "weight_ih_l0")
    ),
    *(Form(kind, "cell", {}, True, trained) for kind in CELLS for trained in ("bias", "hh", "ih")),
]


def outputs_of(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [t for v in value for t in outputs_of(v)]


def layers_of(module: nn.Module, name: str = "") -> list[Layer]:
    return find_layers(module, {id(p) for p in module.parameters() if p.requires_grad}).layers


@torch.no_grad()
def watched(module: nn.Module, args: tuple[Any, ...], output: Any) -> list[tuple[Layer, Seen]]:
    layers = layers_of(module)
    seen = layers[0].kind.watch(layers, Call(args, {}, output))
    assert all(s is not None for s in seen)
    return list(zip(layers, seen, strict=True))


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_second_run_gives_the_modules_own_outputs(form):
    module = form.make()
    args = form.arguments(module)
    call = Call(args, {}, module(*args))
    run = rerun(module, frame_of(module, call), call, set())
    for own, theirs in zip(run.outputs, outputs_of(call.output), strict=True):
        close(own.reshape(theirs.shape), theirs.detach())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_of_gradients_and_inputs_form_every_gradient(form):
    module = form.make()
    args = form.arguments(module)
    output = module(*args)
    found = watched(module, args, output)
    shown = found[0][1].outputs
    edges = [get_gradient_edge(t) for t in shown]
    for silent in range(-1, len(shown) if len(shown) > 1 else 0):  # once each with one left out
        used = [t for k, t in enumerate(shown) if k != silent]
        product = sum((torch.randn_like(t) * t).sum() for t in used)
        u = torch.autograd.grad(product, edges, retain_graph=True, allow_unused=True)
        for layer, seen in found:
            own = layer.parameters()
            exact = torch.autograd.grad(
                product, list(own.values()), retain_graph=True, materialize_grads=True
            )
            G = layer.kind.matrix(layer, dict(zip(own, exact, strict=True)))
            b = seen.rows(u)
            assert seen.a.counts == b.shape[:2]
            assert seen.a.counts[0] == (1 if form.layout.endswith("alone") else N)
            assert seen.batched != form.layout.endswith("alone")
            close(seen.a.product(b), G)
            close(layer.kind.split(layer, G), dict(zip(own, exact, strict=True)))


@pytest.mark.parametrize("form", [f for f in FORMS if f.layout.startswith("packed")], ids=str)
def test_packed_rows_are_those_of_each_sequence_alone(form):
    module = form.make()
    args = form.arguments(module)
    output = module(*args)
    (x, lengths), states = pad_packed_sequence(args[0], batch_first=True), args[1:]
    found, u = watched(module, args, output), [torch.randn_like(t) for t in outputs_of(output)]
    padded, _ = pad_packed_sequence(args[0]._replace(data=u[0]), batch_first=True)
    b = [seen.rows(u) for _, seen in found]
    for n, length in enumerate(lengths.tolist()):
        one = one_example(states, n)
        alone = (x[n, :length].unsqueeze(0 if form.first else 1), *one)
        again = watched(module, alone, module(*alone))
        v = [
            padded[n, :length].unsqueeze(0 if form.first else 1),
            *(g[:, n : n + 1] for g in u[1:]),
        ]
        for (_, seen), rows, (_, single) in zip(found, b, again, strict=True):
            assert seen.present[n].tolist() == [t < length for t in range(T)]
            close(seen.a.dense()[n, :length], single.a.dense()[0])
            close(rows[n, :length], single.rows(v)[0])
            assert not rows[n, length:].any()


def one_example(states: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    def cut(s: Any) -> Any:
        return s[:, n : n + 1].contiguous() if isinstance(s, Tensor) else tuple(map(cut, s))

    return tuple(map(cut, states))


def test_sequences_of_one_length_have_no_padding():
    module = nn.LSTM(D, H)
    (_, seen), *_ = watched(module, (x := torch.randn(T, N, D),), module(x))
    assert seen.present is None


def test_the_way_back_is_taken_once_for_each_set_of_gradients_and_then_forgotten(monkeypatch):
    module = nn.LSTM(D, H, **BOTH)
    found = watched(module, (x := torch.randn(T, N, D),), module(x))
    draws = [[torch.randn_like(t) for t in found[0][1].outputs] for _ in range(3)]
    count, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: count.append(1) or grad(*a, **k))
    for _, seen in found:
        for u in draws:
            seen.rows([g.detach() for g in u])
    assert len(count) == 3
    tape = found[0][1].rows.__closure__
    (kept,) = [c.cell_contents for c in tape if hasattr(c.cell_contents, "_found")]
    assert not kept._found


def test_nothing_is_run_again_where_nothing_is_trained():
    module = nn.LSTM(D, H)
    layers, x = layers_of(module), torch.randn(T, N, D)
    with torch.no_grad():
        output = module(x)
    assert layers[0].kind.watch(layers, Call((x,), {}, output)) == [None] * len(layers)
    module.requires_grad_(False)
    output = module(x.requires_grad_())
    assert layers[0].kind.watch(layers, Call((x,), {}, output)) == [None] * len(layers)


def test_names_and_parameters_of_the_layers():
    model = nn.ModuleDict({"lstm": nn.LSTM(D, H, bidirectional=True, proj_size=2)})
    names = {layer.name: layer.trained for layer in layers_of(model)}
    assert names["lstm.ih_l0"] == ("weight_ih_l0", "bias_ih_l0")
    assert names["lstm.hh_l0_reverse"] == ("weight_hh_l0_reverse", "bias_hh_l0_reverse")
    assert names["lstm.hr_l0"] == ("weight_hr_l0",)
    assert len(names) == 6
    assert [layer.name for layer in layers_of(nn.GRUCell(D, H))] == ["ih", "hh"]


def test_dropout_between_levels_is_refused_by_name_and_elsewhere_it_is_not_there():
    def reasons(module: nn.Module) -> set[str]:
        return set(find_layers(module, {id(p) for p in module.parameters()}).reasons.values())

    assert reasons(nn.LSTM(D, H, 2, dropout=0.5)) == {
        "its dropout between levels cannot be repeated"
    }
    assert not reasons(nn.LSTM(D, H, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that it has no effect
        assert not reasons(nn.GRU(D, H, 1, dropout=0.5))


def test_a_subclass_with_a_forward_of_its_own_is_refused():
    class Own(nn.GRU):
        def forward(self, x, hx=None):
            return super().forward(2 * x, hx)

    found = find_layers(module := Own(D, H), {id(p) for p in module.parameters()})
    assert set(found.reasons.values()) == {"its forward is not that of nn.GRU"}


@pytest.mark.parametrize("kind", SEQUENCES)
def test_rows_of_a_time_step_are_those_of_a_copy_that_is_used_there_alone(kind):
    module, x = kind(D, H), torch.randn(T, N, D)
    copies = [
        {k: p.detach().clone().requires_grad_() for k, p in module.named_parameters()} for _ in x
    ]
    state, ys = None, []
    for own, x_t in zip(copies, x, strict=True):
        y, state = functional_call(module, own, (x_t.unsqueeze(0), state))
        ys.append(y)
    u = torch.randn(T, N, H)
    (torch.cat(ys) * u).sum().backward()
    for layer, seen in watched(module, (x,), module(x)):
        b = seen.rows([u, *[None] * (len(seen.outputs) - 1)])
        G = torch.einsum("nso,nsi->soi", b, seen.a.dense())
        for own, found in zip(copies, G, strict=True):
            exact = {k: own[k].grad for k in layer.trained}
            close(found, layer.kind.matrix(layer, exact))


# The block of one example.


class Last(nn.Module):
    """A linear head on the last outputs, from states that are not zero."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head = body, nn.LazyLinear(3)
        count = len(suffixes(body)) if isinstance(body, nn.RNNBase) else 1
        P = getattr(body, "proj_size", 0) or H
        self.register_buffer("h", torch.randn(count, 1, P))
        self.register_buffer("c", torch.randn(count, 1, H))

    def forward(self, x: Tensor) -> Tensor:
        cell = isinstance(self.body, CELLS)
        state = (self.h, self.c) if isinstance(self.body, (nn.LSTM, nn.LSTMCell)) else (self.h,)
        state = tuple(s[0] for s in state) if cell else state
        given = state if len(state) == 2 else state[0]
        y = self.body(x[:, 0] if cell else x.transpose(0, 1), given)
        y = y if isinstance(y, Tensor) else y[0]
        return self.head(y if cell else y[-1])


def ggn(model: nn.Module, layer: Layer, criterion: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """J'ΛJ over a layer's matrix, row by row."""
    M = layer.kind.matrix(layer, layer.parameters()).detach()
    ends = {name: f"body.{name}" for name in layer.trained}

    def output(m: Tensor) -> Tensor:
        parts = layer.kind.split(layer, m.reshape(M.shape))
        return functional_call(model, {ends[k]: t for k, t in parts.items()}, (x,))

    J = torch.autograd.functional.jacobian(output, M.flatten()).reshape(-1, M.numel())
    z = output(M.flatten()).detach()
    hessian = torch.autograd.functional.hessian(lambda z: criterion(z, y), z)
    return J.T @ hessian.reshape(len(J), len(J)) @ J


BODIES = {
    "RNN": lambda: nn.RNN(D, H, 2),
    "LSTM": lambda: nn.LSTM(D, H, 2),
    "LSTM with projections": lambda: nn.LSTM(D, H, 2, bidirectional=True, proj_size=2),
    "GRU": lambda: nn.GRU(D, H, bidirectional=True),
    "RNNCell": lambda: nn.RNNCell(D, H),
    "LSTMCell": lambda: nn.LSTMCell(D, H),
    "GRUCell": lambda: nn.GRUCell(D, H, bias=False),
}


@pytest.mark.parametrize("body", BODIES)
def test_one_example_of_one_time_step_has_its_exact_block(body):
    model, criterion = Last(BODIES[body]()), nn.CrossEntropyLoss()
    x, y = torch.randn(1, 1, D), torch.tensor([1])
    model(x)
    opt = kn.KFAC(model, criterion, **{**PINNED, "lr": 0.0})
    criterion(model(x), y).backward()
    opt.step()
    checked = 0
    for layer in opt._layers:
        if layer.name.startswith("body"):
            factors = opt._curvature.factors[layer.name]
            found = torch.kron(factors.B.mean, factors.A.mean)
            close(found, ggn(model, layer, criterion, x, y))
            checked += 1
    assert checked == len(layers_of(model.body))


# Training.


class Language(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(11, D)
        self.lstm = nn.LSTM(D, H, 2, batch_first=True, **options)
        self.head = nn.Linear(H, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(tokens))[0]).transpose(1, 2)


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, D)
        self.gru = nn.GRU(D, H, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * H, 4)

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.table(tokens), lengths, True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.head(y).transpose(1, 2)


class Loop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(D, H), nn.Linear(H, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for x_t in x.unbind(1):
            state = self.cell(x_t, state)
        return self.head(state[0])


def language() -> tuple[nn.Module, nn.Module, tuple[Any, ...], Tensor]:
    tokens = torch.randint(0, 11, (8, 7))
    return Language(), nn.CrossEntropyLoss(), (tokens[:, :-1],), tokens[:, 1:]


def tagger() -> tuple[nn.Module, nn.Module, tuple[Any, ...], Tensor]:
    lengths = torch.tensor([3, 6, 1, 5])
    y = torch.randint(0, 4, (4, 6)).masked_fill(torch.arange(6) >= lengths.unsqueeze(1), -100)
    return Tagger(), nn.CrossEntropyLoss(), (torch.randint(0, 11, (4, 6)), lengths), y


def loop() -> tuple[nn.Module, nn.Module, tuple[Any, ...], Tensor]:
    return Loop(), nn.CrossEntropyLoss(), (torch.randn(8, 5, D),), torch.randint(0, 3, (8,))


PROBLEMS = {"language model": language, "tagger": tagger, "loop": loop}
SETTINGS = {
    "defaults": {},
    "pinned": PINNED,
    "refined": {"refine": 2},
    "empirical": {"fisher": "empirical"},
    "draws": {"draws": 2, "basis": "corrected", "factor_every": 1},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recurrent_models_train(problem, settings, dtype):
    torch.set_default_dtype(dtype)
    model, criterion, x, y = PROBLEMS[problem]()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        opt = kn.KFAC(model, criterion, **SETTINGS[settings])
        for _ in range(4):
            opt.zero_grad()
            criterion(model(*x), y).backward()
            opt.step()
    assert not any(p.equal(before[k]) for k, p in model.named_parameters())
    rows = {row.parameter: row for row in opt.coverage().rows}
    for k in before:
        assert rows[k].method.startswith("K-FAC"), k
        recurrent = k.startswith(("lstm", "gru", "cell"))
        assert (rows[k].kind == "recurrent") == recurrent
        assert not rows[k].why


def test_a_model_with_dropout_between_levels_trains_by_the_diagonal():
    model, (_, criterion, x, y) = Language(dropout=0.5), language()
    opt = kn.KFAC(model, criterion, **{**PINNED, "fisher": "sampled"})
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for _ in range(3):
        opt.zero_grad()
        criterion(model(*x), y).backward()
        opt.step()
    assert not any(p.equal(before[k]) for k, p in model.named_parameters())
    rows = [row for row in opt.coverage().rows if row.parameter.startswith("lstm")]
    assert {row.why for row in rows} == {"its dropout between levels cannot be repeated"}
    assert {row.method for row in rows} == {"diagonal"}


def test_modules_with_the_same_matrices_share_their_blocks():
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.GRU(D, H), nn.GRU(D, H)
            self.two.weight_hh_l0, self.two.bias_hh_l0 = self.one.weight_hh_l0, self.one.bias_hh_l0

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)[0] + self.two(x)[0]

    model, criterion, x = Twins(), nn.MSELoss(), torch.randn(T, N, D)
    found = find_layers(model, {id(p) for p in model.parameters()})
    assert [layer.name for layer in found.layers] == ["one.ih_l0", "one.hh_l0", "two.ih_l0"]
    assert [(g.name, g.owner.name) for g in found.guests] == [("two.hh_l0", "one.hh_l0")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)  # both uses explain the gradient
        opt = kn.KFAC(model, criterion, **PINNED)
        criterion(model(x), torch.randn(T, N, H)).backward()
        opt.step()


@pytest.mark.parametrize("layout", ["time first", "packed"])
@pytest.mark.parametrize("kind", SEQUENCES)
def test_fused_kernels_and_half_precision_are_followed(kind, layout):
    form = Form(kind, layout, BOTH)
    torch.set_default_dtype(torch.float32)
    module = form.make()
    args = form.arguments(module)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 3e-2)):
        module, args = module.to(dtype), (args[0].to(dtype),)
        found = watched(module, args, module(*args))
        output = outputs_of(module(*args))
        u = [torch.randn_like(t) for t in output]
        product = sum((g * t).sum() for g, t in zip(u, output, strict=True))
        for layer, seen in found:
            own = layer.parameters()
            exact = torch.autograd.grad(product, list(own.values()), retain_graph=True)
            G = layer.kind.matrix(layer, dict(zip(own, exact, strict=True))).float()
            made = seen.a.product(seen.rows(u))
            assert made.dtype == torch.float32
            assert (made - G).norm() < tolerance * G.norm()


# Running the model again.


def replayed(problem: str) -> tuple[QuadraticModel, list[Tensor], nn.Module, tuple[Any, ...]]:
    model, criterion, x, y = PROBLEMS[problem]()
    at = curvature(criterion, model(*x).detach(), y)
    term = Term(ModelCall(x, {}, random_state()), (), None, at, torch.tensor(1.0))
    replayer = Replayer(model, list(model.parameters()))
    quadratic = QuadraticModel(replayer, [term], contextlib.nullcontext)
    return quadratic, [torch.randn_like(p) for p in model.parameters()], model, x


@torch.no_grad()
def central_difference(model: nn.Module, v: list[Tensor], x: tuple[Any, ...], h: float) -> Tensor:
    ends = []
    for sign in (1, -2):  # from the middle to one side, and from there to the other
        for p, d in zip(model.parameters(), v, strict=True):
            p.add_(d, alpha=sign * h)
        ends.append(model(*x))
    for p, d in zip(model.parameters(), v, strict=True):
        p.add_(d, alpha=h)
    return (ends[0] - ends[1]) / (2 * h)


@pytest.mark.parametrize("twice_backward", [False, True])
@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize(
    ("dtype", "h", "tolerance"), [(torch.float64, 1e-5, 1e-7), (torch.float32, 3e-3, 1e-2)]
)
def test_products_with_the_jacobian_are_finite_differences(
    problem, dtype, h, tolerance, twice_backward
):
    torch.set_default_dtype(dtype)
    quadratic, v, model, x = replayed(problem)
    if twice_backward:
        quadratic.replayer.without_forward_mode = "asked for by a test"
    flags = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # torch's, of its own use
        warnings.filterwarnings("error", category=UserWarning)
        ((Jv, _),) = quadratic.line(v).pushed
    wanted = central_difference(model, v, x, h)
    assert (Jv - wanted).norm() < tolerance * wanted.norm()
    assert twice_backward or not quadratic.replayer.without_forward_mode
    assert not quadratic.replayer.without_products
    assert flags == (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled)
    assert all(p.allclose(b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_rerun_gives_a_recurrent_module_its_own_list_of_weights_back():
    module, x = nn.LSTM(D, H, 2), torch.randn(T, N, D)
    replayer = Replayer(module, list(module.parameters()))
    call = ModelCall((x,), {}, random_state())
    others = [torch.randn_like(p) for p in module.parameters()]
    found = replayer.run(call, (0,), others)
    listed = zip(module._flat_weights, module.parameters(), strict=True)
    assert all(held is p for held, p in listed)
    names = [name for name, _ in module.named_parameters()]
    close(found, functional_call(module, dict(zip(names, others, strict=True)), (x,))[0])


@pytest.mark.parametrize("first", [False, True])
def test_packing_without_torchs_own_function_is_the_same(first):
    x, lengths = torch.randn(N, T + 1, D), torch.tensor(LENGTHS)
    x = x if first else x.transpose(0, 1)
    wanted = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    with UNFUSED["_pack_padded_sequence"]():
        found = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
    assert all(a.equal(b) for a, b in zip(found, wanted, strict=True))


# Planted mistakes.


def explained(module: nn.Module, args: tuple[Any, ...]) -> float:
    """How far gradients made from rows are from autograd's, at most."""
    output = module(*args)
    found, outputs = watched(module, args, output), outputs_of(output)
    product = sum((torch.randn_like(t) * t).sum() for t in outputs)
    edges = [get_gradient_edge(t) for t in outputs]
    u = torch.autograd.grad(product, edges, retain_graph=True)
    worst = 0.0
    for layer, seen in found:
        own = layer.parameters()
        exact = torch.autograd.grad(product, list(own.values()), retain_graph=True)
        G = layer.kind.matrix(layer, dict(zip(own, exact, strict=True)))
        worst = max(worst, float((seen.a.product(seen.rows(u)) - G).norm() / G.norm()))
    return worst


def test_mutant_without_the_reset_gate_is_caught(monkeypatch):
    module, args = nn.GRU(D, H), (torch.randn(T, N, D),)
    assert explained(module, args) < 1e-12
    monkeypatch.setattr(Strand, "output_rows", lambda self, part, gradient: gradient)
    assert explained(module, args) > 1e-3


def test_mutant_that_counts_the_way_from_h_to_c_twice_is_caught(monkeypatch):
    module, args = nn.LSTMCell(D, H), (torch.randn(N, D),)
    assert explained(module, args) < 1e-12
    monkeypatch.setattr(recurrent, "_made_from", lambda h, c: False)
    assert explained(module, args) > 1e-3


def test_mutant_with_steps_in_the_wrong_order_is_caught(monkeypatch):
    module, args = nn.LSTM(D, H, bidirectional=True), (torch.randn(T, N, D),)
    assert explained(module, args) < 1e-12
    monkeypatch.setattr(recurrent.Full, "reversed", lambda self, x: x)
    assert explained(module, args) > 1e-3
