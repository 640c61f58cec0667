"""What quantizations of one size lose: plain, by recipe, by mlx-vlm and mlx-lm, and calibrated.

    python benchmarks/quantization.py --output FOLDER [--second MODEL] [--mlx-vlm PYTHON]

The pictures are those of the demo world; calibration and comparison share none. Each rival's size
is the target of a calibrated conversion, so that rows of one size stand one below the other.
Conversions that are in the folder already are taken as they are, so a run can be continued.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "demo"))

from evaluate import evaluate, mean
from world import TASKS, make_example, messages_of

from mlx_lfm2vl import Quantization, Question, Sampling, batch_generate, convert, load
from mlx_lfm2vl.checkpoints.hub import resolve_model
from mlx_lfm2vl.checkpoints.weights import read_weights, weight_files
from mlx_lfm2vl.conversion.calibrate import ANSWER_TOKENS, Batch, read_samples
from mlx_lfm2vl.conversion.calibrated import Calibration, convert_calibrated, source_identity
from mlx_lfm2vl.conversion.report import bits_per_weight, first_difference, kl_divergence
from mlx_lfm2vl.conversion.samples import TEXTS, Samples

# what exists without calibration: name -> settings; all of them with a vision tower in integers
RECIPES = {
    "plain-4": Quantization(bits=4, vision_bits=4),
    "lfm2_4bit": Quantization(recipe="lfm2_4bit", vision_bits=4),
    "mixed_4_6": Quantization(recipe="mixed_4_6", vision_bits=4),
}
# the converters of others, by their own commands; mlx-vlm leaves vision tower and projector alone
PEERS = {"mlx-vlm-4bit": ["--q-bits", "4"], "mlx-vlm-mixed_4_6": ["--quant-predicate", "mixed_4_6"]}
SMALL = 3.5  # bits at which tasks are scored
# reads pairs of a folder and a file, loads each with mlx-vlm, and tells how far its logits are
CHECK = """
import json, sys
from pathlib import Path
import mlx.core as mx, numpy as np
from mlx_vlm.utils import load_model

for folder, file in json.loads(sys.argv[1]):
    model, kept = load_model(Path(folder)), np.load(file)
    model.set_dtype(mx.float32)  # stored values are what counts
    ids, pixels = mx.array(kept["ids"])[None], mx.array(kept["pixels"])
    mask = mx.ones((1, len(pixels)), mx.int32)
    found = model.get_input_embeddings(
        ids, pixels[None], spatial_shapes=mx.array(kept["shapes"]), pixel_attention_mask=mask
    )
    logits = model.language_model(ids, inputs_embeds=found.inputs_embeds).logits[0]
    print(float(np.abs(np.array(logits) - kept["logits"]).max() / np.abs(kept["logits"]).max()))
