"""Kinds of layer: rows, matrices, and which modules are covered."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from cases import CASES, PLAIN, Case
from kronewton.layers import KINDS, Call, DenseRows, Layer, convolution, find_layers, kind_of
from kronewton.layers.base import rows_of, with_bias_entry
from kronewton.layers.embedding import TokenRows
from kronewton.rows import with_mask
from kronewton.structure import DENSE, DIAGONAL, Blocks

pytestmark = pytest.mark.usefixtures("float64")


TRAINED = [("weight", "bias"), ("weight",), ("bias",)]
LEADS = [(4,), ()]  # a batch, or one example without a dimension for it


def linear(trained: tuple[str, ...]) -> Layer:
    return Layer("fc", nn.Linear(3, 2), KINDS[nn.Linear], trained)


def layers_of(case: Case) -> list[Layer]:
    """The case's layer with all that can be trained of it, and with parts of it frozen."""
    module = case.make()
    choices = [t for t in TRAINED if module.bias is not None or t == ("weight",)]
    return [Layer("layer", module, kind_of(module), trained) for trained in choices]


def unbatched(case: Case, lead: tuple[int, ...]) -> bool:
    return not lead and case.name.startswith("linear") and len(case.example) > 1


def ids(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


def contribution(layer: Layer, x: Tensor) -> Tensor:
    """What the trained parameters add to the layer's output."""
    module = copy.deepcopy(layer.module)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name not in layer.trained:
                p.zero_()
    return module(x).detach()


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_rows_times_the_matrix_are_the_layers_output(case, lead):
    if unbatched(case, lead):
        return  # the first dimension of a sequence is taken for the examples
    for layer in layers_of(case):
        x = torch.randn(*lead, *case.example)
        out = contribution(layer, x)
        a = layer.kind.input_rows(layer, x, out.shape).dense()
        G = layer.kind.matrix(layer, layer.parameters())
        rows = layer.kind.output_rows(layer, out)
        torch.testing.assert_close(a @ G.mT.unsqueeze(-3), rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_rows_of_gradients_and_inputs_form_the_weight_gradient(case, lead):
    if unbatched(case, lead):
        return
    for layer in layers_of(case):
        x = torch.randn(*lead, *case.example)
        out = layer.module(x)
        u, trained = torch.randn_like(out), layer.parameters()
        grads = dict(zip(trained, torch.autograd.grad(out, list(trained.values()), u), strict=True))
        rows = layer.kind.input_rows(layer, x, out.shape)
        a, b = rows.dense(), layer.kind.output_rows(layer, u)
        G = torch.einsum("...nso,...nsi->...oi", b, a)
        wanted = layer.kind.matrix(layer, grads)
        torch.testing.assert_close(G, wanted, rtol=1e-12, atol=1e-12)
        assert rows.counts == b.shape[-3:-1] == a.shape[-3:-1]
        assert rows.counts[0] == (lead[0] if lead else 1)


def every_part(case: Case) -> list[Layer]:
    """The case's layer with all that can be trained of it, and with parts of it frozen."""
    module = case.make()
    own = [name for name, _ in module.named_parameters()]
    return [
        layer
        for trained in TRAINED
        if set(trained) <= set(own)
        for layer in kind_of(module).layers("layer", module, trained)
    ]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_a_call_shows_gives_the_gradient(case):
    """Σ b a' is autograd's gradient, for every kind and every part of it that is trained."""
    for layer in every_part(case):
        inputs = case.drawn()
        inputs = (inputs[0],) if isinstance(layer.module, nn.Linear) else inputs
        given = {"per_sample_weights": inputs[2]} if len(inputs) == 3 else {}
        out = layer.module(*inputs[:2], **given)
        (seen,) = layer.kind.watch([layer], Call(inputs[:2], given, out))
        trained, u = layer.parameters(), torch.randn_like(out)
        grads = dict(zip(trained, torch.autograd.grad(out, list(trained.values()), u), strict=True))
        made = seen.a.product(seen.rows([u]))
        wanted = layer.kind.matrix(layer, grads)
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)
        assert seen.a.width == seen.a.dense().shape[-1]
        dense = DenseRows(seen.a.dense())
        weights = torch.rand(seen.a.counts)
        for structure in (DENSE, DIAGONAL, Blocks(2, seen.a.width)):
            found = seen.a.second_moment(weights, structure)
            torch.testing.assert_close(found, dense.second_moment(weights, structure))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_split_is_the_inverse_of_matrix(case):
    for layer in every_part(case):
        parts = layer.kind.split(layer, layer.kind.matrix(layer, layer.parameters()))
        assert set(parts) == set(layer.trained)
        for name, tensor in layer.parameters().items():
            assert parts[name].equal(tensor)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_rows_that_are_not_laid_out_are_what_they_would_be(case, chunk, channels, monkeypatch):
    monkeypatch.setattr(convolution, "CHUNK", chunk)
    monkeypatch.setattr(convolution, "LEAST_CHANNELS", channels)
    for layer in layers_of(case):
        x = torch.randn(5, *case.example)
        rows = layer.kind.input_rows(layer, x, layer.module(x).shape)
        dense = DenseRows(rows.dense())
        weights = torch.rand(rows.counts)
        of_examples = torch.rand(len(weights), 1).expand(rows.counts)
        for given in (None, weights, of_examples, torch.zeros_like(weights)):
            close = {"rtol": 1e-12, "atol": 1e-12}
            found = rows.second_moment(given)
            torch.testing.assert_close(found, dense.second_moment(given), **close)
            torch.testing.assert_close(found, found.mT)
            averages = rows.averaged(given).dense(), dense.averaged(given).dense()
            torch.testing.assert_close(*averages, **close)
        torch.testing.assert_close(rows.dense(1, 3), dense.rows[..., 1:3, :, :])


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_memory_format_changes_nothing(case):
    layer = layers_of(case)[0]
    x = torch.randn(3, *case.example)
    out = layer.module(x)
    last_first = x.movedim(1, -1).contiguous().movedim(-1, 1)
    u = out.movedim(1, -1).contiguous().movedim(-1, 1)
    rows = layer.kind.input_rows(layer, x, out.shape)
    other = layer.kind.input_rows(layer, last_first, out.shape)
    torch.testing.assert_close(other.second_moment(), rows.second_moment())
    b = layer.kind.output_rows(layer, out)
    torch.testing.assert_close(layer.kind.output_rows(layer, u), b)


def test_an_output_size_asked_for_in_the_call_is_followed():
    module = nn.ConvTranspose2d(2, 3, 3, 3, 1)
    layer = Layer("up", module, kind_of(module), ("weight", "bias"))
    x = torch.randn(2, 2, 3, 3)
    for size in ((7, 7), (8, 9)):
        out = module(x, output_size=size)
        a = layer.kind.input_rows(layer, x, out.shape).dense()
        rows = a @ layer.kind.matrix(layer, layer.parameters()).mT
        torch.testing.assert_close(rows, layer.kind.output_rows(layer, out))


def test_mutant_without_the_bias_column_is_caught(monkeypatch):
    layer, x = linear(("weight", "bias")), torch.randn(4, 3)
    monkeypatch.setattr("kronewton.layers.base.with_bias_entry", lambda rows: rows)
    a = layer.kind.input_rows(layer, x, torch.Size((4, 2))).dense()
    G = layer.kind.matrix(layer, layer.parameters())
    assert a.shape[-1] != G.shape[-1]


def test_rows_of_gives_one_example_to_a_vector_and_positions_to_the_rest():
    assert rows_of(torch.zeros(3)).shape == (1, 1, 3)
    assert rows_of(torch.zeros(4, 3)).shape == (4, 1, 3)
    assert rows_of(torch.zeros(4, 2, 5, 3)).shape == (4, 10, 3)


def test_the_bias_entry_is_the_last_and_one():
    rows = with_bias_entry(torch.zeros(2, 3, 4))
    assert rows.shape == (2, 3, 5)
    assert rows[..., -1].eq(1).all()
    assert rows[..., :-1].eq(0).all()


def test_rows_whose_bias_entry_is_not_laid_out_are_those_that_have_it():
    x, shares = torch.randn(3, 4, 2), torch.rand(3, 4)
    lazy, laid = DenseRows(x, bias=True), DenseRows(with_bias_entry(x))
    assert (lazy.counts, lazy.width) == (laid.counts, laid.width)
    for one, other in (
        (lazy, laid),
        (lazy.some(1, 3), laid.some(1, 3)),
        (lazy.averaged(), laid.averaged()),
        (lazy.averaged(shares), laid.averaged(shares)),
    ):
        torch.testing.assert_close(one.dense(), other.dense())
        torch.testing.assert_close(one.second_moment(), other.second_moment())
    weights = torch.rand(3, 4)
    torch.testing.assert_close(lazy.second_moment(weights), laid.second_moment(weights))
    torch.testing.assert_close(lazy.squares(), laid.dense().square().sum())
    assert float(TokenRows(torch.tensor([[[0, 1], [2, 2]]]), torch.ones(1, 2, 2), 3).squares()) == 6


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(2, 3, 3, stride=2, padding=1),
        nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2),
        nn.Conv3d(1, 2, 2, bias=False),
    ],
)
def test_windows_averaged_axis_by_axis_are_the_mean_of_all(module):
    module = copy.deepcopy(module).double()
    trained = ("weight",) if module.bias is None else ("weight", "bias")
    layer = Layer("conv", module, kind_of(module), trained)
    x = torch.randn(5, module.in_channels, *[9, 7, 6][: len(module.kernel_size)])
    rows = layer.kind.input_rows(layer, x, module(x).shape)
    torch.testing.assert_close(rows.averaged().dense(), rows.dense().mean(-2, keepdim=True))
    torch.testing.assert_close(rows.squares(), rows.dense().square().sum())
    b = layer.kind.output_rows(layer, torch.randn(module(x).shape))
    laid = rows.dense().flatten(-3, -2)
    torch.testing.assert_close(rows.product(b), b.flatten(-3, -2).mT @ laid)


