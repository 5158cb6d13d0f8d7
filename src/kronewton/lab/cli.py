"""The command line: kronewton verify, train, compare, explain, bench and demo.

A command's signature is its interface, one argument per option, however many they are.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch

import kronewton as kn
from kronewton.errors import DataError, KronewtonError, OptionError

try:
    import typer

    from kronewton.lab import (
        arrivals,
        behaviours,
        bench,
        contest,
        dial,
        display,
        ladder,
        plots,
        reports,
        session,
        suite,
        verify,
    )
    from kronewton.lab.entries import Entry, read_entries
    from kronewton.lab.files import write_json
    from kronewton.lab.journal import Journal, open_journal
    from kronewton.lab.rivals import RIVALS, Rival, Setting, available, describe, find_rival
    from kronewton.lab.tasks import MNIST, TASKS, Options, Task, find_task
    from kronewton.lab.training import Budget, Run, start
except ModuleNotFoundError as missing:
    raise SystemExit(
        f"The command line needs the package {missing.name}, which is not installed; "
        "pip install 'kronewton[lab]' brings all that it needs."
    ) from None

INTERRUPTED = 130
EVALUATIONS = 100  # how often a run is evaluated over its length
UNLIMITED = 10**9
DEMO_RIVALS = ("kfac", "sgd", "adamw", "soap")
DEMO_GRID = 6

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(help="Measure costs.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

TaskName = Annotated[str, typer.Argument(metavar="TASK", help=f"{', '.join([*TASKS, *MNIST])}.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 and the like.")]
Seed = Annotated[int, typer.Option(min=0, help="Draws initial weights and the order of batches.")]
Json = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write results here.")]
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for pictures and files.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Steps of a run; the task has a default.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Examples a step; the task has a default.")]
Data = Annotated[Path | None, typer.Option(metavar="PATH", help="MNIST: an .npz or the IDX file.")]
Small = Annotated[bool, typer.Option("--small", help="mnist-autoencoder through 784-256-256-64.")]
Examples = Annotated[int | None, typer.Option(min=1, help="Training images of mnist-autoencoder.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many seeds, from --seed upwards.")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; what a user can mend ends as one sentence and exit code 2."""
    try:
        app(args=None if arguments is None else list(arguments), prog_name="kronewton")
    except KronewtonError as error:
        print(f"kronewton: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@app.callback()
def options_of_all(
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads; default: torch's.")
    ] = None,
) -> None:
    """K-FAC as a Newton step: check the mathematics, train, compare."""
    if threads is not None:
        torch.set_num_threads(threads)


@app.command("verify")
def verify_command(
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
    ladder_too: Annotated[
        bool, typer.Option("--ladder", help="Also the distances of a small convolutional net.")
    ] = False,
) -> None:
    """Walk the note and check each identity; exit 1 if a residual is above its bound."""
    _check_files(None, json)
    results = verify.run(seed, _device(device))
    display.output().print(verify.table(results))
    if ladder_too:
        print(f"The ladder of a convolutional net\n\n{verify.example(seed, _device(device))}")
    _write(json, results)
    if not all(result.passed for result in results):
        raise typer.Exit(1)


