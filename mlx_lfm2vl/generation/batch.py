"""Many questions at once: rows leave when they are done, and waiting ones take their place."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

from mlx.utils import tree_flatten

from ..errors import PromptError
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import Bound
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import NO_CACHE_OPTIONS, Question
from ..prompts.tool_calls import ToolCall
from .engine import AnswerRow, Engine
from .estimate import position_bytes
from .generate import as_question
from .memory import memory_limits
from .usage import Usage

DEFAULT_BATCH_SIZE = 8
BATCH_SIZE = Bound(int, 1, 4096)
MOST_ROWS = 16  # of what is chosen by memory; wider steps gain little
TYPICAL_POSITIONS = 4096  # a large image, a question, an answer
NO_USAGE = Usage()


@dataclass(frozen=True)
class BatchResult:
    """The answer to one question.

    Attributes:
        index: which question, counted from 0.
        text, tokens: the answer.
        finish_reason: "stop" or "length".
        prompt_tokens: positions of the prompt.
        image_tokens: image tokens of each image.
        closed: whether it is whole at its limit, see `GenerationResponse`.
        tool_calls: what the answer calls; they stand in the text, too.
        usage: what it cost.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: tuple[int, ...]
    closed: bool = False
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage = NO_USAGE


def batch_generate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    questions: Iterable[Conversation | Prompt | Question],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Callable[[int], None] | None = None,
) -> list[BatchResult]:
    """Answers many questions, in their order. Each answer is the one that it would get alone.

    Args:
        questions: texts, conversations, prepared prompts, or `Question`s; taken when their turn
            comes, so a generator may make them.
        batch_size: how many are in work at once.
        progress: called with the number of finished answers.

    Raises:
        PromptError, ImageError, ConfigError: of the first question that makes no sense or cannot
            be read.
    """
    results = []
    for result in stream_batch(model, processor, questions, batch_size=batch_size):
        results.append(result)
        if progress is not None:
            progress(len(results))
    return sorted(results, key=lambda result: result.index)


def stream_batch(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    questions: Iterable[Conversation | Prompt | Question],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Iterator[BatchResult]:
    """As `batch_generate`, but yields each answer as it is finished."""
    BATCH_SIZE.check("batch_size", batch_size, PromptError)
    # all prompts are read before a step: nobody watches a single answer grow
    engine = Engine(model, processor, max_rows=batch_size, fair=False)
    waiting = enumerate(questions)
    pieces: dict[AnswerRow, tuple[int, list[str], list[ToolCall]]] = {}
    with memory_limits(model):
        while True:
            while len(pieces) < batch_size and (following := next(waiting, None)) is not None:
                index, question = following
                pieces[engine.add(as_question(question))] = index, [], []
            if not pieces:
                return
            for event, response, error in engine.step():
                if error is not None:
                    raise error
                row = cast(AnswerRow, event)
                index, texts, calls = pieces[row]
                texts.append(response.text)
                calls += response.tool_calls
                if response.finish_reason is not None:
                    del pieces[row]
                    yield BatchResult(
                        index,
                        "".join(texts),
                        row.tokens,
                        response.finish_reason,
                        response.prompt_tokens,
                        response.image_tokens,
                        response.closed,
                        tuple(calls),
                        Usage.of(row),
                    )


def suggested_batch_size(model: Lfm2VlForConditionalGeneration) -> int:
    """How many answers may grow at once in half of the memory that the weights leave free."""
    itemsize = model.language_model.model.embedding_norm.weight.dtype.size
    row = TYPICAL_POSITIONS * position_bytes(model.config.text_config, itemsize, NO_CACHE_OPTIONS)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 - weights
    return max(1, min(MOST_ROWS, free // 2 // row))
