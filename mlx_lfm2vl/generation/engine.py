"""The engine: one loop that reads prompts and decodes answers, for one row and for many.

Rows join and leave at any token. Prompts are read alone and in pieces, between the steps of those
rows that answer already; rows whose caches are of one kind decode together.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, NamedTuple, Protocol, cast

import mlx.core as mx

from ..errors import PromptError
from ..models.cache import Cache, KVCache, blocks, is_long, quantize_caches
from ..models.layers import backend
from ..models.lfm2 import Lfm2ForCausalLM
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import CacheOptions
from ..prompts.processor import Lfm2VlProcessor, Prompt, PromptImage
from ..prompts.question import NO_CACHE_OPTIONS, Question
from .answer import Answer, Clock, GenerationResponse, eos_token_ids
from .decoding import States, decode_step
from .guide import Guide, vocabulary
from .sampling import LogitsProcessor, Sampler, from_settings

PREFILL_STEP_SIZE = 1024  # positions of a prompt at once; more takes memory and saves no time
RESERVE = 1024  # slots; buffers grow by so many, so that few steps are traced again
CPU_RESERVE = 128  # the same for a CPU, which looks at an empty slot as long as at another
TURNS_FROM = 1 << 23  # bytes of buffers, from which to copy them takes longer than a few kernels


class Prefixes(Protocol):
    """What remembers beginnings of prompts; see `serving.prefixes.PrefixStore`."""

    @property
    def features(self) -> Any:
        """Image features by digest, a mutable mapping."""

    def places(self, prompt: Prompt) -> list[int]:
        """Lengths of the beginnings that are worth keeping."""

    def known(self, prompt: Prompt, options: CacheOptions) -> int:
        """The length of the longest known beginning of a prompt."""

    def find(self, prompt: Prompt, options: CacheOptions) -> list[Cache] | None:
        """A cache of one's own that holds the longest known beginning."""

    def put(
        self,
        token_ids: Sequence[int],
        prompt: Prompt,
        cache: Sequence[Cache],
        options: CacheOptions,
    ) -> None:
        """Keeps a copy of a cache that holds these tokens, the images of a prompt among them."""


class Learner(Protocol):
    """What is told of a model's answers; see `generation.speeds.Learner`."""

    def begin(self, row: AnswerRow) -> None:
        """A row joins."""

    def end(self, row: AnswerRow) -> None:
        """It has been answered."""


