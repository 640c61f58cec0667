"""What commands tell of costs before a run, and remember of them after it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from .terminal import tell, write

if TYPE_CHECKING:
    from ..generation.estimate import Estimate
    from ..generation.usage import Usage
    from ..models.lfm2_vl import Lfm2VlForConditionalGeneration

CURE = "run the benchmark, or any question like it, once"
STAGES = {"vision": "images", "prefill": "prompt", "decode": "answer"}


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """--dry-run."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="only tell what it would cost: tokens, memory, and seconds as earlier runs have shown",
    )


def teach(model: Lfm2VlForConditionalGeneration) -> None:
    """Has remembered, from now on, how long a model's answers take, for later estimates."""
    from ..generation.speeds import Learner

    model.learner = Learner(model, tell)


def learn(model: Lfm2VlForConditionalGeneration, usages: Sequence[Usage]) -> None:
    """Remembers what a model's answers cost."""
    from ..generation.speeds import Learner

    Learner(model, tell).learn([(usage, ()) for usage in usages])


def write_estimate(found: Estimate, as_json: bool) -> None:
    """Tells what a question would cost."""
    if as_json:
        write(json.dumps({**asdict(found), "seconds": found.seconds}) + "\n")
        return
    images, tokens = len(found.image_tokens), sum(found.image_tokens)
    about = ""
    if images:
        about = (
            f", {tokens:,} of them of {count(images, 'image')} "
            f"({count(found.views, 'view')}, {found.patches:,} patches)"
        )
    seconds = {stage: getattr(found, f"seconds_{stage}") for stage in STAGES}
    write(
        f"prompt: {found.prompt_tokens:,} tokens{about}\n"
        f"answer: at most {count(found.max_tokens, 'token')}\n"
        f"memory: {found.memory / 1e9:.2f} GB of weights and cache\n"
        f"time: {time_of(seconds)}\n"
    )


def time_of(seconds: Mapping[str, float | None]) -> str:
    """Seconds of each stage and of all, or that they are unknown."""
    known = [s for s in seconds.values() if s is not None]
    if not any(known):
        return f"unknown; {CURE}" if len(known) < len(seconds) else "none"
    parts = [
        f"{STAGES[stage]} {'unknown' if s is None else duration(s)}"
        for stage, s in seconds.items()
        if s != 0
    ]
    if len(known) < len(seconds):
        return f"{', '.join(parts)}; {CURE}"
    return f"at most {duration(sum(known))} ({', '.join(parts)})"


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def count(number: int, name: str) -> str:
    """A number and what it counts."""
    return f"{number:,} {name}{'' if number == 1 else 's'}"
