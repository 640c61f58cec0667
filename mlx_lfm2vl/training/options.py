"""How to train, and how often a run saves, reports and evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import TrainError
from ..options import ImageOptions

OPTIMIZERS = ("adamw", "adam", "muon", "sgd", "lion", "adafactor")
SCHEDULES = ("cosine", "linear", "constant")
COUNT = (1, 2**31 - 1)
POSITIVE = (1e-37, 1e37)  # float32 holds them, and ten times as much
COUNTS = ("iters", "batch_size", "grad_accumulation_steps", "rank", "max_length")
LIMITS = {
    **dict.fromkeys(COUNTS, COUNT),
    **dict.fromkeys(("learning_rate", "scale"), POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), (0, POSITIVE[1])),
    "dropout": (0, 0.999),
    "seed": (0, 2**64 - 1),
}


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. Names are mlx-lm's if it has one.

    Attributes:
        fine_tune_type: `full`, `lora` or `dora`.
        train: parts of the model that learn.
        iters: optimizer steps.
        batch_size: samples per step and machine, before accumulation.
        grad_accumulation_steps: batches whose gradients are added up before a step.
        learning_rate: the highest, after `warmup` steps; it falls to a tenth at the end.
        max_grad_norm: gradients are shortened to this length; 0 leaves them.
        rank, scale, dropout: of adapters; the update is `scale · B · A`.
        num_layers: how many last layers get adapters; -1 for all.
        grad_checkpoint: compute activations again instead of keeping them.
        max_length: most tokens of a sample, image tokens included.
    """

    fine_tune_type: str = "lora"
    train: tuple[str, ...] = ("language",)
    iters: int = 1000
    batch_size: int = 4
    grad_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    rank: int = 8
    scale: float = 20.0
    dropout: float = 0.0
    num_layers: int = -1
    grad_checkpoint: bool = False
    max_length: int = 4096
    seed: int = 0
    image_options: ImageOptions = ImageOptions()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        from ..checkpoints.adapters import FINE_TUNE_TYPES, PARTS

        known = {"fine_tune_type": FINE_TUNE_TYPES, "optimizer": OPTIMIZERS, "schedule": SCHEDULES}
        for name, choices in known.items():
            _check(self, name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        if not self.train or len({*self.train} & {*PARTS}) < len(self.train):
            raise TrainError(
                f"train is {','.join(self.train)!r}; choose among {', '.join(PARTS)}, each once"
            )
        check_limits(self, LIMITS)
        layers, warmup = self.num_layers, self.warmup
        _check(self, "num_layers", layers == -1 or layers in range(*COUNT), "1 or more, or -1")
        _check(self, "warmup", 0 <= warmup < self.iters, f"below the {self.iters} iters")
        if self.optimizer == "adam" and self.weight_decay != 0:
            raise TrainError("adam has no weight_decay; adamw has")


@dataclass(frozen=True)
class RunOptions:
    """What a run keeps in its folder, and how often, in steps.

    Attributes:
        output: the folder.
        keep_checkpoints: the last ones; older ones are removed.
        metric_samples: how many validation samples are answered for a metric.
        skip_bad: leave samples out that cannot be read.
        plot: draw the losses in the end.
    """

    output: str = "adapters"
    save_every: int = 100
    keep_checkpoints: int = 2
    steps_per_report: int = 10
    steps_per_eval: int = 200
    metric_samples: int = 50
    skip_bad: bool = False
    plot: bool = False

    def __post_init__(self) -> None:
        names = ("save_every", "keep_checkpoints", "steps_per_report", "steps_per_eval")
        check_limits(self, dict.fromkeys((*names, "metric_samples"), COUNT))


def check_limits(options: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises a TrainError if a value is outside of its limits, or no number."""
    for name, (least, most) in limits.items():
        _check(options, name, least <= getattr(options, name) <= most, f"from {least} to {most}")


def _check(options: Any, name: str, good: bool, right: str) -> None:
    if not good:
        raise TrainError(f"{name} is {getattr(options, name)!r}; it must be {right}")
