"""What several test modules use."""

import csv
import json

import mlx.core as mx
import numpy as np
from PIL import Image

from .checkpoints.pictures import messages, picture
from .conftest import FIXTURES

# training data


def user(content) -> dict:
    return {"role": "user", "content": content}


def answer(content="Ten.") -> dict:
    return {"role": "assistant", "content": content}


def save_picture(path, width=40, height=50, seed=0):
    Image.fromarray(picture(width, height, seed)).save(path)
    return path


def save_case(folder, case, reply) -> dict:
    """A sample of a case and what to answer, its images as files with relative paths."""
    conversation = messages(case)
    for number, message in enumerate(conversation):
        for place, item in enumerate(message["content"]):
            if item["type"] == "image":
                name = f"{case}-{number}-{place}.png"
                Image.fromarray(item["image"]).save(folder / name)
                item["image"] = name
    return {"messages": [*conversation, answer([{"type": "text", "text": reply}])]}


def write_lines(path, entries):
    lines = [entry if isinstance(entry, str) else json.dumps(entry) for entry in entries]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def cut(path):
    """Takes away the last pixels; the header stays."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])


# runs of training

SOURCE = FIXTURES / "v5"
FLAGS = (
    *("--model", SOURCE, "--fine-tune-type", "full", "--train-parts", "projector"),
    *("--batch-size", 2, "--iters", 6, "--learning-rate", 1e-3),
    *("--save-every", 2, "--steps-per-report", 1, "--steps-per-eval", 3),
)


def make_data(folder):
    """Nine samples of different length, with images and without, and three for validation."""
    entries = []
    for number in range(12):
        conversation = [user("How many? " * (1 + number % 4)), answer(f"{number} cats.")]
        entry = {"messages": conversation}
        if number % 3:
            save_picture(folder / f"{number}.png", 40 + 30 * (number % 2), 50, number)
            conversation[0]["content"] = [{"type": "image"}, {"type": "text", "text": "What?"}]
            entry["images"] = [f"{number}.png"]
        entries.append(entry)
    write_lines(folder / "train.jsonl", entries[:9])
    write_lines(folder / "valid.jsonl", entries[9:])
    return folder


def log_of(output):
    with (output / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def result_of(output):
    found = [output / name for name in ("adapters.safetensors", "model.safetensors")]
    file = next(path for path in found if path.exists())
    return {name: np.array(array) for name, array in mx.load(str(file)).items()}


def same(first, second):
    return first.keys() == second.keys() and all(
        (first[name] == second[name]).all() for name in first
    )
