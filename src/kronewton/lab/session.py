"""One training run as a user sees it: progress, files that a later run continues, a summary."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.table import Table

import kronewton as kn
from kronewton.errors import DataError, KronewtonError, OptionError
from kronewton.lab import checkpoint, plots
from kronewton.lab.files import read_records, sweep, write_lines
from kronewton.lab.training import Budget, Record, Run, train

LINES = "steps.jsonl"
PICTURE = "training.png"
SAVE_EVERY = 30.0  # seconds between checkpoints, so that writing them costs little


@dataclass(frozen=True)
class Outcome:
    """What a session leaves: all its records, and whether Ctrl-C ended it."""

    records: tuple[Record, ...]
    interrupted: bool


@contextmanager
def ctrl_c() -> Iterator[Callable[[], bool]]:
    """Tell when Ctrl-C was pressed, so that a step under way ends first; a second press breaks."""
    pressed: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def make_folder(folder: Path | None) -> None:
    """Make the folder for a run's files. Raises DataError if that can't be."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} can't be a folder ({error.strerror}); name another.") from error


def resume_(run: Run, folder: Path | None) -> list[Record]:
    """Bring a run to its checkpoint and return the records up to there, none if there is none.

    What starts a training again when it was killed need not know whether it had saved anything.
    """
    if folder is None:
        raise OptionError("--resume needs --out DIR, the folder of the run that is to go on.")
    if not (folder / checkpoint.FILE).exists():
        return []
    last = checkpoint.load_(folder, run)
    records = read_records(folder / LINES, last.step)
    if not records or records[-1].step != last.step:
        raise DataError(f"{folder / LINES} ends before the checkpoint; train without --resume.")
    return records


def train_(
    run: Run,
    budget: Budget,
    folder: Path | None,
    records: list[Record],
    show: Callable[[Record], None],
    save_every: float = SAVE_EVERY,
) -> Outcome:
    """Train on from the records, show every step, and keep the folder's files up to date."""
    last = records[-1] if records else None
    if folder is not None:
        for name in (LINES, checkpoint.FILE):
            sweep(folder / name)
    saved = -math.inf  # the first step's too: a folder that can't be written is found out at once
    with ctrl_c() as pressed:
        for record in _going_on(train(run, budget, last), folder if records else None):
            records.append(record)
            show(record)
            if folder is not None and time.monotonic() - saved >= save_every:
                _save(run, folder, records)
                saved = time.monotonic()
            if pressed():
                break
        interrupted = pressed()
    if folder is not None and records:
        _save(run, folder, records)
        label = f"{run.rival.label}, seed {run.seed}"
        plots.run_plot(run.task, label, run.rival.name, records, folder / PICTURE)
    return Outcome(tuple(records), interrupted)


def summary(run: Run, outcome: Outcome) -> Table:
    """What the run came to, in a few rows."""
    table = Table(show_header=False)
    if not outcome.records:
        table.add_row("steps", "0")
        return table
    last = outcome.records[-1]
    seen = [r for r in outcome.records if r.train_loss is not None]
    end = "diverged" if last.diverged else "interrupted" if outcome.interrupted else "done"
    table.add_row("steps", f"{last.step} ({end})")
    table.add_row("seconds of training", f"{last.seconds:.3g}")
    table.add_row("milliseconds a step", f"{1e3 * last.seconds / last.step:.3g}")
    if seen:
        table.add_row(
            f"training {run.task.unit} at step {seen[-1].step}", _value(seen[-1].train_loss)
        )
        table.add_row("test loss", _value(seen[-1].test_loss))
        if run.task.metric is not None:
            table.add_row(f"test {run.task.metric.name}", f"{100 * (seen[-1].metric or 0.0):.1f} %")
    return table


def uncovered(run: Run) -> str | None:
    """The parameters that K-FAC trains without curvature, in a sentence; None if there are none."""
    if not isinstance(run.optimizer, kn.KFAC):
        return None
    coverage = run.optimizer.coverage()
    names = [row.parameter for row in coverage.rows if not row.curved]
    if not names:
        return None
    return f"K-FAC has no curvature for {', '.join(names)}: see `kronewton explain`."


def _going_on(steps: Iterator[Record], resumed: Path | None) -> Iterator[Record]:
    """The steps. What fits a run by its shapes and names may fail all the same at the first."""
    try:
        first = next(steps, None)
    except KronewtonError:
        raise
    except Exception as error:
        if resumed is None:
            raise
        raise checkpoint.unfit(resumed / checkpoint.FILE, error) from error
    if first is not None:
        yield first
        yield from steps


def _save(run: Run, folder: Path, records: list[Record]) -> None:
    # The lines first: those that are ahead of a checkpoint are left out by who goes on from it.
    write_lines(folder / LINES, records)
    if not records[-1].diverged:  # the last good weights are worth more than the lost ones
        checkpoint.save(folder, run, records[-1])


def _value(value: float | None) -> str:
    return f"{math.nan if value is None else value:.6g}"
