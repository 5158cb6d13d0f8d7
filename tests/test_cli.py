"""The command line, run as a user would."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch

from kronewton.lab import cli, contest, display, ladder, session, verify
from kronewton.lab.checkpoint import FILE
from kronewton.lab.tasks import find_task

torch.set_num_threads(1)  # the models are tiny, and tests run side by side


def run(*arguments: object) -> int:
    """The exit code of the command line with these arguments."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    code = ended.value.code
    return code if isinstance(code, int) else 0


def weights(folder: Path) -> torch.Tensor:
    model = torch.load(folder / FILE, weights_only=True)["model"]
    return torch.cat([tensor.flatten() for tensor in model.values()])


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A file like MNIST's, of noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "mnist.npz", images=pixels, labels=np.zeros(30, np.uint8))
    return tmp_path / "mnist.npz"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "verify",
        "train",
        "compare",
        "explain",
        "demo",
        "bench",
        "bench step-cost",
        "bench time-to-target",
    ],
)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*command.split(), "--help") == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("optimizer", ["kfac", "adamw"])
def test_train_leaves_files_and_a_summary(
    optimizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, file = tmp_path / "run", tmp_path / "result.json"
    options = ["--optimizer", optimizer, "--steps", 12, "--out", out, "--json", file]
    assert run("train", "digits-mlp", *options) == 0
    printed = capsys.readouterr().out
    assert "12 (done)" in printed
    assert "accuracy" in printed
    assert {f.name for f in out.iterdir()} == {FILE, session.LINES, session.PICTURE}
    lines = [json.loads(line) for line in (out / session.LINES).read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert ("damping" in lines[-1]["settings"]) == (optimizer == "kfac")
    assert json.loads(file.read_text())["records"] == lines


@pytest.mark.parametrize("optimizer", ["kfac", "sgd", "adamw"])
def test_resume_continues_exactly(optimizer: str, tmp_path: Path) -> None:
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    common = ["train", "digits-mlp", "--optimizer", optimizer, "--steps"]
    assert run(*common, 7, "--out", parts) == 0
    assert run(*common, 15, "--out", parts, "--resume") == 0
    assert run(*common, 15, "--out", whole) == 0
    assert torch.equal(weights(parts), weights(whole))
    lines = (parts / session.LINES).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 16))


def test_resume_of_a_finished_run_does_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["train", "digits-mlp", "--optimizer", "sgd", "--steps", 5, "--out", tmp_path]
    assert run(*common) == run(*common, "--resume") == 0
    assert capsys.readouterr().out.count("5 (done)") == 2


