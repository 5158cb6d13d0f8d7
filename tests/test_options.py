"""Every option: what is allowed passes, what is not is refused in a sentence."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from kronewton import KFAC
from kronewton.errors import KronewtonError, OptionError, UnsupportedError
from kronewton.options import Options, check_criterion

MODEL = nn.Linear(2, 2)

DECAYS = ("factor_decay", "averaging")
NUMBERS = ("lr", "momentum", "damping", "weight_decay", "fallback_lr", *DECAYS)
AUTOMATIC = ("lr", "momentum", "damping", "trust_region")
COUNTS = ("factor_every", "inverse_every", "adapt_every", "draws")


def refused(name: str, value: object) -> str:
    before = [p.clone() for p in MODEL.parameters()]
    with pytest.raises(OptionError) as caught:
        KFAC(MODEL, nn.MSELoss(), **{name: value})
    assert isinstance(caught.value, ValueError)
    assert not MODEL._forward_hooks
    assert all(p.equal(q) for p, q in zip(MODEL.parameters(), before, strict=True))
    return str(caught.value)


@pytest.mark.parametrize("name", [*NUMBERS, "trust_region"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf, True, "much", [1.0], 1j])
def test_numbers_below_zero_and_things_that_are_none(name, value):
    message = refused(name, value)
    assert message.startswith(f"{name} must be a number ≥ 0")
    assert repr(value) in message
    assert ("'auto'" in message) is (name in (*AUTOMATIC, "factor_decay"))
    assert ("or None" in message) is (name == "trust_region")


@pytest.mark.parametrize("name", NUMBERS)
def test_none_is_for_the_trust_region_only(name):
    assert refused(name, None).endswith("not None.")


@pytest.mark.parametrize("name", ["weight_decay", "fallback_lr", "averaging"])
def test_auto_is_not_for_every_number(name):
    assert refused(name, "auto").endswith("not 'auto'.")


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("value", [1, 1.0, 2.0])
def test_decays_are_below_one(name, value):
    assert refused(name, value) == f"{name} must lie in [0, 1), not {value!r}."


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", None, True])
def test_counts_are_whole_and_at_least_one(name, value):
    assert refused(name, value) == f"{name} must be a whole number ≥ 1, not {value!r}."


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("fisher", "'sampled', 'exact', 'empirical'"),
        ("sharing", "'auto', 'expand', 'reduce', 'best'"),
        ("basis", "'auto', 'factored', 'eigen', 'corrected', 'adam', 'orthogonal'"),
    ],
)
@pytest.mark.parametrize("value", ["EXACT", "", None, 3, ["exact"]])
def test_choices_are_listed(name, allowed, value):
    assert refused(name, value) == f"{name} must be one of {allowed}, not {value!r}."


@pytest.mark.parametrize("value", ["x", 1.5, None])
def test_the_seed_is_a_whole_number(value):
    message = refused("seed", value)
    assert message.startswith("seed must be a whole number")
    assert repr(value) in message


def test_counts_that_may_be_zero_are_whole_numbers():
    for wrong in (-1, 1.5, True, "3"):
        assert f"refine must be a whole number ≥ 0, not {wrong!r}." in refused("refine", wrong)
    assert "refine_tolerance must be a number ≥ 0" in refused("refine_tolerance", -1e-3)
    for wrong in (-1, 1.5, True, None):
        words = f"most_skips must be a whole number ≥ 0, not {wrong!r}."
        assert words in refused("most_skips", wrong)
    assert "curvature_batches must be a whole number ≥ 1" in refused("curvature_batches", 0)


@pytest.mark.parametrize("value", [0, 0.0, 1e-12, 3])
@pytest.mark.parametrize("name", NUMBERS)
def test_allowed_numbers_pass(name, value):
    if name in DECAYS and value >= 1:
        value = 0.5
    KFAC(MODEL, nn.MSELoss(), **{name: value}).close()


def test_options_are_frozen_and_know_whether_anything_is_automatic():
    optimizer = KFAC(MODEL, nn.MSELoss())
    options = optimizer.options
    optimizer.close()
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.lr = 1.0
    fixed: Options = dataclasses.replace(
        options, lr=1.0, momentum=0.0, damping=0.1, trust_region=None
    )
    assert not fixed.uses_model
    for name in AUTOMATIC:
        assert dataclasses.replace(fixed, **{name: "auto"}).uses_model
    assert dataclasses.replace(fixed, trust_region=1.0).uses_model


def test_an_unknown_option_is_pythons_error():
    with pytest.raises(TypeError, match="learning_rate"):
        KFAC(MODEL, nn.MSELoss(), learning_rate=0.1)


# Criteria.


@pytest.mark.parametrize(
    "criterion", [nn.functional.mse_loss, nn.MSELoss, lambda x, y: x, "mse", 3]
)
def test_a_criterion_that_cannot_be_watched_is_named_with_the_way_out(criterion):
    with pytest.raises(OptionError) as caught:
        KFAC(MODEL, criterion)
    message = str(caught.value)
    assert getattr(criterion, "__name__", type(criterion).__name__) in message
    assert "must be an nn.Module" in message
    assert "observe(output" in message


def test_the_exact_fisher_needs_a_criterion():
    with pytest.raises(OptionError, match=r"fisher='exact' needs .* use fisher='empirical'"):
        KFAC(MODEL, fisher="exact")


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_the_other_fishers_do_without(fisher):
    check_criterion(None, fisher)


def test_an_unreduced_loss_is_refused():
    with pytest.raises(UnsupportedError, match=r"MSELoss\(reduction='none'\).*Use reduction="):
        KFAC(MODEL, nn.MSELoss(reduction="none"))


@pytest.mark.parametrize(
    "group", [{"lr": -1.0}, {"lr": "auto"}, {"lr": math.nan}, {"weight_decay": -0.1}]
)
def test_a_groups_own_options_are_checked_too(group):
    ((name, value),) = group.items()
    with pytest.raises(KronewtonError, match=f"{name} must be a number ≥ 0, not {value!r}"):
        KFAC([{"params": list(MODEL.parameters()), **group}], nn.MSELoss(), model=MODEL)
    assert torch.isfinite(MODEL.weight).all()


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Options)])
@pytest.mark.parametrize(
    "value", [np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), object(), 10**400, "no such word"]
)
def test_whatever_is_given_is_refused_in_one_line(name, value):
    if isinstance(value, str) and name == "sharing":
        value = 3
    message = refused(name, value)
    assert message.startswith(name)
    assert message.endswith(".")
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [1.1e30, 1e300, 10**400])
def test_numbers_that_would_overflow_are_refused(name, value):
    message = refused(name, value)
    assert message.startswith(f"{name} must be a number ≥ 0 and ≤ 1e+30")


def test_whole_numbers_end_where_the_machines_do():
    assert "seed must be a whole number ≥ 0 and ≤ 18446744073709551615" in refused("seed", 2**64)
    assert "draws must be a whole number ≥ 1 and ≤ 9223372036854775807" in refused("draws", 2**63)
    KFAC(MODEL, nn.MSELoss(), seed=2**64 - 1, factor_every=2**63 - 1).close()