"""


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


class Row(NamedTuple):
    """One conversion against the source."""

    name: str
    nbytes: int
    bits: float
    kl: float
    top: float
    equal: float
    part: int | None  # median of the first token that differs, of the answers that do
    text_kl: float
    text_top: float


class Judge:
    """The source's answers to unseen pictures, and its opinion of texts."""

    def __init__(self, source: Path, count: int, kept: Path) -> None:
        model, processor = load(source, dtype="float32")
        self.talks = questions("test", count)
        parts = (Samples(self.talks, [], [None] * count), Samples([], list(TEXTS)))
        self.batches: list[list[Batch]] = [
            read_samples(model, processor, part, kept, source_identity(source), lambda *told: None)
            for part in parts
        ]
        self.right = [[_logprobs(model, b) for b in batches] for batches in self.batches]
        self.answers = self._answers(model, processor)

    def _answers(self, model: Any, processor: Any) -> list[list[int]]:
        asked = [
            Question(talk, max_tokens=ANSWER_TOKENS, sampling=Sampling(temperature=0.0))
            for talk in self.talks
        ]
        return [answer.tokens for answer in batch_generate(model, processor, asked)]

    def judge(self, folder: Path) -> Row:
        model, processor = load(folder, dtype="float32")
        scores = []
        for batches, right in zip(self.batches, self.right, strict=True):
            pairs = [(p, _logprobs(model, b)) for p, b in zip(right, batches, strict=True)]
            divergences = mx.concatenate([kl_divergence(p, q) for p, q in pairs])
            same = mx.concatenate([p.argmax(axis=-1) == q.argmax(axis=-1) for p, q in pairs])
            scores += [divergences.mean().item(), same.astype(mx.float32).mean().item()]
        answers = zip(self.answers, self._answers(model, processor), strict=True)
        places = [first_difference(a, b) for a, b in answers]
        apart = sorted(place for place in places if place is not None)
        return Row(
            folder.name,
            sum(file.stat().st_size for file in weight_files(folder)),
            bits_per_weight(folder)["all"],
            *scores[:2],
            1 - len(apart) / len(places),
            apart[len(apart) // 2] if apart else None,
            *scores[2:],
        )


def _logprobs(model: Any, batch: Batch) -> mx.array:
    found = batch.logprobs(model)
    mx.eval(found)
    return found


# ---- conversions


def make_rivals(source: Path, output: Path, mlx_vlm: str | None) -> list[Path]:
    """All conversions without calibration."""
    for name, settings in RECIPES.items():
        if not (output / name).exists():
            convert(source, output / name, settings)
    peers = PEERS if mlx_vlm is not None else {}
    for name, flags in peers.items():
        if not (output / name).exists():
            command = [str(mlx_vlm), "-m", "mlx_vlm", "convert", "--hf-path", str(source)]
            run([*command, "--mlx-path", str(output / name), "-q", *flags])
    return [output / name for name in (*RECIPES, *peers)]


def run(command: Sequence[str]) -> str:
    """What a command prints; its complaints, if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command[:4])} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def make_calibrated(
    source: Path, output: Path, target: float, samples: Path, settings: dict[str, Any]
) -> Path:
    """A calibrated conversion of so many bits per weight."""
    folder = output / f"calibrated-{target:.2f}"
    if not folder.exists():
        kept = Calibration(samples, target, folder=output / "calibration", **settings)
        convert_calibrated(source, folder, kept)
    return folder


# ---- mlx-vlm and mlx-lm


def differences(folders: Sequence[Path], output: Path, mlx_vlm: str) -> list[float]:
    """How far mlx-vlm's logits are from ours, about one picture, by folder; relative."""
    pairs = []
    (output / "logits").mkdir(exist_ok=True)
    for folder in folders:
        model, processor = load(folder, dtype="float32")
        prompt = next(
            prompt
            for prompt in (processor(talk) for talk in questions("test", 20))
            if len(prompt.spatial_shapes) == 1
        )
        logits = model(mx.array([prompt.token_ids]), prompt.pixel_values, prompt.spatial_shapes)
        file = output / "logits" / f"{folder.name}.npz"
        np.savez(
            file,
            ids=np.array(prompt.token_ids),
            pixels=np.array(model.normalize(mx.array(prompt.pixel_values))),
            shapes=np.array(prompt.spatial_shapes),
            logits=np.array(logits.logits[0].astype(mx.float32)),
        )
        pairs.append((str(folder), str(file)))
    return [float(line) for line in run([mlx_vlm, "-c", CHECK, json.dumps(pairs)]).split()]


def mlx_lm_told(source: Path, output: Path) -> str:
    """mlx-lm drops what sees; its text part against that of the same bits here."""
    folder = output / "mlx-lm-4bit"
    if not folder.exists():
        # it knows the family by its older name only, and wants what transformers has defaults for
        renamed = output / "mlx-lm-source"
        shutil.copytree(source, renamed, dirs_exist_ok=True)
        config = json.loads((renamed / "config.json").read_text())
        config["model_type"] = "lfm2-vl"
        config["text_config"] |= {"block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0}
        (renamed / "config.json").write_text(json.dumps(config))
        command = [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(renamed)]
        run([*command, "--mlx-path", str(folder), "-q", "--q-bits", "4"])
    theirs, ours = mx.load(str(folder / "model.safetensors")), read_weights(output / "plain-4")
    seeing = sum(not name.startswith("language_model.") for name in theirs)
    same = sum(name in ours and mx.array_equal(ours[name], theirs[name]).item() for name in theirs)
    return (
        f"mlx-lm 4 bits: {seeing} tensors that see are left; {same} of {len(theirs)} of the "
        "text part are those of plain-4, bit for bit"
    )


# ---- tables


def as_table(rows: Sequence[Row], apart: Sequence[float | None]) -> str:
    lines = [
        "| conversion | size | bits/weight | after pictures: KL | same top token | equal answers "
        "(others part at) | texts: KL | same top token | mlx-vlm differs by |",
        "|---" * 9 + "|",
    ]
    for row, other in sorted(zip(rows, apart, strict=True), key=lambda p: (p[0].bits, p[0].name)):
        part = f" ({row.part})" if row.part is not None else ""
        lines.append(
            f"| {row.name} | {row.nbytes / 1e6:.3f} MB | {row.bits:.2f} | {row.kl:.5f} | "
            f"{100 * row.top:.1f} % | {100 * row.equal:.1f} %{part} | {row.text_kl:.4f} | "
            f"{100 * row.text_top:.1f} % | " + ("-" if other is None else f"{other:.0e}") + " |"
        )
    return "\n".join(lines)


def verdicts(pairs: Sequence[tuple[Row, Row]]) -> str:
    """Calibrated against a rival of its size."""
    return "\n".join(
        f"{ours.name} : {rival.name} = {ours.kl / rival.kl:.3f} of its KL after pictures, "
        f"{ours.text_kl / rival.text_kl:.3f} on texts, {ours.nbytes / rival.nbytes:.4f} of its size"
        for ours, rival in pairs
    )


def task_table(folders: Sequence[Path], count: int) -> str:
    """Scores by task, in percent; the first folder is the source."""
    lines = ["| model | " + " | ".join([*TASKS, "mean"]) + " |", "|---" * (len(TASKS) + 2) + "|"]
    for folder in folders:
        model, processor = load(folder, dtype="float32")
        scores = [100 * mean(evaluate(model, processor, task, count)) for task in TASKS]
        told = " | ".join(f"{score:.1f}" for score in [*scores, sum(scores) / len(scores)])
        lines.append(f"| {folder.name} | {told} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def compare(source: Path, output: Path, args: argparse.Namespace, small: bool) -> None:
    """Prints all tables of one model."""
    output.mkdir(parents=True, exist_ok=True)
    samples = write_questions(output / "pictures", args.count)
    settings = {} if args.epochs is None else {"epochs": args.epochs}
    if args.refine is not None:
        settings["methods"] = tuple(args.refine)
    judge = Judge(source, args.held_out, output / "held-out.json")
    rows: dict[Path, Row] = {}

    def judged(folder: Path) -> Row:
        if folder not in rows:
            rows[folder] = judge.judge(folder)
            print(rows[folder], file=sys.stderr, flush=True)
        return rows[folder]

    pairs = []
    for folder in make_rivals(source, output, args.mlx_vlm):
        rival = judged(folder)
        ours = make_calibrated(source, output, rival.bits, samples, settings)
        pairs.append((judged(ours), rival))
    least = make_calibrated(source, output, SMALL, samples, settings) if small else None
    if least is not None:
        judged(least)
    apart: Sequence[float | None] = [None] * len(rows)
    if args.mlx_vlm is not None:
        apart = differences(list(rows), output, args.mlx_vlm)
    print(f"\n{source}\n\n{as_table(list(rows.values()), apart)}\n\n{verdicts(pairs)}")
    print(mlx_lm_told(source, output), flush=True)
    if least is not None and args.tasks > 0:
        print(f"\n{task_table([source, least, output / 'plain-4'], args.tasks)}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Losses of quantizations of one size.")
    parser.add_argument("--model", default="demo", help="source (default: demo)")
    parser.add_argument("--second", help="a second source, compared after it; without tasks")
    parser.add_argument("--output", type=Path, required=True, help="folder of all conversions")
    parser.add_argument("--mlx-vlm", help="Python with mlx-vlm, to convert and to compare with it")
    parser.add_argument("--count", type=int, default=96, help="pictures to calibrate on")
    parser.add_argument("--held-out", type=int, default=112, help="pictures to compare on")
    parser.add_argument("--tasks", type=int, default=50, help="pictures per task to score")
    parser.add_argument("--epochs", type=int, help="of the distillation")
    parser.add_argument("--refine", nargs="+", help="methods, if not the default")
    args = parser.parse_args(argv)
    compare(resolve_model(args.model), args.output / "first", args, small=True)
    if args.second is not None:
        compare(resolve_model(args.second), args.output / "second", args, small=False)


if __name__ == "__main__":
    main()
