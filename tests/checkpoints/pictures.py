"""Pictures made in code, the same for the official implementation and for the tests."""

from __future__ import annotations

import numpy as np


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Gradients, a few boxes and a little noise: (height, width, 3) uint8."""
    random = np.random.default_rng([seed, width, height])
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 200 / width, y * 200 / height, (x + y) * 200 / (width + height)], axis=-1)
    for _ in range(4):
        left, top = random.integers(0, width), random.integers(0, height)
        right, bottom = left + 1 + width // 3, top + 1 + height // 3
        base[top:bottom, left:right] = random.integers(0, 256, 3)
    noise = random.integers(-12, 13, base.shape)
    return np.clip(base + noise, 0, 255).astype(np.uint8)


# name -> [(role, [text or (width, height)])]; the tiling area of these checkpoints is 8192 pixels
CASES: dict[str, list[tuple[str, list[str | tuple[int, int]]]]] = {
    "small": [("user", [(40, 50), "What is in this image?"])],
    "tiled": [("user", [(200, 130), "Describe the picture."])],
    "thin": [("user", [(16, 100), "What is this?"])],
    "column": [("user", [(100, 300), "What is this?"])],
    "wide": [("user", [(130, 24), "What is this?"])],
    "tiny": [("user", [(5, 7), "And this?"])],
    # a larger area that rounds to the limit, and a smaller one that rounds above it
    "below": [("user", [(140, 70), "How large is it?"])],
    "above": [("user", [(146, 50), "How large is it?"])],
    "square": [("user", [(150, 150), "What shape is this?"])],
    "interleaved": [("user", ["Compare", (40, 50), "with", (90, 60), "and tell me what changed."])],
    "turns": [
        ("system", ["You are helpful."]),
        ("user", [(64, 40), "What is it?"]),
        ("assistant", ["A red cat."]),
        ("user", ["Where is the cat?"]),
    ],
    "text": [("user", ["How many cats are there? \N{SNOWMAN}"])],
}
SOME_CASES = ("small", "tiled", "text")
# what the assistant is trained to answer; rows of different length, with and without images
TRAINED = {
    "small": "A red cat, and the dog sleeps under the table.",
    "tiled": "There are two red squares and one blue circle.",
    "interleaved": "Nothing.",
    "turns": "Under the large yellow star.",
    "text": "Ten.",
}


def messages(case: str) -> list[dict[str, object]]:
    """The case in the transformers form, images as arrays."""
    conversation: list[dict[str, object]] = []
    seed = 0
    for role, parts in CASES[case]:
        content: list[dict[str, object]] = []
        for part in parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                content.append({"type": "image", "image": picture(*part, seed=seed)})
                seed += 1
        conversation.append({"role": role, "content": content})
    return conversation
