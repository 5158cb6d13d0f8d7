"""A text to learn from that comes with Python: the language reference, as help() prints it."""

from __future__ import annotations

from pydoc_data.topics import topics

import torch
from torch import Tensor

# Fixed, so that a model's size does not depend on Python's version; all else is RARE.
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
RARE = len(ALPHABET)
CHARACTERS = RARE + 1
CODES = {character: code for code, character in enumerate(ALPHABET)}


def windows(context: int, train: int, test: int) -> tuple[Tensor, Tensor]:
    """The first and the last so many windows of context + 1 characters, as codes.

    A window's last character is the next one's first: each is predicted once. Topics stand in the
    order of their names. Help repeats some passages under several topics, so that a part of the
    test was met in training. The text is that of the running Python: versions differ a little.
    """
    text = "\n".join(topics[name] for name in sorted(topics))
    codes = torch.tensor([CODES.get(character, RARE) for character in text])
    cut = codes.unfold(0, context + 1, context)  # (windows, context + 1)
    return cut[:train], cut[-test:]
