"""`Worker`: a model and its thread, asked from any thread and from asyncio.

MLX streams belong to threads, so one thread does all the work; several answers grow at once.
"""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack, cast

from ..checkpoints.loading import load as load_model
from ..errors import Lfm2VlError, PromptError
from ..generation.answer import GenerationResponse
from ..generation.batch import BATCH_SIZE, DEFAULT_BATCH_SIZE
from ..generation.generate import as_question
from ..options import CacheOptions, ImageOptions
from ..prompts.image_processor import NO_OPTIONS, ImageInput
from ..prompts.image_source import RawImage
from ..prompts.messages import Conversation, Message
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import (
    NO_CACHE_OPTIONS,
    AnswerSettings,
    Question,
    QuestionSettings,
    Tools,
)
from .pending import PendingAnswer, own_copy
from .prefixes import MAX_PREFIX_BYTES, PrefixStore
from .session import Item, Talk, film_items, image_item
from .thread import EngineThread, Job, Parts, close_at_exit


class Worker:
    """Owns a model and the thread that runs it.

        with Worker("LiquidAI/LFM2.5-VL-450M") as worker:
            answer = worker.submit("What is in this image?", "photo.jpg")
            for response in answer:
                print(response.text, end="")

    Loading begins at once, in the thread. Several questions are answered together, and what their
    prompts have in common is read once. A worker that is forgotten answers what it was asked and
    ends; at the interpreter's exit it ends with the token under way.

    Args:
        model, dtype, revision, adapter_path: as for `load`.
        load: makes (model, processor) in the worker's thread, instead of these.
        batch_size: how many answers grow at once.
        max_prefix_bytes: what may be kept for reuse; the least recently used part goes first.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        *,
        adapter_path: str | Path | None = None,
        load: Callable[[], Parts] | None = None,
        batch_size: int = DEFAULT_BATCH_SIZE,
        max_prefix_bytes: int = MAX_PREFIX_BYTES,
    ) -> None:
        if (model is None) == (load is None):
            raise TypeError("a Worker takes either model or load")
        BATCH_SIZE.check("batch_size", batch_size, PromptError)
        if load is None:
            load = partial(
                load_model, cast("str | Path", model), dtype, revision, adapter_path=adapter_path
            )
        close_at_exit()
        self._thread = EngineThread(load, batch_size, PrefixStore(max_prefix_bytes))
        # atexit is _close_all's; SimpleQueue.put may be called by the garbage collector
        weakref.finalize(self, self._thread.queue.put, None).atexit = False
        self._thread.start()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until the model is loaded. Nobody needs to; questions wait for it, too.

        Raises:
            TimeoutError: it took more than `timeout` seconds.
            ModelNotFoundError, ConfigError, WeightsError: what `load` raised.
            AnswerCancelled: the worker is closed.
        """
        self._thread.check_process()
        if not self._thread.loaded.wait(timeout):
            raise TimeoutError(f"the model is not loaded after {timeout} seconds")
        if self._thread.error is not None:
            raise own_copy(self._thread.error)

    @property
    def active(self) -> int:
        """How many answers grow or have their prompts read now."""
        return len(self._thread.active)

    @property
    def remembered_bytes(self) -> int:
        """What is kept for reuse takes so much."""
        return self._thread.prefixes.nbytes

    async def ready(self) -> None:
        """`wait_until_ready` for asyncio."""
        await asyncio.to_thread(self.wait_until_ready)

    def submit(
        self,
        prompt: Conversation | Prompt | Question,
        images: ImageInput | Sequence[ImageInput] | None = None,
        *,
        logprobs: bool = False,
        latest: str | None = None,
        keep_answer: bool = False,
        keep_prompt: bool = False,
        look: Callable[[GenerationResponse], None] | None = None,
        **settings: Unpack[QuestionSettings],
    ) -> PendingAnswer:
        """Asks, from any thread; never waits.

        Whatever goes wrong is raised by the answer: what `stream_generate` raises, what `load`
        raised, or `AnswerCancelled` if the worker is closed.

        Args:
            prompt, images, settings: as for `stream_generate`. Images are read later, in another
                thread, so an array may not change until then.
            logprobs: keep the log-probabilities of each response, (vocab,) float32, 0.3 MB or so;
                otherwise they are empty.
            latest: a name, such as "camera", under which only the last question waits: an older one
                that has not begun is cancelled, one that has continues.
            keep_answer, keep_prompt: remember prompt and answer for the turn after them, or the
                prompt for another question with it; images and system messages are remembered in
                any case.
            look: called in the worker's thread with each response before it is handed out, its
                log-probabilities included; must be quick.
        """
        pending = self._thread.pending()
        try:
            question = as_question(prompt, images, **settings)
        except Lfm2VlError as error:
            pending._finish(error)
            return pending
        job = Job(
            pending,
            question.prepared,
            keep_answer=keep_answer,
            keep_prompt=keep_prompt,
            logprobs=logprobs,
            look=look,
        )
        self._thread.put(job, latest)
        return pending

    def close(self, timeout: float | None = None) -> None:
        """Cancels everything and waits for the thread, which frees the model; may be repeated.

        Waits for the token, the piece of a prompt or the loading under way, `timeout` seconds at
        most.
        """
        self._thread.stop()
        if self._thread.process == os.getpid():
            self._thread.join(timeout)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def __aenter__(self) -> Worker:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await asyncio.to_thread(self.close)

    def session(
        self,
        system: str | None = None,
        *,
        tools: Tools | None = None,
        image_options: ImageOptions = NO_OPTIONS,
        cache_options: CacheOptions = NO_CACHE_OPTIONS,
    ) -> WorkerSession:
        """A conversation that remembers its images; arguments as for `Session`."""
        talk = Talk(system, tools=tools, image_options=image_options, cache_options=cache_options)
        return WorkerSession(self, talk)


