"""A run around a `Trainer`: its folder, its log, its checkpoints, and what it tells."""

from __future__ import annotations

import csv
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.adapters import ADAPTER_CONFIG
from ..errors import Lfm2VlError, TrainError
from .data import Dataset, Progress
from .metrics import Metric, answer_metric, validation_loss
from .options import RunOptions
from .trainer import StepReport, Trainer, checkpoints, publish, replaced

LOG, PLOT = "log.csv", "loss.png"
MEASURES = ("loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb")
COLUMNS = ("step", *MEASURES, "validation_loss", "metric")
Row = Mapping[str, Any]  # of the log; texts, if they were read back


class Run:
    """Takes the steps of a trainer; keeps log, checkpoints and result in one folder.

    Args:
        output: an open folder, see `open_output`.
        source: folder of the base model.
        reports: of steps that the log may lack, from `Trainer.resume`.
        metric: a function of (answer, reference), for answers to validation samples.
        say: takes lines for the user.
        progress: is given the steps, their unit, how many are done and how many there are.
    """

    def __init__(
        self,
        trainer: Trainer,
        output: Path,
        source: Path,
        options: RunOptions,
        reports: Sequence[StepReport] = (),
        validation: Dataset | None = None,
        metric: Metric | None = None,
        *,
        say: Callable[[str], None] | None = None,
        progress: Progress | None = None,
    ) -> None:
        if metric is not None and validation is None:
            raise TrainError("--metric needs validation samples; pass --validation")
        self.trainer, self.output, self.source, self.options = trainer, output, source, options
        self.validation, self.metric, self.progress = validation, metric, progress
        self.is_first = trainer.group.rank() == 0  # the machine that writes
        self.say = say if say is not None and self.is_first else lambda text: None
        self.rows: list[Row] = read_log(output / LOG, trainer.steps_done)
        reported = int(self.rows[-1]["step"]) if self.rows else 0
        self.recent = [report for report in reports if report.step > reported]
        self.saved = trainer.steps_done

    def train(self, interrupted: Callable[[], bool] = lambda: False) -> bool:
        """Takes the steps that are left; False if it was stopped, with a checkpoint."""
        trainer, options = self.trainer, self.trainer.options
        self._tell_start()
        self.report()  # what a run had no time for after its last checkpoint
        steps: Iterable[StepReport] = trainer.run()
        if self.progress is not None:
            steps = self.progress(steps, "step", trainer.steps_done, options.iters)
        for report in steps:
            self.recent.append(report)
            # asked once a step: what comes later waits for the next one, and its checkpoint
            stop = any_machine(interrupted())
            if stop or report.step == options.iters or report.step % self.options.save_every == 0:
                self.save()
                any_machine(False)  # as one process ends, MLX's launcher kills the others
            self.report()
            if stop:
                self.say(f"stopped after step {report.step}; --resume continues from here")
                return False
        if self.is_first:
            publish(checkpoints(self.output)[-1], self.output)
            if self.options.plot:
                draw_log(self.rows, self.output / PLOT)
        if trainer.skipped:
            self.say(f"skipped {len(trainer.skipped)} samples whose images could not be read")
        self.say(f"wrote {self.output}")
        return True

    def save(self) -> None:
        """Writes a checkpoint, unless there is one of this step."""
        if self.is_first and self.saved != self.trainer.steps_done:
            keep = self.options.keep_checkpoints
            self.trainer.save(self.output, self.source, keep, self.recent)
        self.saved = self.trainer.steps_done

    def report(self) -> None:
        """Adds a row to the log if one is due: means over the steps since the last one."""
        step, options, recent = self.trainer.steps_done, self.options, self.recent
        evaluates = step == self.trainer.options.iters or step % options.steps_per_eval == 0
        if not recent or not (evaluates or step % options.steps_per_report == 0):
            return
        loss, metric = self.evaluate() if evaluates else (None, None)
        row = {
            "step": step,
            "loss": round(fmean(report.loss for report in recent), 5),
            "learning_rate": float(f"{recent[-1].learning_rate:.4g}"),
            "grad_norm": round(fmean(report.grad_norm for report in recent), 4),
            "tokens_per_second": round(fmean(report.tokens_per_second for report in recent)),
            "peak_memory_gb": round(recent[-1].peak_memory, 3),
            "validation_loss": None if loss is None else round(loss, 5),
            "metric": None if metric is None else round(metric, 4),
        }
        self.rows.append(row)
        self.recent = []
        more = {"validation loss": loss, "metric": metric}
        self.say(
            f"step {step}: loss {row['loss']:.4f}, {row['tokens_per_second']} tok/s, peak memory "
            f"{row['peak_memory_gb']:.2f} GB"
            + "".join(f", {name} {value:.4f}" for name, value in more.items() if value is not None)
        )
        if self.is_first:
            write_log(self.output / LOG, self.rows)

    def evaluate(self) -> tuple[float | None, float | None]:
        """Validation loss and mean metric, if asked for; if they fail, the steps are kept."""
        if self.validation is None:
            return None, None
        trainer, metric, bad = self.trainer, self.metric, self.options.skip_bad
        parts = (trainer.model, trainer.processor, self.validation)
        try:
            loss = validation_loss(*parts, trainer.options, bad)
            if metric is None or not self.is_first:
                return loss, None
            limit = self.options.metric_samples
            return loss, answer_metric(*parts, metric, limit, trainer.options, bad)
        except Lfm2VlError:
            self.save()
            raise

    def _tell_start(self) -> None:
        trainer = self.trainer
        for name, dataset in (("training", trainer.dataset), ("validation", self.validation)):
            if dataset is not None and dataset.skipped:
                line, reason = dataset.skipped[0]
                self.say(
                    f"{name}: skipped {len(dataset.skipped)} bad lines, first {line}: {reason}"
                )
        learned = sum(array.size for _, array in tree_flatten(trainer.model.trainable_parameters()))
        self.say(
            f"{len(trainer.dataset)} samples, {learned / 1e6:.3f} million weights learn, steps "
            f"{trainer.steps_done + 1} to {trainer.options.iters}"
        )


