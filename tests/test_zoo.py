"""Models of many architectures, each trained for a few steps with nothing set."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zoo import ENTRIES, WORDS, Entry, N, T, discriminator, generator

import kronewton as kn

STEPS = 6
ROUNDING = 1e-6  # of the largest gradient: what is smaller may be zero but for rounding


def hooks(*modules: nn.Module | None) -> list[Any]:
    """Every hook on the modules and on their parameters."""
    found: list[Any] = []
    for module in [m for top in modules if top is not None for m in top.modules()]:
        for name in ("forward", "forward_pre", "backward", "backward_pre"):
            found += getattr(module, f"_{name}_hooks").values()
        for p in module.parameters(recurse=False):
            found += (p._backward_hooks or {}).values()
    return found


def of_consequence(model: nn.Module) -> set[str]:
    """The trained parameters whose gradient is not zero."""
    gradients = {n: p.grad.abs().max() for n, p in model.named_parameters() if p.grad is not None}
    largest = max(gradients.values())
    return {name for name, size in gradients.items() if size > ROUNDING * largest}


def seeded_loss(entry: Entry, model: nn.Module, criterion: Any, batch: Any) -> Tensor:
    torch.manual_seed(2)
    return entry.loss(model, criterion, batch)


def check(entry: Entry) -> None:
    torch.manual_seed(0)
    model, criterion = entry.make()
    batch = entry.batch()
    had = len(hooks(model, criterion))
    optimizer = kn.KFAC(model, criterion, **entry.options)
    shown = optimizer.observe if entry.observes else criterion
    took_part: set[str] = set()
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = seeded_loss(entry, model, shown, batch)
        if step == 0:
            first = float(loss)
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
        loss.backward()
        took_part |= of_consequence(model)
        optimizer.step()

    covered(optimizer, model)
    unused = {n for n in before if n.startswith(entry.unused)} if entry.unused else set()
    assert not took_part & unused
    for name, p in model.named_parameters():
        assert torch.isfinite(p).all(), f"{name} is not finite"
        same = torch.equal(p, before[name])
        assert not (same and name in took_part), f"{name} takes part in the loss and has not moved"
        assert same or (p.requires_grad and name not in unused), f"{name} has moved"

    optimizer.close()
    assert len(hooks(model, criterion)) == had
    after = float(seeded_loss(entry, model, (lambda *_: None) if entry.observes else shown, batch))
    assert after <= first + 0.5 * abs(first), f"the loss went from {first} to {after}"


def covered(optimizer: kn.KFAC, model: nn.Module) -> None:
    """One row for each trained parameter, and a reason wherever curvature has no part in it."""
    rows = optimizer.coverage().rows
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(row.parameter for row in rows) == sorted(trained)
    for row in rows:
        assert row.method
        assert row.why or (row.curved and row.method != "AdamW"), f"no reason for {row.parameter}"


def silent_but_for(allowed: tuple[str, ...], found: list[warnings.WarningMessage]) -> None:
    others = [
        str(w.message) for w in found if not any(re.search(p, str(w.message)) for p in allowed)
    ]
    assert not others


def entries() -> list[Any]:
    return [
        pytest.param(
            entry,
            id=entry.name,
            marks=[pytest.mark.xfail(reason=entry.fails, strict=False)] if entry.fails else [],
        )
        for entry in ENTRIES
    ]


@pytest.mark.parametrize("entry", entries())
def test_each_architecture_trains_by_the_defaults(entry: Entry) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check(entry)
    silent_but_for(entry.warnings, found)


def test_names_are_their_own() -> None:
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_two_networks_against_each_other() -> None:
    torch.manual_seed(0)
    G, D, criterion = generator(), discriminator(), nn.BCEWithLogitsLoss()
    before = [p.detach().clone() for net in (G, D) for p in net.parameters()]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        of_g, of_d = kn.KFAC(G, criterion), kn.KFAC(D, criterion)
        for _ in range(STEPS):
            images, noise = torch.rand(N, 3, 8, 8) * 2 - 1, torch.randn(N, 8)
            of_d.zero_grad()
            real = criterion(D(images), torch.ones(N, 1))
            real.backward()
            fakes = G(noise)
            fake = criterion(D(fakes.detach()), torch.zeros(N, 1))
            fake.backward()
            of_d.step()
            of_g.zero_grad()
            fooled = criterion(D(fakes), torch.ones(N, 1))
            fooled.backward()
            of_g.step()
    after = [p for net in (G, D) for p in net.parameters()]
    assert all(bool(torch.isfinite(p).all()) for p in after)
    moved = [not torch.equal(p, q) for p, q in zip(after, before, strict=True)]
    assert all(moved)
    for optimizer, net in ((of_g, G), (of_d, D)):
        covered(optimizer, net)
        optimizer.close()
    assert not hooks(G, D, criterion)
    silent_but_for((), found)


def small_configuration(name: str, transformers: Any) -> nn.Module:
    """A randomly initialised model of transformers, of a few thousand numbers."""
    if name == "GPT2LMHeadModel":
        config = transformers.GPT2Config(WORDS, T, 16, 1, 2, bos_token_id=0, eos_token_id=0)
    elif name == "BertForMaskedLM":
        config = transformers.BertConfig(
            WORDS, 16, 1, 2, intermediate_size=32, max_position_embeddings=T
        )
    else:
        config = transformers.T5Config(
            WORDS, 16, 8, 32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    return getattr(transformers, name)(config)


@pytest.mark.parametrize(
    "name", ["GPT2LMHeadModel", "BertForMaskedLM", "T5ForConditionalGeneration"]
)
def test_models_of_transformers(name: str) -> None:
    why = "needs transformers: pip install transformers"
    transformers = pytest.importorskip("transformers", reason=why)

    def observed(model: nn.Module, observe: Any, batch: Any) -> Tensor:
        x, y = batch
        out = model(input_ids=x, labels=y)
        logits, labels = out.logits, y
        if name == "GPT2LMHeadModel":
            logits, labels = logits[:, :-1], y[:, 1:]
        observe(logits.flatten(0, 1), labels.flatten(), nn.CrossEntropyLoss())
        return out.loss

    check(
        Entry(
            name,
            lambda: (small_configuration(name, transformers), None),
            lambda: (torch.randint(WORDS, (N, T)), torch.randint(WORDS, (N, T))),
            observed,
            observes=True,
        )
    )


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext"])
def test_models_of_timm(name: str) -> None:
    timm = pytest.importorskip("timm", reason="needs timm: pip install timm")
    check(
        Entry(
            name,
            lambda: (timm.create_model(name, num_classes=4), nn.CrossEntropyLoss()),
            lambda: (torch.randn(2, 3, 160, 160), torch.randint(4, (2,))),
        )
    )
