"""The dial: K-FAC at several settings of refine, in numbers, in words and in a picture."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from torch import Tensor, nn

import kronewton as kn
from kronewton.errors import OptionError
from kronewton.lab import cli, contest, dial, plots, reports, rivals
from kronewton.lab.entries import read_entries
from kronewton.lab.rivals import Setting
from kronewton.lab.tasks import find_task
from kronewton.lab.training import Budget, Record

torch.set_num_threads(1)  # the models are tiny, and tests run side by side

CPU = torch.device("cpu")


class Telling(kn.KFAC):
    """K-FAC that says it was refined, and is not."""

    told = 0

    def diagnostics(self) -> dict[str, Tensor]:
        return {**super().diagnostics(), "refined": torch.tensor(float(self.told))}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The settings that K-FAC was asked for, by a constructor that takes any."""
    asked: list[int] = []

    def make(model: nn.Module, criterion: nn.Module, setting: Setting) -> kn.KFAC:
        optimizer = Telling(model, criterion)
        optimizer.told = int(setting["refine"])
        asked.append(optimizer.told)
        return optimizer

    monkeypatch.setitem(rivals.RIVALS, "kfac", replace(rivals.RIVALS["kfac"], make=make))
    return asked


def plan(settings: tuple[int, ...], beside: str | None = None) -> contest.Plan:
    entries = dial.with_dial(() if beside is None else read_entries(beside), settings)
    chosen = tuple(entry.rival for entry in entries)
    budgets = {e.rival.name: Budget(e.steps) for e in entries if e.steps}
    return contest.Plan(
        find_task("digits-autoencoder"), chosen, (0, 1), Budget(20), (2.0,), 2, CPU, budgets
    )


def run_of(*losses: float, predicted: float = math.nan) -> list[Record]:
    """A record a step, a tenth of a second each."""
    settings = {"predicted": predicted, "refined": 3.0}
    return [
        Record(step, 0.1 * step, loss, settings, train_loss=loss, test_loss=loss)
        for step, loss in enumerate(losses, 1)
    ]


def board(**losses: tuple[float, ...]) -> contest.Board:
    """Runs of rivals whose two seeds went alike; an underscore is the plus of a name."""
    return {
        contest.Lane(name.replace("_", "+"), 0, seed): run_of(*values, predicted=-0.5)
        for name, values in losses.items()
        for seed in (0, 1)
    }


def test_settings_are_read_in_order() -> None:
    assert dial.read_dial("4, 0,1,12") == (0, 1, 4, 12)


@pytest.mark.parametrize("text", ["", "0,", "0,-1", "0,1.5", "many", "0;1", "²"])
def test_list_that_is_no_dial_is_refused(text: str) -> None:
    said = f"whole numbers with commas, 0 or more, not {text!r}; give for example"
    with pytest.raises(OptionError, match=re.escape(said)):
        dial.read_dial(text)


def test_setting_named_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="names a setting twice in '0,2,02'; name each once"):
        dial.read_dial("0,2,02")


def test_the_dial_takes_the_place_and_the_length_of_kfac() -> None:
    entries = dial.with_dial(read_entries("sgd:30,kfac:10"), (0, 2))
    assert [(e.rival.name, e.rival.grid[0].get("refine"), e.steps) for e in entries] == [
        ("kfac", 0, 10),
        ("kfac+2", 2, 10),
        ("sgd", None, 30),
    ]
    assert [rivals.family(e.rival.name) for e in entries] == ["kfac", "kfac", "sgd"]


def test_kfac_is_asked_for_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[object] = []
    monkeypatch.setattr(rivals.kn, "KFAC", lambda *_, **options: given.append(options))
    for entry in dial.with_dial((), (0, 3)):
        entry.rival.make(nn.Linear(1, 1), nn.MSELoss(), entry.rival.grid[0])
    assert given == [{"lr": "auto", "refine": 0}, {"lr": "auto", "refine": 3}]


def test_only_rivals_beside_the_dial_are_tuned_and_make_a_target() -> None:
    here = replace(plan((0, 2), "sgd"), targets=(contest.BY_TUNING,))
    assert {lane.rival for lane in contest.tuning_lanes(here)} == {"sgd"}
    tuned = {contest.Lane("sgd", 0, 0): run_of(3.01), contest.Lane("kfac+2", 0, 0): run_of(1)}
    assert contest.with_target(here, tuned).target == 3.1
    with pytest.raises(OptionError, match="none is tuned here"):
        contest.check(replace(plan((0,)), targets=(contest.BY_TUNING,)))


