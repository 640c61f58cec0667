"""How good a model is on validation samples."""

from __future__ import annotations

import math
import os
import runpy
from collections.abc import Callable
from typing import cast

import mlx.core as mx

from ..errors import DataError, ImageError, PromptError, TrainError
from ..generation.generate import generate
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.processor import Lfm2VlProcessor
from .data import Dataset, collate, read_conversation, read_lines, text_of, user_path
from .options import TrainingOptions
from .trainer import loss_sum

ANSWER = 256  # most tokens of an answer that a metric looks at
Metric = Callable[[str, str], float]


def validation_loss(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    dataset: Dataset,
    options: TrainingOptions,
    skip_bad: bool = False,
) -> float:
    """Mean loss over all tokens that count, of this machine's share and all others'."""
    group = mx.distributed.init()
    total, counted = mx.array(0.0), 0
    samples, size = sorted(dataset.samples, key=len), options.batch_size
    batches = [samples[i : i + size] for i in range(0, len(samples), size)]
    for chosen in batches[group.rank() :: group.size()]:
        batch = collate(chosen, processor.image_processor, options.image_options, skip_bad)
        total = total + loss_sum(model, batch)
        counted += len(batch.targets)
        mx.eval(total)
    both = mx.distributed.all_sum(mx.stack([total, mx.array(float(counted))]))
    return cast("float", (both[0] / both[1]).item())


def exact_match(answer: str, reference: str) -> float:
    """1 if the texts are equal, but for white space around them."""
    return float(answer.strip() == reference.strip())


def load_metric(name: str) -> Metric:
    """`exact_match`, or the function that FILE.py:FUNCTION names.

    Raises:
        TrainError: there is no such file or function, or the file cannot be run.
    """
    if name == "exact_match":
        return exact_match
    file, _, function = name.rpartition(":")
    path = user_path(file)
    if path.suffix != ".py" or not os.path.isfile(path):
        raise TrainError(f"--metric {name}: pass exact_match or FILE.py:FUNCTION")
    try:
        found = runpy.run_path(str(path)).get(function)
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise TrainError(f"--metric {name}: {path} fails: {_told(error)}") from error
    if not callable(found):
        raise TrainError(f"--metric {name}: {file} has no function {function}")
    return cast("Metric", found)


def answer_metric(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    dataset: Dataset,
    metric: Metric,
    limit: int,
    options: TrainingOptions,
    skip_bad: bool = False,
) -> float:
    """Mean metric of greedy answers in the place of each sample's last assistant turn.

    Args:
        metric: a function of (answer, reference).
        limit: at most so many samples, the first ones.
        skip_bad: leave samples out whose images cannot be read.

    Raises:
        DataError: an image cannot be read.
        TrainError: the metric fails, or returns no number.
    """
    lines = read_lines(dataset.path)
    values = []
    for sample in dataset.samples[:limit]:
        place = f"{dataset.path} line {sample.line}"
        messages, tools = read_conversation(lines[sample.line - 1], dataset.path.parent)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        try:
            prompt = processor(messages[:last], tools=tools, image_options=options.image_options)
        except (ImageError, PromptError) as error:  # or nothing stands before the answer
            if skip_bad:
                continue
            raise DataError(f"{place}: {error}") from None
        most = min(ANSWER, max(1, options.max_length - len(prompt.token_ids)))
        text = generate(model, processor, prompt, max_tokens=most, temperature=0.0)
        values.append(_value(metric, text, text_of(messages[last]), place))
    return sum(values) / max(1, len(values))


def _value(metric: Metric, answer: str, reference: str, place: str) -> float:
    """What a metric says about one answer, as a finite number."""
    name = getattr(metric, "__name__", repr(metric))
    try:
        value = float(metric(answer, reference))
    except (Exception, SystemExit) as error:  # a user's code may raise anything
        raise TrainError(f"metric {name} fails for {place}: {_told(error)}") from error
    if not math.isfinite(value):
        raise TrainError(f"metric {name} is {value} for {place}; it must be a finite number")
    return value


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
