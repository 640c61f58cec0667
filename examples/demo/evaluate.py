"""Asks a model about unseen pictures of the demo world and counts right answers.

python examples/demo/evaluate.py --model demo --count 500
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from world import DETECT, TASKS, Example, make_example, messages_of, unit_box

from mlx_lfm2vl import Question, Sampling, batch_generate, load

MAX_TOKENS = 160
BATCH = 32


def intersection_over_union(a: Sequence[float], b: Sequence[float]) -> float:
    """Of two boxes (x1, y1, x2, y2)."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared
    return shared / union if union > 0 else 0.0


def read_boxes(answer: str) -> list[list[float]]:
    """The boxes of an answer; none where it is not the JSON that was asked for."""
    try:
        boxes = [[float(value) for value in item["bbox"]] for item in json.loads(answer)]
    except (ValueError, TypeError, KeyError):
        return []
    return [box for box in boxes if len(box) == 4]


def true_boxes(example: Example) -> list[list[float]]:
    """Where the things are that a question asks for: drawn places, not the rounded answer."""
    before, after = DETECT.replace("{{", "{").replace("}}", "}").split("{query}")
    query = example.turns[0][0].removeprefix(before).removesuffix(after)
    [scene] = example.scenes
    found = [thing for thing in scene.shapes if query in (thing.kind, thing.name)]
    return [unit_box(thing, scene) for thing in found]


def box_score(answer: str, wanted: Sequence[Sequence[float]]) -> float:
    """Mean overlap of the boxes, each true one with its best; missing and extra ones count 0."""
    found = read_boxes(answer)
    if not wanted:
        return float(answer.strip() == "[]")
    pairs = sorted(
        (
            (intersection_over_union(a, b), i, j)
            for i, a in enumerate(wanted)
            for j, b in enumerate(found)
        ),
        reverse=True,
    )
    total, used_a, used_b = 0.0, set[int](), set[int]()
    for overlap, i, j in pairs:
        if i not in used_a and j not in used_b:
            total += overlap
            used_a.add(i)
            used_b.add(j)
    return total / max(len(wanted), len(found))


def score(example: Example, answer: str) -> float:
    """1 where the answer is exactly right; for boxes their mean overlap."""
    if example.task == "detect":
        return box_score(answer, true_boxes(example))
    return float(answer.strip() == example.turns[0][1])


def ask_all(
    model: Any, processor: Any, examples: Sequence[Example], batch_size: int = BATCH
) -> list[str]:
    """Greedy answers to the first question of each example."""
    requests = [
        Question(
            messages_of(example, example.pictures)[:1],
            max_tokens=MAX_TOKENS,
            sampling=Sampling(temperature=0.0),
        )
        for example in examples
    ]
    answers = batch_generate(model, processor, requests, batch_size=batch_size)
    return [answer.text for answer in answers]


def accuracy(
    model: Any, processor: Any, task: str, count: int, split: str = "test"
) -> tuple[float, list[tuple[Example, str]]]:
    """Mean score over a task's examples, and the wrong ones with their answers."""
    examples = [make_example(split, number, task) for number in range(count)]
    answers = ask_all(model, processor, examples)
    scores = [score(example, answer) for example, answer in zip(examples, answers, strict=True)]
    wrong = [
        pair
        for pair, value in zip(zip(examples, answers, strict=True), scores, strict=True)
        if value < 0.5
    ]
    return sum(scores) / count, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on the demo world's test split.")
    parser.add_argument("--model", default="demo", help="folder or name (default: demo)")
    parser.add_argument("--adapter-path", help="folder of adapters")
    parser.add_argument("--dtype", help="type to compute in")
    parser.add_argument("--count", type=int, default=500, help="pictures per task")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task")
    args = parser.parse_args()
    model, processor = load(args.model, dtype=args.dtype, adapter_path=args.adapter_path)
    for task in args.tasks:
        right, wrong = accuracy(model, processor, task, args.count, args.split)
        print(f"{task:9} {100 * right:5.1f} {'mean IoU' if task == 'detect' else '%'}", flush=True)
        for example, answer in wrong[: args.show]:
            print(f"   {example.turns[0]} -> {answer!r}")


if __name__ == "__main__":
    main()