@dataclass(eq=False)
class Row:
    """One answer in work.

    Attributes:
        token_ids: the prompt.
        max_tokens: how many tokens at most; 0 only reads the prompt.
        sampler, logits_processors: see `sampling`; no sampler takes the most likely token.
        cache: where it continues from.
        cache_options: says when keys and values become integers.
        prompt: with its images, if beginnings are to be remembered.
        keep_cache: fill the cache again when it ends.
        keep_answer: remember the beginning that prompt and answer make together.
        keep_prompt: remember the prompt up to its last token.
        reused: positions that were known already.
        tokens: of the answer so far.
        finished: whether it has ended.
    """

    token_ids: list[int]
    max_tokens: int
    sampler: Sampler | None = None
    logits_processors: Sequence[LogitsProcessor] = ()
    cache: list[Cache] = field(default_factory=list)
    cache_options: CacheOptions = NO_CACHE_OPTIONS
    prompt: Prompt | None = None
    keep_cache: bool = False
    keep_answer: bool = False
    keep_prompt: bool = False
    reused: int = 0
    tokens: list[int] = field(default_factory=list)
    finished: bool = False

    def __post_init__(self) -> None:
        self.offset = 0  # positions that its cache holds
        self.y: mx.array | None = None  # its next token (1,), which goes in next
        self.unread = True  # nobody has been told this token yet
        self.logprobs: mx.array | None = None  # (1, vocab) it was chosen from
        # seconds to the first token, and of decode steps after it, shared by the rows of each
        self.prompt_time = self.answer_time = 0.0
        self.most_rows = 1  # of a step
        self.history = mx.array([0])

    @property
    def length(self) -> int:
        """Positions that the prompt ends at."""
        return len(self.token_ids)

    @property
    def attention(self) -> KVCache:
        """The cache of an attention layer; all of them have the same slots."""
        return cast(KVCache, next(entry for entry in self.cache if entry.has_slots))

    @property
    def is_plain(self) -> bool:
        """Whether the most likely token is taken as it is."""
        return self.sampler is None and not self.logits_processors

    @property
    def waits(self) -> bool:
        """Whether a processor must know a token before the next step begins."""
        return any(getattr(p, "needs_token", False) for p in self.logits_processors)

    @property
    def left(self) -> int:
        """How many tokens may still come."""
        return self.max_tokens - len(self.tokens)

    @property
    def forced(self) -> list[int]:
        """Tokens of the answer behind `y`, which go in without being chosen."""
        return self.tokens[self.offset + 1 - self.length :]

    def follow(self, token: int) -> list[int]:
        """The tokens that come now that this one was chosen: itself and those it forces."""
        return [token]

    def embed(self, start: int, stop: int) -> mx.array:
        """Embeddings (stop - start, hidden) of positions of the prompt."""
        raise NotImplementedError

    def choose(self, logits: mx.array) -> mx.array:
        """(1, vocab) -> token (1,)."""
        if self.logits_processors:
            for processor in self.logits_processors:
                logits = processor(self.history, logits)
        self.logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        # these stay lazy if nobody needs them, so greedy decoding takes the logits
        return mx.argmax(logits, axis=-1) if self.sampler is None else self.sampler(self.logprobs)

    def take(self, token: int, logprobs: mx.array) -> Any:
        """Adds a token to the answer; returns the response to it."""
        self.tokens.append(token)
        self.finished = self.left == 0
        return token, logprobs


class AnswerRow(Row):
    """A question's answer: its responses are `GenerationResponse`s."""

    def __init__(
        self, model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor,
        question: Question, features: Any,
    ) -> None:  # fmt: skip
        prompt = question.prepare(processor)
        if len(prompt.token_ids) == 0:
            raise PromptError("the prompt has no tokens; it needs one or more")
        prompt.plan.check_length(model.config.text_config.max_position_embeddings)
        sampling = question.sampling.apply(processor.generation_config.sampling)
        sampler, processors = from_settings(sampling, question.seed)
        super().__init__(
            prompt.token_ids,
            question.max_tokens,
            sampler,
            [*question.logits_processors, *processors],
            model.make_cache(question.cache_options, prompt.first_turn_length),
            question.cache_options,
            prompt,
        )
        self.guide = None
        if question.constraint is not None:
            size = model.config.text_config.vocab_size
            known = vocabulary(processor.tokenizer, size, eos_token_ids(processor))
            self.guide = Guide(question.constraint, known, question.max_tokens)
            self.logits_processors = [self.guide, *self.logits_processors]
        self.model, self.question, self.features = model, question, features
        self.encoded_images = self.encoded_patches = 0
        self.measure_vision = question.measure_vision
        self.answer, self.clock = Answer(processor, question), Clock(prompt)

    def embed(self, start: int, stop: int) -> mx.array:
        assert self.prompt is not None
        if self.question.image_features is None:
            self._count([image for image in self.prompt.images if start <= image.start < stop])
        measured = self.measure_vision and len(self.prompt.images) > 0
        if measured:
            mx.eval([entry.arrays for entry in self.cache])  # what came before is not vision
        begun = perf_counter()
        embeddings = self.model.embed_prompt(
            self.prompt, start, stop, self.features, self.question.image_features
        )
        if measured:
            mx.eval(embeddings)
            before = self.clock.vision_time
            self.clock.vision_time = (before or 0.0) + perf_counter() - begun
        return embeddings

    def _count(self, images: Sequence[PromptImage]) -> None:
        """Counts what is to be encoded of these images."""
        if self.features is not None:
            new = {image.digest: image for image in images if image.digest not in self.features}
            images = list(new.values())
        self.encoded_images += len(images)
        self.encoded_patches += sum(image.image.patches for image in images)

    def follow(self, token: int) -> list[int]:
        return [token] if self.guide is None else self.guide.take(token, self.left)

    def take(self, token: int, logprobs: mx.array) -> GenerationResponse:
        super().take(token, logprobs)
        piece, closed = self.answer.add(token), False
        self.finished = piece.finish_reason is not None
        if self.guide is not None and self.finished:
            if self.guide.closing and token in self.answer.eos_token_ids:
                piece = piece._replace(finish_reason="length")
            closed = piece.finish_reason == "length" and self.guide.is_whole
        return self.clock.response(piece, token, logprobs, closed)


