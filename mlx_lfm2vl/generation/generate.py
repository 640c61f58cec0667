"""`generate_step`, `stream_generate` and `generate`: an engine with one row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Unpack, cast

import mlx.core as mx

from ..errors import PromptError
from ..models.cache import Cache
from ..models.lfm2 import Lfm2ForCausalLM, check_token_ids
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import DEFAULT_MAX_TOKENS, CacheOptions
from ..prompts.image_processor import ImageInput
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import NO_CACHE_OPTIONS, Question, QuestionSettings
from .answer import GenerationResponse
from .engine import PREFILL_STEP_SIZE, Engine, Row
from .memory import memory_limits
from .sampling import LogitsProcessor, Sampler


def generate_step(
    prompt: mx.array | Sequence[int],
    model: Lfm2VlForConditionalGeneration | Lfm2ForCausalLM,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    sampler: Sampler | None = None,
    logits_processors: Sequence[LogitsProcessor] = (),
    prompt_cache: list[Cache] | None = None,
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
    prefill_step_size: int = PREFILL_STEP_SIZE,
    input_embeddings: mx.array | None = None,
) -> Iterator[tuple[int, mx.array]]:
    """Yields (token, log-probabilities (vocab,)), as mlx-lm's function of this name.

    Args:
        prompt: token ids (tokens,), which follow what `prompt_cache` holds.
        max_tokens: how many tokens at most.
        sampler: log-probabilities (batch, vocab) -> tokens (batch,); greedy by default.
        logits_processors: see `sampling`.
        prompt_cache: a cache to continue from; it holds everything that was read when the last
            token has come.
        cache_options: how attention layers remember; a rotating cache pins the prompt.
        prefill_step_size: positions of the prompt that go through the model at once.
        input_embeddings: (tokens, hidden), what is read instead of the prompt's own; at least
            one. Logits processors still see the prompt.
    """
    engine = Engine(model, prefill_step_size=prefill_step_size)
    ids = cast("list[int]", prompt.tolist()) if isinstance(prompt, mx.array) else list(prompt)
    if len(ids) == 0:
        raise PromptError("the prompt has no tokens; it needs one or more")
    check_token_ids(ids, engine.language_model.vocab_size)
    cache = prompt_cache
    if cache is None:
        cache = engine.language_model.make_cache(cache_options, len(ids))
    embeddings, known = input_embeddings, cache[0].offset
    if embeddings is None:
        embeddings = engine.language_model.embed(mx.array(ids))
    processors = list(logits_processors)
    row = StepRow(ids, max_tokens, sampler, processors, cache, cache_options, keep_cache=True)
    row.embeddings, row.known = embeddings, known
    engine.begin(row)
    yield from run(engine, row)


class StepRow(Row):
    """A row whose embeddings are there, from position `known` on."""

    embeddings: mx.array
    known: int

    @property
    def length(self) -> int:
        return self.known + len(self.embeddings)

    def embed(self, start: int, stop: int) -> mx.array:
        return self.embeddings[start - self.known : stop - self.known]


def stream_generate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt | Question,
    images: ImageInput | Sequence[ImageInput] | None = None,
    **settings: Unpack[QuestionSettings],
) -> Iterator[GenerationResponse]:
    """Yields an answer piece by piece.

    Args:
        prompt: a text, a conversation, what the processor made of one, or a whole `Question`.
        images: one image or several; see `Lfm2VlProcessor`.
        settings: see `QuestionSettings`.

    Raises:
        PromptError, ImageError, ConfigError: what was asked makes no sense or cannot be read.
    """
    question = as_question(prompt, images, **settings)

    def responses() -> Iterator[GenerationResponse]:
        engine = Engine(model, processor)
        yield from run(engine, engine.add(question))

    return responses()


def generate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt | Question,
    images: ImageInput | Sequence[ImageInput] | None = None,
    **settings: Unpack[QuestionSettings],
) -> str:
    """The whole answer as a text. Arguments and errors are those of `stream_generate`."""
    responses = stream_generate(model, processor, prompt, images, **settings)
    return "".join(response.text for response in responses)


def as_question(
    prompt: Conversation | Prompt | Question,
    images: ImageInput | Sequence[ImageInput] | None = None,
    **settings: Unpack[QuestionSettings],
) -> Question:
    """A question as it is, or one made of its parts."""
    if not isinstance(prompt, Question):
        return Question(prompt, images, **settings)
    if images is not None or settings:
        raise TypeError("a Question holds its images and settings already")
    return prompt


def run(engine: Engine, row: Row) -> Iterator[Any]:
    """Steps until a row has ended, and yields its responses; raises what ends it."""
    with memory_limits(engine.model):
        try:
            while not row.finished:
                for event in engine.step():
                    if event.row is row:
                        if event.error is not None:
                            raise event.error
                        if event.response is not None:  # a prompt that was only read has none
                            yield event.response
        finally:
            engine.cancel(row)