def test_masked_examples_weigh_the_same_said_by_example_or_by_position():
    alive = torch.ones(4, 3, dtype=torch.bool)
    alive[1] = False
    weights = torch.tensor([1.0, 2.0, 0.0, 4.0])
    for given in (weights.unsqueeze(1).expand(4, 3), torch.tensor(2.0)):
        found = with_mask(given, alive)
        spread = given.expand(4, 3).clone()  # the same, one number for each position
        torch.testing.assert_close(found, with_mask(spread, alive))
        assert found.stride(1) == 0
        assert not found[1].any()
    alive[2, 1] = False
    assert with_mask(torch.tensor(2.0), alive)[2].tolist() == [2, 0, 2]


# Finding layers.


def test_every_trained_parameter_is_in_a_layer_or_has_a_reason():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False), nn.PReLU())
    found = find_layers(model, ids(model))
    layers, reasons = found.layers, found.reasons
    assert [layer.name for layer in layers] == ["0", "1", "2", "3"]
    assert found.covered == ids(model)
    assert not reasons


def test_frozen_parts_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    found = find_layers(model, ids(model))
    layers, reasons = found.layers, found.reasons
    assert [(layer.name, layer.trained) for layer in layers] == [
        ("0", ("bias",)),
        ("2", ("weight",)),
    ]
    assert not reasons


