"""Every model of the zoo, trained by the defaults: all of it moves, and nothing stays unsaid."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch

import kronewton as kn
from zoo import ZOO, Entry, Trained, hooks_of, train


def _case(entry: Entry) -> Any:
    marks = [pytest.mark.xfail(reason=entry.fails, strict=False)] if entry.fails else []
    return pytest.param(entry, id=entry.name, marks=marks)


@pytest.mark.parametrize("entry", [_case(entry) for entry in ZOO])
def test_training_by_the_defaults(entry: Entry) -> None:
    if entry.needs:
        package, how = entry.needs
        pytest.importorskip(package, reason=f"{package} is not installed: {how}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "`torch.jit.script")  # torch's, of its own first jvp
        trained = train(entry)
    said = [str(w.message) for w in caught]
    assert not [s for s in said if not any(re.search(p, s) for p in entry.warns)]
    _check_movement(trained)
    for optimizer in trained.optimizers:
        _check_coverage(optimizer)
    if not entry.rises:
        first, last = trained.losses[0], trained.losses[-1]
        assert all(b <= a + 0.2 * abs(a) for a, b in zip(first, last, strict=True))
    _check_hooks(trained)


def _check_movement(trained: Trained) -> None:
    now = dict(trained.model.named_parameters())
    assert all(bool(torch.isfinite(p).all()) for p in now.values())
    same = {n for n, p in now.items() if torch.equal(p, trained.before[n])}
    assert not same & trained.moving
    assert same == now.keys() - trained.moving


def _check_coverage(optimizer: kn.KFAC) -> None:
    rows = optimizer.coverage().rows
    listed = [p for group in optimizer.param_groups for p in group["params"]]
    names = {row.parameter for row in rows}
    assert len(rows) == len(names) == len({id(p) for p in listed if p.requires_grad})
    for row in rows:
        assert row.method
        assert row.why or not {"AdamW", "diagonal"} & set(row.method.split(", ")), row


def _check_hooks(trained: Trained) -> None:
    for optimizer in trained.optimizers:
        optimizer.close()
    left = hooks_of(trained.modules)
    assert not [hook for hook in left if not any(hook is before for before in trained.hooks)]