class WorkerSession:
    """A conversation with a worker's model, to be used from any thread; nothing here waits.

    `see`, `ask` and `send` are those of `Session`, but give answers on their way. What is asked
    while a turn is on its way is asked after it.

    Attributes:
        messages: the conversation so far, in the `transformers` form.
    """

    def __init__(self, worker: Worker, talk: Talk) -> None:
        self._worker = worker
        self._talk = talk
        self._lock = threading.RLock()
        self._sending = False
        self._see: Job | None = None  # the last one
        self._later: deque[Callable[[], None]] = deque()  # what waits for the turn under way

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, its pictures as they were given."""
        with self._lock:
            return list(self._talk.messages)

    def see(self, image: ImageInput, image_options: ImageOptions | None = None) -> PendingAnswer:
        """Reads an image once; the questions that follow are about it.

        Nobody needs to wait for the answer, which is empty. If the image cannot be read, it raises
        an ImageError, and so do questions that were asked meanwhile; later ones are not about it.
        """
        options = image_options if image_options is not None else self._talk.image_options
        return self._look(lambda processor: [image_item(processor.image_processor(image, options))])

    def see_video(
        self,
        video: RawImage,
        frames: int | None = None,
        image_options: ImageOptions | None = None,
    ) -> PendingAnswer:
        """As `see` for a film; see `Session.see_video`."""
        options = image_options if image_options is not None else self._talk.image_options
        return self._look(lambda processor: film_items(processor, video, frames, options))

    def _look(self, read: Callable[[Lfm2VlProcessor], list[Item]]) -> PendingAnswer:
        item = image_item(seen := _Seen(read))

        def begin(pending: PendingAnswer) -> Job:
            self._talk.pending = [*self._talk.pending, item]
            question = self._talk.question("?")
            self._see = Job(pending, partial(_prepared, question), read_only=True, end=end)
            return self._see

        def end(question: Question | None) -> None:
            with self._lock:
                if seen.error is not None:
                    self._talk.pending = [i for i in self._talk.pending if i is not item]

        return self._start(begin)

    def ask(self, question: str, **settings: Unpack[AnswerSettings]) -> PendingAnswer:
        """Answers a question that does not become part of the conversation."""

        def begin(pending: PendingAnswer) -> Job:
            asked = self._talk.question(question, **settings)
            return Job(pending, partial(_prepared, asked), after=self._see)

        return self._start(begin)

    def send(self, message: str, **settings: Unpack[AnswerSettings]) -> PendingAnswer:
        """A turn of the conversation: message and answer become part of it, if it is answered."""

        def begin(pending: PendingAnswer) -> Job:
            asked = self._talk.question(message, **settings)
            self._sending = True

            def end(question: Question | None) -> None:
                with self._lock:
                    if question is not None:
                        self._talk.take(asked, pending.text)
                    self._sending = False
                    while self._later and not self._sending:
                        self._later.popleft()()

            return Job(
                pending, partial(_prepared, asked), keep_answer=True, end=end, after=self._see
            )

        return self._start(begin)

    def undo(self) -> None:
        """Takes back the last turn; a PromptError if there is none."""
        with self._lock:
            self._talk.undo()

    def reset(self) -> None:
        """Forgets conversation and images; the system message stays."""
        with self._lock:
            self._talk.reset()

    def _start(self, begin: Callable[[PendingAnswer], Job]) -> PendingAnswer:
        pending = self._worker._thread.pending()

        def start() -> None:
            try:
                job = begin(pending)
            except Lfm2VlError as error:
                pending._finish(error)
            else:
                self._worker._thread.put(job)

        with self._lock:
            if self._sending:
                self._later.append(start)
            else:
                start()
        return pending


class _Seen:
    """What a session sees, an image or a film: read once, in the thread that first needs it."""

    def __init__(self, read: Callable[[Lfm2VlProcessor], list[Item]]) -> None:
        self.read: Callable[[Lfm2VlProcessor], list[Item]] | None = read  # and forgets the source
        self.items: list[Item] = []
        self.error: Lfm2VlError | None = None
        self.lock = threading.Lock()

    def as_items(self, processor: Lfm2VlProcessor) -> list[Item]:
        """Processed images, and the times of a film's; raises what went wrong, again and again."""
        with self.lock:
            if self.error is not None:
                raise own_copy(self.error)
            if self.read is not None:
                try:
                    self.items, self.read = self.read(processor), None
                except Lfm2VlError as error:
                    self.error = error
                    raise
            return self.items


def _prepared(question: Question, processor: Lfm2VlProcessor) -> Question:
    """As `Question.prepared`, for a session's question."""

    def read(message: Message) -> Message:
        content = message["content"]
        if not isinstance(content, list):
            return message
        parts = [i["image"].as_items(processor) if "image" in i else [i] for i in content]
        return {**message, "content": [item for part in parts for item in part]}

    messages = [read(message) for message in cast("list[Message]", question.prompt)]
    return replace(question, prompt=messages).prepared(processor)
