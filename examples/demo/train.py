"""Trains the demo model: one command from nothing to weights, which continues if it was stopped.

    python examples/demo/train.py --output demo-training

Draws each stage's pictures, trains on them from the weights of the stage before, and writes all
losses to `log.csv` and `log.png`. With OpenMPI installed, two processes share the work.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from make_model import write_model
from world import write_world

PROCESSES = 2
BATCH = 16  # samples of a process


@dataclass(frozen=True)
class Stage:
    """Pictures to draw, and how to learn from them.

    Attributes:
        examples: how many; a step takes 32 of them, and they come again as often as needed.
        shapes, turns: of a picture and about a picture, at most.
        rate: the highest learning rate.
        schedule: how it falls.
    """

    name: str
    split: str
    examples: int
    steps: int
    rate: float
    shapes: int = 4
    turns: int = 5
    warmup: int = 40
    schedule: str = "cosine"


# an untrained model first finds out what a shape is, where there is only one
FIRST = (
    Stage("one-shape", "train-one", 20_000, 1_200, 1e-3, shapes=1, turns=4, schedule="constant"),
    Stage("few-shapes", "train-few", 40_000, 4_000, 1e-3, shapes=3, schedule="constant"),
)
STAGES = (
    Stage("wide", "train", 26_000, 500, 1e-3, schedule="constant"),
    Stage("long", "train-long", 38_750, 1_900, 9e-4),
    Stage("more", "train-more", 60_000, 2_600, 9e-4, turns=6),
)


def draw(stage: Stage, folder: Path) -> Path:
    """The data file of a stage, drawn if it is not there yet."""
    world = folder / "world" / stage.name
    if not world.exists():
        unfinished = world.with_name(f".{stage.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_world(unfinished, stage.split, stage.examples, None, stage.turns, stage.shapes)
        unfinished.rename(world)
    return world / "data.jsonl"


def train(stage: Stage, model: Path, folder: Path) -> Path:
    """The folder with a stage's weights; a run that was stopped continues."""
    output = folder / stage.name
    if (output / "model.safetensors").exists():
        return output
    data = draw(stage, folder)
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(PROCESSES)]
    if shutil.which("mpirun") is None:
        print("There is no mpirun: one process does all, with half of the samples in a step.")
        launcher = []
    # fmt: off
    command = [
        *launcher, sys.executable, "-m", "mlx_lfm2vl.train", "--model", str(model),
        "--data", str(data), "--output", str(output), "--fine-tune-type", "full",
        "--train-parts", "language,projector,vision", "--optimizer", "muon",
        "--weight-decay", "0.05", "--batch-size", str(BATCH), "--learning-rate", str(stage.rate),
        "--warmup", str(stage.warmup), "--iters", str(stage.steps), "--schedule", stage.schedule,
        "--save-every", "100", "--steps-per-report", "25",
    ]
    # fmt: on
    if any(output.glob("checkpoint-*")):
        command.append("--resume")
    subprocess.run(command, check=True)
    return output


def read_losses(folder: Path, stages: tuple[Stage, ...]) -> list[dict[str, str]]:
    """The logs of all stages, one after the other."""
    rows = []
    for stage in stages:
        for log in sorted((folder / stage.name).glob("*.csv")):
            with open(log, newline="") as file:
                rows += [{"stage": stage.name, **row} for row in csv.DictReader(file)]
    return rows


def write_log(folder: Path, stages: tuple[Stage, ...]) -> None:
    """`log.csv` and `log.png`: the loss of every 25 steps, stages side by side."""
    from matplotlib.figure import Figure

    rows = read_losses(folder, stages)
    with open(folder / "log.csv", "w", newline="") as file:
        names = ["stage", "step", "loss", "learning_rate"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, done = figure.add_subplot(), 0
    for stage in stages:
        mine = [row for row in rows if row["stage"] == stage.name]
        steps = [done + int(row["step"]) for row in mine]
        axes.plot(steps, [float(row["loss"]) for row in mine], label=stage.name)
        done = steps[-1] if len(steps) > 0 else done
    axes.set_yscale("log")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(folder / "log.png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--output", type=Path, default=Path("demo-training"), help="folder")
    parser.add_argument(
        "--weights-from", type=Path, help="begin with an earlier demo model, in the later stages"
    )
    args = parser.parse_args()
    start, begun = args.output / "start", time.monotonic()
    if not (start / "model.safetensors").exists():
        write_model(start, weights_from=args.weights_from)
    stages = STAGES if args.weights_from is not None else (*FIRST, *STAGES)
    model = start
    for stage in stages:
        model = train(stage, model, args.output)
        write_log(args.output, stages)
    print(f"{model}: {(time.monotonic() - begun) / 60:.0f} minutes in this run")


if __name__ == "__main__":
    main()
