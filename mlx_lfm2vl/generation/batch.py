"""Many conversations at once: rows leave when they are done, and waiting ones take their place.

`python -m mlx_lfm2vl.batch` answers one question about a folder of images, see `folder.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx

from ..errors import PromptError
from ..models.cache import BatchKVCache, ConvCache, KVCache
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import DEFAULT_MAX_TOKENS, ImageOptions, Sampling
from ..prompts.image_processor import NO_OPTIONS, ImageInput
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt
from .answer import Answer, AnswerOptions
from .generate import read_prompt, wired_limit
from .sampling import from_settings

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True)
class BatchRequest:
    """One row, with settings of its own.

    Attributes:
        prompt, images: as `generate` takes them.
        max_tokens: how long the answer may be.
        sampling: None takes the checkpoint's recommendation.
        seed: makes this row repeatable, whatever its neighbours do.
        stop: texts that end the answer.
    """

    prompt: Conversation | Prompt
    images: ImageInput | Sequence[ImageInput] | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS
    sampling: Sampling | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    image_options: ImageOptions = NO_OPTIONS


@dataclass(frozen=True)
class BatchResult:
    """The answer to one row.

    Attributes:
        index: which request, counted from 0.
        text, tokens: the answer.
        finish_reason: "stop" or "length".
        prompt_tokens: positions of the prompt.
        image_tokens: image tokens of each image.
    """

    index: int
    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: int
    image_tokens: tuple[int, ...]


def batch_generate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    requests: Iterable[Conversation | Prompt | BatchRequest],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Callable[[int], None] | None = None,
) -> list[BatchResult]:
    """Answers many prompts, in their order. Each answer is the one that it would get alone.

    Args:
        requests: texts, conversations, prepared prompts, or `BatchRequest`s; taken when their
            turn comes, so a generator may make them.
        batch_size: how many are in work at once.
        progress: called with the number of finished rows.

    Raises:
        PromptError, ImageError: of the first request that makes no sense or cannot be read.
    """
    results = []
    for result in stream_batch(model, processor, requests, batch_size=batch_size):
        results.append(result)
        if progress is not None:
            progress(len(results))
    return sorted(results, key=lambda result: result.index)


def stream_batch(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    requests: Iterable[Conversation | Prompt | BatchRequest],
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> Iterator[BatchResult]:
    """As `batch_generate`, but yields each answer as it is finished."""
    if batch_size < 1:
        raise PromptError(f"batch_size is {batch_size}; it must be 1 or more")
    waiting = enumerate(requests)
    batch = _Batch(model)
    with wired_limit(model):
        while True:
            arrivals = []
            for index, request in waiting:
                arrivals.append(_Row(index, request, model, processor))
                if len(batch.rows) + len(arrivals) == batch_size:
                    break
            batch.join(arrivals)
            if not batch.rows:
                return
            finished: list[BatchResult] = []
            while not finished:
                finished = batch.step()
            yield from finished


class _Row:
    """One conversation: its prompt is read alone, so nothing is padded there."""

    def __init__(
        self,
        index: int,
        request: Conversation | Prompt | BatchRequest,
        model: Lfm2VlForConditionalGeneration,
        processor: Lfm2VlProcessor,
    ) -> None:
        if not isinstance(request, BatchRequest):
            request = BatchRequest(request)
        prompt = request.prompt
        if not isinstance(prompt, Prompt):
            prompt = processor(prompt, request.images, image_options=request.image_options)
        sampling = request.sampling
        if sampling is None:
            sampling = processor.generation_config.sampling
        options = AnswerOptions(request.max_tokens, sampling, request.seed, request.stop)
        self.index = index
        self.prompt = prompt
        self.answer = Answer(processor, options)
        self.sampler, self.logits_processors = from_settings(sampling, request.seed)
        self.history = mx.array(prompt.token_ids)
        self.pieces: list[str] = []
        self.tokens: list[int] = []
        self.cache = model.make_cache()
        self.first = self._read(model)

    def _read(self, model: Lfm2VlForConditionalGeneration) -> mx.array:
        """Reads the prompt; the first token (1,)."""
        embeddings = model.embed_prompt(self.prompt)
        y = self.choose(read_prompt(model.language_model, embeddings, self.cache))
        mx.async_eval(y)
        return y

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken as it is."""
        return self.sampler is None and not self.logits_processors

    def choose(self, logits: mx.array) -> mx.array:
        """(1, vocab) -> token (1,)."""
        for processor in self.logits_processors:
            logits = processor(self.history, logits)
        if self.sampler is None:
            return mx.argmax(logits, axis=-1)
        return self.sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    def take(self, token: int) -> BatchResult | None:
        """Adds a token to the answer; the result, where it ends it."""
        self.tokens.append(token)
        text, finish_reason = self.answer.add(token)
        self.pieces.append(text)
        if finish_reason is None:
            return None
        return BatchResult(
            self.index,
            "".join(self.pieces),
            self.tokens,
            finish_reason,
            len(self.prompt.token_ids),
            tuple(image.image_tokens for image in self.prompt.images),
        )


@dataclass
class _Batch:
    """The rows that decode together, their caches joined, and each one's next token."""

    model: Lfm2VlForConditionalGeneration
    rows: list[_Row] = field(default_factory=list)
    cache: list[Any] = field(default_factory=list)  # BatchKVCache or ConvCache, as the layer is
    y: mx.array | None = None

    def join(self, arrivals: list[_Row]) -> None:
        """Adds rows behind the present ones."""
        if not arrivals:
            return
        parts = [row.cache for row in arrivals]
        if not self.rows:
            self.cache = [_merge([part[layer] for part in parts]) for layer in range(len(parts[0]))]
        else:
            for layer, entry in enumerate(self.cache):
                entry.extend([part[layer] for part in parts])
        present = [self.y] if self.y is not None and self.rows else []
        self.y = mx.concatenate([*present, *(row.first for row in arrivals)])
        self.rows = self.rows + arrivals
        for row in arrivals:
            row.cache = []

    def step(self) -> list[BatchResult]:
        """Takes one token for each row; the next ones are under way before these are read."""
        assert self.y is not None
        y, next_y = self.y, None
        if any(row.answer.left > 1 for row in self.rows):
            next_y = self._next(y)
            mx.async_eval(next_y)
        results = [
            row.take(token)
            for row, token in zip(self.rows, cast("list[int]", y.tolist()), strict=True)
        ]
        going = [i for i, result in enumerate(results) if result is None]
        self.rows, self.y = [self.rows[i] for i in going], next_y
        if not going:
            self.cache, self.y = [], None
        elif len(going) < len(results):
            assert next_y is not None
            self.y = next_y[mx.array(going)]
            for entry in self.cache:
                entry.filter(going)
        return [result for result in results if result is not None]

    def _next(self, y: mx.array) -> mx.array:
        """Tokens (batch,) -> next tokens (batch,)."""
        language_model = self.model.language_model
        hidden = language_model.model(language_model.embed(y[:, None]), self.cache)
        logits = language_model.logits(hidden.last_hidden_state[:, -1])
        if all(row.is_plain for row in self.rows):
            return mx.argmax(logits, axis=-1)
        for i, row in enumerate(self.rows):
            if row.logits_processors:
                row.history = mx.concatenate([row.history, y[i : i + 1]])
        return mx.concatenate([row.choose(logits[i : i + 1]) for i, row in enumerate(self.rows)])


def _merge(entries: list[Any]) -> BatchKVCache | ConvCache:
    if isinstance(entries[0], KVCache):
        return BatchKVCache(entries)
    joined = ConvCache()
    joined.extend(entries)
    return joined
