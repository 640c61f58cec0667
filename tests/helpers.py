"""What several test modules use."""

import csv
import json
import subprocess
import sys
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map_with_path
from PIL import Image

from mlx_lfm2vl import load
from mlx_lfm2vl.checkpoints.adapters import PARTS
from mlx_lfm2vl.models.config import Lfm2Config
from mlx_lfm2vl.models.lfm2 import Lfm2ForCausalLM
from mlx_lfm2vl.training.trainer import TrainingOptions, prepare, write_result

from .checkpoints.pictures import messages, picture

FIXTURES = Path(__file__).parent / "checkpoints"
PUBLISHED = Path(__file__).parents[2] / "shared" / "checkpoints"

# numbers

# float32: sums of at most a few hundred products, done in another order
TOLERANCE = 1e-5


def cases_of(name: str) -> Path:
    """The weights of `mlx` are those of `v5` in another layout, so its cases are the same."""
    return FIXTURES / ("v5" if name == "mlx" else name) / "cases"


def stored(name: str, case: str) -> dict[str, np.ndarray]:
    with np.load(cases_of(name) / f"{case}.npz") as arrays:
        return dict(arrays)


def close(ours: mx.array, official: np.ndarray) -> None:
    ours = np.asarray(ours, np.float32)
    assert ours.shape == official.shape
    error = np.abs(ours - official).max() / np.abs(official).max()
    assert error < TOLERANCE, f"relative error {error:.1e}"


def shapes(arrays: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    return [(int(rows), int(cols)) for rows, cols in arrays.get("spatial_shapes", [])]


def relative(a: mx.array, b: mx.array) -> float:
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


# models

WIDE = FIXTURES / "wide"  # widths of 64 can be quantized
# the small checkpoints are 32, 40 and 48 wide
SMALL = {"group_size": 32, "projector": False}


def load_v5():
    return load(FIXTURES / "v5", dtype="float32")


def tensors(folder) -> dict[str, mx.array]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(mx.load(str(path)))
    return found


def random_language_model(*layer_types: str):
    """A language model whose heads are wide enough to be quantized: 64 values each."""
    mx.random.seed(0)
    model = Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=300,
            hidden_size=256,
            feed_forward_size=128,
            num_hidden_layers=len(layer_types),
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=layer_types,
        )
    )
    mx.eval(model.parameters())
    return model


def random_updates(model, seed=1):
    """Makes the trainable part of adapters count: B begins at zero."""
    mx.random.seed(seed)

    def shake(name, array):
        if name.endswith("lora_b"):
            return 0.1 * mx.random.normal(array.shape)
        return array * mx.random.uniform(0.8, 1.2, array.shape) if name.endswith(".m") else array

    model.update(tree_map_with_path(shake, model.trainable_parameters()))
    mx.eval(model.parameters())


def make_adapters(folder, kind="lora", source=WIDE, train=tuple(PARTS), **options):
    """Writes adapters as training does; returns the model that they were made with."""
    folder.mkdir()
    mx.random.seed(0)
    model, _ = load(source, dtype="float32")
    settings = TrainingOptions(fine_tune_type=kind, train=train, rank=4, scale=2.0, **options)
    config = prepare(model, settings)
    random_updates(model)
    write_result(model, config, folder, source)
    return model


# workers

WAIT = 30  # seconds, for what takes far less


class Gate:
    """Keeps a worker busy until it is opened: a logits processor that waits."""

    def __init__(self):
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, tokens, logits):
        self.entered.set()
        assert self.opened.wait(WAIT)
        return logits


# what is imported

HEAVY = ("transformers", "torch", "mlx_lm", "numpy", "PIL", "jinja2", "huggingface_hub")
HEAVY += ("starlette", "uvicorn", "llguidance", "av", "mss", "tkinter")
# printed after everything else, so that the last line of stdout is the list
REPORT = """
import atexit, json, sys
atexit.register(lambda: print(json.dumps(sorted(m for m in sys.modules if "." not in m))))
"""


def modules_after(code: str, *arguments: str) -> set[str]:
    run = subprocess.run(
        [sys.executable, "-c", REPORT + code, *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(run.stdout.splitlines()[-1]))


def run_module(module: str) -> str:
    return f"import runpy; runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


# published checkpoints

NAMES = [
    "LFM2-VL-450M",
    "LFM2-VL-1.6B",
    "LFM2-VL-3B",
    "LFM2.5-VL-450M",
    "LFM2.5-VL-1.6B",
    "LFM2.5-VL-3B",
]


def inventory(name: str) -> list[list[str]]:
    lines = (PUBLISHED / name / "tensor_inventory.tsv").read_text().splitlines()
    return [line.split("\t") for line in lines[1:]]


def shape(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(","))


# conversations, and what transformers makes of them

CHAT = Path(__file__).parent / "chat"
CONVERSATIONS = json.loads((CHAT / "conversations.json").read_text("utf-8"))
RENDERED = json.loads((CHAT / "rendered.json").read_text("utf-8"))


# settings that nobody should write

VALUES = (
    *(0, -1, 1, 2, 3, 7, 10**6, 10**12, 2**63, 10**400, -0.5, 1e308, 1e-320),
    *("", "no", "gelu", "full_attention", True, False, None),
    *([], [1], [[1]], ["x"], {}, {"a": 1}, {"rope_theta": 0}, {"group_size": 0, "bits": 4}),
)


def places(data, path=()):
    """Every place inside a JSON value."""
    yield path
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(
        data, list) else ()  # fmt: skip
    for key, value in children:
        yield from places(value, (*path, key))


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