@app.command("train")
def train_command(
    task: TaskName,
    optimizer: Annotated[str, typer.Option(help=f"{', '.join(RIVALS)}.")] = "kfac",
    lr: Annotated[float | None, typer.Option(help="Learning rate; K-FAC finds its own.")] = None,
    steps: Steps = None,
    batch_size: Batch = None,
    data: Data = None,
    small: Small = False,
    examples: Examples = None,
    out: Out = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --out's checkpoint, if there is one.")
    ] = False,
    save_every: Annotated[
        float, typer.Option(min=0, help="Seconds between checkpoints; 0: after each step.")
    ] = session.SAVE_EVERY,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Train a task with one optimizer; --out keeps a picture, a line per step, a checkpoint."""
    chosen = find_task(task, Options(batch_size, data, small, examples))
    rival = find_rival(optimizer)
    _check_files(out, json)
    run = start(chosen, rival, _setting(rival, lr), seed, _device(device))
    records = session.resume_(run, out) if resume else []
    if resume and not records:
        print(f"{out} has no checkpoint yet: the run begins.", file=sys.stderr)
    budget = _budget(chosen, steps, None)
    with display.step_bar(rival.label, budget, len(records)) as show:
        outcome = session.train_(run, budget, out, records, show, save_every)
    print(f"{rival.label} on {chosen.described()}")
    display.output().print(session.summary(run, outcome))
    _say_uncovered([run])
    _write(json, {"task": chosen.described(), "unit": chosen.unit, "optimizer": rival.name,
                  "setting": run.setting, "seed": seed, "records": outcome.records})  # fmt: skip
    if outcome.interrupted:
        raise typer.Exit(INTERRUPTED)
    if outcome.records and outcome.records[-1].diverged:
        raise typer.Exit(1)


@app.command("compare")
def compare_command(
    task: TaskName,
    rivals: Annotated[
        str | None,
        typer.Option(
            help="Names with commas, a rival's own steps after a colon: kfac:100,adam:3000. "
            "Default: all."
        ),
    ] = None,
    seeds: Seeds = 3,
    steps: Steps = None,
    seconds: Annotated[
        float | None, typer.Option(help="Length of a run, instead of steps.")
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(help="The dial: K-FAC at each of these settings of refine, as in 0,1,2,4,8."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS|auto",
            help="Training loss to reach; the task has a default. "
            "auto: what K-FAC's best tuned rival ends with, rounded up to two digits.",
        ),
    ] = None,
    grid_budget: Annotated[int, typer.Option(min=1, help="Settings that each may try.")] = 12,
    batch_size: Batch = None,
    data: Data = None,
    small: Small = False,
    examples: Examples = None,
    out: Out = None,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Tune every rival over a grid of the same size, then race them in turn on several seeds."""
    chosen = find_task(task, Options(batch_size, data, small, examples))
    entries = _entries(rivals) if refine is None else _dial(rivals, refine)
    plan = contest.Plan(
        task=chosen,
        rivals=tuple(entry.rival for entry in entries),
        seeds=tuple(range(seed, seed + seeds)),
        budget=_budget(chosen, steps, seconds),
        targets=(_target(chosen, target),),
        grid=grid_budget,
        device=_device(device),
        budgets={e.rival.name: _budget(chosen, e.steps, seconds) for e in entries if e.steps},
    )
    _check_files(out, json)
    _say_uncovered(contest.check(plan))
    _compare(plan, out, json)


