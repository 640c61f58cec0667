"""Asks a model about unseen pictures of the demo world and counts right answers.

    python examples/demo/evaluate.py --model demo --count 500 --sheet worst.png

Answers are scored from 0 to 1: exactly right or not, boxes by their overlap, records by their
fields. `--pen svg` or `--pen matplotlib` asks about pictures that are drawn by other means.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw
from world import DETECT, TASKS, Example, make_example, messages_of, queries_of, unit_box

from mlx_lfm2vl import Box, GenerationResponse, Question, Sampling, batch_generate, load
from mlx_lfm2vl.generation.grounding import parse_boxes

MAX_TOKENS = 200
BATCH = 32
CELL, WORST = 240, 24  # pixels of a picture on the contact sheet, and how many


@dataclass(frozen=True)
class Result:
    """An example, what a model answered, and how good that is, from 0 to 1."""

    example: Example
    answer: str
    score: float


# ---- scores


def true_boxes(example: Example) -> list[Box]:
    """Where the things are that a question asks for: drawn places, not the rounded answer."""
    [scene], [picture] = example.scenes, example.pictures
    width, height = picture.size
    found = []
    for query in queries_of(example.turns[0][0]):
        for thing in scene.things:
            if thing.is_a(query):
                x1, y1, x2, y2 = unit_box(thing, scene)
                found.append(
                    Box(query, x1 * width, y1 * height, x2 * width, y2 * height, picture.size)
                )
    return found


def box_score(found: Sequence[Box], wanted: Sequence[Box]) -> float:
    """Mean overlap of the boxes, each true one with its best; missing and extra ones count 0."""
    if len(wanted) == 0:
        return float(len(found) == 0)
    pairs = sorted(
        (
            (a.iou(b), i, j)
            for i, a in enumerate(wanted)
            for j, b in enumerate(found)
            if a.label == b.label
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


def record_score(answer: str, wanted: str) -> float:
    """The share of a record's fields that are right; shapes are compared from left to right."""
    right = list(_fields(json.loads(wanted)))
    try:
        found = list(_fields(json.loads(answer)))
    except (ValueError, TypeError, AttributeError, KeyError):
        return 0.0
    return sum(a == b for a, b in zip(right, found, strict=False)) / max(len(right), len(found))


def _fields(record: dict[str, Any]) -> list[tuple[int, str, Any]]:
    shapes = enumerate(record["shapes"], 1)
    fields = [(number, key, value) for number, shape in shapes for key, value in shape.items()]
    return [(0, "text", record["text"]), *fields]


def score(example: Example, answer: str) -> float:
    """How good the answer to an example's first question is, from 0 to 1."""
    [_, wanted], *_ = example.turns
    if example.task == "detect":
        return box_score(parse_boxes(answer, example.pictures[0].size), true_boxes(example))
    if example.task == "record":
        return record_score(answer, wanted)
    if example.task == "call":
        return float(answer == _told(example))
    return float(answer.strip() == wanted)


def _told(example: Example) -> str:
    """A call and what is said of its result, as one text."""
    (_, (name, arguments)), (_, said) = example.turns
    return f"{name} {json.dumps(arguments)} {said}"


# ---- answers


def ask(example: Example, turns: int = 1) -> Question:
    """The question of a turn, those before it answered as they should be."""
    messages = messages_of(example, example.pictures)[: 2 * turns - 1]
    sampling, tools = Sampling(temperature=0.0), [*example.tools] or None
    return Question(messages, max_tokens=MAX_TOKENS, sampling=sampling, tools=tools)


def ask_all(
    model: Any, processor: Any, examples: Sequence[Example], batch_size: int = BATCH
) -> list[str]:
    """Greedy answers to the first question of each example; with tools, to the result as well."""
    first = batch_generate(model, processor, [ask(e) for e in examples], batch_size=batch_size)
    texts = [answer.text for answer in first]
    calls = [i for i, example in enumerate(examples) if len(example.tools) > 0]
    seconds = [ask(examples[i], turns=2) for i in calls]
    if len(seconds) > 0:
        said = batch_generate(model, processor, seconds, batch_size=batch_size)
        for i, answer in zip(calls, said, strict=True):
            texts[i] = f"{_call(first[i])} {answer.text}"
    return texts