def any_machine(value: bool) -> bool:
    """Whether it is true on any machine; each waits until all of them ask."""
    return bool(mx.distributed.all_max(mx.array(value, mx.int32)).item())


def open_output(output: Path, resume: bool) -> Path | None:
    """Makes the folder of a run; gives the checkpoint to resume from, None for a new run.

    One that was stopped before its first checkpoint begins again, with `resume` or without. Only
    what a killed run left half-written is removed.

    Raises:
        TrainError: the folder cannot be made, holds something else, or nothing to resume.
    """
    try:
        if not resume:
            output.mkdir(parents=True, exist_ok=True)
        names = os.listdir(output) if os.path.isdir(output) else None
    except (OSError, ValueError) as error:
        raise TrainError(f"{output} cannot be a folder for the result: {error}") from None
    done = [] if names is None else checkpoints(output)
    begun = names is not None and _is_begun(output, names)
    if resume and not (done or begun):
        raise TrainError(f"{output} has no checkpoint to resume from")
    if not resume and not begun:
        raise TrainError(f"{output} is there already; choose another --output, or --resume")
    for name in names or []:
        if name.startswith(".checkpoint-"):
            shutil.rmtree(output / name, ignore_errors=True)
    return done[-1] if done else None


def _is_begun(output: Path, names: Sequence[str]) -> bool:
    """Whether a folder is empty, or that of a run that has no checkpoint and no result."""
    theirs = (ADAPTER_CONFIG, "config.json", "checkpoint-")
    ours = (".checkpoint-", f".{LOG}")  # half-written
    if any(name.startswith(theirs) for name in names):
        return False
    return not names or is_log(output / LOG) or any(name.startswith(ours) for name in names)


def write_log(path: Path, rows: Sequence[Row]) -> None:
    """Writes the whole log, in the place of the old one."""
    with replaced(path) as new, new.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def is_log(path: Path) -> bool:
    """Whether a file is a log of a run."""
    if not path.is_file():
        return False
    with path.open(newline="", errors="replace") as file:
        return file.readline().rstrip() == ",".join(COLUMNS)


def read_log(path: Path, steps_done: int) -> list[Row]:
    """The rows of a log up to a step; what came after the checkpoint is written again.

    Raises:
        TrainError: the log is not one, or a row of it is damaged.
    """
    if steps_done == 0 or not path.exists():
        return []
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                numbers = {name: float(text) for name, text in row.items() if text != ""}
                if [*row] != [*COLUMNS] or "step" not in numbers:
                    raise ValueError
                if int(row["step"]) <= steps_done:
                    rows.append(row)
        except (ValueError, TypeError, csv.Error):
            raise TrainError(
                f"{path}:{reader.line_num} is no row of a log; remove it to resume"
            ) from None
    return rows


def check_plot() -> None:
    """Raises a TrainError if nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise TrainError('--plot needs matplotlib: pip install "mlx-lfm2vl[plot]"')


def draw_log(rows: Sequence[Row], path: Path) -> None:
    """The losses by step, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for column, label in (("loss", "training"), ("validation_loss", "validation")):
        points = [(int(r["step"]), float(r[column])) for r in rows if r[column] not in (None, "")]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log")
    axes.legend()
    with replaced(path) as new:
        figure.savefig(new, dpi=150, format="png")
