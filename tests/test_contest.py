"""Contests: tuning, racing, lengths, targets, tables, pictures and the verdict."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console

from kronewton.errors import OptionError
from kronewton.lab import contest, files, plots, reports, rivals
from kronewton.lab.entries import read_entries
from kronewton.lab.rivals import find_rival
from kronewton.lab.tasks import Task, find_task
from kronewton.lab.training import Budget, Record

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

CPU = torch.device("cpu")


def plan(
    task: Task | None = None, names: tuple[str, ...] = ("kfac", "sgd", "adamw")
) -> contest.Plan:
    task = task or find_task("digits-mlp")
    chosen = tuple(find_rival(name) for name in names)
    return contest.Plan(task, chosen, (0, 1), Budget(20, every=5), (1.0,), 2, CPU)


def run_of(*losses: float) -> list[Record]:
    """A record a step, a tenth of a second each."""
    return [
        Record(step, 0.1 * step, loss, train_loss=loss, test_loss=loss, metric=0.5)
        for step, loss in enumerate(losses, 1)
    ]


def report_of(**losses: tuple[float, ...]) -> reports.Report:
    """A report on rivals whose two seeds went alike."""
    made = plan(names=tuple(losses))
    raced = {contest.Lane(n, 0, seed): run_of(*ls) for n, ls in losses.items() for seed in (0, 1)}
    return reports.summarise(made, {}, raced)


def test_tuning_prefers_the_first_to_arrive_then_the_lowest() -> None:
    made, sgd = plan(), find_rival("sgd")
    tuned = {contest.Lane("sgd", 0, 0): run_of(3, 2, 1), contest.Lane("sgd", 1, 0): run_of(3, 1, 2)}
    assert contest.best_settings(made, sgd, tuned) == (1,)
    assert contest.best_settings(replace(made, targets=(0.1,)), sgd, tuned) == (0,)
    broken = Record(2, 0.2, math.nan, diverged=True)
    tuned[contest.Lane("sgd", 0, 0)] = [*run_of(0.5), broken]
    assert contest.best_settings(replace(made, targets=(0.1,)), sgd, tuned) == (1,)


def test_contest_end_to_end(tmp_path: Path) -> None:
    made = plan()
    tuned: contest.Board = {}
    raced: contest.Board = {}
    list(contest.tune_(made, tuned))
    turns = list(contest.race_(made, tuned, raced))
    assert {lane.rival for lane in tuned} == {"sgd", "adamw"}
    assert len(tuned) == 4
    assert len(raced) == 6
    assert len(turns) == 6 * 20
    assert turns[0] != turns[contest.CHUNK]
    report = reports.summarise(made, tuned, raced)
    assert {line.rival for line in report.lines} == {"kfac", "sgd", "adamw"}
    plots.contest_plot(made, raced, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    files.write_json(tmp_path / "report.json", {"report": report, "curves": reports.curves(raced)})
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["report"]["seconds"] is None  # no limit: infinity is no JSON
    assert len(document["curves"]) == 6


def unequal() -> contest.Plan:
    """K-FAC's 20 steps against SGD's 200."""
    return replace(plan(names=("kfac", "sgd")), budgets={"sgd": Budget(200, every=50)})


def test_every_rival_runs_its_own_length() -> None:
    made = unequal()
    tuned: contest.Board = {}
    raced: contest.Board = {}
    list(contest.tune_(made, tuned))
    turns = [lane.rival for lane in contest.race_(made, tuned, raced)]
    assert {len(records) for records in tuned.values()} == {200}
    assert {(lane.rival, len(rs)) for lane, rs in raced.items()} == {("kfac", 20), ("sgd", 200)}
    # Both are half way at the same time, and both evaluate at the pace of their own length.
    half = turns[: len(turns) // 2]
    assert (half.count("kfac"), half.count("sgd")) == (20, 200)
    for lane, records in raced.items():
        steps = [r.step for r in records if r.train_loss is not None]
        assert steps == ([1, 5, 10, 15, 20] if lane.rival == "kfac" else [1, 50, 100, 150, 200])


def test_turns_are_equal_where_the_clock_ends_the_runs() -> None:
    made = replace(unequal(), budget=Budget(10**9, seconds=60), budgets={"kfac": Budget(30, 60)})
    lanes = contest.racing_lanes(made, {})
    turns = [lane.rival for lane in islice(contest.run_(made, lanes, {}), 2 * contest.CHUNK)]
    assert turns == ["kfac"] * contest.CHUNK + ["sgd"] * contest.CHUNK


def test_table_and_verdict_say_each_length() -> None:
    made = replace(unequal(), targets=(1.5,), seeds=(0,))
    raced = {
        contest.Lane("kfac", 0, 0): run_of(*[2] * 19, 1),
        contest.Lane("sgd", 0, 0): run_of(*[2] * 200),
    }
    report = reports.summarise(made, {}, raced)
    assert {line.rival: line.length for line in report.lines} == {"kfac": 20, "sgd": 200}
    console = Console(width=100)
    with console.capture() as printed:
        console.print(reports.contest_tables(report))
    assert "at the end of 20 to 200 steps" in printed.get()
    assert "in 20 steps and 2 s (one seed)" in reports.verdict(report)
    assert "SGD, ends at 2 after 200 steps" in reports.verdict(report)


@pytest.mark.parametrize(("length", "scale"), [(100, "linear"), (101, "log")])
def test_steps_are_on_a_log_axis_where_lengths_differ_widely(
    length: int, scale: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(unequal(), budgets={"sgd": Budget(length)})
    raced = {
        contest.Lane("kfac", 0, 0): run_of(*[2] * 20),
        contest.Lane("sgd", 0, 0): run_of(*[3] * length),
    }
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.contest_plot(made, raced, tmp_path / "picture.png")
    steps, seconds = drawn[0].axes
    assert steps.get_xscale() == scale
    assert seconds.get_xscale() == "linear"
    assert seconds.get_xlim()[1] > 0.1 * length  # every run is seen to its end
    assert {"K-FAC, 20 steps: 2", f"SGD, {length} steps: 3"} <= {t.get_text() for t in steps.texts}


@pytest.mark.parametrize(
    ("lowest", "target"), [(9.04, 9.1), (0.00123, 0.0013), (120.1, 130), (0.0, 0.0), (9.1, 9.1)]
)
def test_automatic_target_is_what_tuning_ends_with_rounded_up(lowest: float, target: float) -> None:
    made = replace(plan(), targets=(contest.BY_TUNING,))
    tuned = {
        contest.Lane("sgd", 0, 0): run_of(200, lowest + 50),
        contest.Lane("sgd", 1, 0): run_of(300, lowest),
        contest.Lane("kfac", 0, 0): run_of(200, -1),
    }
    assert contest.best_settings(made, find_rival("sgd"), tuned) == (1,)
    assert contest.with_target(made, tuned).target == target
    assert contest.with_target(plan(), tuned) == plan()


def test_settings_are_chosen_by_the_automatic_target_before_it_is_rounded() -> None:
    tuned = {
        contest.Lane("sgd", 0, 0): run_of(3, 1.48, 1.47),
        contest.Lane("sgd", 1, 0): run_of(3, 2, 1.41),
    }
    aimed = contest.with_target(replace(plan(), targets=(contest.BY_TUNING,)), tuned)
    assert aimed.target == 1.5
    assert contest.best_settings(aimed, find_rival("sgd"), tuned) == (1,)


def test_automatic_target_needs_a_rival_that_is_tuned_and_ends() -> None:
    made = replace(plan(names=("kfac",)), targets=(contest.BY_TUNING,))
    with pytest.raises(OptionError, match=r"none is tuned here: name one in --rivals"):
        contest.check(made)
    with pytest.raises(OptionError, match=r"--grid-budget of 2 or more"):
        contest.check(replace(plan(), targets=(contest.BY_TUNING,), grid=1))
    contest.check(replace(plan(), targets=(contest.BY_TUNING,)))
    contest.check(plan(names=("kfac",)))
    broken = [Record(1, 0.1, math.nan, diverged=True)]
    with pytest.raises(OptionError, match="every tuned run diverged; give a number"):
        contest.with_target(
            replace(plan(), targets=(contest.BY_TUNING,)), {contest.Lane("sgd", 0, 0): broken}
        )


def test_what_refuses_does_so_before_the_tuning() -> None:
    made = plan(replace(find_task("digits-mlp"), batch_size=1438), names=("sgd", "kfac"))
    with pytest.raises(OptionError, match="batch of 1438"):
        contest.check(made)
    runs = contest.check(plan())
    assert [run.rival.name for run in runs] == ["kfac", "sgd", "adamw"]


def test_entries_are_rivals_with_lengths() -> None:
    entries = read_entries("kfac:100, adam:3000,sgd,sgd")
    assert [(e.rival.name, e.steps) for e in entries] == [
        ("kfac", 100),
        ("adam", 3000),
        ("sgd", None),
    ]
    assert [e.rival.name for e in read_entries(None)] == rivals.available()


@pytest.mark.parametrize("item", ["sgd:", "sgd:0", "sgd:-3", "sgd:1e3", "sgd:many", "sgd:²"])
def test_length_that_is_none_is_refused(item: str) -> None:
    with pytest.raises(OptionError, match=rf"'{item}'; after the colon.*1 or more.*adam:3000"):
        read_entries(f"kfac,{item}")


def test_two_lengths_for_one_rival_are_refused() -> None:
    with pytest.raises(OptionError, match="names sgd twice, with different lengths; name it once"):
        read_entries("sgd:100,kfac,sgd:200")


@pytest.mark.parametrize(
    ("value", "said"), [(236.4, "236"), (99.4, "99"), (0.01234, "0.012"), (2e6, "2e+06")]
)
def test_numbers_have_two_digits_or_all_before_the_point(value: float, said: str) -> None:
    assert reports.digits(value) == said


def test_ratios_are_to_kfac() -> None:
    report = report_of(kfac=(2, 1, 1, 1), sgd=(2, 2, 2, 1))
    slow = next(line for line in report.lines if line.rival == "sgd")
    assert slow.steps == reports.Spread(4, 4, 4)
    assert slow.step_ratio == pytest.approx(2)
    assert slow.second_ratio == pytest.approx(2)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ({"kfac": (2, 1, 1), "sgd": (2, 2, 1)}, "first by steps: SGD, the next, takes 1.5 times"),
        ({"kfac": (2, 2, 1), "sgd": (2, 1, 1)}, "By steps it is behind: SGD takes 0.67 times"),
        ({"kfac": (2, 1, 1), "sgd": (2, 1, 1)}, "By steps it is level with SGD"),
        (
            {"kfac": (2, 1, 1), "sgd": (2, 2, 2)},
            "of 1 tuned rivals none does, and the lowest, SGD, ends at 2",
        ),
        ({"kfac": (2, 2, 2), "sgd": (2, 1, 1)}, r"K-FAC does not reach.*those that do: SGD"),
        ({"kfac": (2, 2, 2), "sgd": (2, 2, 2)}, r"K-FAC does not reach.*those that do: none"),
        ({"adamw": (2, 1, 1), "sgd": (2, 2, 1)}, "AdamW is first of 2 by steps; K-FAC did not run"),
    ],
)
def test_verdict_says_what_the_numbers_say(losses: dict[str, tuple[float, ...]], said: str) -> None:
    verdict = reports.verdict(report_of(**losses))
    assert re.search(said, verdict), verdict


def test_kfac_is_matched_with_the_end_of_each_rival_on_the_same_seed() -> None:
    lane = contest.Lane
    raced = {
        lane("kfac", 0, 0): run_of(5, 4, 3),
        lane("kfac", 0, 1): run_of(5, 2, 1),
        lane("kfac", 0, 2): run_of(5, 2, 1),
        lane("sgd", 1, 0): run_of(9, 9, 2, 4),  # its end counts, not its lowest
        lane("sgd", 1, 1): run_of(9, 9, 9, 6),
        lane("sgd", 1, 2): run_of(9, 9, 9, 1.5),
        lane("adamw", 0, 0): run_of(9, 0.5),
        lane("adamw", 0, 1): [Record(1, 0.1, math.nan, diverged=True)],
    }
    sgd, adamw = reports.summarise(plan(), {}, raced).matches
    assert (sgd.rival, sgd.seeds, sgd.end.median) == ("sgd", 3, 4)
    assert sgd.steps == reports.Spread(2, 1, 3)
    assert sgd.share == reports.Spread(0.5, 0.25, 0.75)
    assert reports.match_said(sgd) == (
        "K-FAC reaches the training loss at which SGD ends (4) in 2 steps, "
        "0.50 [0.25–0.75] of SGD's (3 seeds, each against its own)."
    )
    assert adamw.seeds == 1  # the diverged run has no end
    assert "does not reach the training loss at which AdamW ends (0.5)" in reports.match_said(adamw)


def test_without_kfac_or_an_end_nothing_is_matched() -> None:
    assert report_of(sgd=(2, 1), adamw=(2, 1)).matches == ()
    assert report_of(kfac=(2, 1)).matches == ()


def test_diverged_rival_stays_in_the_table() -> None:
    made = plan(names=("kfac", "sgd"))
    raced = {contest.Lane(name, 0, 0): run_of(2, 1) for name in ("kfac", "sgd")}
    raced[contest.Lane("sgd", 0, 0)] = [Record(1, 0.1, math.nan, diverged=True)]
    console = Console(width=100)
    with console.capture() as printed:
        console.print(reports.contest_tables(reports.summarise(made, {}, raced)))
    (soon, end) = [line for line in printed.get().splitlines() if line.strip().startswith("SGD")]
    assert "never" in soon
    assert "diverged" in end