@app.command("explain")
def explain_command(
    task: TaskName,
    steps: Annotated[
        int, typer.Option(min=0, help="Steps of K-FAC before the ladder is measured.")
    ] = 0,
    batch_size: Batch = None,
    data: Data = None,
    small: Small = False,
    out: Out = None,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Say which parameter of a task's model K-FAC covers, how, and how far off each layer is."""
    chosen = find_task(task, Options(batch_size, data, small))
    _check_files(out, json)
    run = start(chosen, find_rival("kfac"), {}, seed, _device(device))
    with display.step_bar(run.rival.label, Budget(max(1, steps)), 0) as show:
        problem = ladder.advance(run, steps, show)
    assert isinstance(run.optimizer, kn.KFAC)
    coverage = run.optimizer.coverage()
    print(f"{chosen.described()}\n\n{coverage}\n")
    found = ladder.measure(run, problem, steps)
    print(found)
    document = {"task": chosen.described(), "coverage": coverage, "ladder": found}
    _write(json, document)
    if out is not None:
        _write(out / f"{chosen.name}-ladder.json", document)
        _draw_ladder(chosen, found, out)


@bench_app.command("step-cost")
def step_cost_command(
    tasks: Annotated[list[str] | None, typer.Argument(metavar="[TASK]...")] = None,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of steps to take in turn.")] = 15,
    data: Data = None,
    out: Out = None,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Time K-FAC's step, nothing set, against AdamW's and SGD's.

    The tasks are digits-mlp and digits-autoencoder if none is named, and those of MNIST what they
    are in time-to-target: batches of 1,000.
    """
    _check_files(out, json)
    costs = []
    for task in suite.find_tasks(suite.FULL, tasks or ("digits-mlp", "digits-autoencoder"), data):
        costs += bench.step_cost(task, chunks, seed, _device(device))
    print("K-FAC's step, nothing set, as a multiple of another optimizer's")
    display.output().print(bench.cost_table(costs))
    _write(json, costs)
    if out is not None:
        plots.cost_plot(costs, out / "step-cost.png")
        _write(out / "step-cost.json", costs)


@bench_app.command("time-to-target")
def time_to_target_command(
    tasks: Annotated[list[str] | None, typer.Argument(metavar="[TASK]...")] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full/--quick", help="All tasks and whole grids, hours; or four and small ones."
        ),
    ] = False,
    rivals: Annotated[
        str | None, typer.Option(help="Names with commas, as in compare. Default: the form's own.")
    ] = None,
    seeds: Seeds = 3,
    grid_budget: Annotated[
        int | None, typer.Option(min=1, help="Settings that each may try; the form has a default.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="K-FAC's; a rival has several times as many.")
    ] = None,
    data: Data = None,
    out: Out = None,
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Race K-FAC, nothing set, against tuned rivals to fixed training losses, by the clock.

    Every rival is tuned for each target on the first seed; then all run in turn on every seed, up
    to the last target. With --out, what has been run is kept: the same command goes on from there.
    """
    form = suite.FULL if full else suite.QUICK
    seen = tuple(range(seed, seed + seeds))
    order = suite.Order(seen, _device(device), rivals, grid_budget, steps)
    chosen = suite.find_tasks(form, tasks or (), data)
    _check_files(out, json)
    plans = [suite.plan_of(form, order, task) for task in chosen]
    for plan in plans:
        contest.check(plan)
    if full and not tasks and data is None:
        print(f"Without {' and '.join(MNIST)}: --data PATH adds them.", file=sys.stderr)
    # All are opened before anything runs, so that a folder of another contest is refused at once.
    boards = [
        Journal() if out is None else open_journal(out / f"{plan.task.name}.jsonl", plan)
        for plan in plans
    ]
    results = []
    with session.ctrl_c() as pressed:
        for plan, board in zip(plans, boards, strict=True):
            suite.compete_(plan, board, pressed, f"{plan.task.name}, ")
            if pressed():
                break
            results.append(_arrived(plan, board, out))
        interrupted = pressed()
    _summarise(results, out, json)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


@bench_app.command("behaviours")
def behaviours_command(json: Json = None) -> None:
    """Try what a training loop asks of an optimizer: K-FAC beside AdamW, SGD and SOAP."""
    _check_files(None, json)
    answers = behaviours.behaviours()
    display.output().print(behaviours.behaviour_table(answers))
    for answer in answers:
        if answer.why:
            print(f"{answer.optimizer}, {answer.behaviour}: {answer.why}")
    _write(json, answers)


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the picture.")] = Path(
        "demo"
    ),
    device: Device = "cpu",
    seed: Seed = 0,
    json: Json = None,
) -> None:
    """Check the note, then race K-FAC against tuned rivals on handwritten digits, on one thread."""
    _check_files(out, json)
    # Matrices this small gain nothing from a second thread, and wait for it when it is taken.
    torch.set_num_threads(1)
    results = verify.run(seed, _device(device))
    good = sum(result.passed for result in results)
    print(f"{good} of the note's {len(results)} identities hold within their bounds.")
    task = find_task("digits-mlp")
    names = [name for name in DEMO_RIVALS if name in available()]
    plan = contest.Plan(
        task=task,
        rivals=tuple(find_rival(name) for name in names),
        seeds=(seed, seed + 1, seed + 2),
        budget=_budget(task, None, None),
        targets=(task.target,),
        grid=DEMO_GRID,
        device=_device(device),
    )
    _compare(plan, out, json)
    if good < len(results):
        raise typer.Exit(1)


def _compare(plan: contest.Plan, out: Path | None, json: Path | None) -> None:
    """Tune, race, and report what was run, all of it or up to Ctrl-C."""
    board = Journal()
    with session.ctrl_c() as pressed:
        aimed = suite.compete_(plan, board, pressed)
        interrupted = pressed()
    if aimed.target != plan.target:
        print(f"Target {aimed.target:g}: what the best tuned rival ended with, rounded up.")
    report = reports.summarise(aimed, board.tuned, board.raced, interrupted)
    _report(report, aimed, board.raced, out, json)
    if interrupted:
        raise typer.Exit(INTERRUPTED)


def _arrived(plan: contest.Plan, board: Journal, out: Path | None) -> suite.Result:
    """Report on one task, as soon as it has been run."""
    result = suite.result_of(plan, board)
    display.output().print(arrivals.task_table(plan, result.goals))
    if out is not None:
        picture = out / f"{plan.task.name}.png"
        plots.arrival_plot(plan, board.raced, result.goals, picture)
        print(f"Picture: {picture}\n")
    return result


