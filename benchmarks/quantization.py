"""What quantizations of one size lose: plain, by recipe, by mlx-vlm, and calibrated.

    python benchmarks/quantization.py --model demo --output FOLDER [--mlx-vlm PYTHON]

The pictures are those of the demo world; calibration and comparison share none. Each rival's size
is a target for a calibrated conversion, so that rows of one size stand side by side. Conversions
that are in the folder already are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

from evaluate import accuracy
from world import TASKS, make_example, messages_of

from mlx_lfm2vl import Quantization, convert, load
from mlx_lfm2vl.checkpoints.hub import resolve_model
from mlx_lfm2vl.checkpoints.weights import weight_files
from mlx_lfm2vl.conversion.calibrate import Batch, read_samples
from mlx_lfm2vl.conversion.calibrated import Calibration, convert_calibrated, source_identity
from mlx_lfm2vl.conversion.report import bits_per_weight, kl_divergence
from mlx_lfm2vl.conversion.samples import TEXTS, Samples

# what exists without calibration: name -> settings
RECIPES = {
    "plain-4": Quantization(bits=4),
    "plain-4-all": Quantization(bits=4, vision_bits=4),
    "lfm2_4bit-vision-4": Quantization(recipe="lfm2_4bit", vision_bits=4),
    "mixed_4_6-vision-4": Quantization(recipe="mixed_4_6", vision_bits=4),
}
# mlx-vlm's converter takes mlx-lm's recipes; mlx-lm's own drops the vision tower
PEERS = {"4bit": "q_bits=4", "mixed_4_6": "quant_predicate='mixed_4_6'"}
PEER = (
    "from mlx_vlm.convert import convert; convert({!r}, {!r}, quantize=True, q_group_size=64, {})"
)


def questions(split: str, count: int) -> list[list[Any]]:
    """Conversations about drawn pictures, task after task."""
    examples = [make_example(split, n, TASKS[n % len(TASKS)]) for n in range(count)]
    return [messages_of(example, example.pictures)[:1] for example in examples]


def write_questions(folder: Path, count: int) -> Path:
    """The calibration set as a user would have it: pictures, and a file of questions."""
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        example = make_example("calibration", number, TASKS[number % len(TASKS)])
        names = [f"{number}-{place}.png" for place in range(len(example.pictures))]
        for name, picture in zip(names, example.pictures, strict=True):
            picture.save(folder / name)
        lines.append(json.dumps({"messages": messages_of(example, names)[:1]}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


class Judge:
    """The source's answers to unseen pictures, and its opinion of texts."""

    def __init__(self, source: Path, count: int, kept: Path) -> None:
        model, processor = load(source, dtype="float32")
        talks = questions("test", count)
        parts = (Samples(talks, [], [None] * count), Samples([], list(TEXTS)))
        self.batches: list[list[Batch]] = [
            read_samples(model, processor, part, kept, source_identity(source), lambda *told: None)
            for part in parts
        ]
        self.right = [[self._logprobs(model, b) for b in batches] for batches in self.batches]

    def _logprobs(self, model: Any, batch: Batch) -> mx.array:
        found = batch.logprobs(model)
        mx.eval(found)
        return found

    def judge(self, folder: Path) -> list[float]:
        """Mean divergence and share of equal top tokens: of answers, then of texts."""
        model, _ = load(folder, dtype="float32")
        scores = []
        for batches, right in zip(self.batches, self.right, strict=True):
            own = [self._logprobs(model, batch) for batch in batches]
            pairs = list(zip(right, own, strict=True))
            divergences = mx.concatenate([kl_divergence(p, q) for p, q in pairs])
            same = mx.concatenate([p.argmax(axis=-1) == q.argmax(axis=-1) for p, q in pairs])
            scores += [divergences.mean().item(), same.astype(mx.float32).mean().item()]
        return scores


def task_score(folder: Path, count: int) -> float:
    """Mean of all tasks, in percent."""
    model, processor = load(folder, dtype="float32")
    scores = [accuracy(model, processor, task, count)[0] for task in TASKS]
    return 100 * sum(scores) / len(scores)


def make_rivals(source: Path, output: Path, mlx_vlm: str | None) -> list[Path]:
    """All conversions without calibration."""
    folders = []
    for name, settings in RECIPES.items():
        folders.append(output / name)
        if not folders[-1].exists():
            convert(source, folders[-1], settings)
    for name, settings in PEERS.items() if mlx_vlm is not None else ():
        folders.append(output / f"mlx-vlm-{name}")
        if not folders[-1].exists():
            code = PEER.format(str(source), str(folders[-1]), settings)
            subprocess.run([mlx_vlm, "-c", code], check=True, capture_output=True)
    return folders


def make_calibrated(
    source: Path, output: Path, target: float, samples: Path, epochs: int, rate: float
) -> Path:
    """A calibrated conversion of so many bits per weight."""
    folder = output / f"calibrated-{target:.2f}"
    if not folder.exists():
        settings = Calibration(
            samples,
            target,
            epochs=epochs,
            learning_rate=rate,
            folder=output / "calibration",
        )
        convert_calibrated(source, folder, settings)
    return folder


def row(folder: Path, judge: Judge, tasks: int) -> str:
    size = sum(file.stat().st_size for file in weight_files(folder)) / 1e6
    kl, top, text_kl, text_top = judge.judge(folder)
    line = (
        f"| {folder.name} | {size:.3f} MB | {bits_per_weight(folder)['all']:.2f} | {kl:.5f} | "
        f"{100 * top:.1f} % | {text_kl:.4f} | {100 * text_top:.1f} % |"
    )
    return line + (f" {task_score(folder, tasks):.1f} |" if tasks else "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Losses of quantizations of one size.")
    parser.add_argument("--model", default="demo", help="source (default: demo)")
    parser.add_argument("--output", type=Path, required=True, help="folder of all conversions")
    parser.add_argument("--mlx-vlm", help="Python with mlx-vlm, to convert with it")
    parser.add_argument("--targets", type=float, nargs="*", default=[3.5], help="further sizes")
    parser.add_argument("--rivals", nargs="*", help="whose sizes are targets (default: all)")
    parser.add_argument("--count", type=int, default=96, help="pictures to calibrate on")
    parser.add_argument("--held-out", type=int, default=112, help="pictures to compare on")
    parser.add_argument("--tasks", type=int, default=0, help="pictures per task to score, too")
    parser.add_argument("--epochs", type=int, default=Calibration.epochs)
    parser.add_argument("--learning-rate", type=float, default=Calibration.learning_rate)
    args = parser.parse_args(argv)
    source = resolve_model(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    samples = write_questions(args.output / "pictures", args.count)
    folders = [source, *make_rivals(source, args.output, args.mlx_vlm)]
    names = RECIPES if args.rivals is None else args.rivals
    targets = {*args.targets, *(bits_per_weight(args.output / name)["all"] for name in names)}
    judge = Judge(source, args.held_out, args.output / "held-out.json")
    print("| conversion | size | bits/weight | answers: KL | same top | texts: KL | same top |"
          + (" tasks |" if args.tasks else ""))  # fmt: skip
    print("|---" * (8 if args.tasks else 7) + "|", flush=True)
    for target in sorted(targets):
        made = make_calibrated(
            source, args.output, target, samples, args.epochs, args.learning_rate
        )
        print(row(made, judge, args.tasks), flush=True)
    for folder in folders:
        print(row(folder, judge, args.tasks), flush=True)


if __name__ == "__main__":
    main()