def _call(answer: GenerationResponse) -> str:
    calls = answer.tool_calls or []
    return "; ".join(f"{call.name} {json.dumps(call.arguments)}" for call in calls)


def evaluate(
    model: Any, processor: Any, task: str, count: int, split: str = "test", pen: str = "pillow"
) -> list[Result]:
    """What a model answers to a task's first examples of a split."""
    results = []
    for start in range(0, count, 10 * BATCH):  # pictures of so many lie in memory at once
        numbers = range(start, min(start + 10 * BATCH, count))
        examples = [make_example(split, number, task, pen=pen) for number in numbers]
        answers = ask_all(model, processor, examples)
        results += [Result(e, a, score(e, a)) for e, a in zip(examples, answers, strict=True)]
    return results


def mean(results: Sequence[Result]) -> float:
    """The mean score."""
    return sum(result.score for result in results) / len(results)


# ---- the contact sheet


def contact_sheet(results: Sequence[Result]) -> Image.Image:
    """The worst answers below their pictures; boxes are drawn white as wanted, black as found."""
    worst = sorted(results, key=lambda result: result.score)[:WORST]
    columns, tall = 6, CELL + 60
    sheet = Image.new("RGB", (columns * CELL, -(-len(worst) // columns) * tall), "white")
    for number, result in enumerate(worst):
        left, top = number % columns * CELL, number // columns * tall
        sheet.paste(_cell(result), (left, top))
        question, wanted = result.example.turns[0]
        is_long = DETECT.startswith(question[:10])
        question = ", ".join(queries_of(question)) if is_long else question
        told = "" if is_long else f"{result.answer}\nright: {wanted}"
        text = f"{result.score:.2f} {question}\n{told}"
        lines = [line[i : i + 40] for line in text.split("\n") for i in range(0, len(line), 40)]
        ImageDraw.Draw(sheet).text((left + 4, top + CELL), "\n".join(lines[:4]), fill="black")
    return sheet


def _cell(result: Result) -> Image.Image:
    pictures = [picture.copy() for picture in result.example.pictures]
    if result.example.task == "detect":
        brush, size = ImageDraw.Draw(pictures[0]), pictures[0].size
        for color, boxes in (
            ("white", true_boxes(result.example)),
            ("black", parse_boxes(result.answer, size)),
        ):
            for box in boxes:
                brush.rectangle(box.xyxy, outline=color)
    cell = Image.new("RGB", (CELL, CELL), "gray")
    part = CELL // len(pictures)
    for number, picture in enumerate(pictures):
        picture.thumbnail((part - 4, CELL - 4))
        cell.paste(picture, (number * part + 2, 2))
    return cell


def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy on the demo world's test split.")
    parser.add_argument("--model", default="demo", help="folder or name (default: demo)")
    parser.add_argument("--adapter-path", help="folder of adapters")
    parser.add_argument("--dtype", help="type to compute in")
    parser.add_argument("--count", type=int, default=500, help="pictures per task (default: 500)")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS)
    parser.add_argument("--split", default="test")
    parser.add_argument("--pen", default="pillow", choices=("pillow", "svg", "matplotlib"))
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per task")
    parser.add_argument("--sheet", help="draw the worst answers into this file")
    args = parser.parse_args()
    model, processor = load(args.model, dtype=args.dtype, adapter_path=args.adapter_path)
    seen: list[Result] = []
    for task in args.tasks:
        results = evaluate(model, processor, task, args.count, args.split, args.pen)
        unit = {"detect": "mean IoU", "record": "% of fields"}.get(task, "%")
        print(f"{task:9} {100 * mean(results):5.1f} {unit}", flush=True)
        wrong = [result for result in results if result.score < 0.5]
        for result in wrong[: args.show]:
            print(f"   {result.example.turns[0]} -> {result.answer!r}")
        seen += results
    if args.sheet is not None:
        contact_sheet(seen).save(args.sheet)


if __name__ == "__main__":
    main()