def test_a_parameter_of_two_modules_is_one_layer_with_a_guest():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    found = find_layers(model, ids(model))
    shown = [(layer.name, layer.trained) for layer in found.layers]
    assert shown == [
        ("0", ("weight",)), ("0.bias", ("bias",)), ("1", ("weight", "bias")), ("2.bias", ("bias",)),
    ]  # fmt: skip
    assert [(guest.name, guest.term, guest.turned) for guest in found.guests] == [("2", "0", False)]
    assert found.covered == ids(model)


def test_what_is_shared_without_a_common_matrix_is_alone_and_names_its_users():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.PReLU(3))
    model[2].weight = model[1].weight
    found = find_layers(model, ids(model))
    assert found.reasons[id(model[1].weight)] == "shared by 1 and 2"
    assert [layer.kind.name for layer in found.layers if layer.name == "1.weight"] == ["parameter"]
    assert found.covered == ids(model)


def test_a_table_that_is_also_a_matrix_is_one_layer_with_a_turned_guest():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5))
    model[1].weight = model[0].weight
    found = find_layers(model, ids(model))
    assert [(layer.name, layer.kind.name) for layer in found.layers] == [
        ("0", "embedding"), ("1.bias", "linear"),
    ]  # fmt: skip
    assert [(guest.term, guest.turned) for guest in found.guests] == [("0 (turned)", True)]


def test_one_module_under_two_names_is_one_layer():
    model = nn.Module()
    model.first = model.second = nn.Linear(3, 3)
    found = find_layers(model, ids(model))
    layers, reasons = found.layers, found.reasons
    assert [layer.name for layer in layers] == ["first"]
    assert not reasons


def test_a_subclass_is_covered_unless_it_has_a_forward_of_its_own():
    class Named(nn.Linear):
        pass

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Named(3, 3), Doubled(3, 3))
    found = find_layers(model, ids(model))
    layers, reasons = found.layers, found.reasons
    assert [layer.name for layer in layers if layer.kind.hooked] == ["0"]
    assert reasons[id(model[1].weight)] == "its forward is not that of nn.Linear"


def test_complex_parameters_are_refused():
    model = nn.Linear(3, 3, dtype=torch.complex64)
    found = find_layers(model, ids(model))
    layers, reasons = found.layers, found.reasons
    assert not layers
    assert "real floating-point" in reasons[id(model.weight)]


def test_a_model_that_is_a_layer_itself_is_covered():
    model = nn.Linear(3, 2)
    found = find_layers(model, ids(model))
    assert [layer.name for layer in found.layers] == [""]


def test_parameters_are_looked_up_late():
    layer = linear(("weight", "bias"))
    layer.module.weight = nn.Parameter(torch.zeros(2, 3))
    assert layer.parameters()["weight"].eq(0).all()
