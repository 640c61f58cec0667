"""The command line `python -m mlx_lfm2vl.train`, also installed as `mlx-lfm2vl-train`."""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import TrainError
from ..options import ImageOptions
from .options import add_image_options, add_model, options_from, positive
from .terminal import Parser, interruptible, make_parser, run_command

if TYPE_CHECKING:
    from ..training.data import Dataset
    from ..training.trainer import StepReport, Trainer


LOG, PLOT = "log.csv", "loss.png"
COLUMNS = (
    "step",
    "loss",
    "learning_rate",
    "grad_norm",
    "tokens_per_second",
    "peak_memory_gb",
    "validation_loss",
    "metric",
)
EPILOG = """\
examples:
  %(prog)s --data samples.jsonl --output adapters
  %(prog)s --data samples.jsonl --train language,projector --rank 16 --iters 500
  %(prog)s --model lfm2-4bit --data folder --grad-checkpoint
  %(prog)s --data samples.jsonl --fine-tune-type full --train language,projector,vision
  mlx.launch -n 2 -- %(prog)s --data samples.jsonl
then:
  python -m mlx_lfm2vl.generate --adapter-path adapters --image photo.jpg --prompt "…"
"""


def build_parser() -> Parser:
    """The arguments, named as in mlx-lm's trainer; defaults are those of `TrainingOptions`."""
    parser = make_parser(
        "mlx-lfm2vl-train", "Fine-tune LFM2-VL on conversations about images.", EPILOG
    )
    add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        help='JSON lines {"messages": […]}, or a folder with train.jsonl and valid.jsonl',
    )
    parser.add_argument("--validation", help="JSON lines for the validation loss")
    parser.add_argument("--output", default="adapters", help="folder (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad lines out, and count")
    parser.add_argument("--save-every", type=positive, default=100, help="steps (default: 100)")
    parser.add_argument("--keep-checkpoints", type=positive, default=2, help="default: 2")
    parser.add_argument("--steps-per-report", type=positive, default=10, help="default: 10")
    parser.add_argument("--steps-per-eval", type=positive, default=200, help="default: 200")
    parser.add_argument(
        "--metric",
        help="also answer validation samples and compare: exact_match, or FILE.py:FUNCTION of "
        "(answer, reference) that returns a number",
    )
    parser.add_argument("--metric-samples", type=positive, default=50, help="default: 50")
    parser.add_argument("--plot", action="store_true", help=f"draw {PLOT} beside {LOG}")
    _add_training(parser)
    add_image_options(parser)
    return parser


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--fine-tune-type", choices=("lora", "dora", "full"), help="default: lora")
    group.add_argument(
        "--train",
        type=lambda text: tuple(text.split(",")),
        metavar="PARTS",
        help="of language,projector,vision (default: language)",
    )
    group.add_argument("--iters", type=positive, help="steps (default: 1000)")
    group.add_argument("--batch-size", type=positive, help="per machine (default: 4)")
    group.add_argument("--grad-accumulation-steps", type=positive, help="batches (default: 1)")
    group.add_argument("--optimizer", help="adamw, adam, muon, sgd, lion or adafactor (adamw)")
    group.add_argument("--learning-rate", type=float, help="default: 1e-4")
    group.add_argument("--schedule", help="cosine, linear or constant (default: cosine)")
    group.add_argument("--warmup", type=int, help="steps (default: 0)")
    group.add_argument("--weight-decay", type=float, help="default: 0")
    group.add_argument("--max-grad-norm", type=float, help="0 is no limit (default: 1)")
    group.add_argument("--rank", type=int, help="of adapters (default: 8)")
    group.add_argument("--scale", type=float, help="of adapters (default: 20)")
    group.add_argument("--dropout", type=float, help="of adapters (default: 0)")
    group.add_argument("--num-layers", type=int, help="last layers with adapters (default: all)")
    group.add_argument(
        "--grad-checkpoint",
        action="store_true",
        default=None,
        help="compute activations twice instead of keeping them: slower, less memory",
    )
    group.add_argument("--max-length", type=positive, help="tokens of a sample (default: 4096)")
    group.add_argument("--seed", type=int, help="default: 0")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs the command line and exits: 0 done, 2 bad input, 130 interrupted."""
    parser = build_parser()
    run_command(parser.prog, lambda: run(parser.parse_args(argv)))


def run(args: argparse.Namespace) -> None:
    """Does what the arguments ask for; errors are exceptions."""
    from ..checkpoints.hub import resolve_model
    from ..checkpoints.loading import load
    from ..training.data import find_split, read_dataset
    from ..training.trainer import Trainer, TrainingOptions

    args.image_options = options_from(args, ImageOptions)
    options = options_from(args, TrainingOptions)
    output = free_output(Path(args.output).expanduser(), args.resume)
    _check_plot(args.plot)
    metric = None if args.metric is None else load_metric(args.metric)
    train_file = find_split(args.data, "train")
    other = args.validation if args.validation is not None else args.data
    validation_file = (
        Path(other) if args.validation is not None else find_split(other, "validation")
    )
    source = resolve_model(args.model, args.revision)
    model, processor = load(source, dtype=args.dtype)
    assert train_file is not None

    def read(path: Path) -> Dataset:
        with _bar("reading", "line") as step:
            return read_dataset(
                path,
                processor,
                max_length=options.max_length,
                skip_bad=args.skip_bad,
                image_options=options.image_options,
                progress=step,
            )

    dataset = read(train_file)
    validation = None if validation_file is None else read(validation_file)
    if metric is not None and validation is None:
        raise TrainError("--metric needs validation samples; pass --validation")
    trainer = Trainer(model, processor, dataset, options, skip_bad=args.skip_bad)
    if args.resume:
        trainer.resume(latest(output))
    run_steps(Run(args, output, source, trainer, validation, metric))


class Run:
    """What the loop around a `Trainer` needs."""

    def __init__(
        self,
        args: argparse.Namespace,
        output: Path,
        source: Path,
        trainer: Trainer,
        validation: Dataset | None,
        metric: Callable[[str, str], float] | None,
    ) -> None:
        self.args, self.output, self.source, self.trainer = args, output, source, trainer
        self.validation, self.metric = validation, metric
        self.is_first = trainer.group.rank() == 0  # the machine that writes

    def say(self, text: str) -> None:
        if self.is_first:
            sys.stderr.write(text + "\n")

    def save(self) -> None:
        if self.is_first:
            self.trainer.save(self.output, self.source, self.args.keep_checkpoints)
        # where one process ends, MLX's launcher kills the others, even while they write
        self.any_machine(False)

    def evaluate(self) -> tuple[float | None, float | None]:
        """Validation loss and mean metric, where asked for."""
        from ..training.metrics import answer_metric, validation_loss

        if self.validation is None:
            return None, None
        trainer = self.trainer
        bad = self.args.skip_bad
        loss = validation_loss(
            trainer.model, trainer.processor, self.validation, trainer.options, bad
        )
        if self.metric is None or not self.is_first:
            return loss, None
        limit = self.args.metric_samples
        return loss, answer_metric(
            trainer.model,
            trainer.processor,
            self.validation,
            self.metric,
            limit,
            trainer.options,
            bad,
        )

    def any_machine(self, value: bool) -> bool:
        """Whether it is true on any machine; each waits until all of them ask."""
        import mlx.core as mx

        return bool(mx.distributed.all_max(mx.array(value, mx.int32)).item())


def run_steps(run: Run) -> None:
    """Trains to the end, with reports, checkpoints and the final result."""
    from ..training.trainer import publish

    trainer, args = run.trainer, run.args
    _tell_start(run)
    rows = read_log(run.output / LOG, trainer.steps_done) if run.is_first else []
    recent: list[StepReport] = []
    with interruptible() as interrupted, _bar("training", "step") as move:
        for report in trainer.run():
            recent.append(report)
            last = report.step == trainer.options.iters
            if move is not None:
                move(report.step)
            # asked once a step: what comes later waits for the next one, and its checkpoint
            stop = run.any_machine(interrupted())
            if report.step % args.save_every == 0 or last or stop:
                run.save()
            evaluated = report.step % args.steps_per_eval == 0 or last
            if report.step % args.steps_per_report == 0 or evaluated or stop:
                row = _row(recent, *(run.evaluate() if evaluated else (None, None)))
                recent = []
                rows.append(row)
                run.say(_line(row))
                if run.is_first:
                    write_log(run.output / LOG, rows)
            if stop:
                run.say(f"stopped after step {report.step}; --resume goes on from here")
                raise KeyboardInterrupt
    if run.is_first:
        publish(trainer.model, trainer.adapter_config, run.output, run.source)
        if args.plot:
            draw_log(rows, run.output / PLOT)
    if trainer.skipped:
        run.say(f"skipped {len(trainer.skipped)} samples whose images could not be read")
    run.say(f"wrote {run.output}")


def _tell_start(run: Run) -> None:
    from mlx.utils import tree_flatten

    trainer = run.trainer
    model = trainer.model
    learned = sum(array.size for _, array in tree_flatten(model.trainable_parameters()))
    for name, dataset in (("training", trainer.dataset), ("validation", run.validation)):
        if dataset is not None and dataset.skipped:
            line, reason = dataset.skipped[0]
            run.say(f"{name}: skipped {len(dataset.skipped)} bad lines, first {line}: {reason}")
    run.say(
        f"{len(trainer.dataset)} samples, {learned / 1e6:.3f} million weights learn, steps "
        f"{trainer.steps_done + 1} to {trainer.options.iters}"
    )


def _row(
    recent: Sequence[StepReport], validation: float | None, metric: float | None
) -> dict[str, Any]:
    """A line of the log: means over the steps since the last one."""
    count, last = len(recent), recent[-1]
    return {
        "step": last.step,
        "loss": round(sum(report.loss for report in recent) / count, 5),
        "learning_rate": float(f"{last.learning_rate:.4g}"),
        "grad_norm": round(sum(report.grad_norm for report in recent) / count, 4),
        "tokens_per_second": round(sum(report.tokens_per_second for report in recent) / count),
        "peak_memory_gb": round(last.peak_memory, 3),
        "validation_loss": None if validation is None else round(validation, 5),
        "metric": None if metric is None else round(metric, 4),
    }


def _line(row: dict[str, Any]) -> str:
    text = (
        f"step {row['step']}: loss {row['loss']:.4f}, {row['tokens_per_second']} tok/s, "
        f"peak memory {row['peak_memory_gb']:.2f} GB"
    )
    for name, title in (("validation_loss", "validation loss"), ("metric", "metric")):
        if row[name] is not None:
            text += f", {title} {row[name]:.4f}"
    return text


def write_log(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the whole log beside the old one, then in its place."""
    new = path.with_name("." + path.name)
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(new, path)