def test_train_mnist_autoencoder(mnist: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", mnist, "--small", "--examples", 20, "--batch-size", 10, "--steps", 2]
    assert run("train", "mnist-autoencoder", *options) == 0
    assert "squared error per image" in capsys.readouterr().out


def test_diverged_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optimizer", "sgd", "--lr", 1e30, "--steps", 20]
    assert run("train", "digits-mlp", *options) == 1
    assert "(diverged)" in capsys.readouterr().out


def test_compare_prints_tables_and_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rivals", "kfac,sgd", "--seeds", 2, "--steps", 20, "--grid-budget", 2]
    assert run("compare", "digits-mlp", *options, "--target", 0.5, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "to a training loss of 0.5" in printed
    assert "On digits-mlp, K-FAC" in printed
    assert {f.name for f in tmp_path.iterdir()} == {"digits-mlp.png", "digits-mlp.json"}
    report = json.loads((tmp_path / "digits-mlp.json").read_text())
    assert len(report["grids"]["sgd"]) == 2
    assert len(report["curves"]) == 4


def test_compare_rivals_of_different_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--rivals", "kfac:10,adam:120", "--seeds", 1, "--grid-budget", 2]
    assert run("compare", "digits-mlp", *options, "--target", "auto", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert re.match(r"Target 0\.\d+: what the best tuned rival ended with", printed)
    assert "at the end of 10 to 120 steps" in printed
    assert "the training loss at which Adam ends" in printed
    document = json.loads((tmp_path / "digits-mlp.json").read_text())
    ends = {curve["rival"]: curve["records"][-1]["step"] for curve in document["curves"]}
    assert ends == {"kfac": 10, "adam": 120}
    (adam,) = [line for line in document["report"]["lines"] if line["rival"] == "adam"]
    assert adam["reached"] == 1  # the target is what it ended with
    assert adam["final"]["median"] <= document["report"]["target"]


@pytest.mark.parametrize(
    ("after", "said"), [(5, "nothing to compare yet"), (60, "what was run before Ctrl-C")]
)
def test_ctrl_c_ends_a_comparison_with_what_was_run(
    after: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = count()

    def press_later(bar: display.Bar, lane: contest.Lane) -> None:
        if next(turns) == after:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(display.Bar, "step", press_later)
    options = ["--rivals", "adamw,sgd", "--seeds", 2, "--steps", 10, "--grid-budget", 2]
    assert run("compare", "two-spirals", *options) == 130
    assert said in capsys.readouterr().out


def test_compare_by_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rivals", "adamw,sgd", "--seeds", 1, "--seconds", 0.03, "--grid-budget", 1]
    assert run("compare", "linear-regression", *options) == 0
    assert "at the end of 0.03 s" in capsys.readouterr().out


def test_threads_are_set_and_said(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--rivals", "sgd", "--seeds", 1, "--steps", 5, "--grid-budget", 1]
    try:
        assert run("--threads", 2, "compare", "linear-regression", *options) == 0
    finally:
        torch.set_num_threads(1)
    assert "2 threads" in " ".join(capsys.readouterr().out.split())


def test_explain_lists_every_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "digits-mlp", "--batch-size", 16) == 0
    printed = capsys.readouterr().out
    assert all(f"{layer}.{kind}" in printed for layer in "024" for kind in ("weight", "bias"))


@pytest.mark.parametrize("task", ["digits-vit", "digits-unet", "char-lstm", "char-gpt"])
def test_explain_lists_the_networks_of_today(
    task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "measure", lambda *given: ladder.Ladder(0, None, "No ladder here."))
    assert run("explain", task, "--batch-size", 4) == 0
    printed = capsys.readouterr().out
    model = find_task(task).build(0, torch.device("cpu")).model
    assert all(f"{name} " in printed for name, _ in model.named_parameters())


def test_explain_draws_the_ladder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, file = tmp_path / "out", tmp_path / "explain.json"
    options = ["--steps", 2, "--batch-size", 50, "--out", out, "--json", file]
    assert run("explain", "two-spirals", *options) == 0
    printed = capsys.readouterr().out
    assert "batch 50" in printed
    assert printed.index("are covered by curvature") < printed.index("after 2 steps of K-FAC")
    assert "50 examples" in printed
    assert printed.endswith(f"Picture: {out / 'two-spirals-ladder.png'}\n")
    assert {f.name for f in out.iterdir()} == {"two-spirals-ladder.png", "two-spirals-ladder.json"}
    document = json.loads(file.read_text())
    assert document == json.loads((out / "two-spirals-ladder.json").read_text())
    assert document["ladder"]["steps"] == 2
    assert [row["layer"] for row in document["ladder"]["explanation"]["rows"]] == ["0", "2", "4"]


def test_explain_without_a_ladder_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = ladder.Ladder(0, None, "No ladder: that is so.")
    monkeypatch.setattr(ladder, "measure", lambda *given: refused)
    assert run("explain", "linear-regression", "--out", tmp_path) == 0
    assert capsys.readouterr().out.endswith("No ladder: that is so.\n")
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["ladder"]["explanation"] is None


def test_bench_step_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--chunks", 2, "--out", tmp_path]
    assert run("bench", "step-cost", "linear-regression", *options) == 0
    assert "AdamW" in capsys.readouterr().out
    assert (tmp_path / "step-cost.png").is_file()
    costs = json.loads((tmp_path / "step-cost.json").read_text())
    assert [cost["base"] for cost in costs] == ["adamw", "sgd"]
    assert all(cost["ratio"] > 0 for cost in costs)


HOLDS = verify.Result("1", "an identity", 1e-15, "≤ 1e-12", instances=1, passed=True)
BROKEN = replace(HOLDS, residual=1.0, passed=False)


@pytest.mark.parametrize(("results", "code"), [([HOLDS, HOLDS], 0), ([HOLDS, BROKEN], 1)])
def test_demo_ends_with_a_table_a_picture_and_a_sentence(
    results: list[verify.Result],
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(verify, "run", lambda seed, device: results)
    monkeypatch.setattr(cli, "DEMO_GRID", 1)
    monkeypatch.setattr(cli, "find_task", lambda name: replace(find_task(name), steps=20))
    assert run("demo", "--out", tmp_path) == code
    printed = capsys.readouterr().out
    assert f"{2 - code} of the note's 2 identities hold" in printed
    assert f"Picture: {tmp_path / 'digits-mlp.png'}" in printed
    assert printed.splitlines()[-1].startswith("On digits-mlp, K-FAC")


def test_verify_fails_with_a_residual_above_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "run", lambda seed, device: [HOLDS, BROKEN])
    assert run("verify") == 1


def test_verify_prints_residuals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("verify", "--json", tmp_path / "verify.json") == 0
    assert capsys.readouterr().out
    assert json.loads((tmp_path / "verify.json").read_text())


def test_verify_prints_the_ladder_of_a_small_net(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "run", lambda seed, device: [HOLDS])
    assert run("verify") == 0
    assert "convolution" not in capsys.readouterr().out
    assert run("verify", "--ladder") == 0
    printed = capsys.readouterr().out
    assert "The ladder of a convolutional net" in printed
    assert len(re.findall(r"^\d +(?:convolution|linear) ", printed, re.MULTILINE)) == 3


BAD = {
    "unknown task": ("train mnist", "no task 'mnist'; the tasks are digits-mlp"),
    "unknown optimizer": ("train digits-mlp --optimizer newton", "no optimizer 'newton'"),
    "unknown rival": ("compare digits-mlp --rivals kfac,newton", "no optimizer 'newton'"),
    "no rival": ("compare digits-mlp --rivals ,", "no optimizer ''"),
    "unknown device": ("train digits-mlp --device abacus", "--device abacus can't be used"),
    "no data": ("train mnist-autoencoder", "needs --data PATH and none was given"),
    "missing data": ("train mnist-autoencoder --data nowhere.npz", "nowhere.npz does not exist"),
    "wrong data": (f"train mnist-autoencoder --data {__file__}", "could not be read"),
    "data of no use": ("train digits-mlp --small", "digits-mlp takes no --data"),
    "large batch": ("train digits-mlp --batch-size 9999", "batch of 9999"),
    "negative rate": ("train digits-mlp --optimizer sgd --lr -1", "--lr must be a number"),
    "rate of nan": ("train digits-mlp --lr nan", "--lr must be a number"),
    "no time": ("compare digits-mlp --seconds 0", "--seconds must be a positive number"),
    "no dial": ("compare digits-mlp --refine 0,-1", "--refine must be whole numbers"),
    "no length": ("compare digits-mlp --rivals sgd:long", "'sgd:long'; after the colon"),
    "target of words": ("compare digits-mlp --target low", "must be a number or auto, not low"),
    "no target": ("compare digits-mlp --rivals kfac --target auto", "none is tuned here"),
    "target of nan": ("compare digits-mlp --target nan", "--target must be a number"),
    "resume nothing": ("train digits-mlp --resume", "--resume needs --out DIR"),
    "json nowhere": ("train digits-mlp --json no/where.json", "--json no/where.json can't be"),
    "out is a file": (f"train digits-mlp --out {__file__}", "can't be a folder"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_ends_in_one_sentence(
    what: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments, said = BAD[what]
    assert run(*arguments.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert error.rstrip().endswith(".")


def test_explain_refuses_a_negative_number_of_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("explain", "digits-mlp", "--steps", -1) == 2
    assert "--steps" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--steps -5", "--steps many", "--batch-size 0", "--seed -1"])
def test_option_out_of_range_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("train", "digits-mlp", *option.split()) == 2
    error = capsys.readouterr().err
    assert option.split()[0] in error
    assert "Traceback" not in error


def test_wrong_checkpoints_end_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--optimizer", "sgd", "--steps", 3, "--out", tmp_path]
    assert run("train", "digits-mlp", *common) == 0
    again = ["train", "digits-mlp", *common, "--resume"]
    for arguments, said in (
        (["train", "two-spirals", *common, "--resume"], "task 'digits-mlp' where"),
        ([*again, "--optimizer", "adamw"], "optimizer 'sgd' where"),
        ([*again, "--lr", 0.5], "settings {'lr': 0.1"),
    ):
        capsys.readouterr()
        assert run(*arguments) == 2
        assert said in capsys.readouterr().err
    (tmp_path / session.LINES).write_text("{}\n")
    assert run(*again) == 2
    assert "missing or damaged" in capsys.readouterr().err
    (tmp_path / FILE).write_bytes(b"PK not a checkpoint")
    assert run(*again) == 2
    assert "damaged or is no checkpoint" in capsys.readouterr().err


def command(*arguments: object) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    code = "from kronewton.lab.cli import main; main()"
    line = [sys.executable, "-c", code, *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, stdout=pipe, stderr=pipe, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_ctrl_c_ends_with_the_summary_and_a_checkpoint(tmp_path: Path) -> None:
    common = ["train", "digits-mlp", "--optimizer", "sgd", "--out", tmp_path, "--steps"]
    process = command(*common, 10**6)
    while process.poll() is None and not (tmp_path / FILE).exists():
        time.sleep(0.1)  # its first checkpoint tells that it is among the steps
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert "(interrupted)" in printed
    assert "Traceback" not in error
    done = len((tmp_path / session.LINES).read_text().splitlines())
    assert run(*common, done + 2, "--resume") == 0


def test_missing_lab_packages_are_named() -> None:
    code = "import sys; sys.modules['typer'] = None; import kronewton.lab.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "needs the package typer" in done.stderr
    assert "Traceback" not in done.stderr
