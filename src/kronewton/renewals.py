"""When curvature is renewed: how far apart, more often in the first steps, and in whose turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from kronewton.options import Options

RENEWALS = {  # steps between renewals of factors and of inverses, by what is known of the noise
    "early": (4, 20),  # a second moment is only as good as the basis that it is taken in
    "normalised": (8, 20),
    "early, dear": (50, 50),  # where that takes longer than the steps in between
    "normalised, dear": (50, 50),
    "noise": (10, 40),  # averages have to run over many batches anyway
    "unknown": (5, 20),
    "none": (2, 10),
    "refined": (1, 4),  # no noise, and a step that costs several products deserves fresh factors
}
CALM, CALM_RENEWALS = 0.5, (16, 20)  # below this share of sides whose basis had drifted, measured
ROWS = 256  # of a layer, that are enough of a batch where factors run over many
DECAY, QUIET_DECAY = 0.95, 0.5  # of running factors, where averages make up for noise and not
# Renewals in the first steps: averages of a few batches change fast. By their price.
OFTEN = frozenset(2**k for k in range(32))
SELDOM = frozenset(5**k for k in range(1, 16))


def intervals(known: str, restless: float, options: Options) -> tuple[int, int]:
    """Steps between renewals of the factors and of the inverses.

    known: of the noise, a key of RENEWALS. restless: the share of sides whose basis had drifted.
    """
    automatic = RENEWALS["refined" if known == "none" and options.refine else known]
    if restless < CALM:
        automatic = max(automatic, CALM_RENEWALS)
    given = options.factor_every, options.inverse_every
    factors, inverses = (
        a if isinstance(g, str) else g for a, g in zip(automatic, given, strict=True)
    )
    return factors, inverses


def decay(known: str, options: Options) -> float:
    """The weight of the running factors against one new batch."""
    if not isinstance(options.factor_decay, str):
        return options.factor_decay
    if known.startswith("normalised") and isinstance(options.factor_every, str):
        return DECAY**2  # twice as far apart, and as long a memory
    # Without noise this batch is all there is, and where the weights were is in the way.
    quiet = 0.0 if options.refine else QUIET_DECAY
    return quiet if known == "none" else DECAY


def due(step: int, every: int, early: Collection[int] = OFTEN) -> bool:
    """Every so many steps, and in some that are early."""
    return step % every == 0 or (step < every and step in early)


def turn_of(step: int, every: int) -> int:
    """The place of a renewal among them all, or about that while they follow fast."""
    return step // every if step >= every else step.bit_length() // 2


def due_in_turn(
    step: int, every: int, names: Sequence[str], early: Collection[int] = OFTEN
) -> set[str]:
    """The layers whose inverse is due: all at the start, then each in its own turn."""
    if step < every:
        return set(names) if due(step, every, early) else set()
    # Spread over the steps: all inversions in one step make it many times the median.
    return {n for i, n in enumerate(names) if (step + i * every // len(names)) % every == 0}
