"""What the official implementation computes with the demo model: `reference.json`.

This file imports no MLX, so that the script that makes the stored values can use it, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np

FILE = Path(__file__).with_name("reference.json")
SAMPLES = 64  # values that are stored of an array; whatever is wrong in a model spreads over all


class Case(NamedTuple):
    """A question about a drawn picture, `side` pixels wide and high."""

    side: int
    question: str


# one view, and four tiles with a thumbnail, which is resized
CASES = (Case(128, "What is in this image?"), Case(256, "Where is the red circle?"))


def draw(side: int) -> np.ndarray[Any, Any]:
    """A blue square and a red circle, (side, side, 3) uint8, in whole numbers only."""
    import numpy as np

    rows, columns = np.mgrid[:side, :side]
    unit = side // 16
    square = (abs(rows - 5 * unit) <= 2 * unit) & (abs(columns - 4 * unit) <= 2 * unit)
    circle = (rows - 11 * unit) ** 2 + (columns - 12 * unit) ** 2 <= (2 * unit) ** 2
    picture = np.full((side, side, 3), 236, np.uint8)
    picture[square], picture[circle] = (45, 85, 220), (215, 40, 40)
    return picture


def sampled(array: np.ndarray[Any, Any]) -> list[float]:
    """Evenly spaced values."""
    import numpy as np

    flat = np.asarray(array).reshape(-1)
    places = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return [float(value) for value in flat[places]]


def stored() -> dict[str, Any]:
    """`weights`, the digest of their file, and of each of the `cases`: `token_ids` of the prompt,
    samples of its image `features` and of the `logits` after it, and the `answer`'s tokens."""
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found
