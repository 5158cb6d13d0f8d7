"""What a user may do wrong: a sentence with what was given, what is allowed and what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kronewton as kn
from kronewton import KFAC
from kronewton.errors import (
    CriterionError,
    KronewtonError,
    KronewtonWarning,
    ModelError,
    OptionError,
)

pytestmark = pytest.mark.usefixtures("float64")


PINNED = {"lr": 0.5, "momentum": 0.3, "damping": 0.05, "trust_region": None}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))


X, CLASSES, VALUES = torch.randn(6, 3), torch.arange(6) % 4, torch.randn(6, 4)
X, VALUES = X.double(), VALUES.double()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


class Loop:
    """A training whose weights, after something was refused, are bit for bit as before."""

    def __init__(self, criterion: nn.Module | None = None, warm: int = 2, **options) -> None:
        self.model, self.criterion = net(), criterion
        self.optimizer = KFAC(self.model, criterion, **options)
        for _ in range(warm):
            self.step(lambda: self.right().backward())

    def right(self) -> Tensor:
        target = VALUES if isinstance(self.criterion, nn.MSELoss) else CLASSES
        return (self.criterion or F.cross_entropy)(self.model(X), target)

    def step(self, backward: Callable[[], None]) -> None:
        self.optimizer.zero_grad()
        backward()
        self.optimizer.step()

    def refused(self, backward: Callable[[], None], kind: type[Exception] = CriterionError) -> str:
        before = weights(self.model)
        with pytest.raises(kind) as caught:
            self.step(backward)
        assert isinstance(caught.value, KronewtonError)
        assert weights(self.model).equal(before)
        self.step(lambda: self.right().backward())  # and the training can go on
        assert not weights(self.model).equal(before)
        return str(caught.value)


WARM = pytest.mark.parametrize("warm", [0, 3])  # factors are due, or are not
ALL_FISHERS = pytest.mark.parametrize("fisher", ["exact", "sampled", "empirical"])


# The criterion that is not watched.


def test_a_plain_function_as_criterion():
    with pytest.raises(OptionError) as caught:
        KFAC(net(), F.cross_entropy, fisher="exact")
    for words in ("'cross_entropy'", "nn.Module", "nn.CrossEntropyLoss()", "observe"):
        assert words in str(caught.value)


def test_the_exact_fisher_without_a_criterion():
    with pytest.raises(OptionError) as caught:
        KFAC(net(), fisher="exact")
    for words in ("fisher='exact'", "none was given", "nn.CrossEntropyLoss()", "'empirical'"):
        assert words in str(caught.value)


@WARM
@ALL_FISHERS
def test_a_loss_computed_without_the_watched_criterion(warm, fisher):
    loop = Loop(nn.CrossEntropyLoss(), warm, fisher=fisher)
    message = loop.refused(lambda: F.cross_entropy(loop.model(X), CLASSES).backward())
    for words in ("CrossEntropyLoss", "was not called", "criterion=None", "observe(output"):
        assert words in message


@WARM
@ALL_FISHERS
def test_another_instance_of_the_criterion_is_not_the_watched_one(warm, fisher):
    loop = Loop(nn.CrossEntropyLoss(), warm, fisher=fisher)
    other = nn.CrossEntropyLoss()
    message = loop.refused(lambda: other(loop.model(X), CLASSES).backward())
    assert "the very module that was given to KFAC" in message


@WARM
@ALL_FISHERS
def test_a_criterion_on_an_output_of_another_model(warm, fisher):
    loop, other = Loop(nn.CrossEntropyLoss(), warm, fisher=fisher), net()

    def backward() -> None:
        loop.criterion(other(X), CLASSES).backward()
        F.cross_entropy(loop.model(X), CLASSES).backward()

    message = loop.refused(backward)
    for words in ("CrossEntropyLoss", "no watched layer", "what the model that was given to KFAC"):
        assert words in message


@WARM
@ALL_FISHERS
@pytest.mark.parametrize("forward", [True, False])
def test_a_criterion_on_an_output_of_another_model_when_no_gradient_arrives(warm, fisher, forward):
    loop, other = Loop(nn.CrossEntropyLoss(), warm, fisher=fisher), net()

    def backward() -> None:
        if forward:
            loop.model(X)
        loop.criterion(other(X), CLASSES).backward()

    assert "no watched layer" in loop.refused(backward)


def test_the_criterion_called_under_no_grad_only():
    loop = Loop(nn.CrossEntropyLoss())

    def backward() -> None:
        output = loop.model(X)
        with torch.no_grad():
            loop.criterion(output, CLASSES)
        output.square().mean().backward()

    assert "was not called" in loop.refused(backward)


def test_gradients_without_a_forward_of_the_model():
    loop = Loop(None, warm=0)

    def backward() -> None:
        for p in loop.model.parameters():
            p.grad = torch.ones_like(p)

    message = loop.refused(backward)
    assert "no watched layer was run forward and backward" in message
    assert "Run the model that was given to KFAC" in message


# Called twice.


@ALL_FISHERS
def test_twice_on_the_same_output_warns_once_and_is_the_sum(fisher):
    torch.manual_seed(1)
    loop = Loop(nn.CrossEntropyLoss(), warm=0, fisher=fisher, basis="eigen", **PINNED)
    torch.manual_seed(1)
    doubled = Loop(nn.CrossEntropyLoss(), warm=0, fisher=fisher, basis="eigen", **PINNED)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):

            def backward() -> None:
                output = loop.model(X)
                first, second = (loop.criterion(output, CLASSES) for _ in range(2))
                (first + second).backward()

            loop.step(backward)
    said = [w for w in said if issubclass(w.category, KronewtonWarning)]
    assert len(said) == 1
    message = str(said[0].message)
    for words in ("CrossEntropyLoss", "more than once on the same output", "torch.no_grad()"):
        assert words in message
    for _ in range(2):
        doubled.step(lambda: (2 * doubled.right()).backward())
    if fisher != "sampled":  # whose draws are others
        torch.testing.assert_close(
            weights(loop.model), weights(doubled.model), rtol=1e-9, atol=1e-12
        )


@ALL_FISHERS
def test_twice_on_the_same_output_for_logging_only_is_neither_warned_of_nor_counted(fisher):
    torch.manual_seed(1)
    loop = Loop(nn.CrossEntropyLoss(), warm=0, fisher=fisher, **PINNED)
    torch.manual_seed(1)
    plain = Loop(nn.CrossEntropyLoss(), warm=0, fisher=fisher, **PINNED)

    def backward() -> None:
        output = loop.model(X)
        loss = loop.criterion(output, CLASSES)
        loop.criterion(output, CLASSES)
        loss.backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        loop.step(backward)
    plain.step(lambda: plain.right().backward())
    if fisher != "sampled":  # the call for logging has draws of its own
        torch.testing.assert_close(weights(loop.model), weights(plain.model))


@ALL_FISHERS
def test_twice_on_two_micro_batches_is_accumulation_and_no_matter_for_a_warning(fisher):
    torch.manual_seed(1)
    loop = Loop(nn.CrossEntropyLoss(), warm=0, fisher=fisher, **PINNED)
    torch.manual_seed(1)
    whole = Loop(nn.CrossEntropyLoss(), warm=0, fisher=fisher, **PINNED)

    def backward() -> None:
        for part in (slice(0, 2), slice(2, 6)):
            n = len(CLASSES[part])
            (loop.criterion(loop.model(X[part]), CLASSES[part]) * (n / 6)).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        loop.step(backward)
    whole.step(lambda: whole.right().backward())
    if fisher != "sampled":
        torch.testing.assert_close(weights(loop.model), weights(whole.model), rtol=1e-9, atol=1e-12)


def test_two_heads_that_are_slices_of_one_output_are_no_matter_for_a_warning():
    loop = Loop(nn.MSELoss(), warm=0, fisher="exact")

    def backward() -> None:
        output = loop.model(X)
        loss = loop.criterion(output[:, :1], VALUES[:, :1])
        (loss + loop.criterion(output[:, :3], VALUES[:, :3])).backward()

    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        loop.step(backward)


# The model and its parameters.


def frozen() -> nn.Module:
    return net().requires_grad_(False)


def test_a_list_of_frozen_parameters():
    model = frozen()
    with pytest.raises(ModelError, match=r"nothing to train: no parameter .* Unfreeze a layer"):
        KFAC(model.parameters(), nn.MSELoss(), model=model)


@pytest.mark.parametrize("model", [frozen(), nn.ReLU(), nn.Sequential()])
def test_a_model_without_a_trainable_parameter(model):
    with pytest.raises(ModelError) as caught:
        KFAC(model, nn.MSELoss())
    for words in ("nothing to train", "requires_grad=True", "Unfreeze"):
        assert words in str(caught.value)


@pytest.mark.parametrize("params", [[], (), iter(())])
def test_an_empty_list_of_parameters(params):
    with pytest.raises(ModelError, match="nothing to train"):
        KFAC(params, nn.MSELoss(), model=net())


@pytest.mark.parametrize("form", ["list", "groups"])
def test_parameters_of_another_model(form):
    model, other = net(), nn.Linear(7, 2)
    params = [*model.parameters(), *other.parameters()]
    given = params if form == "list" else [{"params": params[:2]}, {"params": params[2:]}]
    with pytest.raises(ModelError) as caught:
        KFAC(given, nn.MSELoss(), model=model)
    for words in ("2 of the parameters", "(2, 7)", "do not belong to the model", "of its own"):
        assert words in str(caught.value)
    assert not model._forward_hooks


def test_two_different_models():
    with pytest.raises(KronewtonError, match="model"):
        KFAC(net(), nn.MSELoss(), model=net())


def test_model_and_criterion_the_wrong_way_round():
    with pytest.raises(KronewtonError):
        KFAC(nn.MSELoss(), net())


# Targets and outputs.

TARGETS = {
    "regression shape": (nn.MSELoss(), VALUES[:, :1], ("(6, 4)", "(6, 1)", "equal shapes")),
    "regression classes": (nn.MSELoss(), VALUES.long(), ("int64", "floating-point", "Use")),
    "class shape": (nn.CrossEntropyLoss(), CLASSES[:3], ("(6, 4)", "(3,)", "(6,)")),
    "class column": (nn.CrossEntropyLoss(), CLASSES[:, None], ("(6, 1)", "(6,)")),
    "class dtype": (nn.CrossEntropyLoss(), CLASSES.double(), ("float64", "int64", "target.long()")),
    "class bool": (nn.CrossEntropyLoss(), CLASSES > 2, ("bool", "int64")),
    "class too large": (nn.CrossEntropyLoss(), CLASSES + 1, ("class 4", "0 to 3", "start at 1")),
    "class negative": (nn.CrossEntropyLoss(), CLASSES - 1, ("class -1", "0 to 3", "-100")),
    "no target": (nn.CrossEntropyLoss(), None, ("nothing", "target", "Call criterion(")),
    "a list": (nn.MSELoss(), VALUES.tolist(), ("list", "tensors")),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_a_target_of_the_wrong_shape_dtype_or_class(name, fisher):
    criterion, target, words = TARGETS[name]
    loop = Loop(criterion, warm=0, fisher=fisher)
    given = () if target is None else (target,)
    message = loop.refused(lambda: criterion(loop.model(X), *given).backward())
    assert type(criterion).__name__ in message
    assert all(word in message for word in words), message


def test_an_output_that_is_no_tensor():
    loop = Loop(nn.MSELoss(), warm=0)
    message = loop.refused(lambda: loop.criterion((loop.model(X),), VALUES).backward())
    for words in ("MSELoss", "tuple", "output first", "observe(output"):
        assert words in message


def test_log_probabilities_that_are_none():
    loop = Loop(nn.CrossEntropyLoss(), warm=0)
    other = KFAC(loop.model, nll := nn.NLLLoss())
    with pytest.raises(CriterionError, match="Put LogSoftmax"):
        nll(loop.model(X), CLASSES)
    other.close()


@ALL_FISHERS
@WARM
def test_an_empty_batch(fisher, warm):
    loop = Loop(nn.CrossEntropyLoss(), warm, fisher=fisher)
    message = loop.refused(lambda: loop.criterion(loop.model(X[:0]), CLASSES[:0]).backward())
    for words in ("empty batch", "(0, 3)", "At least one example", "drop_last=True"):
        assert words in message


@pytest.mark.parametrize("options", [{}, PINNED])
@WARM
def test_an_empty_batch_without_a_criterion_leaves_the_weights(options, warm):
    loop = Loop(None, warm, **options)
    before = weights(loop.model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            loop.step(lambda: F.cross_entropy(loop.model(X[:0]), CLASSES[:0]).backward())
        except KronewtonError as refusal:
            said = [refusal]
    assert weights(loop.model).equal(before)
    assert said, "an empty batch was taken without a word"
    for _ in range(2):
        loop.step(lambda: loop.right().backward())
    assert torch.isfinite(weights(loop.model)).all()
    assert not weights(loop.model).equal(before)


@ALL_FISHERS
@pytest.mark.parametrize("options", [{}, PINNED])
@pytest.mark.parametrize("where", ["input", "target"])
def test_nan_in_the_batch(fisher, options, where):
    loop = Loop(nn.MSELoss(), fisher=fisher, **options)
    x, y = X.clone(), VALUES.clone()
    (x if where == "input" else y)[0, 0] = math.nan
    before = weights(loop.model)
    with pytest.warns(KronewtonWarning) as said:
        loop.step(lambda: loop.criterion(loop.model(x), y).backward())
    for words in ("step was skipped", "not finite", "as they were", "Look for NaN"):
        assert words in str(said[0].message)
    assert weights(loop.model).equal(before)
    assert float(loop.optimizer.diagnostics()["skipped"]) == 1
    loop.step(lambda: loop.right().backward())
    assert torch.isfinite(weights(loop.model)).all()
    assert not weights(loop.model).equal(before)


def test_a_criterion_that_returns_no_single_number():
    class Unreduced(nn.Module):
        def forward(self, output: Tensor, target: Tensor) -> Tensor:
            return (output - target).square().mean(1)

    loop = Loop(nn.MSELoss(), warm=0)
    optimizer = KFAC(loop.model, criterion := Unreduced(), fisher="exact")
    with pytest.raises(CriterionError, match="one number"):
        criterion(loop.model(X), VALUES)
    optimizer.close()


def test_observe_checks_as_a_watched_criterion_does():
    model = net()
    optimizer = KFAC(model)
    with pytest.raises(CriterionError, match="equal shapes are allowed"):
        optimizer.observe(model(X), VALUES[:, :1], nn.MSELoss())
    with pytest.raises(OptionError, match=r"must be an nn\.Module"):
        optimizer.observe(model(X), VALUES, F.mse_loss)


def test_observing_an_output_of_another_model():
    model, other = net(), net()
    optimizer = KFAC(model)
    with pytest.raises(CriterionError, match="no watched layer"):
        optimizer.observe(other(X), VALUES, nn.MSELoss())


def test_an_option_in_a_parameter_group_is_refused_by_name():
    model = net()
    groups = [{"params": model.parameters(), "momentum": 0.9, "basis": "eigen", "lr": 0.5}]
    with pytest.raises(OptionError, match=r"group sets basis, momentum: a group has an lr and"):
        KFAC(groups, nn.MSELoss(), model=model)


def test_what_is_no_model_and_no_output_is_said():
    with pytest.raises(ModelError, match=r"the model was given as str; an nn.Module"):
        kn.explain("model", nn.MSELoss(), (torch.ones(2, 3), torch.ones(2, 2)))
    with pytest.raises(CriterionError, match=r"observe\(\) was given NoneType for the output"):
        KFAC(net()).observe(None, torch.ones(2, 2), nn.MSELoss())