def test_promises_are_medians_of_the_first_steps() -> None:
    here = plan((0, 2), "sgd")
    raced = board(kfac=(8,) * 10 + (4,) * 15, kfac_2=(1.0,), sgd=(3.0,))
    raced[contest.Lane("kfac", 0, 0)][0] = Record(1, 0.1, math.nan)  # tells nothing
    first, second = dial.notches(here, reports.summarise(here, {}, raced), raced)
    assert (first.refine, second.refine) == (0, 2)
    assert first.decrease == pytest.approx(0.5)
    # Seed 0 has 9 steps at 8 and 10 at 4, seed 1 has 10 of each: the last five do not count.
    assert first.share == pytest.approx((0.5 / 4 + (0.5 / 4 + 0.5 / 8) / 2) / 2)
    assert second.share == pytest.approx(0.5)
    assert first.directions == 3


def test_contest_without_a_dial_has_no_notches() -> None:
    here = replace(plan((0,)), rivals=(rivals.find_rival("kfac"),))
    raced = board(kfac=(1.0,))
    assert dial.notches(here, reports.summarise(here, {}, raced), raced) == ()


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        (
            {"kfac": (3, 3, 3, 1), "kfac_2": (3, 1)},
            "fewest steps at refine 2 (2; at refine 0, 4) and the least time at refine 2 "
            "(0.2 s; at refine 0, 0.4 s).",
        ),
        (
            {"kfac": (3, 1), "kfac_2": (3, 3, 1)},
            "fewest steps at refine 0 (2) and the least time at refine 0 (0.2 s).",
        ),
        ({"kfac": (3, 3), "kfac_2": (3, 1)}, "at refine 2 (2; at refine 0, never)"),
        ({"kfac": (4, 4), "kfac_2": (4, 3)}, "reaches a training loss of 2; the lowest, refine 2"),
    ],
)
def test_verdict_says_what_the_numbers_say(losses: dict[str, tuple[float, ...]], said: str) -> None:
    here = plan((0, 2))
    report = reports.summarise(here, {}, board(**losses))
    assert said in dial.dial_verdict(report, dial.notches(here, report, board(**losses)))


def test_table_has_a_row_for_each_setting_and_rival() -> None:
    here = plan((0, 2), "sgd")
    raced = board(kfac=(3, 1), kfac_2=(3, 3), sgd=(3, 3, 1))
    report = reports.summarise(here, {}, raced)
    console = Console(width=100)
    with console.capture() as printed:
        console.print(dial.dial_table(report, dial.notches(here, report, raced)))
    rows = [line.split() for line in printed.get().splitlines()]
    assert ["K-FAC,", "refine", "0", "2", "0.2", "1", "0.5", "33", "%", "3"] in rows
    assert ["K-FAC,", "refine", "2", "never", "never", "3", "0.5", "17", "%", "3"] in rows
    assert ["SGD", "3", "0.3", "1", "–", "–", "–"] in rows


def test_picture_has_the_dial_as_its_axis(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = plan((0, 1, 4), "sgd,adamw,lbfgs")
    raced = board(
        kfac=(3, 3, 1), kfac_1=(3, 1), kfac_4=(3, 3), sgd=(3,) * 7 + (1,), adamw=(3, 3),
        lbfgs=(3,) * 30 + (1,),
    )  # fmt: skip
    report = reports.summarise(here, {}, raced)
    found = dial.notches(here, report, raced)
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.dial_plot(here, raced, found, dial.others(report, found), tmp_path / "dial.png")
    steps, seconds, *races = drawn[0].axes
    for ax in (steps, seconds):
        assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "1", "4"]
        words = {text.get_text() for text in ax.texts}
        assert {"never", "SGD"} <= words  # refine 4 does not arrive; SGD does, within sight
        assert any("L-BFGS" in w and "AdamW never" in w for w in words)
    assert steps.get_ylim()[1] < 31
    assert [len(ax.lines) for ax in races] == [7, 7]  # six rivals and the target


def test_dial_end_to_end(
    made: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--refine", "2,0", "--rivals", "kfac:8,adamw:16", "--seeds", "2", "--target", "1"]
    words = ["compare", "digits-mlp", *options, "--grid-budget", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert not ended.value.code
    assert set(made) == {0, 2}
    printed = capsys.readouterr().out
    assert "the dial, to a training loss of 1" in printed
    assert printed.splitlines()[-1].startswith("On digits-mlp, a training loss of 1 takes")
    assert {f.name for f in tmp_path.iterdir()} == {"digits-mlp-dial.png", "digits-mlp-dial.json"}
    document = json.loads((tmp_path / "digits-mlp-dial.json").read_text())
    assert [(n["refine"], n["directions"]) for n in document["dial"]] == [(0, 0), (2, 2)]
    assert all(n["decrease"] > 0 and 0 < n["share"] < 1 for n in document["dial"])
    ends = {curve["rival"]: curve["records"][-1]["step"] for curve in document["curves"]}
    assert ends == {"kfac": 8, "kfac+2": 8, "adamw": 16}


def test_the_dial_alone_is_a_contest(made: list[int], capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--refine", "0,1", "--seeds", "1", "--steps", "5"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", "linear-regression", *options])
    assert not ended.value.code
    assert set(made) == {0, 1}
    assert "AdamW" not in capsys.readouterr().out
