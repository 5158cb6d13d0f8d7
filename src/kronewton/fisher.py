"""How the rows b are made: cotangents at the criterion's input, exact, drawn or none."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kronewton.losses import OutputCurvature


class Fisher:
    """How the rows b are made: exact columns, draws, or the training gradients themselves."""

    def __init__(self, mode: str, draws: int, generator: torch.Generator) -> None:
        self.mode, self.draws, self.generator = mode, draws, generator

    @property
    def rides_along(self) -> bool:
        """Whether the user's own backward pass brings the rows."""
        return self.mode == "empirical"

    def _on(self, device: torch.device) -> torch.Generator:
        """The generator of a device: the model may have been moved since the optimizer was made."""
        if self.generator.device != device:
            seed = self.generator.initial_seed()
            self.generator = torch.Generator(device).manual_seed(seed)
        return self.generator

    @property
    def drawn(self) -> tuple[torch.Generator, Tensor]:
        """How far the draws have come."""
        return self.generator, self.generator.get_state()

    def undo(self, drawn: tuple[torch.Generator, Tensor]) -> None:
        """Go on as if nothing had been drawn since."""
        self.generator, state = drawn
        self.generator.set_state(state)

    def resume(self, state: Tensor, device: torch.device) -> None:
        """Go on drawing where a saved generator was; another kind of device's starts anew."""
        generator = self._on(device)
        if state.shape == generator.get_state().shape:
            generator.set_state(state.cpu())

    def cotangents(self, at: OutputCurvature, folded: int = 1) -> Iterator[Tensor]:
        """Cotangents u at the criterion's input with Σ u u' = Λ, or its expectation.

        folded: how many positions of an example stand one after the other in the output's first
        dimension. Each has its own columns: what lies behind them may be shared. 0: the output
        is one example's.
        """
        if self.mode == "exact":
            for column in at.columns():
                if not folded:  # one example
                    yield column
                for t in range(folded):
                    yield self._signed(_every(column, t, folded))
            return
        for _ in range(self.draws):
            draw = at.draw(self._on(at.weights.device))
            yield draw if self.draws == 1 else draw * self.draws**-0.5

    def _signed(self, column: Tensor) -> Tensor:
        """A column with a sign drawn for each example.

        One column serves all examples at once. What they share behind the criterion (a parameter's
        own gradient, a positional table) would add them up: with signs, their products cancel in
        the mean. Rows of one example only are the same with either sign.
        """
        if column.dim() == 0 or len(column) == 1:
            return column
        generator, place = self._on(column.device), column.device
        draw = torch.randint(0, 2, (len(column),), generator=generator, device=place)
        return column * (2 * draw - 1).to(column.dtype).reshape(-1, *[1] * (column.dim() - 1))


def _every(column: Tensor, t: int, folded: int) -> Tensor:
    """The rows t, t + folded, t + 2·folded, … of a column, zero elsewhere."""
    if folded == 1:
        return column
    found = torch.zeros_like(column)
    found[t::folded] = column[t::folded]
    return found
