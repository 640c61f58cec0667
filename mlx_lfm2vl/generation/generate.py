"""Generation: `generate_step` ⊂ `stream_generate` ⊂ `generate`.

`python -m mlx_lfm2vl.generate` is the command line, see `cli.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import PromptError
from ..models.cache import Cache, quantize_caches
from ..models.lfm2 import Lfm2ForCausalLM
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import DEFAULT_MAX_TOKENS, CacheOptions, ImageOptions
from ..prompts.image_processor import NO_OPTIONS, ImageInput
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt
from .answer import Answer, AnswerOptions, Clock, GenerationResponse
from .decoding import DecodeStep
from .sampling import LogitsProcessor, Sampler, from_settings

PREFILL_STEP_SIZE = 1024  # positions of a prompt at once; more takes memory and saves no time
CLEAR_CACHE_EVERY = 256  # tokens
NO_CACHE_OPTIONS = CacheOptions()


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

    The next step is under way before a token is read; only the first token goes out before it.

    Args:
        prompt: token ids (tokens,).
        max_tokens: how many tokens at most.
        sampler: log-probabilities (batch, vocab) -> tokens (batch,); greedy by default.
        logits_processors: see `sampling`.
        prompt_cache: a cache to go on from, filled in place. What it holds of the prompt already
            is left out of `input_embeddings`.
        cache_options: how attention layers remember; a rotating cache pins the prompt.
        prefill_step_size: positions of the prompt that go through the model at once.
        input_embeddings: (tokens, hidden), to use instead of the prompt's own; at least one.
    """
    language_model = model.language_model if "language_model" in model else model
    cache = prompt_cache
    if cache is None:
        cache = language_model.make_cache(cache_options, len(prompt))
    tokens = prompt if isinstance(prompt, mx.array) else mx.array(list(prompt))
    if input_embeddings is None:
        input_embeddings = language_model.embed(tokens)
    step = _Step(language_model, cache, cache_options, sampler, list(logits_processors), tokens)
    y, logprobs = step.prefill(input_embeddings, prefill_step_size)
    mx.async_eval(y)
    for n in range(1, max_tokens + 1):
        if n < max_tokens:
            next_y, next_logprobs = step(y)
            if n > 1:
                mx.async_eval(next_y)
        yield cast(int, y.item()), logprobs
        if n == max_tokens:
            return
        if n == 1:  # only now: a CPU takes work over no faster than it does it
            mx.async_eval(next_y)
        if n % CLEAR_CACHE_EVERY == 0:
            mx.clear_cache()
        y, logprobs = next_y, next_logprobs


def read_embeddings(
    language_model: Lfm2ForCausalLM,
    embeddings: mx.array,
    cache: list[Cache],
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
    step_size: int = PREFILL_STEP_SIZE,
) -> None:
    """Fills a cache with (tokens, hidden), piece by piece, without any logits."""
    for start in range(0, len(embeddings), step_size):
        language_model.model(embeddings[None, start : start + step_size], cache, last_only=True)
        quantize_caches(cache, cache_options)
        mx.async_eval([entry.state for entry in cache])


def read_prompt(
    language_model: Lfm2ForCausalLM,
    embeddings: mx.array,
    cache: list[Cache],
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
    step_size: int = PREFILL_STEP_SIZE,
) -> mx.array:
    """Fills a cache with (tokens, hidden); logits (1, vocab) of the last position only."""
    rest = (len(embeddings) - 1) % step_size + 1
    read_embeddings(language_model, embeddings[:-rest], cache, cache_options, step_size)
    hidden = language_model.model(embeddings[None, -rest:], cache, last_only=True).last_hidden_state
    quantize_caches(cache, cache_options)
    return language_model.logits(hidden[:, -1])


