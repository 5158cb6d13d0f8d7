"""Models and loops that are not as the optimizer would like them: a right step, or a sentence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kronewton as kn
from kronewton.errors import CriterionError, KronewtonWarning, ModelError
from kronewton.layers import find_layers

CRITERION = nn.CrossEntropyLoss


def batch(seed: int = 0, count: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 6, 6, generator=generator), torch.randint(
        4, (count,), generator=generator
    )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
    )


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def train(model: nn.Module, steps: int = 6, **options: Any) -> kn.KFAC:
    criterion, (x, y) = CRITERION(), batch()
    optimizer = kn.KFAC(model, criterion, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
    return optimizer


class Attention(nn.Module):
    """The fused kernel has no forward mode and can be differentiated once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.qkv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean(1))


@pytest.mark.parametrize("refine", [0, 2])
def test_fused_attention_is_rerun_without_fusion(refine: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        optimizer = train(Attention(), refine=refine)
    assert float(optimizer.diagnostics()["predicted"]) < 0


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * u


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


@pytest.mark.parametrize("refine", [0, 2])
def test_what_can_be_differentiated_only_once_gets_fixed_rules_and_is_told(refine: int) -> None:
    model = nn.Sequential(*list(net())[:2], Square(), *list(net())[2:])
    before = values(model)
    with pytest.warns(KronewtonWarning, match="torch can differentiate a part of this model only"):
        train(model, refine=refine)
    assert bool(torch.isfinite(values(model)).all())
    assert not torch.equal(values(model), before)


def test_evaluation_mode_between_backward_and_step_changes_nothing() -> None:
    found = []
    for evaluates in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Flatten(), nn.Linear(96, 4)
        )
        criterion, (x, y) = CRITERION(), batch()
        optimizer = kn.KFAC(model, criterion, refine=1)
        for _ in range(4):
            model.train()
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            model.train(not evaluates)
            optimizer.step()
            assert model[1].training is not evaluates
        found.append(values(model))
    assert torch.equal(*found)


def test_an_overwritten_target_is_not_used() -> None:
    model, criterion, (x, y) = net(), CRITERION(), batch()
    optimizer, kept = kn.KFAC(model, criterion, refine=1), y.clone()
    criterion(model(x), y).backward()
    y.zero_()
    with pytest.warns(KronewtonWarning, match="cannot be run again"):
        optimizer.step()
    assert not torch.equal(y, kept)


@pytest.mark.parametrize("bias", [True, False])
def test_weights_that_are_computed_from_others_get_the_fallback_by_name(bias: bool) -> None:
    model = net()
    model[0] = nn.utils.spectral_norm(nn.Conv2d(3, 6, 3, padding=1, bias=bias))
    reasons = find_layers(model, {id(p) for p in model.parameters()}).reasons
    assert reasons[id(model[0].weight_orig)] == "its weight is computed from other parameters"
    rows = {row.parameter: row for row in train(model).coverage().rows}
    assert rows["0.weight_orig"].method == "diagonal"
    with pytest.warns(KronewtonWarning, match="torch has no forward mode for a part of this model"):
        train(model, basis="factored")  # whose steps ask the exact model


@pytest.mark.parametrize("refine", [0, 2])
def test_what_is_frozen_later_stays_where_it_is(refine: int) -> None:
    model, criterion, (x, y) = net(), CRITERION(), batch()
    optimizer = kn.KFAC(model, criterion, refine=refine)
    for step in range(4):
        optimizer.zero_grad()
        criterion(model(x), y).backward()
        optimizer.step()
        if step == 0:
            model[0].requires_grad_(False)
            frozen = model[0].weight.detach().clone()
    assert torch.equal(model[0].weight, frozen)


def test_complex_parameters_are_not_in_the_dial() -> None:
    class Complex(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3, dtype=torch.complex64), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.conv(x.to(torch.complex64)).abs().mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = train(Complex(), 2, refine=2)
    methods = {row.parameter: row.method for row in optimizer.coverage().rows}
    assert methods["conv.weight"] == "AdamW"


def test_a_parameter_that_is_another_one_is_refused_by_name() -> None:
    model, criterion, (x, y) = net(), CRITERION(), batch()
    optimizer = kn.KFAC(model, criterion)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    criterion(model(x), y).backward()
    with pytest.raises(ModelError, match=r"'weight' of layer '0' is another parameter"):
        optimizer.step()


@pytest.mark.parametrize("at", [0, 6])
def test_a_forward_of_the_instances_own_is_not_covered(at: int) -> None:
    model = net()
    module = model[at]
    own = type(module).forward
    module.forward = lambda x: own(module, x)
    (row,) = [r for r in kn.KFAC(model, CRITERION()).coverage().rows if r.parameter == f"{at}.bias"]
    assert "forward" in row.why


def test_an_input_given_by_name_after_others() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.head = nn.ConvTranspose2d(3, 2, 3, 2), nn.Linear(2, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.up(output_size=[14, 14], input=x).mean((2, 3)))

    train(Up())


