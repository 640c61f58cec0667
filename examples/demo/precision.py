"""Average precision of a model's boxes on unseen pictures, with its scores and without.

    python examples/demo/precision.py --model demo --count 500

A box is right if it overlaps a thing of its label by half, and no surer box does. Without scores,
boxes come in any order: the mean over some of them.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable
from typing import Any

from evaluate import true_boxes
from world import DETECT, make_example

from mlx_lfm2vl import Box, detect, load

SHUFFLES = 20
Found = list[tuple[float, bool]]  # score, and whether it is right


def query_of(question: str) -> str:
    before, after = DETECT.replace("{{", "{").replace("}}", "}").split("{query}")
    return question.removeprefix(before).removesuffix(after)


def find(model: Any, processor: Any, numbers: Iterable[int]) -> tuple[Found, int]:
    """All boxes of unseen pictures, and how many things there are."""
    found: Found = []
    things = 0
    for number in numbers:
        example = make_example("test", number, "detect")
        [picture], query = example.pictures, query_of(example.turns[0][0])
        width, height = picture.size
        left = [
            Box(query, x1 * width, y1 * height, x2 * width, y2 * height, picture.size)
            for x1, y1, x2, y2 in true_boxes(example)
        ]
        things += len(left)
        boxes = detect(model, processor, picture, [query])
        for box in sorted(boxes, key=lambda box: box.score or 0.0, reverse=True):
            best = max(left, key=box.iou, default=None)
            is_right = best is not None and box.iou(best) >= 0.5
            if is_right:
                left.remove(best)
            found.append((box.score or 0.0, is_right))
    return found, things


def average_precision(found: Found, things: int) -> float:
    """The area below the curve of the best precision at each recall, boxes in this order."""
    right, points = 0, list[tuple[float, float]]()
    for place, (_, is_right) in enumerate(found, 1):
        right += is_right
        points.append((right / things, right / place))
    area, best = 0.0, 0.0
    for (here, precision), (before, _) in zip(
        reversed(points), [*reversed(points[:-1]), (0.0, 0.0)], strict=bool(points)
    ):
        best = max(best, precision)
        area += (here - before) * best
    return area


def both(found: Found, things: int) -> tuple[float, float]:
    """Average precision with scores, and with constant ones."""
    rng, constant = random.Random(0), 0.0
    for _ in range(SHUFFLES):
        constant += average_precision(rng.sample(found, len(found)), things) / SHUFFLES
    return average_precision(sorted(found, reverse=True), things), constant


def main() -> None:
    parser = argparse.ArgumentParser(description="Average precision on the demo world's boxes.")
    parser.add_argument("--model", default="demo", help="folder or name (default: demo)")
    parser.add_argument("--count", type=int, default=500, help="pictures (default: 500)")
    args = parser.parse_args()
    model, processor = load(args.model)
    found, things = find(model, processor, range(args.count))
    scored, constant = both(found, things)
    right = sum(is_right for _, is_right in found)
    print(f"{len(found)} boxes, {right} right, {things} things")
    print(f"AP@0.5 {scored:.3f}, with constant scores {constant:.3f}")


if __name__ == "__main__":
    main()