class Event(NamedTuple):
    """What a step brought a row: a response, or the error that ended it.

    A step may bring several; only the last one of a `GenerationResponse` has a `finish_reason`.
    """

    row: Row
    response: Any = None
    error: BaseException | None = None


class Engine:
    """Answers questions with one model, in one thread.

    Args:
        model: the whole model, or a language model alone, for rows that embed by themselves.
        processor: makes prompts of questions.
        max_rows: how many are in work at once; others wait.
        prefixes: what remembers beginnings of prompts.
        prefill_step_size: positions of a prompt that go through the model at once.
        fair: rows that answer get a step between two pieces of others' prompts; otherwise all
            prompts are read first.
    """

    def __init__(
        self,
        model: Lfm2VlForConditionalGeneration | Lfm2ForCausalLM,
        processor: Lfm2VlProcessor | None = None,
        *,
        max_rows: int = 1,
        prefixes: Prefixes | None = None,
        prefill_step_size: int = PREFILL_STEP_SIZE,
        fair: bool = True,
    ) -> None:
        self.model = model
        self.language_model: Lfm2ForCausalLM = (
            model.language_model if "language_model" in model else model
        )
        self.processor = processor
        self.max_rows = max_rows
        self.prefixes = prefixes
        self.learner: Learner | None = getattr(model, "learner", None)
        self.prefill_step_size = prefill_step_size
        self.fair = fair
        self.waiting: deque[Row] = deque()
        self.reading: deque[tuple[Row, Iterator[None]]] = deque()
        self.arrivals: list[Row] = []
        self.batches: dict[Any, Batch] = {}

    def add(
        self,
        question: Question,
        *,
        keep_answer: bool = False,
        keep_prompt: bool = False,
        read_only: int | None = None,
    ) -> AnswerRow:
        """A row for a question; its prompt is made now and read by later steps.

        Args:
            keep_answer: remember the beginning that prompt and answer make together.
            keep_prompt: remember the prompt up to its last token, for others that ask the same.
            read_only: read so many positions of the prompt, to remember them, and answer nothing.

        Raises:
            PromptError, ImageError, ConfigError: what was asked makes no sense.
        """
        assert self.processor is not None
        features = None if self.prefixes is None else self.prefixes.features
        row = AnswerRow(
            cast(Lfm2VlForConditionalGeneration, self.model), self.processor, question, features
        )
        row.keep_answer = row.keep_cache = keep_answer
        row.keep_prompt = keep_prompt
        if read_only is not None:
            row.token_ids, row.max_tokens = row.token_ids[:read_only], 0
        self.begin(row)
        return row

    def begin(self, row: Row) -> Row:
        """Takes a row in."""
        if self.learner is not None and isinstance(row, AnswerRow):
            self.learner.begin(row)
        self.waiting.append(row)
        return row

    @property
    def is_idle(self) -> bool:
        """Whether everything has ended."""
        return not (self.batches or self.arrivals or self.reading or self.waiting)

    def step(self) -> list[Event]:
        """One decode step of the rows that answer, and one piece of a prompt.

        Errors come as events; they end their rows and no others.
        """
        for row in self.arrivals:
            kind = row.attention.kind
            if kind not in self.batches:
                self.batches[kind] = Batch(self.language_model, kind)
            self.batches[kind].join(row)
        self.arrivals = []
        self._admit()
        events = self._decode() if self.fair or not self.reading else []
        events += self._read_piece() if self.reading else []
        if self.learner is not None:
            for row in dict.fromkeys(e.row for e in events if e.row.finished and e.error is None):
                if isinstance(row, AnswerRow):
                    self.learner.end(row)
        return events

    def cancel(self, row: Row) -> None:
        """Ends a row now; nothing more comes of it, and its memory goes."""
        row.finished = True
        if row in self.waiting:
            self.waiting.remove(row)
        self.arrivals = [other for other in self.arrivals if other is not row]
        self.reading = deque(pair for pair in self.reading if pair[0] is not row)
        for kind, batch in list(self.batches.items()):
            batch.leave(lambda other: other is row)
            if not batch.rows:
                del self.batches[kind]

    def _admit(self) -> None:
        """Begins to read waiting rows, as many as may be in work."""
        active = sum(len(batch.rows) for batch in self.batches.values())
        while self.waiting and active + len(self.arrivals) + len(self.reading) < self.max_rows:
            row = self.waiting.popleft()
            self.reading.append((row, self._read(row)))

    def _read_piece(self) -> list[Event]:
        """Reads on in the first prompt; its first token is told when it is read."""
        row, pieces = self.reading[0]
        answering, start = len(row.tokens) > 0, perf_counter()
        try:
            next(pieces)
            return []
        except StopIteration:
            events = self._first(row)
        except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
            events = [Event(row, error=error)]
            row.finished = True
        finally:
            if answering:
                row.answer_time += perf_counter() - start
            else:
                row.prompt_time += perf_counter() - start
        self.reading.popleft()
        if not row.finished:
            self.arrivals.append(row)
        elif row.keep_answer and row.offset > row.length:
            self._remember(row, row.offset)
        return events

    def _first(self, row: Row) -> list[Event]:
        """Tells a row its first token, or that its prompt is read, if that is all it wanted."""
        if row.y is None or row.logprobs is None:
            row.finished = True
            if self.learner is not None:
                mx.eval([entry.arrays for entry in row.cache])  # it has not been read before
            return [Event(row)]
        row.unread = False
        return tell(row, cast(int, row.y.item()), row.logprobs)

    def _read(self, row: Row) -> Iterator[None]:
        """Reads a prompt, piece by piece, until its first token is under way."""
        length, places = row.length, list[int]()
        if self.prefixes is not None and row.prompt is not None:
            row.cache = self.prefixes.find(row.prompt, row.cache_options) or row.cache
            last = {length - 1} - {0} if row.keep_prompt else set()
            places = sorted({*self.prefixes.places(row.prompt), *last})
            places = [place for place in places if place < length]
        start = row.reused = row.cache[0].offset
        for stop in [*(place for place in places if place > start), length]:
            answers = stop == length and row.max_tokens > 0
            yield from self._pieces(row, row.embed(start, stop), answers)
            if not answers:
                self._remember(row, stop)
            start = stop

    def _jump(self, row: Row) -> Iterator[None]:
        """Reads the last tokens of an answer, which are known, in one pass."""
        tokens = row.tokens[row.offset - row.length :]
        yield from self._pieces(row, self.language_model.embed(mx.array(tokens)), True)

    def _remember(self, row: Row, length: int) -> None:
        """Keeps what a row's cache holds, so many positions."""
        if self.prefixes is not None and row.prompt is not None:
            token_ids = [*row.token_ids, *row.tokens][:length]
            self.prefixes.put(token_ids, row.prompt, row.cache, row.cache_options)

    def _pieces(self, row: Row, embeddings: mx.array, is_last: bool) -> Iterator[None]:
        pieces = prefill(
            self.language_model, embeddings, row.cache, row.cache_options, self.prefill_step_size
        )
        for hidden in pieces:
            if is_last and row.cache[0].offset == row.length + len(row.tokens):
                row.history = mx.array([*row.token_ids, *row.tokens])
                row.y = row.choose(self.language_model.logits(hidden[:, -1]))
                row.offset = row.cache[0].offset
                mx.async_eval(row.y)
                return
            mx.async_eval([entry.arrays for entry in row.cache])
            yield

    def _decode(self) -> list[Event]:
        """One step of each batch; rows that have ended leave."""
        events: list[Event] = []
        for kind, batch in list(self.batches.items()):
            start, rows = perf_counter(), batch.rows
            try:
                events += batch.step()
            except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
                events += [Event(row, error=error) for row in batch.rows]
                for row in batch.rows:
                    row.finished = True
            share = (perf_counter() - start) / max(1, len(rows))  # all may be reading jumps
            for row in rows:
                row.answer_time, row.most_rows = (
                    row.answer_time + share,
                    max(row.most_rows, len(rows)),
                )
            for row in batch.leave(lambda row: row.finished):
                if row.keep_answer:
                    self._remember(row, row.offset)
            for row in batch.leave(_becomes_quantized):
                quantize_caches(row.cache, row.cache_options)
                self.arrivals.append(row)
            # a pass of its own costs all rows as much as a step, and saves this one as many
            jumping = [row for row in batch.rows if 0 < len(batch.rows) <= len(row.forced)]
            for row in batch.leave(jumping.__contains__):
                self.reading.appendleft((row, self._jump(row)))
            if not batch.rows and not jumping:  # otherwise the row is back soon
                del self.batches[kind]
        return events


