"""This package side by side with mlx-vlm and transformers: ratios, stage by stage.

    python benchmarks/compare.py --model FOLDER --mlx-vlm-python OTHER_ENV/bin/python

Each rival runs in its own environment and process (`rivals.py`), with the same checkpoint, images
and prompts; in each round all of them take their turn, and medians count. Prompts must have the
same ids, first tokens the same logits and answers the same tokens, or the comparison ends.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlx_lfm2vl.checkpoints.settings import load_image_processor_config
from mlx_lfm2vl.measuring.machine import this_machine
from mlx_lfm2vl.measuring.stages import made_picture
from mlx_lfm2vl.models.config import load_config
from mlx_lfm2vl.prompts.tokenizer import Lfm2Tokenizer

HERE = Path(__file__).parent
OURS, PEER, OFFICIAL = "mlx_lfm2vl", "mlx-vlm", "transformers"
QUESTIONS = ["What is in this image?", "What colours do you see?"]
TILE = 512  # pixels; image sizes below are for tiles of this size, and scale with a model's own
SMALL, LARGE = (420, 300), (1400, 900)
FIVE_VIEWS, TEN_VIEWS = (1024, 1024), (1536, 1536)
PHOTO = (4000, 3000)  # 12 megapixels, whatever the tiles
PREFILL_POSITIONS = 1300
DECODE_POSITIONS = (270, 2600)
TEXT = "The lighthouse keeper climbed the stairs, lit the lamp, and wrote down wind and clouds. "
# largest difference of first-token logits, relative to the largest logit. torchvision resizes
# images within one grey level of Pillow, which the vision tower makes larger
TOLERANCE = {PEER: 1e-3, OFFICIAL: 1e-3}
IMAGE_TOLERANCE = {PEER: 1e-3, OFFICIAL: 1e-1}
CODE = {
    OURS: "from mlx_lfm2vl import load, generate",
    PEER: "from mlx_vlm import load, generate",
    OFFICIAL: "from transformers import AutoProcessor, Lfm2VlForConditionalGeneration",
}


@dataclass
class Row:
    """One measured quantity.

    Attributes:
        unit: of the values: "s" or "bytes"; "" for a share.
        goal: what this package's median divided by mlx-vlm's may be at most.
        values: each counted round, by rival.
    """

    stage: str
    name: str
    unit: str
    goal: float | None = None
    values: dict[str, list[float]] = field(default_factory=dict)

    def median(self, rival: str) -> float | None:
        return statistics.median(self.values[rival]) if self.values.get(rival) else None

    def ratio(self, rival: str) -> float | None:
        ours, theirs = self.median(OURS), self.median(rival)
        return None if ours is None or not theirs else ours / theirs


class Disagreement(Exception):
    """Two rivals did not compute the same."""


class Worker:
    """A rival's process. Calls wait for their answer, so only one rival works at a time."""

    def __init__(self, rival: str, command: list[str]) -> None:
        self.rival = rival
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()

    def call(self, name: str, **arguments: Any) -> Any:
        self.process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.rival} failed in {name}; what it said stands above")
        return json.loads(line)


