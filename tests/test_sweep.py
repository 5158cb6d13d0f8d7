"""Defaults do not depend on batch size, width or the loss's unit: steps to a target, all slow."""

from __future__ import annotations

import statistics

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import kronewton as kn

TARGET = 0.1  # training cross-entropy, on all examples


def steps_to_target(batch: int, width: int, scale: float, seed: int) -> int:
    bunch = load_digits()
    x = torch.from_numpy(bunch.data).float() / 16
    y = torch.from_numpy(bunch.target).long()
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    criterion = nn.CrossEntropyLoss()
    optimizer = kn.KFAC(model, criterion)
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, 400):
        if len(order) < batch:
            order = torch.randperm(len(x))
        rows, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        (scale * criterion(model(x[rows]), y[rows])).backward()
        optimizer.step()
        with torch.no_grad():
            if float(criterion(model(x), y)) < TARGET:
                return step
    return 400


def median_steps(batch: int = 128, width: int = 128, scale: float = 1.0) -> float:
    return statistics.median(steps_to_target(batch, width, scale, seed) for seed in range(5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"batch": 64},
        {"batch": 256},
        {"width": 64},
        {"width": 256},
        {"scale": 1000.0},
        {"scale": 1e-3},
    ],
)
def test_half_and_double_and_another_unit_change_the_steps_by_less_than_two(change):
    usual, changed = median_steps(), median_steps(**change)
    assert usual / 2 < changed < 2 * usual
