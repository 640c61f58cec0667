"""The thread that runs an engine: jobs come in from any thread, answers go out to whoever waits."""

from __future__ import annotations

import atexit
import os
import threading
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import islice
from queue import SimpleQueue
from typing import Any, cast

import mlx.core as mx

from ..errors import Lfm2VlError
from ..generation.answer import GenerationResponse
from ..generation.engine import AnswerRow, Engine, Event
from ..generation.memory import memory_limits
from ..generation.usage import Usage
from ..models.config import Lfm2VlConfig
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import Question
from .pending import AnswerCancelled, PendingAnswer
from .prefixes import PrefixStore

EXIT_PATIENCE = 10.0  # seconds that the interpreter's exit waits for the token under way
AHEAD = 4  # questions whose pictures are read before there is a place for them

Parts = tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor]


@dataclass(eq=False)
class Job:
    """A question on its way through a worker's thread.

    Attributes:
        pending: who waits for it.
        ask: makes the question; called with the processor, in a thread beside the worker's.
        read_only: whether images are only to be read.
        keep_answer, keep_prompt: see `Engine.add`.
        logprobs: whether responses keep their log-probabilities.
        look: called in the worker's thread with each response, log-probabilities included.
        end: called in the worker's thread with its question if it was answered, else None.
        after: begins first, since what it reads is read here, too.
    """

    pending: PendingAnswer
    ask: Callable[[Lfm2VlProcessor], Question]
    read_only: bool = False
    keep_answer: bool = False
    keep_prompt: bool = False
    logprobs: bool = False
    look: Callable[[GenerationResponse], None] | None = None
    end: Callable[[Question | None], None] | None = None
    after: Job | None = None
    prepared: Future[Question] | None = None

    def finish(
        self, error: BaseException | None, question: Question | None = None, usage: Any = None
    ) -> None:
        """Ends it, answered or not."""
        if self.end is not None:
            self.end(question)
        self.pending._finish(error, usage)


