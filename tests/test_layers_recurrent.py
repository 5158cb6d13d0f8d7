"""Recurrent kinds: their second run, their rows, and training with them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
)

import kronewton as kn
from kronewton.capture import gradient_of
from kronewton.layers import Call, Layer, Seen, find_layers
from kronewton.layers.recurrent import frame_of, rerun, suffixes

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
    for silent in range(-1, len(shown)):  # several sets of gradients, in some of which one is not
        u = [None if k == silent else torch.randn_like(t) for k, t in enumerate(shown)]
        if all(g is None for g in u):
            continue
        product = sum((g * t).sum() for g, t in zip(u, shown, strict=True) if g is not None)
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
            close(gradient_of(seen.a, b), G)
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