class Comparison:
    """The rivals, what they work on, and what was measured."""

    def __init__(self, args: argparse.Namespace, stack: ExitStack) -> None:
        self.args = args
        self.stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.pythons = {OURS: sys.executable}
        if args.mlx_vlm_python is not None:
            self.pythons[PEER] = args.mlx_vlm_python
        if args.transformers_python is not None:
            self.pythons[OFFICIAL] = args.transformers_python
        self.rows: list[Row] = []
        self.running: list[Worker] = []
        config = load_image_processor_config(Path(args.model), load_config(Path(args.model)))
        self.scale = config.tile_size / TILE
        self.tokenizer = Lfm2Tokenizer.from_folder(Path(args.model))

    @property
    def workers(self) -> list[Worker]:
        """One running process per rival, its model loaded."""
        if not self.running:
            for rival in self.pythons:
                command = self.rival_command(rival, self.args.model)
                self.running.append(self.stack.enter_context(Worker(rival, command)))
        return self.running

    def rival_command(self, rival: str, model: str) -> list[str]:
        command = [self.pythons[rival], str(HERE / "rivals.py"), "--rival", rival]
        if rival == OFFICIAL and self.args.transformers_import is not None:
            command += ["--import", self.args.transformers_import]
        return [*command, "--model", model]

    def picture(self, size: tuple[int, int], scaled: bool = True) -> str:
        """Path of a JPEG; the size is in pixels, for tiles of 512 where it scales."""
        width, height = (round(side * self.scale) if scaled else side for side in size)
        path = self.folder / f"{width}x{height}.jpg"
        if not path.exists():
            path.write_bytes(made_picture(width, height))
        return str(path)

    def ids(self, length: int) -> list[int]:
        """A text of so many tokens."""
        ids: list[int] = []
        while len(ids) < length:
            ids += self.tokenizer.encode(f"{len(ids)} {TEXT}", add_special_tokens=False)
        return ids[:length]

    def take_turns(
        self, measure: Callable[[Worker], Any], without: Sequence[str] = ()
    ) -> dict[str, list[Any]]:
        """Each rival's results of each round, and of one before that does not count."""
        workers = [worker for worker in self.workers if worker.rival not in without]
        found: dict[str, list[Any]] = {worker.rival: [] for worker in workers}
        for number in range(self.args.rounds + 1):
            # who goes first changes
            turn = number % len(workers)
            for worker in [*workers[turn:], *workers[:turn]]:
                found[worker.rival].append(measure(worker))
        return found

    def add(
        self,
        stage: str,
        name: str,
        found: dict[str, list[float]],
        unit: str = "s",
        goal: float | None = None,
    ) -> Row:
        """A row of what `take_turns` found, the first round left out, and prints it."""
        row = Row(stage, name, unit, goal, {rival: v[1:] for rival, v in found.items() if v})
        self.rows.append(row)
        print(markdown(cells(row, list(self.pythons))), flush=True)
        return row

    def see(self, image: str) -> int:
        """Shows all rivals an image; the number of its views. Prompts and logits must agree."""
        seen = {w.rival: w.call("see", image=image, question=QUESTIONS[0]) for w in self.workers}
        for rival, answer in seen.items():
            if answer != seen[OURS]:
                raise Disagreement(f"{rival} makes another prompt of {image}: {answer}")
        self.agree({w.rival: w.call("logits") for w in self.workers}, IMAGE_TOLERANCE)
        return seen[OURS]["views"]

    def agree(self, found: dict[str, Any], tolerance: dict[str, float]) -> None:
        """First-token logits must be close, and mlx-vlm's first token the same."""
        ours = found[OURS]
        largest = max(map(abs, ours["logits"]))
        for rival, theirs in found.items():
            pairs = zip(ours["logits"], theirs["logits"], strict=True)
            difference = max(abs(a - b) for a, b in pairs) / largest
            if difference > tolerance.get(rival, 0.0):
                raise Disagreement(f"{rival}: first-token logits differ by {difference:.1e}")
            if rival == PEER and theirs["argmax"] != ours["argmax"]:
                raise Disagreement(f"{rival}: the first token is {theirs['argmax']}")


def vision(run: Comparison) -> None:
    """Vision tower and projector, pixels at hand."""
    for size, goal in ((SMALL, 1 / 3), (LARGE, 1 / 1.2)):
        views = run.see(run.picture(size))
        found = run.take_turns(lambda worker: worker.call("vision")["seconds"])
        run.add("vision", f"{size[1]}x{size[0]}, views: {views}", found, goal=goal)


def memory(run: Comparison) -> None:
    """Most memory in vision, above what was there before. PyTorch does not tell on a CPU."""
    for size in (FIVE_VIEWS, TEN_VIEWS):
        views = run.see(run.picture(size))
        found = run.take_turns(lambda worker: worker.call("vision")["bytes"], without=[OFFICIAL])
        run.add("memory", f"vision, {views} views", found, "bytes", 1 / 2.5)


def prefill(run: Comparison) -> None:
    """A prompt of text into an empty cache, until its first token is known."""
    ids = run.ids(PREFILL_POSITIONS)
    found = run.take_turns(lambda worker: worker.call("prefill", ids=ids))
    run.agree({rival: answers[0] for rival, answers in found.items()}, TOLERANCE)
    times = {rival: [a["seconds"] for a in answers] for rival, answers in found.items()}
    run.add("prefill", f"{len(ids)} positions", times, goal=1 / 1.3)


