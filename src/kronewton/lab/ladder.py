"""The ladder of a task's model: each layer's approximations and how far they are from its block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

import kronewton as kn
from kronewton.errors import KronewtonError, OptionError
from kronewton.lab.problems import Problem
from kronewton.lab.training import Budget, Record, Run, batch_of, train

EXAMPLES = 128  # of a full batch, as many as the other tasks have in a step
DRAWS = 4  # where the exact block is too large
RUNGS = {  # field of a layer's distances → what a picture calls it
    "diagonal": "diagonal",
    "expand": "expand (K-FAC)",
    "corrected": "expand, corrected (EKFAC)",
    "reduce": "reduce (K-FAC)",
    "best": "best single B ⊗ A",
}


@dataclass(frozen=True)
class Ladder:
    """Distances at the weights after some steps of K-FAC, or the reason why there are none."""

    steps: int
    explanation: kn.Explanation | None
    remark: str  # what else must be known to read the distances

    def when(self) -> str:
        """At which weights, in words."""
        plural = "" if self.steps == 1 else "s"
        return f"after {self.steps} step{plural} of K-FAC" if self.steps else "at initial weights"

    def __str__(self) -> str:
        if self.explanation is None:
            return self.remark
        told = f"The ladder {self.when()}\n\n{self.explanation}"
        return f"{told}\n{self.remark}" if self.remark else told


def advance(run: Run, steps: int, show: Callable[[Record], None]) -> Problem:
    """Take the run's steps; its problem at these weights, in a copy that K-FAC does not watch.

    Without any steps one is taken all the same, for what curvature takes is known only then, and
    the copy stays at the initial weights.
    """
    problem = run.task.build(run.seed, next(run.problem.model.parameters()).device)
    length = max(1, steps)
    for record in train(run, Budget(length, every=length)):
        show(record)
    if steps:
        problem.model.load_state_dict(run.problem.model.state_dict())
    return problem


def measure(run: Run, problem: Problem, steps: int) -> Ladder:
    """The ladder on the batch that the next step would have, at most EXAMPLES of a full one.

    Of a task that says how many, only so many, and of draws.
    """
    model, criterion, few = problem.model, problem.criterion, run.task.explained
    x, y = batch_of(run, steps)
    if few is not None:
        x, y = x[:few], y[:few]
    elif run.task.batch_size is None:
        x, y = x[:EXAMPLES], y[:EXAMPLES]
    explained = _explained if few is None else _drawn
    try:
        return Ladder(steps, *explained(model, criterion, (x, y)))
    except OptionError as refusal:
        said = f"No ladder: draws were refused too, as {refusal} --batch-size sets the examples."
        return Ladder(steps, None, said)
    except KronewtonError as refusal:
        return Ladder(steps, None, f"No ladder: {refusal}")


def _explained(
    model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[kn.Explanation, str]:
    """Exact, or of a few draws where that is refused."""
    try:
        return kn.explain(model, criterion, batch), ""
    except OptionError:
        return _drawn(model, criterion, batch)


def _drawn(
    model: nn.Module, criterion: nn.Module, batch: tuple[Tensor, Tensor]
) -> tuple[kn.Explanation, str]:
    """Of a few draws, with a remark that says so."""
    told = kn.explain(model, criterion, batch, fisher="sampled", draws=DRAWS)
    return told, (
        "The exact block takes too many outputs, memory or time here, so that distances are to "
        f"the block of {DRAWS} draws an example. So few draws scatter, and what is exact in theory "
        "is not at distance 0."
    )