def read_log(path: Path, steps_done: int) -> list[dict[str, Any]]:
    """The rows of a log up to a step; what came after the checkpoint is written again."""
    if steps_done == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if int(row["step"]) <= steps_done]


def draw_log(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The losses by step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [int(row["step"]) for row in rows]
    axes.plot(steps, [float(row["loss"]) for row in rows], label="training")
    validation = [
        (int(row["step"]), float(row["validation_loss"]))
        for row in rows
        if row["validation_loss"] not in (None, "")
    ]
    if validation:
        axes.plot(*zip(*validation, strict=True), marker="o", label="validation")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=150)


def free_output(output: Path, resume: bool) -> Path:
    """The folder of the run; a TrainError where it holds another run's result."""
    if resume:
        latest(output)
        for unfinished in (*output.glob(".checkpoint-*"), *output.glob(".result-*")):
            shutil.rmtree(unfinished, ignore_errors=True)
        return output
    if output.exists() and any(output.iterdir()):
        raise TrainError(f"{output} is there already; state another --output, or --resume")
    output.mkdir(parents=True, exist_ok=True)
    return output


def latest(output: Path) -> Path:
    """The newest complete checkpoint of a run."""
    from ..training.trainer import checkpoints

    found = checkpoints(output)
    if not found:
        raise TrainError(f"{output} has no checkpoint to resume from")
    return found[-1]


def load_metric(name: str) -> Callable[[str, str], float]:
    """`exact_match`, or the function that FILE.py:FUNCTION names."""
    if name == "exact_match":
        from ..training.metrics import exact_match

        return exact_match
    file, _, function = name.rpartition(":")
    if not file.endswith(".py") or not Path(file).exists():
        raise TrainError(f"--metric {name}: pass exact_match or FILE.py:FUNCTION")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, function, None)
    if not callable(found):
        raise TrainError(f"--metric {name}: {file} has no function {function}")
    return found


def _check_plot(wanted: bool) -> None:
    if wanted and importlib.util.find_spec("matplotlib") is None:
        raise TrainError('--plot needs matplotlib: pip install "mlx-lfm2vl[plot]"')


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Callable[[int], None] | None]:
    """A progress bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(desc=title, unit=unit, leave=False) as bar:
        yield lambda done: bar.update(done - bar.n) and None
