"""Time to a target: tuning that stops, settings for each target, resuming, ratios, the verdict."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console

from kronewton.errors import DataError, OptionError, StateError
from kronewton.lab import arrivals, cli, contest, display, plots, suite
from kronewton.lab.contest import Lane
from kronewton.lab.journal import Journal, open_journal
from kronewton.lab.rivals import find_rival
from kronewton.lab.tasks import find_task
from kronewton.lab.training import Budget, Record

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

CPU = torch.device("cpu")


def plan(*names: str, seeds: int = 2, targets: tuple[float, ...] = (2.0, 1.0)) -> contest.Plan:
    """K-FAC and others on a tiny task, up to the last target."""
    chosen = tuple(find_rival(name) for name in names or ("kfac", "sgd"))
    budget = Budget(30, until=targets[-1])
    task = replace(find_task("linear-regression"), targets=targets)
    return contest.Plan(task, chosen, tuple(range(seeds)), budget, targets, 2, CPU)


def run_of(*losses: float, pace: float = 0.5) -> list[Record]:
    """A record a step, `pace` seconds each."""
    return [
        Record(step, pace * step, loss, train_loss=loss, test_loss=10 * loss, metric=0.5)
        for step, loss in enumerate(losses, 1)
    ]


def found_of(pace: float = 0.5, **losses: tuple[float, ...]) -> tuple[arrivals.Goal, ...]:
    """Goals of runs whose two seeds went alike; a step of K-FAC takes half a second."""
    raced = {
        Lane(name, 0, seed): run_of(*values, pace=0.5 if name == "kfac" else pace)
        for name, values in losses.items()
        for seed in (0, 1)
    }
    return arrivals.goals(plan(*losses), {}, raced)


def whole_lines(text: str) -> str:
    return " ".join(text.split())


# tuning


def test_a_setting_has_no_more_steps_than_the_best_took_to_the_last_target() -> None:
    made = replace(plan(targets=(1e-3, 1e-12)), rivals=(find_rival("adamw"),))
    board = {Lane("adamw", 0, 0): run_of(*[1.0] * 6, 0.0)}
    list(contest.tune_(made, board))
    assert len(board[Lane("adamw", 1, 0)]) == 7
    assert board[Lane("adamw", 1, 0)][-1].train_loss is not None  # its end is evaluated
    alone: contest.Board = {Lane("adamw", 0, 0): run_of(*[1.0] * 6)}  # not there: nothing is known
    list(contest.tune_(made, alone))
    assert len(alone[Lane("adamw", 1, 0)]) == 30


def test_a_tuning_run_ends_at_the_last_target() -> None:
    board: contest.Board = {}
    list(contest.tune_(plan("sgd", targets=(0.5, 0.05)), board))
    for records in board.values():
        *before, last = [r.train_loss for r in records]
        assert last is not None
        assert last <= 0.05 < min(loss for loss in before if loss is not None)


def test_every_target_has_its_own_best_setting() -> None:
    made, sgd = plan("sgd"), find_rival("sgd")
    tuned = {
        Lane("sgd", 0, 0): run_of(3, 2, *[1.5] * 9, 1),
        Lane("sgd", 1, 0): run_of(3, 3, 3, 2, 1),
    }
    assert contest.best_settings(made, sgd, tuned) == (0, 1)
    lanes = contest.racing_lanes(made, tuned)
    assert {lane.setting: budget.until for lane, budget in lanes.items()} == {0: 2.0, 1: 1.0}
    tuned[Lane("sgd", 1, 0)] = run_of(3, 2, 1)  # level at the first, and ends as low
    assert contest.best_settings(made, sgd, tuned) == (0, 1)
    tuned[Lane("sgd", 0, 0)] = run_of(3, 3, 1)
    assert contest.best_settings(made, sgd, tuned) == (1, 0)
    endless = replace(made, budget=Budget(30))  # as compare runs: to the end
    assert {b.until for b in contest.racing_lanes(endless, tuned).values()} == {-math.inf}


# resuming


def finished(made: contest.Plan, journal: Journal) -> dict[tuple[str, Lane], list[Record]]:
    """All lanes of the contest, after what was left of it has been run."""
    suite.compete_(made, journal, lambda: False)
    boards = {"tuning": journal.tuned, "race": journal.raced}
    return {
        (phase, lane): [record for record in records if record.train_loss is not None]
        for phase, board in boards.items()
        for lane, records in board.items()
    }


def same(some: dict[tuple[str, Lane], list[Record]], other: object) -> bool:
    """The same lanes, and in each the same losses at the same steps, up to rounding."""
    assert isinstance(other, dict)
    return some.keys() == other.keys() and all(
        [r.step for r in records] == [r.step for r in other[key]]
        and [r.train_loss for r in records]
        == pytest.approx([r.train_loss for r in other[key]], rel=1e-6, abs=1e-13)
        for key, records in some.items()
    )


@pytest.mark.parametrize("after", [3, 60])
def test_a_contest_that_was_killed_goes_on_to_the_same_lanes(tmp_path: Path, after: int) -> None:
    made = plan("kfac", "adamw", targets=(1e-1, 1e-12))
    whole = finished(made, Journal())
    journal = open_journal(tmp_path / "x.jsonl", made)
    turns = count()
    suite.compete_(made, journal, lambda: next(turns) >= after)
    again = open_journal(tmp_path / "x.jsonl", made)
    kept = len(again.tuned) + len(again.raced)
    assert kept < len(whole)
    assert same(whole, finished(made, again))
    read = open_journal(tmp_path / "x.jsonl", made)
    assert same(whole, finished(made, read))
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    assert len(lines) == 1 + len(whole)  # nothing ran twice


def test_a_line_cut_short_is_dropped_and_runs_again(tmp_path: Path) -> None:
    made, file = plan("kfac", "adamw", targets=(1e-1, 1e-2)), tmp_path / "x.jsonl"
    whole = finished(made, open_journal(file, made))
    text = file.read_text()
    file.write_text(text[:-40])
    cut = open_journal(file, made)
    assert len(cut.tuned) + len(cut.raced) == len(whole) - 1
    assert same(whole, finished(made, cut))


def test_seeds_may_be_added(tmp_path: Path) -> None:
    few, more = plan(seeds=1), plan(seeds=2)
    finished(few, open_journal(tmp_path / "x.jsonl", few))
    journal = open_journal(tmp_path / "x.jsonl", more)
    assert {lane.seed for lane in journal.raced} == {0}
    finished(more, journal)
    assert {lane.seed for lane in journal.raced} == {0, 1}


def test_the_journal_of_another_contest_is_refused(tmp_path: Path) -> None:
    made, file = plan(), tmp_path / "x.jsonl"
    open_journal(file, made)
    for other, said in (
        (replace(made, targets=(3.0,)), r"has targets \[2.0, 1.0\] where .* \[3.0\]"),
        (replace(made, grid=1), "has settings of sgd .* give the same options again"),
        (replace(made, budget=Budget(31)), "has steps"),
        (plan("kfac", "adamw"), r"has rivals \['kfac', 'sgd'\]"),
        (replace(made, task=find_task("deep-linear")), "has task 'linear-regression"),
        (replace(made, seeds=(1, 2)), "has first seed 0"),
    ):
        with pytest.raises(StateError, match=said):
            open_journal(file, other)


@pytest.mark.parametrize("text", ["no journal\n", '{"phase": "x"}\n{}\n', "[]\n[1]\n"])
def test_a_damaged_journal_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"damaged or is no journal.*another --out"):
        open_journal(tmp_path / "x.jsonl", plan())
    (tmp_path / "y.jsonl").write_text("3\n")
    with pytest.raises(StateError, match="has version None"):
        open_journal(tmp_path / "y.jsonl", plan())


# numbers


def test_ratios_are_of_the_same_seed_to_the_rival_with_the_least_median() -> None:
    raced = {
        Lane("kfac", 0, 0): run_of(2, 1),  # 1 s to the last target
        Lane("kfac", 0, 1): run_of(2, 2, 1),  # 1.5 s
        Lane("sgd", 0, 0): run_of(2, 2, 2, 1),  # 2 s
        Lane("sgd", 0, 1): run_of(2, 1),  # 1 s
        Lane("adamw", 0, 0): run_of(2, 2, 2, 2, 1),
        Lane("adamw", 0, 1): run_of(2, 2, 2, 2),  # never
    }
    first, last = arrivals.goals(plan("kfac", "sgd", "adamw"), {}, raced)
    assert (first.target, last.target) == (2.0, 1.0)
    assert last.best is not None
    assert last.best.rival == "sgd"
    assert last.ratio == arrivals.Spread(1.0, 0.5, 1.5)
    assert not last.won
    assert [a.reached for a in (last.kfac, *last.rivals)] == [2, 2, 1]
    assert last.kfac.test == 10
    # When K-FAC was there: on seed 0 SGD stood at 2, on seed 1 it had ended before.
    assert last.best.test_then == 20


def test_settings_are_those_of_the_target() -> None:
    tuned = {Lane("sgd", 0, 0): run_of(2, 1.5, 1.5, 1), Lane("sgd", 1, 0): run_of(3, 3, 1)}
    raced = {Lane("kfac", 0, seed): run_of(2, 1) for seed in (0, 1)}
    raced |= {Lane("sgd", 0, seed): run_of(3, 2) for seed in (0, 1)}
    raced |= {Lane("sgd", 1, seed): run_of(3, 3, 3, 1) for seed in (0, 1)}
    first, last = arrivals.goals(plan(), tuned, raced)
    assert (first.rivals[0].steps.median, last.rivals[0].steps.median) == (2, 4)
    assert first.rivals[0].setting != last.rivals[0].setting


FAST, SLOW, NEVER = (2, 1), (2, 2, 2, 2, 1), (2, 2, 2)


@pytest.mark.parametrize(
    ("kfac", "sgd", "won", "said"),
    [
        (FAST, SLOW, True, "wins 2 of 2 on the clock, 1 of them by a fifth or more."),
        (FAST, NEVER, True, "wins 2 of 2"),
        (SLOW, FAST, False, "; linear-regression at 1 (2.50 times SGD's seconds)."),
        (NEVER, FAST, False, "linear-regression at 1 (K-FAC does not arrive, SGD does)"),
        (NEVER, NEVER, False, "linear-regression at 1 (neither it nor a rival arrives)"),
    ],
)
def test_the_verdict_is_what_the_clock_says(
    kfac: tuple[float, ...], sgd: tuple[float, ...], won: bool, said: str, tmp_path: Path
) -> None:
    goals = found_of(pace=0.51 if won else 0.5, kfac=kfac, sgd=sgd)
    assert goals[-1].won == won
    assert said in arrivals.verdict(goals)
    plots.ratio_plot(goals, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 5_000
    console = Console(width=100)
    with console.capture() as printed:
        console.print(arrivals.summary_table(goals))
        console.print(arrivals.task_table(plan(), goals))
    text = whole_lines(printed.get())
    assert ("none arrives" in text) == (sgd == NEVER)
    assert ("never" in text) == (NEVER in (kfac, sgd))


def test_who_loses_on_test_data_by_then_has_not_won() -> None:
    goal = found_of(kfac=FAST, sgd=SLOW)[-1]
    assert goal.won
    better = replace(goal.rivals[0], test_then=0.9 * goal.kfac.test)
    worse = replace(goal, rivals=(replace(better, label="other", test_then=math.inf), better))
    assert worse.first
    assert not worse.won
    assert worse.better_on_test == better
    assert "(first, but SGD's test loss is lower by then)" in arrivals.verdict([worse])


def test_level_on_test_data_is_not_behind() -> None:
    goal = found_of(kfac=FAST, sgd=SLOW)[-1]
    level = replace(goal.rivals[0], test_then=goal.kfac.test)
    assert replace(goal, rivals=(level,)).won


def test_the_summary_for_a_page_has_a_row_for_each_target() -> None:
    head, rule, first, last = arrivals.summary_markdown(found_of(kfac=FAST, sgd=SLOW)).splitlines()
    assert {line.count("|") for line in (head, rule, first, last)} == {7}
    assert last.startswith("| linear-regression, 1 | 2, 1, 10 | SGD, lr ")
    assert last.endswith(" | 5, 2.5, 10 | **0.40** | 20 |")
    never = arrivals.summary_markdown(found_of(kfac=NEVER, sgd=NEVER)).splitlines()[-1]
    assert never == "| linear-regression, 1 | never | none arrives | – | – | – |"


def test_without_a_task_there_is_no_verdict() -> None:
    assert "nothing to say yet" in arrivals.verdict([])


def test_an_arrival_is_seen_at_the_same_share_of_all_steps() -> None:
    made = suite.plan_of(suite.QUICK, suite.Order((0,), CPU), find_task("linear-regression"))
    assert {made.budget_of(name).share for name in ("kfac", "sgd")} == {suite.SHARE}
    lane = Lane("adamw", 0, 0)
    board: contest.Board = {}
    budget = Budget(100, share=1 / 16)
    list(contest.run_(plan("adamw"), {lane: budget}, board))
    steps = [r.step for r in board[lane] if r.train_loss is not None]
    assert steps[:33] == [*range(1, 33), 34]
    assert all(b - a <= max(1, b / 16) + 6 for a, b in pairwise(steps))
    assert steps[-2:] == [96, 100]


# suites and the command


def test_rivals_have_several_steps_for_one_of_kfacs() -> None:
    task = find_task("deep-linear")
    made = suite.plan_of(suite.QUICK, suite.Order((0,), CPU, "adamw,sgd:7,kfac", 4, 50), task)
    steps = {rival.name: made.budget_of(rival.name).steps for rival in made.rivals}
    assert steps == {"adamw": 300, "sgd": 7, "kfac": 50}
    assert {made.budget_of(name).until for name in steps} == {task.target}
    assert made.grid == 4
    names = [r.name for r in suite.plan_of(suite.QUICK, suite.Order((0,), CPU), task).rivals]
    assert names == ["kfac", "adamw", "sgd", "soap", "lbfgs"]
    noisy = suite.plan_of(suite.QUICK, suite.Order((0,), CPU), find_task("digits-mlp"))
    assert "lbfgs" not in [rival.name for rival in noisy.rivals]
    alone = suite.plan_of(suite.QUICK, suite.Order((0,), CPU, "sgd"), task)
    assert [rival.name for rival in alone.rivals] == ["kfac", "sgd"]


def test_tasks_without_their_data_are_left_out_unless_named() -> None:
    tasks = suite.find_tasks(suite.FULL, (), None)
    assert len(tasks) == len(suite.FULL.tasks) - 2 == 10
    with pytest.raises(DataError, match="needs --data PATH"):
        suite.find_tasks(suite.FULL, ["mnist-autoencoder-small"], None)
    with pytest.raises(OptionError, match=r"--data is of use to mnist-autoencoder and .* alone"):
        suite.find_tasks(suite.QUICK, (), Path("data.npz"))


def test_targets_of_tasks_descend() -> None:
    for name in (*suite.FULL.tasks[2:], *suite.QUICK.tasks):
        targets = find_task(name).targets
        assert list(targets) == sorted(targets, reverse=True)


def run(*arguments: object) -> int:
    """The exit code of the command with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", "time-to-target", *map(str, arguments)])
    code = ended.value.code
    return code if isinstance(code, int) else 0


