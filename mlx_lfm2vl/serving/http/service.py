"""`Service`: a worker that answers requests, within bounds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...checkpoints.loading import load
from ...errors import ConfigError, Lfm2VlError, PromptError
from ...prompts.processor import Lfm2VlProcessor, Prompt
from ...prompts.question import Question
from ..thread import Parts
from ..worker import Worker
from .asking import Ask
from .errors import HttpError, as_http
from .images import Images
from .metrics import Metrics
from .options import ServerOptions
from .running import Choice, Run
from .scores import Scores

SEEDS = 2**64


class Service:
    """Everything behind the endpoints.

    Attributes:
        name: of the model.
        worker: answers.
        processor: of the model; None until it is loaded.
        error: why it cannot be loaded.
        runs: requests under way.
        draining: whether no new ones are taken.
    """

    def __init__(
        self,
        name: str,
        options: ServerOptions,
        *,
        dtype: str | None = None,
        revision: str | None = None,
        adapter_path: str | Path | None = None,
    ) -> None:
        self.name, self.options = name, options
        self.processor: Lfm2VlProcessor | None = None
        self.error: BaseException | None = None
        self.metrics, self.images = Metrics(), Images(options)
        self.runs: set[Run] = set()
        self.preparing = 0  # requests that are being read
        self.draining = False
        self.started = int(time.time())

        def begin() -> Parts:
            try:
                model, self.processor = load(
                    name, dtype, revision, lazy=False, adapter_path=adapter_path
                )
            except BaseException as error:
                self.error = error
                raise
            return model, self.processor

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

    async def prompt(self, ask: Ask) -> Prompt:
        """The prompt of a request, its images read.

        Raises:
            HttpError: 400, 404 or 413, naming what is wrong.
        """
        processor = self.check_ready()
        self.check_model(ask)
        parts = ask.images
        if len(parts) > self.options.max_images:
            raise HttpError(400, f"there are {len(parts)} images; {self.options.max_images} may be",
                            parts[self.options.max_images].param, "too_many_images")  # fmt: skip
        images = await asyncio.gather(*(self.images.read(part, processor) for part in parts))
        waiting = iter(images)
        messages = [_with_images(message, waiting) for message in ask.messages]
        try:
            prompt = await asyncio.to_thread(processor, messages, tools=ask.tools)
        except Lfm2VlError as error:
            raise as_http(error, "messages") from None
        length, most = len(prompt.token_ids), self.options.context
        if length >= most:
            raise HttpError(400, f"the prompt has {length} tokens; prompt and answer may have "
                            f"{most}", "messages", "context_length_exceeded")  # fmt: skip
        return prompt

    async def run(self, ask: Ask, started: float) -> Run:
        """Begins to answer a request.

        Raises:
            HttpError: it makes no sense, or there is no place for it.
        """
        if ask.n > self.options.max_batch:
            raise HttpError(400, f"n is {ask.n}; it must be {self.options.max_batch} or less",
                            "n", "invalid_value")  # fmt: skip
        with self.place(ask.n - 1):
            prompt = await self.prompt(ask)
            questions = await asyncio.to_thread(self._questions, ask, prompt)
        run = Run(ask, self.name, [], started, self.options.request_timeout)
        for index, question in enumerate(questions):
            assert self.processor is not None
            wants = ask.top_logprobs
            scores = None if wants is None else Scores(self.processor, wants)
            pending = self.worker.submit(
                question, keep_answer=True, keep_prompt=ask.n > 1, look=scores
            )
            run.choices.append(Choice(index, pending, scores))
        self.runs.add(run)
        return run

    def end(self, run: Run) -> None:
        """Lets go of a request; what has not ended is cancelled."""
        run.cancel()
        if run in self.runs:
            self.runs.discard(run)
            run.count(self.metrics)

    def _questions(self, ask: Ask, prompt: Prompt) -> list[Question]:
        left = self.options.context - len(prompt.token_ids)
        most = min(ask.max_tokens or self.options.max_tokens, left)
        seed = ask.settings.get("seed")
        seeds = [None if seed is None else (seed + n) % SEEDS for n in range(ask.n)]
        settings: Any = {**ask.settings, "max_tokens": most}
        try:
            return [Question(prompt, **{**settings, "seed": each}) for each in seeds]
        except (PromptError, ConfigError) as error:
            word = str(error).split()[0]
            raise as_http(error, word if word in settings else None) from None

    def seconds(self, prompt_tokens: int, max_tokens: int) -> float | None:
        """What a request may take at the speeds seen so far; None if none were seen."""
        total = self.metrics.total
        read = total("prompt_tokens_total") - total("cached_tokens_total")
        if not (read and total("decode_seconds_total")):
            return None
        prefill = total("prefill_seconds_total") / read
        step = total("decode_seconds_total") / total("decoded_tokens")
        return prompt_tokens * prefill + max_tokens * step


def _with_images(message: dict[str, Any], images: Iterator[Any]) -> dict[str, Any]:
    if not isinstance(message["content"], list):
        return message
    content = [
        {**item, "image": next(images)} if item["type"] == "image" else item
        for item in message["content"]
    ]
    return {**message, "content": content}