def _summarise(results: Sequence[suite.Result], out: Path | None, json: Path | None) -> None:
    goals = [goal for result in results for goal in result.goals]
    said = arrivals.verdict(goals)
    document = {"verdict": said, "threads": torch.get_num_threads(), "tasks": results}
    _write(json, document)
    if goals:
        display.output().print(arrivals.summary_table(goals))
        if out is not None:
            _write(out / "time-to-target.json", document)
            table = arrivals.summary_markdown(goals)
            (out / "time-to-target.md").write_text(table, encoding="utf-8")
            plots.ratio_plot(goals, out / "time-to-target.png")
            print(f"Picture: {out / 'time-to-target.png'}")
    print(said)


def _report(
    report: reports.Report,
    plan: contest.Plan,
    raced: contest.Board,
    out: Path | None,
    json: Path | None,
) -> None:
    if not report.lines:
        print("Stopped before the race: there is nothing to compare yet.")
        return
    print(report.task)
    found = dial.notches(plan, report, raced)
    table = dial.dial_table(report, found) if found else reports.contest_tables(report)
    display.output().print(table)
    document = {"report": report, "grids": _grids(plan), "curves": reports.curves(raced)}
    document |= {"dial": found} if found else {}
    _write(json, document)
    if out is not None:
        stem = f"{plan.task.name}-dial" if found else plan.task.name
        picture = out / f"{stem}.png"
        if found:
            plots.dial_plot(plan, raced, found, dial.others(report, found), picture)
        else:
            plots.contest_plot(plan, raced, picture)
        _write(out / f"{stem}.json", document)
        print(f"Picture: {picture}")
    for match in report.matches:
        print(reports.match_said(match))
    print(dial.dial_verdict(report, found) if found else reports.verdict(report))


def _draw_ladder(task: Task, found: ladder.Ladder, out: Path) -> None:
    if found.explanation is not None:
        picture = out / f"{task.name}-ladder.png"
        plots.ladder_plot(task, found, picture)
        print(f"Picture: {picture}")


def _grids(plan: contest.Plan) -> dict[str, list[str]]:
    return {rival.name: [describe(s) for s in plan.settings(rival)] for rival in plan.rivals}


def _budget(task: Task, steps: int | None, seconds: float | None) -> Budget:
    if seconds is None:
        length = steps or task.steps
        return Budget(length, every=max(1, length // EVALUATIONS))
    if not (math.isfinite(seconds) and seconds > 0):
        raise OptionError(f"--seconds must be a positive number, not {seconds:g}.")
    every = max(1, (steps or task.steps) // EVALUATIONS)
    return Budget(steps or UNLIMITED, seconds, every)


def _target(task: Task, target: str | None) -> float:
    if target is None:
        return task.target
    if target == "auto":
        return contest.BY_TUNING
    try:
        number = float(target)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise OptionError(f"--target must be a number or auto, not {target}.")
    return number


def _setting(rival: Rival, lr: float | None) -> Setting:
    """The first setting of the rival's grid, with the user's learning rate if there is one."""
    first = rival.grid[0]
    if lr is None:
        return first
    if not (math.isfinite(lr) and lr >= 0):
        raise OptionError(f"--lr must be a number that is not negative, not {lr:g}.")
    return {**first, "lr": lr}


def _entries(text: str | None) -> tuple[Entry, ...]:
    if text is None:
        left_out = [RIVALS[name].label for name in RIVALS if name not in available()]
        if left_out:
            print(
                f"Without {', '.join(left_out)}: pip install 'kronewton[bench]' adds them.",
                file=sys.stderr,
            )
    return read_entries(text)


def _dial(rivals: str | None, refine: str) -> tuple[Entry, ...]:
    """K-FAC at each setting of the dial, alone unless rivals are named."""
    return dial.with_dial(() if rivals is None else read_entries(rivals), dial.read_dial(refine))


def _say_uncovered(runs: Sequence[Run]) -> None:
    said = next(filter(None, map(session.uncovered, runs)), None)
    if said is not None:
        print(said)


def _device(name: str) -> torch.device:
    """The device of that name. Raises OptionError if it can't hold a tensor."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"--device {name} can't be used ({str(error).splitlines()[0]}); cpu always can."
        ) from error
    return device


def _check_files(out: Path | None, json: Path | None) -> None:
    """Make the folder, and refuse a file without one, before any work is done."""
    session.make_folder(out)
    if json is not None and (json.is_dir() or not json.parent.is_dir()):
        raise DataError(f"--json {json} can't be a file: it must lie in a folder that exists.")


def _write(json: Path | None, value: object) -> None:
    if json is not None:
        write_json(json, value)
