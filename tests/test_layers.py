"""Kinds of layer: rows, matrices, and which modules are covered."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from kronewton.layers import KINDS, Layer, find_layers
from kronewton.layers.base import rows_of, with_bias_entry

pytestmark = pytest.mark.usefixtures("float64")


TRAINED = [("weight", "bias"), ("weight",), ("bias",)]
LEADS = [(), (4,), (4, 3), (4, 3, 2)]


def linear(trained: tuple[str, ...]) -> Layer:
    return Layer("fc", nn.Linear(3, 2), KINDS[nn.Linear], trained)


def ids(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("lead", LEADS)
def test_rows_times_the_matrix_are_the_layers_output(trained, lead):
    layer, x = linear(trained), torch.randn(*lead, 3)
    a = layer.kind.input_rows(layer, x)
    G = layer.kind.matrix(layer, layer.parameters())
    out = (a @ G.T).reshape(*lead, 2)
    module = layer.module
    wanted = {
        ("weight", "bias"): module(x),
        ("weight",): module(x) - module.bias,
        ("bias",): module.bias.expand(*lead, 2),
    }[trained]
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("lead", LEADS)
def test_rows_of_gradients_and_inputs_form_the_weight_gradient(trained, lead):
    layer, x = linear(trained), torch.randn(*lead, 3)
    out = layer.module(x)
    u = torch.randn_like(out)
    grads = dict(
        zip(trained, torch.autograd.grad(out, list(layer.parameters().values()), u), strict=True)
    )
    a, b = layer.kind.input_rows(layer, x), layer.kind.output_rows(layer, u)
    G = torch.einsum("nso,nsi->oi", b, a)
    torch.testing.assert_close(G, layer.kind.matrix(layer, grads))
    assert a.shape[0] == b.shape[0] == (lead[0] if lead else 1)


@pytest.mark.parametrize("trained", TRAINED)
def test_split_is_the_inverse_of_matrix(trained):
    layer = linear(trained)
    parts = layer.kind.split(layer, layer.kind.matrix(layer, layer.parameters()))
    assert set(parts) == set(trained)
    for name, tensor in layer.parameters().items():
        assert parts[name].equal(tensor)


def test_mutant_without_the_bias_column_is_caught(monkeypatch):
    layer, x = linear(("weight", "bias")), torch.randn(4, 3)
    monkeypatch.setattr(type(layer.kind), "input_rows", lambda self, layer, inputs: rows_of(inputs))
    a, G = layer.kind.input_rows(layer, x), layer.kind.matrix(layer, layer.parameters())
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


# Finding layers.


def test_every_trained_parameter_is_in_a_layer_or_has_a_reason():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 4, bias=False), nn.Conv1d(1, 1, 3)
    )
    layers, reasons = find_layers(model, ids(model))
    assert [layer.name for layer in layers] == ["0", "2"]
    covered = {id(p) for layer in layers for p in layer.parameters().values()}
    assert covered | set(reasons) == ids(model)
    assert not covered & set(reasons)
    assert reasons[id(model[1].weight)] == "LayerNorm has no kind yet"
    assert reasons[id(model[3].bias)] == "Conv1d has no kind yet"


def test_frozen_parts_are_left_out():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    model[1].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    layers, reasons = find_layers(model, ids(model))
    assert [(layer.name, layer.trained) for layer in layers] == [
        ("0", ("bias",)),
        ("2", ("weight",)),
    ]
    assert not reasons


def test_a_parameter_of_two_modules_falls_back_and_names_both():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    layers, reasons = find_layers(model, ids(model))
    assert [layer.name for layer in layers] == ["1"]
    assert reasons[id(model[0].weight)] == "shared by 0 and 2"
    assert id(model[0].bias) in reasons
    assert id(model[2].bias) in reasons


def test_one_module_under_two_names_is_one_layer():
    model = nn.Module()
    model.first = model.second = nn.Linear(3, 3)
    layers, reasons = find_layers(model, ids(model))
    assert [layer.name for layer in layers] == ["first"]
    assert not reasons


def test_a_subclass_is_covered_unless_it_has_a_forward_of_its_own():
    class Named(nn.Linear):
        pass

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Named(3, 3), Doubled(3, 3))
    layers, reasons = find_layers(model, ids(model))
    assert [layer.name for layer in layers] == ["0"]
    assert reasons[id(model[1].weight)] == "its forward is not that of nn.Linear"


def test_complex_parameters_are_refused():
    model = nn.Linear(3, 3, dtype=torch.complex64)
    layers, reasons = find_layers(model, ids(model))
    assert not layers
    assert "real floating-point" in reasons[id(model.weight)]


def test_a_model_that_is_a_layer_itself_is_covered():
    model = nn.Linear(3, 2)
    layers, _ = find_layers(model, ids(model))
    assert [layer.name for layer in layers] == [""]


def test_parameters_are_looked_up_late():
    layer = linear(("weight", "bias"))
    layer.module.weight = nn.Parameter(torch.zeros(2, 3))
    assert layer.parameters()["weight"].eq(0).all()