def prefill(
    language_model: Lfm2ForCausalLM,
    embeddings: mx.array,
    cache: list[Cache],
    cache_options: CacheOptions = NO_CACHE_OPTIONS,
    step_size: int = PREFILL_STEP_SIZE,
) -> Iterator[mx.array]:
    """Fills a cache with (tokens, hidden); yields the last hidden state (1, 1, hidden) by piece."""
    for start in range(0, len(embeddings), step_size):
        piece = embeddings[None, start : start + step_size]
        hidden = language_model.model(piece, cache, last_only=True).last_hidden_state
        quantize_caches(cache, cache_options)
        yield hidden


class Batch:
    """Rows of one kind that decode together.

    Attributes:
        rows: in the order of the arrays' rows.
        states: arrays of each layer's cache, (rows, …); the rows' own caches are empty meanwhile.
        older: the same, without the last token, and its keys and values; none if there is no step
            before or if there are no two sets.
        y: the tokens (rows,) that go in next.
    """

    def __init__(self, language_model: Lfm2ForCausalLM, kind: Any) -> None:
        self.kind = kind
        self.traced, self.weights = decode_step(language_model)
        self.weight_bytes = sum(array.nbytes for array in self.weights)
        self.rows: list[Row] = []
        self.states: States = []
        self.older: States = []
        self.y = mx.array([], mx.uint32)
        self.capacity = 0

    def join(self, row: Row) -> None:
        """Takes a row in, behind the present ones."""
        assert row.y is not None
        self.reserve(row.cache, slots_for(row))
        self.older = []
        for n, entry in enumerate(row.cache):
            arrays = entry.padded(entry.state, self.capacity)
            entry.arrays = []
            if self.rows:
                pairs = zip(self.states[n], arrays, strict=True)
                self.states[n] = [mx.concatenate(list(pair)) for pair in pairs]
            else:
                self.states.append(arrays)
        self.y = mx.concatenate([self.y, row.y]) if self.rows else row.y
        self.rows.append(row)

    def reserve(self, cache: Sequence[Cache], slots: int) -> None:
        """Makes capacity for so many slots."""
        if slots > self.capacity:
            self.capacity, self.older = slots, []
            self.states = [
                entry.padded(arrays, self.capacity)
                for entry, arrays in zip(cache, self.states, strict=False)
            ]

    def step(self) -> list[Event]:
        """A token for each row; the next ones are under way before these are read."""
        if any(row.waits for row in self.rows):
            if not any(row.unread for row in self.rows):
                self._launch()
            return self._tell(self._pending())
        pending = self._pending()
        if any(row.left > row.unread for row in self.rows):
            self._launch()
        return self._tell(pending)

    def leave(self, which: Callable[[Row], bool]) -> list[Row]:
        """Lets rows go; those that keep their caches take them along."""
        going = [(i, row) for i, row in enumerate(self.rows) if which(row)]
        for i, row in going:
            row.y = self.y[i : i + 1]
            for entry, arrays in zip(row.cache, self.states, strict=True):
                entry.offset = row.offset
                if row.keep_cache or not row.finished:
                    alone = len(self.rows) == 1
                    entry.arrays = arrays if alone else [a[i : i + 1] for a in arrays]
        left = [i for i, row in enumerate(self.rows) if not which(row)]
        if not left:
            self.rows, self.states, self.older, self.capacity = [], [], [], 0
        elif going:
            self.older = []
            self.rows, places = [self.rows[i] for i in left], mx.array(left)
            self.states = [[array[places] for array in arrays] for arrays in self.states]
            self.y = self.y[places]
        return [row for _, row in going]

    def _launch(self) -> None:
        """Hands over the step that turns these tokens into the next ones."""
        for i, row in enumerate(self.rows):
            if row.logits_processors:
                row.history = mx.concatenate([row.history, self.y[i : i + 1]])
        cache, places = self.rows[0].cache, [(row, row.attention) for row in self.rows]
        self.reserve(cache, max(map(slots_for, self.rows)))
        slots = [entry.slot(row.offset) for row, entry in places]
        most = [entry.max_size for _, entry in places]
        offsets = [row.offset for row in self.rows]
        last = [o if m is None else min(o, m - 1) for o, m in zip(offsets, most, strict=True)]
        before = [entry.slot(row.offset - 1) for row, entry in places]
        if backend() == "cuda" and len(self.rows) == 1:
            logits = self._untraced(cache)
        else:
            logits = self._forward(cache, [offsets, slots, last], before)
        if any(row.waits for row in self.rows):
            mx.async_eval(logits)  # meanwhile, processors look at tokens
        forced = [row.forced[:1] for row in self.rows]
        for row, tokens in zip(self.rows, forced, strict=True):
            row.offset += 1
            row.unread = not tokens
        self._choose(logits, forced)
        mx.async_eval(self.y)

    def _untraced(self, cache: Sequence[Cache]) -> mx.array:
        """As `_forward`, for a row alone.

        CUDA's fast attention takes no array for a mask, which a step of fixed shapes cannot do
        without.
        """
        for entry, arrays in zip(cache, self.states, strict=True):
            entry.arrays, entry.offset = arrays, self.rows[0].offset
        logits = self.traced.untraced(self.y, cache)
        self.states = [list(entry.arrays) for entry in cache]
        return logits

    def _forward(
        self, cache: Sequence[Cache], table: list[list[int]], before: list[int]
    ) -> mx.array:
        """Logits (rows, vocab) of the next tokens; takes the states along.

        Args:
            cache: of any row.
            table: see `Step`, without its last row.
            before: that row, the slots of the tokens before.
        """
        inputs, turns = self.states, self.takes_turns
        if turns:
            table = [*table, before]
            if not self.older:
                places = mx.array(before)[:, None, None, None]
                self.older = [
                    [*now, *(mx.take_along_axis(array, places, axis=2) for array in now)]
                    if entry.has_slots
                    else now
                    for entry, now in zip(cache, self.states, strict=True)
                ]
            sets = zip(cache, self.older, self.states, strict=True)
            inputs = [older if entry.has_slots else now for entry, older, now in sets]
        logits, new = self.traced(self.weights, self.y, table, cache, inputs, self.kind)
        pairs = list(zip(self.states, new, strict=True))
        self.older = [[*now, *more[len(now) :]] for now, more in pairs] if turns else []
        self.states = [more[: len(now)] for now, more in pairs]
        return logits

    @property
    def takes_turns(self) -> bool:
        """Whether there are two sets of buffers, of which a step writes the one read less lately.

        A GPU may still read for the last step when it is handed the next one, and what is read
        MLX copies in order to write. Two sets cost memory, and one more write for each.
        """
        if backend() == "cpu":
            return False
        nbytes = sum(array.nbytes for arrays in self.states for array in arrays)
        return TURNS_FROM <= nbytes <= self.weight_bytes / 4

    def _choose(self, logits: mx.array, forced: list[list[int]]) -> None:
        """Logits (rows, vocab) -> the tokens that go in next, if they are not known already."""
        if all(row.is_plain for row in self.rows):
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            for i, row in enumerate(self.rows):
                row.logprobs = logprobs if len(self.rows) == 1 else logprobs[i : i + 1]
            self.y = mx.argmax(logits, axis=-1)
            return
        parts = [
            mx.array(tokens, mx.uint32) if tokens else row.choose(logits[i : i + 1])
            for i, (row, tokens) in enumerate(zip(self.rows, forced, strict=True))
        ]
        self.y = parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _pending(self) -> tuple[mx.array, list[tuple[Row, mx.array | None]]]:
        """The next tokens, and for each row the log-probabilities, if it has not been told yet."""
        return self.y, [(row, row.logprobs if row.unread else None) for row in self.rows]

    def _tell(self, pending: tuple[mx.array, list[tuple[Row, mx.array | None]]]) -> list[Event]:
        """Reads tokens and tells those rows that do not know theirs yet."""
        y, rows = pending
        if all(logprobs is None for _, logprobs in rows):
            return []
        if y is self.y:
            for row in self.rows:
                row.unread = False
        tokens = cast("list[int]", y.tolist()) if len(rows) > 1 else [cast(int, y.item())]
        return [
            event
            for (row, logprobs), token in zip(rows, tokens, strict=True)
            if logprobs is not None
            for event in tell(row, token, logprobs)
        ]