OPTIONS = ["--rivals", "adamw,sgd", "--seeds", 1, "--steps", 4, "--grid-budget", 2]


def test_the_command_leaves_everything_and_does_nothing_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = ["two-spirals", "linear-regression"]
    assert run(*tasks, *OPTIONS, "--out", tmp_path, "--json", tmp_path / "too.json") == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("K-FAC with nothing set wins ")
    names = {f"{task}.{kind}" for task in tasks for kind in ("png", "jsonl")}
    names |= {f"time-to-target.{kind}" for kind in ("json", "md", "png")} | {"too.json"}
    assert {file.name for file in tmp_path.iterdir()} == names
    document = json.loads((tmp_path / "time-to-target.json").read_text())
    assert document == json.loads((tmp_path / "too.json").read_text())
    (first, _) = document["tasks"]
    assert len(first["tuning"]) == 4
    assert len(first["curves"]) == 3
    assert first["goals"][0]["kfac"]["rival"] == "kfac"

    def runs(*given: object) -> Iterator[Lane]:
        raise AssertionError("a lane ran again")

    monkeypatch.setattr(contest, "run_", runs)
    assert run(*tasks, *OPTIONS, "--out", tmp_path) == 0
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    assert run(*tasks, *OPTIONS, "--steps", 5, "--out", tmp_path) == 2
    assert "has steps [4, 24, 24] where this contest" in capsys.readouterr().err


def test_ctrl_c_keeps_what_has_ended(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = count()

    def press_later(bar: display.Bar, lane: Lane) -> None:
        if next(turns) == 30:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(display.Bar, "step", press_later)
    assert run("two-spirals", *OPTIONS, "--out", tmp_path) == 130
    assert "nothing to say yet" in capsys.readouterr().out
    (file,) = tmp_path.iterdir()
    assert len(file.read_text().splitlines()) == 2  # the plan, and the one lane that had ended


def test_a_full_suite_without_data_says_what_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(suite.FULL, tasks=("mnist-autoencoder", "linear-regression"))
    monkeypatch.setattr(suite, "FULL", few)
    assert run("--full", *OPTIONS) == 0
    told = capsys.readouterr()
    assert "Without mnist-autoencoder and mnist-autoencoder-small: --data PATH" in told.err
    assert "linear-regression" in told.out
