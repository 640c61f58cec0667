"""`PendingAnswer`: an answer on its way from a worker's thread to whoever waits for it."""

from __future__ import annotations

import asyncio
import copy
import os
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterator,
    Sequence,
)
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

from ..errors import Lfm2VlError
from ..generation.answer import GenerationResponse


class AnswerCancelled(Lfm2VlError):
    """An answer was cancelled, replaced by a later one, or its worker closed."""


class PendingAnswer(Coroutine[Any, Any, str]):
    """An answer on its way, made by `Worker.submit`.

    `for response in answer` and `async for response in answer` give each response from the first
    one on, as often as they are asked; `answer.result()` and `await answer` give the whole text;
    `asyncio.create_task(answer)` and `TaskGroup.create_task(answer)` take it as a coroutine. All of
    them raise what went wrong: `AnswerCancelled`, or what `load` or `stream_generate` raised, each
    time an exception of its own. To stop iterating does not stop the answer, `cancel` does; so does
    cancelling the last asyncio task that waits for it.

    Attributes:
        usage: what it cost; known when it is done.
        progress: (positions of the prompt that are read, all of them), while it is being read.
    """

    def __init__(self, forget: Callable[[PendingAnswer], None]) -> None:
        self.usage: Any = None
        self.progress: tuple[int, int] | None = None
        self._forget = forget  # tells the worker that nobody wants it any more
        # kept without bound: a few hundred bytes each, max_tokens at most
        self._responses: list[GenerationResponse] = []
        self._error: BaseException | None = None
        self._done = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []
        self._waiters = 0
        self._tasks: dict[Any, Coroutine[Any, Any, str]] = {}
        self._begun = False  # somebody has begun to work on it
        self._process = os.getpid()

    @property
    def done(self) -> bool:
        """Whether it has ended: answered, cancelled or failed."""
        return self._done

    @property
    def responses(self) -> list[GenerationResponse]:
        """The responses so far; never waits."""
        with self._changed:
            return list(self._responses)

    @property
    def text(self) -> str:
        """The text so far; never waits and never raises, so a window may poll it."""
        return "".join(response.text for response in self.responses)

    def result(self, timeout: float | None = None) -> str:
        """Waits for the whole text.

        Raises:
            TimeoutError: it took more than `timeout` seconds; the answer continues.
        """
        with self._waiting(), self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"no answer within {timeout} seconds")
        self._raise()
        return self.text

    def cancel(self, reason: str = "the answer was cancelled") -> bool:
        """Ends it now; no response comes after this. False if it had ended already.

        The worker lets go of it after the token under way, or the piece of a prompt under way.
        """
        ended = self._finish(AnswerCancelled(reason))
        if ended:
            self._forget(self)
        return ended

    def __iter__(self) -> Iterator[GenerationResponse]:
        seen = 0
        with self._waiting():
            while True:
                with self._changed:
                    self._changed.wait_for(partial(self._has_news, seen))
                responses, done = self._since(seen)
                yield from responses
                if done:
                    return self._raise()
                seen += len(responses)

    def __aiter__(self) -> AsyncIterator[GenerationResponse]:
        return (response async for [(_, responses)] in news([self]) for response in responses)

    def __await__(self) -> Generator[Any, None, str]:
        return self._whole().__await__()

    def send(self, value: Any) -> Any:
        """Continues for the present asyncio task; each task awaits by itself."""
        return self._step(lambda coroutine: coroutine.send(value))

    def throw(self, *error: Any) -> Any:
        """Raises in the present asyncio task."""
        return self._step(lambda coroutine: coroutine.throw(*error))

    def close(self) -> None:
        """There is nothing to close; see `cancel`."""

    def _step(self, step: Callable[[Coroutine[Any, Any, str]], Any]) -> Any:
        task = asyncio.current_task()
        if task not in self._tasks:
            self._tasks[task] = self._whole()
        try:
            return step(self._tasks[task])
        except BaseException:  # its end, too, is an exception
            self._tasks.pop(task, None)
            raise

    async def _whole(self) -> str:
        async for _ in self:
            pass
        return self.text

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """Counts who waits."""
        if os.getpid() != self._process:
            raise Lfm2VlError(
                f"this answer belongs to process {self._process}; after os.fork() a process needs "
                "a Worker of its own"
            )
        with self._changed:
            self._waiters += 1
        try:
            yield
        finally:
            with self._changed:
                self._waiters -= 1

    def _has_news(self, seen: int) -> bool:
        return self._done or len(self._responses) > seen

    def _since(self, seen: int) -> tuple[list[GenerationResponse], bool]:
        """The responses after some, and whether no more will come."""
        with self._changed:
            return self._responses[seen:], self._done

    @contextmanager
    def _listening(self, listener: Callable[[], None]) -> Iterator[None]:
        """Calls a function at whatever comes."""
        with self._waiting():
            with self._changed:
                self._listeners.append(listener)
            try:
                yield
            finally:
                with self._changed:
                    self._listeners.remove(listener)

    def _raise(self) -> None:
        if self._error is not None:
            raise own_copy(self._error)

    def _add(self, response: GenerationResponse) -> None:
        with self._changed:
            if not self._done:
                self._responses.append(response)
                self._tell()

    def _finish(self, error: BaseException | None = None, usage: Any = None) -> bool:
        """The first end counts."""
        with self._changed:
            if self._done:
                return False
            self._done, self._error, self.usage = True, error, usage
            self._tell()
            return True

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


News = list[tuple[int, list[GenerationResponse]]]  # place of an answer, and what is new of it


async def news(
    answers: Sequence[PendingAnswer], patience: float | None = None
) -> AsyncGenerator[News, None]:
    """What comes of several answers, all of one wake-up together, until all have ended.

    The first error of any of them is raised. An empty list comes after `patience` seconds in which
    nothing did. Cancelling the task cancels those answers that nobody else waits for.
    """
    loop, event, seen = asyncio.get_running_loop(), asyncio.Event(), [0] * len(answers)
    with ExitStack() as listening:
        for answer in answers:
            listening.enter_context(answer._listening(partial(_wake, loop, event)))
        try:
            while True:
                event.clear()
                states = [answer._since(n) for answer, n in zip(answers, seen, strict=True)]
                found = [(place, new) for place, (new, _) in enumerate(states) if new]
                if found:
                    yield found
                seen = [n + len(new) for n, (new, _) in zip(seen, states, strict=True)]
                for answer, (_, done) in zip(answers, states, strict=True):
                    if done:
                        answer._raise()
                if all(done for _, done in states):
                    return
                if not await _within(event, patience):
                    yield []
        except asyncio.CancelledError:
            for answer in answers:
                if answer._waiters == 1:  # nobody else wants it
                    answer.cancel()
            raise


async def _within(event: asyncio.Event, seconds: float | None) -> bool:
    """Waits for an event; False if the time was over first."""
    if seconds is None:
        return await event.wait()
    late: list[None] = []

    def end() -> None:
        late.append(None)
        event.set()

    timer = asyncio.get_running_loop().call_later(seconds, end)
    try:
        await event.wait()
    finally:
        timer.cancel()
    return not late


def own_copy(error: BaseException) -> BaseException:
    """An exception like another: one that is raised again and again would keep all who saw it."""
    try:
        twin = copy.copy(error)
    except TypeError:  # an exception whose arguments are not its constructor's
        return error
    twin.__cause__, twin.__suppress_context__ = error.__cause__, True
    return twin.with_traceback(error.__traceback__)


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed, nobody waits
        loop.call_soon_threadsafe(event.set)
