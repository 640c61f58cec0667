"""How good a model is on validation samples."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from ..errors import DataError, ImageError, PromptError
from ..generation.generate import generate
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.processor import Lfm2VlProcessor
from .data import (
    Dataset,
    collate,
    read_conversation,
    read_lines,
    text_of,
)
from .trainer import TrainingOptions, _number, loss_sum

ANSWER = 256  # most tokens of an answer that a metric looks at


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
    return _number(both[0] / both[1])


def exact_match(answer: str, reference: str) -> float:
    """1 where the texts are equal, but for white space around them."""
    return float(answer.strip() == reference.strip())


def answer_metric(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    dataset: Dataset,
    metric: Callable[[str, str], float],
    limit: int,
    options: TrainingOptions,
    skip_bad: bool = False,
) -> float:
    """Mean metric of greedy answers in the place of each sample's last assistant turn.

    Args:
        metric: a function of (answer, reference).
        limit: at most so many samples, the first ones.
        skip_bad: leave samples out whose images cannot be read.
    """
    lines = read_lines(dataset.path)
    values = []
    for sample in dataset.samples[:limit]:
        messages, tools = read_conversation(lines[sample.line - 1], dataset.path.parent)
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        try:
            prompt = processor(messages[:last], tools=tools, image_options=options.image_options)
        except (ImageError, PromptError) as error:  # or nothing stands before the answer
            if skip_bad:
                continue
            raise DataError(f"{dataset.path} line {sample.line}: {error}") from None
        room = max(1, options.max_length - len(prompt.token_ids))
        text = generate(model, processor, prompt, max_tokens=min(room, ANSWER), temperature=0.0)
        values.append(metric(text, text_of(messages[last])))
    return sum(values) / max(1, len(values))
