"""What several test modules use."""

import json

from PIL import Image

from .checkpoints.pictures import messages, picture

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
