"""The damping rules: scalars in, scalars out."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kronewton.adapt import (
    FIRST_TRIALS,
    Fixed,
    LevenbergMarquardt,
    Pace,
    Pacing,
    Settings,
    StepInfo,
)

RULE = LevenbergMarquardt()
START = Settings(damping=1.0, inverse_damping=2.0)


def info(agreement: float, *, steps: int = 1, scale: float = 1.0, noise: float | None = None):
    return StepInfo(-1.0, -agreement, scale, steps, noise)


@pytest.mark.parametrize(
    ("agreement", "factor"),
    [
        (1.0, 0.7**3),
        (0.76, 0.7),
        (5.0, 0.7**3),
        (0.5, 1.0),
        (0.25, 1.0),
        (0.24, 1 / 0.7),
        (-2.0, 1 / 0.7),
    ],
)
def test_damping_falls_where_the_model_is_right_and_rises_where_it_promised_too_much(
    agreement, factor
):
    found = RULE.update(START, info(agreement))
    assert found.damping == pytest.approx(factor)
    assert found.inverse_damping == START.inverse_damping


def test_several_steps_since_the_last_question_count_as_several():
    assert RULE.update(START, info(0.9, steps=5)).damping == pytest.approx(0.7**5)
    assert RULE.update(START, info(0.0, steps=5)).damping == pytest.approx(0.7**-5)


@pytest.mark.parametrize("actual", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_raises_the_damping(actual):
    found = RULE.update(START, StepInfo(-1.0, actual, 1.0, 1))
    assert found.damping == pytest.approx(1 / 0.7)


@pytest.mark.parametrize("predicted", [0.0, 1.0, math.nan])
def test_without_a_promise_nothing_is_judged(predicted):
    assert RULE.update(START, StepInfo(predicted, -1.0, 1.0, 1)) == START


def test_damping_stays_between_floor_and_ceiling_however_long_it_goes_on():
    low = high = START
    for _ in range(500):
        low, high = RULE.update(low, info(1.0)), RULE.update(high, info(0.0))
    assert low.damping == pytest.approx(RULE.floor)
    assert high.damping == pytest.approx(RULE.ceiling)


def test_noise_is_averaged_capped_and_kept_when_nothing_was_seen():
    noisy = RULE.update(START, info(0.5, noise=1.0))
    assert noisy.noise == pytest.approx((1 - RULE.noise_memory) * 1.0)
    assert RULE.update(noisy, info(0.5, noise=None)).noise == noisy.noise
    assert RULE.update(noisy, info(0.5, noise=math.nan)).noise == noisy.noise
    capped = RULE.update(START, info(0.5, noise=1e30)).noise
    assert capped == RULE.update(START, info(0.5, noise=2.0)).noise


def test_noise_puts_a_floor_under_the_damping():
    noisy = replace(START, damping=1e-6, noise=1.0)
    found = RULE.update(noisy, info(1.0, noise=1.0))
    assert found.damping == pytest.approx(RULE.noisy_floor)
    assert RULE.update(replace(noisy, noise=0.0), info(1.0, noise=0.0)).damping < 1e-6


@pytest.mark.parametrize("c", [1e-9, 1e9])
def test_multiplying_the_loss_multiplies_the_dampings_and_changes_no_decision(c):
    def history(c: float) -> list[Settings]:
        settings, seen = Settings(c, 2 * c), []
        for step in range(60):
            agreement = (0.9, 0.1, 0.5, 0.9, 0.9)[step % 5]
            happened = StepInfo(-c, -c * agreement, 0.01 * c, 1, 0.3 * (step % 3))
            settings = RULE.update(settings, happened)
            settings = RULE.probed(settings, step % 2 == 0, 0.01 * c)
            seen.append(settings)
        return seen

    for plain, scaled in zip(history(1.0), history(c), strict=True):
        assert scaled.damping / c == pytest.approx(plain.damping, rel=1e-9)
        assert scaled.inverse_damping / c == pytest.approx(plain.inverse_damping, rel=1e-9)
        assert (scaled.probe, scaled.noise) == pytest.approx((plain.probe, plain.noise))


def test_a_better_neighbour_is_taken_and_a_worse_one_turns_the_search_round():
    better = RULE.probed(START, True, 1.0)
    assert better.inverse_damping == pytest.approx(START.inverse_damping * START.probe)
    assert better.probe == START.probe
    worse = RULE.probed(START, False, 1.0)
    assert worse.inverse_damping == START.inverse_damping
    assert worse.probe == pytest.approx(1 / START.probe)
    assert RULE.probed(worse, True, 1.0).inverse_damping == pytest.approx(20.0)
    assert better.damping == worse.damping == START.damping


def test_the_neighbour_stays_between_floor_and_ceiling():
    settings = START
    for _ in range(30):
        settings = RULE.probed(settings, True, 1.0)
    assert settings.inverse_damping == pytest.approx(RULE.floor)
    settings = replace(settings, probe=10.0)
    for _ in range(30):
        settings = RULE.probed(settings, True, 1.0)
    assert settings.inverse_damping == pytest.approx(RULE.ceiling)


def test_directions_are_averaged_only_where_there_is_noise():
    assert RULE.averaging(START) == 0.0
    assert RULE.averaging(replace(START, noise=RULE.silence * 0.99)) == 0.0
    half, full = (RULE.averaging(replace(START, noise=n)) for n in (0.5, 1.0))
    assert half == pytest.approx(full / 2)
    assert RULE.averaging(replace(START, noise=2.0)) == full
    assert full < 1


def test_fixed_changes_nothing():
    rule = Fixed()
    assert rule.update(START, info(0.0, noise=3.0)) == START
    assert rule.probed(START, True, 1.0) == START
    assert rule.averaging(replace(START, noise=1.0)) == 0.0


def test_first_trials_fall():
    assert list(FIRST_TRIALS) == sorted(FIRST_TRIALS, reverse=True)
    assert all(t > 0 for t in FIRST_TRIALS)


@pytest.mark.parametrize(
    ("agreement", "noise", "fall"), [(0.9, 0.0, 0.7), (1.2, 0.0, 0.7**3), (1.2, 0.5, 0.7)]
)
def test_lambda_falls_faster_where_the_model_is_right_and_nothing_is_noise(agreement, noise, fall):
    rule, settings = LevenbergMarquardt(noise_memory=1.0), Settings(0.5, 0.5, noise=noise)
    info = StepInfo(predicted=-1.0, actual=-agreement, scale=1.0, steps=1)
    assert rule.update(settings, info).damping == pytest.approx(0.5 * fall)


@pytest.mark.parametrize("c", [1e-6, 1.0, 1e6])
def test_a_first_step_leaps_where_it_is_long_and_promises_a_large_share_of_the_loss(c):
    pacing, pace = Pacing(), Pace(loss=7 * c, slope=-30 * c, bend=200 * c)
    assert pacing.leapt(pace, 0.1)  # 3 − 1 of 7
    assert not pacing.leapt(replace(pace, loss=9 * c), 0.1)
    assert not pacing.leapt(replace(pace, loss=-9 * c), 0.1)  # as of a density
    assert not pacing.leapt(replace(pace, slope=-60 * c), 0.09)  # 5.4 − 0.81, and a ceiling
    assert not pacing.leapt(replace(pace, loss=0.0), 0.31)  # uphill
    assert pacing.leapt(Pace(), 0.1)  # nothing is known of it
    assert pacing.leapt(Pace(loss=9 * c), 0.01)
