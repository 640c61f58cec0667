"""Which bits each module gets, so that a model of a given size loses least."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MOST_UNITS = 50_000  # steps of the budget; a finer one would change nothing


class Choice(NamedTuple):
    """One way to store a group of modules: its bits (None as it is), its bytes, what it loses."""

    bits: int | None
    nbytes: int
    loss: float


# these are computed as one product, as long as they are stored alike
TOGETHER = re.compile(r"(.*language_model.*[.])(?:([qkv])_proj|(w[13]))")


def group_of(path: str) -> str:
    """The modules of one name get the same bits."""
    match = TOGETHER.fullmatch(path)
    if match is None:
        return path
    return match[1] + ("qkv_proj" if match[3] is None else "w13")


def assign(choices: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice for each group: the least total loss within a budget of bytes.

    A knapsack by dynamic programming; exact if the sizes have a common divisor that leaves the
    budget no more than `MOST_UNITS` steps, and else within so small a step of it.

    Args:
        budget: enough for the smallest choices.
    """
    floors = [min(choice.nbytes for choice in options) for options in choices]
    room = budget - sum(floors)
    # bytes above the smallest choice, so that rounding them up costs little
    extra = [[c.nbytes - floor for c in o] for o, floor in zip(choices, floors, strict=True)]
    room = min(room, sum(map(max, extra)))
    unit = max(math.gcd(*(size for sizes in extra for size in sizes)), -(-room // MOST_UNITS), 1)
    steps = [[-(-size // unit) for size in sizes] for sizes in extra]
    left, taken = room // unit, []
    best = np.zeros(left + 1)
    for options, sizes in zip(choices, steps, strict=True):
        losses = np.full((len(options), left + 1), np.inf)
        for i, size in enumerate(sizes):
            losses[i, size:] = best[: max(left + 1 - size, 0)] + options[i].loss
        taken.append(losses.argmin(axis=0))
        best = losses.min(axis=0)
    found = []
    for options, sizes, chosen in zip(choices[::-1], steps[::-1], taken[::-1], strict=True):
        i = int(chosen[left])
        left -= sizes[i]
        found.append(options[i])
    return found[::-1]