class _Step:
    """One pass through the language model and the sampler, all on the device."""

    def __init__(
        self,
        language_model: Lfm2ForCausalLM,
        cache: list[Cache],
        cache_options: CacheOptions,
        sampler: Sampler | None,
        logits_processors: list[LogitsProcessor],
        tokens: mx.array,
    ) -> None:
        self.language_model = language_model
        self.cache = cache
        self.cache_options = cache_options
        self.sampler = sampler
        self.logits_processors = logits_processors
        self.tokens = tokens
        self.decode: DecodeStep | None = None

    def prefill(self, embeddings: mx.array, step_size: int) -> tuple[mx.array, mx.array]:
        """(tokens, hidden) -> first token (1,) and its log-probabilities (vocab,)."""
        return self._choose(
            read_prompt(self.language_model, embeddings, self.cache, self.cache_options, step_size)
        )

    def __call__(self, y: mx.array) -> tuple[mx.array, mx.array]:
        """Token (1,) -> next token (1,) and its log-probabilities (vocab,)."""
        if self.logits_processors:
            self.tokens = mx.concatenate([self.tokens, y])
        if self.decode is None:
            self.decode = DecodeStep(self.language_model)
        logits = self.decode(y, self.cache)
        quantize_caches(self.cache, self.cache_options)
        return self._choose(logits)

    def _choose(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        for processor in self.logits_processors:
            logits = processor(self.tokens, logits)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # logprobs stay lazy where nobody needs them, so greedy decoding takes the logits
        y = mx.argmax(logits, axis=-1) if self.sampler is None else self.sampler(logprobs)
        return y, logprobs[0]


def stream_generate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt,
    images: ImageInput | Sequence[ImageInput] | None = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    image_options: ImageOptions = NO_OPTIONS,
    image_features: mx.array | None = None,
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
    measure_vision: bool = False,
) -> Iterator[GenerationResponse]:
    """Yields an answer piece by piece.

    Args:
        prompt: a text, a conversation, or what the processor made of one.
        images: one image or several; see `Lfm2VlProcessor`.
        max_tokens: how many tokens at most.
        temperature, top_p, top_k, min_p, repetition_penalty, repetition_context_size: see
            `Sampling`; None takes the checkpoint's recommendation. Temperature 0 alone is plain
            greedy decoding.
        seed: makes sampling repeatable.
        stop: texts that end the answer; they are not part of it.
        tools: JSON schemas of functions the model may call.
        image_options: changes of the checkpoint's image settings.
        image_features: what `model.encode_images` gave for these images, so that they are not
            encoded again.
        cache_options: bounds or quantizes what attention layers remember.
        measure_vision: wait for the vision tower, to tell its time; costs a little speed.

    Raises:
        PromptError, ImageError, ConfigError: what was asked makes no sense or cannot be read.
    """
    if not isinstance(prompt, Prompt):
        prompt = processor(prompt, images, tools=tools, image_options=image_options)
    elif images is not None or tools is not None:
        raise PromptError("a prepared prompt holds its images and tools already")
    sampling = processor.generation_config.sampling.override(
        temperature, top_p, top_k, min_p, repetition_penalty, repetition_context_size
    )
    options = AnswerOptions(max_tokens, sampling, seed, _texts(stop))
    clock = Clock(prompt)
    with wired_limit(model):
        embeddings = clock.embed(model, image_features, measure_vision)
        cache = model.make_cache(cache_options, len(prompt.token_ids))
        yield from stream_answer(
            model, processor, prompt, options, cache, embeddings, clock, cache_options
        )


def stream_answer(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Prompt,
    options: AnswerOptions,
    cache: list[Cache],
    embeddings: mx.array,
    clock: Clock,
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
) -> Iterator[GenerationResponse]:
    """Yields an answer to a prompt whose first positions may be in the cache already.

    Args:
        cache: filled in place; afterwards it holds the prompt and the tokens that were read.
        embeddings: (rest, hidden) of the positions that are not in the cache.
        clock: started when the question came.
    """
    answer = Answer(processor, options)
    sampler, logits_processors = from_settings(options.sampling, options.seed)
    for token, logprobs in generate_step(
        prompt.token_ids,
        model,
        max_tokens=options.max_tokens,
        sampler=sampler,
        logits_processors=logits_processors,
        prompt_cache=cache,
        cache_options=cache_options,
        input_embeddings=embeddings,
    ):
        text, finish_reason = answer.add(token)
        yield clock.response(text, token, logprobs, finish_reason)
        if finish_reason is not None:
            return


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    return (stop,) if isinstance(stop, str) else tuple(stop)


def generate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt,
    images: ImageInput | Sequence[ImageInput] | None = None,
    *,
    max_tokens: int = DEFAULT_MAX_TOKENS,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] = (),
    tools: Sequence[Mapping[str, Any]] | None = None,
    image_options: ImageOptions = NO_OPTIONS,
    image_features: mx.array | None = None,
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
) -> str:
    """The whole answer as a text. Arguments and errors are those of `stream_generate`."""
    responses = stream_generate(
        model,
        processor,
        prompt,
        images,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        repetition_context_size=repetition_context_size,
        seed=seed,
        stop=stop,
        tools=tools,
        image_options=image_options,
        image_features=image_features,
        cache_options=cache_options,
    )
    return "".join(response.text for response in responses)


@contextmanager
def wired_limit(model: nn.Module) -> Iterator[None]:
    """Keeps the model's memory wired on Metal while it generates; restores the limit after.

    The limit is the model's size and a quarter, at most what the machine recommends.
    """
    if not mx.metal.is_available():
        yield
        return
    model_bytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    recommended = int(mx.device_info()["max_recommended_working_set_size"])
    before = mx.set_wired_limit(min(recommended, model_bytes + model_bytes // 4))
    try:
        yield
    finally:
        mx.synchronize()
        mx.set_wired_limit(before)
