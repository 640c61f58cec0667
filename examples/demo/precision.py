"""Mean average precision of a model's boxes on unseen pictures, with its scores and without.

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
from world import SHAPES, make_example, queries_of

from mlx_lfm2vl import detect, load

SHUFFLES = 20
Found = list[tuple[float, bool]]  # score, and whether it is right


def find(model: Any, processor: Any, numbers: Iterable[int]) -> dict[str, tuple[Found, int]]:
    """By kind of shape: all boxes of unseen pictures, and how many things there are."""
    found: dict[str, tuple[Found, int]] = {kind: ([], 0) for kind in SHAPES}
    for number in numbers:
        example = make_example("test", number, "detect")
        [picture], [query, *others] = example.pictures, queries_of(example.turns[0][0])
        kind = query.split()[-1]
        if len(others) > 0 or kind not in SHAPES:
            continue
        left = true_boxes(example)
        answers, things = found[kind]
        found[kind] = answers, things + len(left)
        boxes = detect(model, processor, picture, [query])
        for box in sorted(boxes, key=lambda box: box.score or 0.0, reverse=True):
            best = max(left, key=box.iou, default=None)
            is_right = best is not None and box.iou(best) >= 0.5
            if best is not None and is_right:
                left.remove(best)
            answers.append((box.score or 0.0, is_right))
    return {kind: pair for kind, pair in found.items() if pair[1] > 0}


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


def both(found: dict[str, tuple[Found, int]]) -> tuple[float, float]:
    """Mean of the kinds' average precisions with scores, and with constant ones."""
    rng, scored, constant = random.Random(0), [], []
    for answers, things in found.values():
        scored.append(average_precision(sorted(answers, reverse=True), things))
        shuffled = [rng.sample(answers, len(answers)) for _ in range(SHUFFLES)]
        constant += [sum(average_precision(order, things) for order in shuffled) / SHUFFLES]
    return sum(scored) / len(scored), sum(constant) / len(constant)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mean average precision on the world's boxes.")
    parser.add_argument("--model", default="demo", help="folder or name (default: demo)")
    parser.add_argument("--count", type=int, default=500, help="pictures (default: 500)")
    args = parser.parse_args()
    model, processor = load(args.model)
    found = find(model, processor, range(args.count))
    scored, constant = both(found)
    for kind, (answers, things) in found.items():
        right = sum(is_right for _, is_right in answers)
        print(f"{kind:8} {len(answers)} boxes, {right} right, {things} things")
    print(f"mAP@0.5 {scored:.3f}, with constant scores {constant:.3f}")


if __name__ == "__main__":
    main()