def slots_for(row: Row) -> int:
    """Capacity for one more token, of few sizes, and not much more than a window."""
    most = row.attention.max_size
    slots = row.offset + 1 if most is None else min(row.offset + 1, most)
    # a longer row's steps take longer, too, so an eighth is little and is traced seldom
    step = max(CPU_RESERVE, (1 << slots.bit_length()) >> 4) if backend() == "cpu" else RESERVE
    slots = -(-slots // step) * step
    return slots if most is None else min(slots, blocks(most))


def tell(row: Row, token: int, logprobs: mx.array) -> list[Event]:
    """Gives a row its next tokens; an error in taking them ends this row alone."""
    events: list[Event] = []
    try:
        for n, following in enumerate(row.follow(token)):
            chosen = n == 0 and following == token
            told = logprobs[0] if chosen else certain(following, logprobs)
            response = row.take(following, told)
            events.append(Event(row, response))
            if row.finished:
                break
    except Exception as error:  # noqa: BLE001 - it belongs to whoever asked
        row.finished = True
        events.append(Event(row, error=error))
    return events


def certain(token: int, logprobs: mx.array) -> mx.array:
    """Log-probabilities (vocab,) of a token that has no alternative."""
    return mx.where(mx.arange(logprobs.shape[-1]) == token, 0.0, -math.inf)


def _becomes_quantized(row: Row) -> bool:
    """Whether a row has just become so long that its keys and values are to be integers."""
    options = row.cache_options
    return is_long(row.offset, options) and not is_long(row.offset - 1, options)
