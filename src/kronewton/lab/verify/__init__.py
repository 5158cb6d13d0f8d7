"""The note as a list of checks: each identity in its words, held against autograd in float64.

A check draws random instances of several shapes and yields one residual for each.
"""

from __future__ import annotations

import torch

from kronewton.lab.verify import convolution, dial, kfac, ladder, linear, losses, piecewise
from kronewton.lab.verify.checks import (
    APART,
    EXACT,
    Bound,
    Check,
    Result,
    Source,
    Told,
    distance,
    table,
)
from kronewton.lab.verify.ladder import example

__all__ = [
    "APART",
    "CHECKS",
    "EXACT",
    "Bound",
    "Check",
    "Result",
    "Source",
    "Told",
    "distance",
    "example",
    "run",
    "table",
]

SECTIONS = tuple(
    part.SECTION for part in (linear, piecewise, convolution, losses, kfac, ladder, dial)
)
CHECKS = [check for section in SECTIONS for check in section.checks]


def run(seed: int, device: torch.device) -> list[Result]:
    """Every check, on instances that do not depend on what other checks there are."""
    return [c.run(Source(torch.Generator().manual_seed(seed), device)) for c in CHECKS]