def decode(run: Comparison) -> None:
    """Time per token behind prompts of different lengths, and what of the bandwidth it uses."""
    ours = run.workers[0]
    for length in DECODE_POSITIONS:
        call = {"name": "decode", "ids": run.ids(length), "tokens": run.args.tokens}
        found = run.take_turns(lambda worker, call=call: worker.call(**call))
        answers = {rival: each[0]["tokens"] for rival, each in found.items()}
        for rival, answer in answers.items():
            if answer != answers[OURS]:
                raise Disagreement(f"{rival} answers {answer}, not {answers[OURS]}")
        times = {rival: [a["seconds"] for a in each] for rival, each in found.items()}
        run.add("decode", f"per token at {length} positions", times, goal=1.0)
        bandwidth = ours.call("bandwidth", rounds=run.args.rounds)
        read = ours.call("token_bytes", positions=length)
        shares = {rival: [read / t / bandwidth for t in each] for rival, each in times.items()}
        run.add("decode", f"part of the bandwidth at {length}", shares, "")


def host(run: Comparison) -> None:
    """From asking for a token until its work is handed to the device, which is idle."""
    ids = run.ids(DECODE_POSITIONS[0])
    call = {"name": "host", "ids": ids, "tokens": run.args.tokens}
    found = run.take_turns(lambda worker: worker.call(**call)["seconds"], without=[OFFICIAL])
    run.add("host", "building one decode step", found, goal=1 / 2)


def reuse(run: Comparison) -> None:
    """Two questions about one image, each until its first token, image decoding included."""
    for size in (SMALL, LARGE):
        image = run.picture(size)
        views = run.see(image)
        call = {"name": "ask", "image": image, "questions": QUESTIONS}
        found = run.take_turns(lambda worker, call=call: worker.call(**call))
        tokens = {rival: [a["tokens"] for a in each] for rival, each in found.items()}
        if PEER in tokens and tokens[PEER] != tokens[OURS]:
            raise Disagreement(f"{PEER} answers {tokens[PEER]}, not {tokens[OURS]}")
        first, second = (
            {rival: [a["times"][n] for a in each] for rival, each in found.items()} for n in (0, 1)
        )
        about = f"question to first token, views: {views}"
        run.add("reuse", f"first {about}", first)
        run.add("reuse", f"second {about}", second)
        shares = {r: [b / a for a, b in zip(first[r], second[r], strict=True)] for r in first}
        run.add("reuse", f"second of first, views: {views}", shares, "")


def preprocess(run: Comparison) -> None:
    """A photo of 12 megapixels from its file to pixels and prompt."""
    image = run.picture(PHOTO, scaled=False)
    found = run.take_turns(
        lambda w: w.call("preprocess", image=image, question=QUESTIONS[0])["seconds"]
    )
    run.add("preprocess", "12-megapixel JPEG", found, goal=1 / 1.3)