class EngineThread(threading.Thread):
    """Does the work. It does not know its `Worker`, so a forgotten one can be collected."""

    def __init__(self, load: Callable[[], Parts], batch_size: int, prefixes: PrefixStore) -> None:
        # the interpreter would wait for any other thread before it tells us of its exit
        super().__init__(target=self._serve, args=(load,), name="mlx_lfm2vl.Worker", daemon=True)
        # jobs; answers that nobody wants any more and what has been prepared, to wake up; None ends
        self.queue: SimpleQueue[Job | PendingAnswer | Future[Question] | None] = SimpleQueue()
        self.lock = threading.Lock()  # nothing enters the queue once `closed` is set
        self.batch_size = batch_size
        self.prefixes = prefixes
        self.process = os.getpid()
        self.closed = False
        self.ending = False  # with the last answer
        self.loaded = threading.Event()
        self.config: Lfm2VlConfig | None = None
        self.processor: Lfm2VlProcessor | None = None
        self.error: BaseException | None = None  # what a question meets that comes too late
        self.latest: weakref.WeakValueDictionary[str, PendingAnswer] = weakref.WeakValueDictionary()
        self.waiting: deque[Job] = deque()
        self.active: dict[Any, Job] = {}

    def pending(self) -> PendingAnswer:
        """An answer that wakes this thread when it is cancelled."""
        return PendingAnswer(self.queue.put)

    def check_process(self) -> None:
        """Raises an error in a process that `os.fork` has made."""
        if os.getpid() != self.process:
            raise Lfm2VlError(
                f"this Worker belongs to process {self.process}; after os.fork() a process needs "
                "a Worker of its own"
            )

    def put(self, job: Job, latest: str | None = None) -> None:
        """Takes a job in, or ends it at once if the worker has ended."""
        try:
            self.check_process()
        except Lfm2VlError as error:
            job.finish(error)
            return
        with self.lock:
            if not self.closed:
                self.queue.put(job)
                older = None if latest is None else self.latest.get(latest)
                if older is not None and not older._begun:
                    older.cancel(f"a later question for {latest!r} took its place")
                if latest is not None:
                    self.latest[latest] = job.pending
                return
        job.finish(self.error or AnswerCancelled("the worker is closed"))

    def stop(self) -> None:
        """Ends with the token under way."""
        if os.getpid() != self.process:
            return  # the lock may be held for ever
        with self.lock:
            self.closed = True
        self.queue.put(None)

    def _serve(self, load: Callable[[], Parts]) -> None:
        error: BaseException = AnswerCancelled("the worker is closed")
        try:
            self._work(load)  # the model lives and dies in there
        except BaseException as raised:  # noqa: BLE001 - its place is in the caller's thread
            error = _without_frames(raised)
        self.prefixes.clear()
        mx.clear_cache()
        # streams that end after join, with the system's thread, may meet the end of the process:
        # "terminate called without an active exception"
        mx.clear_streams()
        with self.lock:
            self.closed, self.error = True, error
        self.loaded.set()
        self._drain(wait=False)
        left, self.active, self.waiting = [*self.active.values(), *self.waiting], {}, deque()
        for job in left:
            job.finish(error)

    def _work(self, load: Callable[[], Parts]) -> None:
        model, processor = load()
        self.config, self.processor = model.config, processor
        self.loaded.set()
        engine = Engine(model, processor, max_rows=self.batch_size, prefixes=self.prefixes)
        with memory_limits(model):
            while True:
                idle = not self.active and not any(self._is_ready(job) for job in self.waiting)
                if idle and self.ending and not self.waiting:
                    break
                self._drain(wait=idle)
                if self.closed:
                    break
                self._forget(engine)
                self._begin(engine)
                if self.active:
                    self._hand_out(engine.step())
                for row, _ in engine.reading:
                    self.active[row].pending.progress = (row.cache[0].offset, row.length)
        del model, processor, engine  # a traceback that a caller keeps leads back to this frame

    def _drain(self, wait: bool) -> None:
        """Takes what has come; waits for something, if there is nothing else to do."""
        while wait or not self.queue.empty():
            news, wait = self.queue.get(), False
            if isinstance(news, Job):
                self.waiting.append(news)
            elif news is None:
                self.ending = True

    def _forget(self, engine: Engine) -> None:
        """Lets go of what nobody wants any more."""
        for row in [row for row, job in self.active.items() if job.pending.done]:
            engine.cancel(row)
            self.active.pop(row).finish(None)
        for job in [job for job in self.waiting if job.pending.done]:
            self.waiting.remove(job)
            job.finish(None)

    def _begin(self, engine: Engine) -> None:
        """Makes rows of what is prepared, and has prepared what comes next."""
        processor = cast(Lfm2VlProcessor, engine.processor)
        for job in list(self.waiting):
            if len(self.active) == self.batch_size:
                break
            if self._is_ready(job):
                self.waiting.remove(job)
                self._add(engine, job)
        for job in islice(self.waiting, AHEAD):
            if job.prepared is None:
                job.prepared = _in_thread(partial(job.ask, processor), self.queue.put)

    def _is_ready(self, job: Job) -> bool:
        early = job.after is not None and any(job.after is one for one in self.waiting)
        return not early and job.prepared is not None and job.prepared.done()

    def _add(self, engine: Engine, job: Job) -> None:
        try:
            question = cast("Future[Question]", job.prepared).result()
            read_only = None
            if job.read_only:
                read_only = cast(Prompt, question.prompt).images[-1].stop
            job.pending._begun = True
            row = engine.add(
                question,
                keep_answer=job.keep_answer,
                keep_prompt=job.keep_prompt,
                read_only=read_only,
            )
        except Exception as error:  # noqa: BLE001 - its place is in the caller's thread
            job.finish(_without_frames(error))
        else:
            self.active[row] = job

    def _hand_out(self, events: Sequence[Event]) -> None:
        for row, response, error in events:
            job = self.active[row]
            if response is not None:
                self._tell(job, response)
            if response is not None and response.finish_reason is None:
                continue
            del self.active[row]
            usage = Usage.of(cast(AnswerRow, row))
            if error is None:
                job.finish(None, cast(AnswerRow, row).question, usage)
            else:
                job.finish(_without_frames(error), usage=usage)

    def _tell(self, job: Job, response: GenerationResponse) -> None:
        try:
            if job.look is not None:
                job.look(response)
        except Exception as error:  # noqa: BLE001 - its place is in the caller's thread
            job.pending._finish(_without_frames(error))  # `_forget` does the rest
        if job.logprobs:
            mx.eval(response.logprobs)  # no other thread could
        else:
            response = replace(response, logprobs=_no_logprobs())
        job.pending._add(response)


def _in_thread(
    make: Callable[[], Question], tell: Callable[[Future[Question]], None]
) -> Future[Question]:
    """Calls a function in a thread of its own, which the interpreter's exit does not wait for."""
    future: Future[Question] = Future()

    def call() -> None:
        try:
            future.set_result(make())
        except BaseException as error:  # noqa: BLE001 - its place is in the caller's thread
            future.set_exception(error)
        tell(future)

    threading.Thread(target=call, name="mlx_lfm2vl.prepare", daemon=True).start()
    return future


@cache
def _no_logprobs() -> mx.array:
    """(0,), of no stream, so any thread may look at it."""
    return mx.array([])


def _without_frames(error: BaseException) -> BaseException:
    """An exception that holds no model and no cache through the frames of its traceback."""
    traceback.clear_frames(error.__traceback__)
    frame = error.__traceback__.tb_frame if error.__traceback__ is not None else None
    while frame is not None:  # those that called the first one
        with suppress(RuntimeError):  # still running
            frame.clear()
        frame = frame.f_back
    return error


@cache
def close_at_exit() -> None:
    """Registers `_close_all`, once."""
    atexit.register(_close_all)


def _close_all() -> None:
    """A thread inside MLX must not meet the end of the interpreter."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, EngineThread)]
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join(EXIT_PATIENCE)