def test_groups_with_different_factors_are_told_that_the_damping_stays() -> None:
    model, criterion, (x, y) = net(), CRITERION(), batch()
    first, *rest = model.parameters()
    groups = [{"params": [first], "lr": 0.5}, {"params": rest}]
    optimizer = kn.KFAC(groups, criterion, model=model)
    criterion(model(x), y).backward()
    with pytest.warns(KronewtonWarning, match="multiply the automatic step by different lr"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_taken_back_leaves_every_bit(dtype: torch.dtype) -> None:
    model, criterion, (x, y) = net().to(dtype), CRITERION(), batch()
    optimizer = kn.KFAC(model, criterion, weight_decay=0.1, basis="factored")
    optimizer.param_groups[0]["lr"] = 1e3
    before = values(model)
    criterion(model(x.to(dtype)), y).backward()
    optimizer.step()
    assert float(optimizer.diagnostics()["undone"]) == 1
    assert torch.equal(values(model), before)


class Checked(nn.Module):
    """A model with an opinion on its own activations."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.settled, self.last = nn.Conv2d(3, 4, 3), False, 0.0

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).mean((2, 3))
        most = float(h.detach().abs().max())
        if self.settled and abs(most - self.last) > 1e-6 * self.last:
            raise ValueError("not what it was")
        self.last = most
        return h


def test_a_model_that_refuses_the_step_gets_its_weights_back() -> None:
    model, criterion, (x, y) = Checked(), CRITERION(), batch()
    optimizer = kn.KFAC(model, criterion, adapt_every=1)
    criterion(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    criterion(model(x), y).backward()
    before, model.settled = values(model), True
    optimizer.step()
    assert torch.equal(values(model), before)


def test_a_batch_for_explain_that_is_none() -> None:
    model, criterion, (x, y) = net(), CRITERION(), batch()
    with pytest.raises(CriterionError, match="a batch of type Tensor"):
        kn.explain(model, criterion, x)

    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    with pytest.raises(CriterionError, match="returned dict and not a tensor"):
        kn.explain(Dictionary(), criterion, (x, y))


def test_a_copy_of_a_model_does_not_disturb_the_original() -> None:
    model, criterion, (x, y) = net(), CRITERION(), batch()
    optimizer = kn.KFAC(model, criterion, damping=0.1)
    other = copy.deepcopy(model)
    criterion(other(x), y).backward()
    criterion(model(x), y).backward()
    optimizer.step()
    assert bool(torch.isfinite(values(model)).all())


class Experts(nn.Module):
    """Every example goes to one of three experts, and none to the last."""

    def __init__(self, make: Callable[[], nn.Module], run: Callable[..., Tensor]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(make() for _ in range(3))
        self.run = run
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[:, 0] > 0).long() if x.is_floating_point() else x[:, 0] % 2
        found = [self.run(e, x[chosen == j]).flatten(1) for j, e in enumerate(self.experts)]
        order = torch.cat([torch.nonzero(chosen == j).flatten() for j in range(3)])
        whole = torch.cat(found)[:, :4].to(self.head.weight)
        return self.head(torch.zeros_like(whole).index_copy(0, order, whole))


def called(expert: nn.Module, x: Tensor) -> Tensor:
    return expert(x)


def attending(expert: nn.Module, x: Tensor) -> Tensor:
    rows = x.reshape(len(x), 2, 2)
    return expert(rows, rows, rows)[0]


EXPERTS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor]]] = {
    "Linear": (lambda: nn.Linear(4, 4), called),
    "Conv1d": (lambda: nn.Conv1d(2, 2, 1), lambda e, x: e(x.reshape(len(x), 2, 2))),
    "PReLU": (lambda: nn.PReLU(4), called),
    "LayerNorm": (lambda: nn.LayerNorm(4), called),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), called),
    "Bilinear": (lambda: nn.Bilinear(4, 4, 4), lambda e, x: e(x, x)),
    "MultiheadAttention": (lambda: nn.MultiheadAttention(2, 1, batch_first=True), attending),
    "GRU": (
        lambda: nn.GRU(2, 2, batch_first=True),
        lambda e, x: e(x.reshape(len(x), 2, 2))[0],
    ),
    "Embedding": (lambda: nn.Embedding(9, 2), called),
    "EmbeddingBag": (lambda: nn.EmbeddingBag(9, 4), called),
    "a matrix": (
        lambda: nn.ParameterList([nn.Parameter(torch.eye(4))]),
        lambda e, x: F.linear(x, e[0]),
    ),
}
OWNERS: dict[str, Callable[[nn.Module, nn.Module], kn.KFAC | kn.Preconditioner]] = {
    "sampled": lambda m, c: kn.KFAC(m, c),
    "exact": lambda m, c: kn.KFAC(m, c, fisher="exact"),
    "no criterion": lambda m, c: kn.KFAC(m),
    "preconditioner": lambda m, c: kn.Preconditioner(m, c),
}


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("kind", EXPERTS)
def test_an_expert_that_gets_no_row_is_left_out(kind: str, owner: str) -> None:
    torch.manual_seed(0)
    model, criterion = Experts(*EXPERTS[kind]), nn.CrossEntropyLoss()
    optimizer = OWNERS[owner](model, criterion)
    start = [values(expert) for expert in model.experts]
    tokens = kind.startswith("Embedding")
    with warnings.catch_warnings():
        warnings.simplefilter("error", KronewtonWarning)
        for _ in range(6):
            x = torch.randint(9, (16, 2)) if tokens else torch.randn(16, 4)
            model.zero_grad()
            criterion(model(x), torch.arange(16) % 3).backward()
            optimizer.step()
    moved = [not torch.equal(values(e), s) for e, s in zip(model.experts, start, strict=True)]
    assert moved == ([False] * 3 if owner == "preconditioner" else [True, True, False])
    assert float(optimizer.diagnostics()["skipped"]) == 0


@pytest.mark.parametrize("inner", [False, True])
def test_names_are_those_without_torch_compile(inner: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    if inner:
        model[0] = torch.compile(model[0], backend="eager")
    whole = model if inner else torch.compile(model, backend="eager")
    optimizer = kn.KFAC(whole, nn.MSELoss(), sharing={"0": "expand"}, largest_side={"2": 8})
    names = [row.parameter for row in optimizer.coverage().rows]
    assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