def process(command: Sequence[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a whole process, which must end well."""
    start = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    taken = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}")
    return taken, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def processes(
    run: Comparison, commands: dict[str, list[str]]
) -> dict[str, list[tuple[float, int]]]:
    """As `take_turns`, with whole processes."""
    found: dict[str, list[tuple[float, int]]] = {rival: [] for rival in commands}
    for _ in range(run.args.rounds + 1):
        for rival, command in commands.items():
            found[rival].append(process(command))
    return found


def answer_commands(run: Comparison, model: str, image: str, tokens: int) -> dict[str, list[str]]:
    """A question at the command line of each rival."""
    question = ["--image", image, "--prompt", QUESTIONS[0], "--max-tokens", str(tokens)]
    python = run.pythons
    commands = {
        OURS: [
            python[OURS],
            "-m",
            "mlx_lfm2vl.generate",
            "--model",
            model,
            *question,
            "--temp",
            "0",
        ]
    }
    if PEER in python:
        start = [python[PEER], "-m", "mlx_vlm", "generate", "--model", model]
        commands[PEER] = [*start, *question, "--temperature", "0"]
    if OFFICIAL in python:
        start = run.rival_command(OFFICIAL, model)
        commands[OFFICIAL] = [*start, "--answer", image, QUESTIONS[0], str(tokens)]
    return commands


def startup(run: Comparison) -> None:
    """Whole processes: importing, and showing the help."""
    imports = {rival: [python, "-c", CODE[rival]] for rival, python in run.pythons.items()}
    if OFFICIAL in imports and run.args.transformers_import is not None:
        imports[OFFICIAL][2] = f"import {run.args.transformers_import}; {CODE[OFFICIAL]}"
    helps = {OURS: [run.pythons[OURS], "-m", "mlx_lfm2vl.generate", "--help"]}
    if PEER in run.pythons:
        helps[PEER] = [run.pythons[PEER], "-m", "mlx_vlm", "generate", "--help"]
    for name, commands in (("import", imports), ("--help", helps)):
        found = processes(run, commands)
        times = {rival: [taken for taken, _ in each] for rival, each in found.items()}
        run.add("startup", name, times, goal=1 / 10)


def first_token(run: Comparison) -> None:
    """A whole process that answers one token, with a small checkpoint."""
    image = run.folder / "small.jpg"
    image.write_bytes(made_picture(90, 60))
    found = processes(run, answer_commands(run, run.args.small_model, str(image), 1))
    times = {rival: [taken for taken, _ in each] for rival, each in found.items()}
    run.add("first-token", "process with one token", times, goal=1 / 5)


def rss(run: Comparison) -> None:
    """Peak resident memory of a whole process that answers about one photo."""
    found = processes(run, answer_commands(run, run.args.model, run.picture(PHOTO, False), 4))
    sizes = {rival: [peak for _, peak in each] for rival, each in found.items()}
    times = {rival: [taken for taken, _ in each] for rival, each in found.items()}
    run.add("rss", "peak resident memory, one photo", sizes, "bytes", 0.8)
    run.add("rss", "wall time of that process", times)


STAGES: dict[str, Callable[[Comparison], None]] = {
    "vision": vision,
    "memory": memory,
    "prefill": prefill,
    "decode": decode,
    "reuse": reuse,
    "preprocess": preprocess,
    "host": host,
    "startup": startup,
    "first-token": first_token,
    "rss": rss,
}


def show(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 1e6:.3g} MB" if value < 1e9 else f"{value / 1e9:.2f} GB"
    if unit == "":
        return f"{value:.3f}"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.3g} ms"


def cells(row: Row, rivals: list[str]) -> list[str]:
    """Stage, each rival's median, each ratio, and the goal."""
    medians = [show(row.median(rival), row.unit) for rival in rivals]
    ratios = [row.ratio(rival) for rival in rivals[1:]]
    shown = ["-" if ratio is None or row.unit == "" else f"{ratio:.3f}" for ratio in ratios]
    goal = "" if row.goal is None else f"≤ {row.goal:.3f}"
    return [f"{row.stage}: {row.name}", *medians, *shown, goal]


def header(rivals: list[str]) -> list[list[str]]:
    titles = ["", *rivals, *(f"÷ {rival}" for rival in rivals[1:]), "must be"]
    return [titles, ["---", *["---:"] * (len(titles) - 1)]]


def markdown(row: Sequence[str]) -> str:
    return f"| {' | '.join(row)} |"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder that every rival can load")
    parser.add_argument(
        "--small-model",
        default=str(HERE.parent / "tests" / "checkpoints" / "wide"),
        help="folder for the stage first-token (default: %(default)s)",
    )
    parser.add_argument("--mlx-vlm-python", help="Python of an environment with mlx-vlm")
    parser.add_argument("--transformers-python", help="Python with transformers and PyTorch")
    parser.add_argument("--transformers-import", help="module to import before transformers")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="which, with commas (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="decoded each time (default: 16)")
    parser.add_argument("--json", metavar="FILE", help="write every round's value")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.tokens < 1:
        parser.error("--rounds and --tokens must be 1 or more")
    args.stages = args.stages.split(",")
    unknown = set(args.stages) - set(STAGES)
    if unknown:
        parser.error(f"--stages knows {', '.join(STAGES)}, not {', '.join(unknown)}")
    return args


def main() -> None:
    args = parse()
    machine = this_machine()
    print(f"{machine.system}: {machine.device_name}, {machine.cores} cores, on {machine.device}")
    print(f"{args.model}, median of {args.rounds} rounds after one that does not count\n")
    with ExitStack() as stack:
        run = Comparison(args, stack)
        for row in header(list(run.pythons)):
            print(markdown(row))
        for stage in args.stages:
            STAGES[stage](run)
        versions = {worker.rival: worker.call("versions") for worker in run.running}
    print("\n" + "\n".join(f"{rival}: {text}" for rival, text in versions.items()))
    if args.json is not None:
        data = {"machine": asdict(machine), "model": args.model, "versions": versions}
        rows = [asdict(row) | {"ratio": row.ratio(PEER)} for row in run.rows]
        Path(args.json).write_text(json.dumps({**data, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
