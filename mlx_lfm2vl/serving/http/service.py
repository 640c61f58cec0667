"""`Service`: a worker that answers requests, within bounds."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from ...checkpoints.loading import load
from ...errors import Lfm2VlError
from ...generation.grounding import Reading, Size, answers_thousandths, detect_questions
from ...models.lfm2_vl import Lfm2VlForConditionalGeneration
from ...prompts.constraint import Constraint
from ...prompts.processor import Lfm2VlProcessor, Prompt
from ...prompts.question import Question
from ...prompts.tool_grammar import tool_grammar
from ..thread import Parts
from ..worker import Worker
from .asking import Ask
from .detecting import DetectAsk
from .errors import HttpError, as_http
from .images import Images
from .metrics import Metrics
from .options import ServerOptions
from .running import Choice, Run
from .scores import Scores

SEEDS = 2**64
PARAMS = {"schema": "response_format", "tool": "tools"}  # first words of errors


class Service:
    """Everything behind the endpoints.

    Attributes:
        name: of the model.
        worker: answers.
        processor: of the model; None until it is loaded.
        thousandths: whether it answers boxes from 0 to 1000.
        error: why it cannot be loaded.
        runs: requests under way.
        draining: whether no new ones are taken.
    """

    def __init__(
        self,
        model: str,
        options: ServerOptions,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        adapter_path: str | Path | None = None,
        loaded: Callable[[Lfm2VlForConditionalGeneration], None] | None = None,
    ) -> None:
        """Begins to load; `loaded` is called with the model in the worker's thread."""
        # where a folder lies is nobody's business
        self.name = os.path.basename(os.path.abspath(model)) if os.path.isdir(model) else model
        self.options = options
        self.processor: Lfm2VlProcessor | None = None
        self.thousandths = False
        self.error: BaseException | None = None
        self.metrics, self.images = Metrics(), Images(options)
        self.runs: set[Run] = set()
        self.preparing = 0  # requests that are being read
        self.draining = False
        self.started = int(time.time())

        def begin() -> Parts:
            try:
                network, processor = load(
                    model, dtype, revision, lazy=False, adapter_path=adapter_path
                )
            except BaseException as error:
                self.error = error
                raise
            if loaded is not None:
                loaded(network)
            self.thousandths = answers_thousandths(network)
            self.processor = processor  # from now on it is ready
            return network, processor

        self.worker = Worker(
            load=begin, batch_size=options.max_batch, max_prefix_bytes=options.cache_bytes
        )

    def close(self) -> None:
        """Ends with the token under way."""
        self.images.close()
        self.worker.close()

    @property
    def answers(self) -> int:
        """Answers under way and requests that are being read."""
        return self.preparing + sum(run.left for run in self.runs)

    def check_ready(self) -> Lfm2VlProcessor:
        """The processor; a 503 while there is none, or if the server is about to end."""
        if self.draining:
            raise HttpError(503, "the server is about to end", code="draining",
                            headers={"Retry-After": "10"})  # fmt: skip
        if self.processor is None:
            raise HttpError(503, "the model is being loaded", code="loading",
                            headers={"Retry-After": "1"})  # fmt: skip
        return self.processor

    @contextmanager
    def place(self, count: int = 1) -> Iterator[None]:
        """Places for answers in the queue; a 429 at once if there is none."""
        most = self.options.max_batch + self.options.queue
        if self.answers + count > most:
            raise HttpError(429, f"{most} answers are under way or waiting, which is the limit",
                            code="queue_full", headers={"Retry-After": "1"})  # fmt: skip
        self.preparing += count
        try:
            yield
        finally:
            self.preparing -= count

    def check_model(self, ask: Ask) -> None:
        """Refuses another model's name, if the server is strict."""
        if self.options.strict_model and ask.model not in (None, self.name):
            raise HttpError(404, f"model {ask.model!r:.100} is not here; {self.name} is",
                            "model", "model_not_found")  # fmt: skip

    async def question(self, ask: Ask) -> Question:
        """What a request asks, its images read and its prompt made.

        Raises:
            HttpError: 400, 404 or 413, naming what is wrong.
        """
        processor = self.check_ready()
        self.check_model(ask)
        parts = ask.images
        most, count = self.options.max_images, 0
        for part in parts:
            count += max(1, part.frames)
            if count > most:
                total = sum(max(1, part.frames) for part in parts)
                raise HttpError(400, f"there are {total} images or frames; {most} may be",
                                part.param, "too_many_images")  # fmt: skip
        read = await asyncio.gather(*(self.images.read(part, processor) for part in parts))
        waiting = iter([each.items for each in read])
        messages = [_with_images(message, waiting) for message in ask.messages]
        question = await asyncio.to_thread(make_question, ask, messages, processor)
        length, most = len(cast(Prompt, question.prompt).token_ids), self.options.context
        if length >= most:
            raise HttpError(400, f"the prompt has {length} tokens; prompt and answer may have "
                            f"{most}", "messages", "context_length_exceeded")  # fmt: skip
        limit = min(ask.max_tokens or self.options.max_tokens, most - length)
        return replace(question, max_tokens=limit)

    async def run(self, ask: Ask, started: float) -> Run:
        """Begins to answer a request.

        Raises:
            HttpError: it makes no sense, or there is no place for it.
        """
        if ask.n > self.options.max_batch:
            raise HttpError(400, f"n is {ask.n}; it must be {self.options.max_batch} or less",
                            "n", "invalid_value")  # fmt: skip
        with self.place(ask.n - 1):
            question = await self.question(ask)
        run = self.begin(ask, started)
        for index in range(ask.n):
            seed = None if question.seed is None else (question.seed + index) % SEEDS
            wants = ask.top_logprobs
            scores = None if wants is None else Scores(self.check_ready(), wants)
            pending = self.worker.submit(
                replace(question, seed=seed), keep_answer=True, keep_prompt=ask.n > 1, look=scores
            )
            run.choices.append(Choice(index, pending, scores))
        return run

    def begin(self, ask: Ask, started: float) -> Run:
        """A run without answers as yet."""
        run = Run(ask, self.name, [], started, self.options.request_timeout)
        self.runs.add(run)
        return run

    async def detect(self, ask: DetectAsk, started: float) -> tuple[Run, list[Reading], Size]:
        """Begins to look for things in a picture.

        Raises:
            HttpError: it makes no sense, or there is no place for it.
        """
        processor = self.check_ready()
        self.check_model(ask)
        with self.place(ask.n - 1):
            read = await self.images.read(ask.images[0], processor)
            questions = await asyncio.to_thread(
                detect_questions, processor, self.thousandths, read.image, ask.labels,
                ask.max_boxes, ask.max_tokens or self.options.max_tokens,
            )  # fmt: skip
        run, readings = self.begin(ask, started), [Reading() for _ in questions]
        for index, (question, reading) in enumerate(zip(questions, readings, strict=True)):
            run.choices.append(Choice(index, self.worker.submit(question, look=reading.add), None))
        return run, readings, read.size

    def end(self, run: Run) -> None:
        """Lets go of a request; what has not ended is cancelled."""
        run.cancel()
        if run in self.runs:
            self.runs.discard(run)
            run.count(self.metrics)

    def seconds(self, prompt_tokens: int, max_tokens: int) -> float | None:
        """What a request may take at the speeds seen so far; None if none were seen."""
        total = self.metrics.total
        read = total("prompt_tokens_total") - total("cached_tokens_total")
        if not (read and total("decode_seconds_total")):
            return None
        prefill = total("prefill_seconds_total") / read
        step = total("decode_seconds_total") / total("decoded_tokens")
        return prompt_tokens * prefill + max_tokens * step


def _with_images(message: dict[str, Any], images: Iterator[list[dict[str, Any]]]) -> dict[str, Any]:
    if not isinstance(message["content"], list):
        return message
    content = message["content"]
    parts = [next(images) if item["type"] == "image" else [item] for item in content]
    return {**message, "content": [item for part in parts for item in part]}


def make_question(ask: Ask, messages: Any, processor: Lfm2VlProcessor) -> Question:
    """The question with its prompt; an HttpError names what makes no sense."""
    settings = dict(ask.settings)
    if settings.get("seed") is not None:
        settings["seed"] %= SEEDS
    try:
        if settings.pop("parallel", True) is False:
            grammar = tool_grammar(settings["tools"], settings["tool_choice"] or "auto", False)
            settings["constraint"] = Constraint("tools", grammar)
        return Question(messages, **settings).prepared(processor)
    except Lfm2VlError as error:
        word = str(error).split()[0]
        param = PARAMS.get(word, word if word in settings else "messages")
        raise as_http(error, param) from None
