"""`kronewton train`, killed at any moment and started again: the training of one that was not."""

from __future__ import annotations

import gc
import json
import linecache
import multiprocessing
import os
import random
import signal
import sys
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

from kronewton.errors import DataError
from kronewton.lab import checkpoint, cli, files, session
from kronewton.lab.rivals import find_rival
from kronewton.lab.tasks import find_task
from kronewton.lab.training import Budget, evaluate, start, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork()")
FILES = {checkpoint.FILE, session.LINES, session.PICTURE}
TASK, SAVED_ALWAYS = "digits-mlp", ("--save-every", "0")


def command(folder: Path, steps: int, *options: str) -> None:
    """In the child: the command line, told to go on with what is there, as a script would."""
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    cli.main(["train", TASK, "--steps", str(steps), "--out", str(folder), "--resume", *options])


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is imported late, and drawn: children would spend their time on it."""
    with pytest.raises(SystemExit):
        cli.main(["train", TASK, "--steps", "2", "--out", str(tmp_path_factory.mktemp("warm"))])


def started(*arguments: object) -> multiprocessing.Process:
    """A process that has imported everything: nearly all of its time is in training and saving."""
    child = multiprocessing.get_context("fork").Process(target=command, args=arguments)
    child.start()
    return child


def step_saved(folder: Path) -> int:
    """Where the checkpoint is; 0 if there is none. It can be read, and the lines go as far."""
    file = folder / checkpoint.FILE
    if not file.exists():
        return 0
    step: int = torch.load(file, weights_only=True)["last"]["step"]
    lines = [json.loads(line) for line in (folder / session.LINES).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) in (step, step + 1)
    return step


def end_of(folder: Path) -> tuple[torch.Tensor, list[object]]:
    """The weights and every loss of a training, bit for bit."""
    model = torch.load(folder / checkpoint.FILE, weights_only=True)["model"]
    lines = [json.loads(line) for line in (folder / session.LINES).read_text().splitlines()]
    losses = [(line["step"], line["loss"], line["train_loss"], line["metric"]) for line in lines]
    return torch.cat([t.flatten() for t in model.values()]), losses


def killed(kills: int, steps: int, tmp_path: Path, seed: int) -> None:
    """Trainings that are killed again and again until they end, as many as it takes."""
    whole, draw = tmp_path / "whole", random.Random(seed)
    began = time.monotonic()
    child = started(whole, steps)
    child.join()
    longest = time.monotonic() - began
    assert child.exitcode == 0
    done, between, saved = 0, 0, 0
    for number in range(1, kills + 1):
        folder, last, over = tmp_path / str(number), 0, False
        folder.mkdir()
        while not over:
            child = started(folder, steps, *SAVED_ALWAYS)
            child.join(draw.uniform(0, longest) if done < kills else None)
            child.kill()
            child.join()
            over = child.exitcode == 0
            assert over or child.exitcode == -signal.SIGKILL
            now = step_saved(folder)
            assert now >= last
            between += bool(set(os.listdir(folder)) - FILES)  # a file was being written
            done, saved, last = done + (not over), saved + (now > 0 and not over), now
        (weights, losses), (wanted, all_losses) = end_of(folder), end_of(whole)
        assert weights.equal(wanted)
        assert losses == all_losses
        assert {file.name for file in folder.iterdir()} == FILES
        if done >= kills:
            break
    print(f"{done} kills in {number} trainings, {between} within a file, {saved} after the first")
    assert saved > 0


def test_a_few_kills_change_nothing(tmp_path: Path) -> None:
    killed(3, 40, tmp_path, seed=1)


@pytest.mark.slow
def test_fifty_kills_change_nothing(tmp_path: Path) -> None:
    killed(50, 200, tmp_path, seed=2)


@pytest.mark.parametrize("at", ["open", "write", "fsync", "replace"])
def test_a_kill_at_any_point_of_writing_leaves_the_old_file_or_the_new(at, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    files.write_json(path, "old")

    class Killed(BaseException):
        """Like SIGKILL, nothing catches it."""

    def die(*_: object) -> None:
        raise Killed

    if at == "write":
        with pytest.raises(Killed):
            files.write_whole(path, lambda file: (file.write(b'"ne'), die()))
    else:
        monkeypatch.setattr(*((Path, "open") if at == "open" else (os, at)), die)
        with pytest.raises(Killed):
            files.write_json(path, "new")
        monkeypatch.undo()
    assert json.loads(path.read_text()) == "old"
    files.sweep(path)
    assert [file.name for file in tmp_path.iterdir()] == ["file.json"]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (done.append("sync"), sync(n)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("name"), replace(*names)))
    files.write_json(tmp_path / "file.json", 1)
    assert done == ["sync", "name", "sync"]  # the last one of the folder


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    run = start(find_task(TASK), find_rival("kfac"), {}, 0, torch.device("cpu"))
    (*_, last) = train(run, Budget(1))
    checkpoint.save(tmp_path, run, last)
    before = (tmp_path / checkpoint.FILE).read_bytes()
    for error in (OSError(28, "No space left on device"), RuntimeError("writing file failed")):

        def full(_: object, file: object, error: Exception = error) -> None:
            file.write(b"some")
            raise error

        monkeypatch.setattr(torch, "save", full)
        with pytest.raises(DataError, match=r"can't be written \((No space|writing)"):
            checkpoint.save(tmp_path, run, last)
        assert (tmp_path / checkpoint.FILE).read_bytes() == before
        assert [file.name for file in tmp_path.iterdir()] == [checkpoint.FILE]


def test_resume_begins_where_nothing_is_saved(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", TASK, "--steps", "2", "--out", str(tmp_path / "new"), "--resume"])
    assert not ended.value.code
    assert "has no checkpoint yet: the run begins." in capsys.readouterr().err
    assert step_saved(tmp_path / "new") == 2


def test_save_every_is_the_time_between_checkpoints(tmp_path, monkeypatch):
    saved: list[int] = []
    own = checkpoint.save
    monkeypatch.setattr(
        checkpoint, "save", lambda *given: (saved.append(given[-1].step), own(*given))
    )
    for every, wanted in (("0", [1, 2, 3, 3]), ("1e9", [1, 3])):
        saved.clear()
        with pytest.raises(SystemExit):
            cli.main(["train", "linear-regression", "--steps", "3", "--out", str(tmp_path),
                      "--save-every", every])  # fmt: skip
        assert saved == wanted


# Long ones.


def resident() -> int:
    """Bytes of memory that the process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def restarted(steps: int, folder: Path) -> None:
    """Train, save, and go on with a new model and optimizer at random steps."""
    task, rival, cpu = find_task("digits-cnn"), find_rival("kfac"), torch.device("cpu")
    run, draw, last = start(task, rival, {}, 0, cpu), random.Random(0), None
    first, highest, done = evaluate(run, run.problem.train)[0], 0.0, 0
    marks: list[tuple[int, int]] = []  # bytes of Python's objects, and of the process
    tracemalloc.start()
    while done < steps:
        done = min(steps, done + draw.randrange(1, 400))
        for record in train(run, Budget(done, every=50), last):
            assert not record.diverged
            highest, last = max(highest, record.train_loss or 0.0), record
        checkpoint.save(folder, run, last)
        run = start(task, rival, {}, 0, cpu)
        assert repr(checkpoint.load_(folder, run)) == repr(last)
        gc.collect()  # an optimizer and its hooks know each other
        linecache.clearcache()  # of sources that a warning quoted
        marks.append((tracemalloc.get_traced_memory()[0], resident()))
    tracemalloc.stop()
    fifth, half = len(marks) // 5, len(marks) // 2  # what is loaded late is loaded by then
    early, late = marks[half - fifth : half], marks[-fifth:]
    grown = [max(m[i] for m in late) - max(m[i] for m in early) for i in (0, 1)]
    print(
        f"{steps} steps, {len(marks)} restarts; training loss {first:.4g} at the start, "
        f"{highest:.4g} at most; Python has {late[-1][0] / 1e6:.2f} MB, {grown[0] / 1e6:+.2f}, "
        f"the process {late[-1][1] / 1e6:.0f} MB, {grown[1] / 1e6:+.1f}"
    )
    assert grown[0] < 1e6
    assert grown[1] < 40e6
    assert highest < first


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for its memory")
def test_twenty_thousand_steps_with_restarts_keep_their_memory_and_their_loss(tmp_path):
    restarted(20_000, tmp_path)
