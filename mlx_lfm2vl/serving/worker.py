"""`Worker`: a thread that owns a model and answers requests from any thread and from asyncio.

MLX streams belong to threads, so one thread does all the work, one request after another.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, cast

import mlx.core as mx

from ..checkpoints.loading import load as load_model
from ..errors import Lfm2VlError
from ..generation.answer import GenerationResponse
from ..generation.generate import NO_CACHE_OPTIONS, stream_generate
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import DEFAULT_MAX_TOKENS, CacheOptions, ImageOptions
from ..prompts.image_processor import NO_OPTIONS, ImageInput
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt

EXIT_PATIENCE = 10.0  # seconds that the interpreter's exit waits for the token under way
Parts = tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor]
Ask = Callable[[Lfm2VlForConditionalGeneration, Lfm2VlProcessor], Iterator[GenerationResponse]]


class RequestCancelled(Lfm2VlError):
    """A request was cancelled, replaced by a later one, or its worker closed."""


class Request:
    """An answer on its way, made by `Worker.submit`.

    `for response in request` and `async for response in request` give each response from the
    first one on, as often as they are asked; `request.result()` and `await request` give the whole
    text. All of them raise what went wrong: `RequestCancelled`, or what `load` or
    `stream_generate` raised. To stop iterating does not stop the answer, `cancel` does; so does
    cancelling an asyncio task that waits for it.
    """

    def __init__(self, ask: Ask, logprobs: bool) -> None:
        self._ask: Ask | None = ask  # None once it has begun or ended
        self._logprobs = logprobs
        # kept without bound: a few hundred bytes each, max_tokens at most
        self._responses: list[GenerationResponse] = []
        self._error: BaseException | None = None
        self._done = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

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
            TimeoutError: it took more than `timeout` seconds; the request goes on.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._done, timeout):
                raise TimeoutError(f"no answer within {timeout} seconds")
        self._raise()
        return self.text

    def cancel(self, reason: str = "the request was cancelled") -> bool:
        """Ends it now; no response comes after this. False where it had ended already.

        The worker lets go of it after the token under way, or the prompt under way.
        """
        return self._finish(RequestCancelled(reason))

    def __iter__(self) -> Iterator[GenerationResponse]:
        seen = 0
        while True:
            with self._changed:
                self._changed.wait_for(partial(self._has_news, seen))
                news, done = self._responses[seen:], self._done
            yield from news
            if done:
                return self._raise()
            seen += len(news)

    async def __aiter__(self) -> AsyncIterator[GenerationResponse]:
        loop, event, seen = asyncio.get_running_loop(), asyncio.Event(), 0
        wake = partial(_wake, loop, event)
        with self._changed:
            self._listeners.append(wake)
        try:
            while True:
                event.clear()
                with self._changed:
                    news, done = self._responses[seen:], self._done
                for response in news:
                    yield response
                if done:
                    self._raise()
                    return
                seen += len(news)
                await event.wait()
        except asyncio.CancelledError:
            self.cancel()
            raise
        finally:
            with self._changed:
                self._listeners.remove(wake)

    def __await__(self) -> Generator[Any, None, str]:
        return self._whole().__await__()

    async def _whole(self) -> str:
        async for _ in self:
            pass
        return self.text

    def _has_news(self, seen: int) -> bool:
        return self._done or len(self._responses) > seen

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _begin(self) -> Ask | None:
        """What to do, once; None where it has been cancelled."""
        with self._changed:
            ask, self._ask = self._ask, None
            return ask

    def _drop(self, reason: str) -> None:
        """Cancels it, unless it has begun."""
        with self._changed:
            if self._ask is not None:
                self.cancel(reason)

    def _add(self, response: GenerationResponse) -> None:
        with self._changed:
            if not self._done:
                self._responses.append(response)
                self._tell()

    def _finish(self, error: BaseException | None = None) -> bool:
        """The first end counts."""
        with self._changed:
            if self._done:
                return False
            self._done, self._error = True, error
            self._ask = None  # with its images
            self._tell()
            return True

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()


class Worker:
    """Owns a model and the thread that runs it.

        with Worker("LiquidAI/LFM2.5-VL-450M") as worker:
            request = worker.submit("What is in this image?", "photo.jpg")
            for response in request:
                print(response.text, end="")

    Loading begins at once, in the thread. A worker that is forgotten answers what it was asked
    and ends; at the interpreter's exit it ends with the token under way.

    Args:
        model, dtype, revision: as for `load`.
        load: makes (model, processor) in the worker's thread, instead of the three.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        *,
        load: Callable[[], Parts] | None = None,
    ) -> None:
        if (model is None) == (load is None):
            raise TypeError("a Worker takes either model or load")
        if load is None:
            load = partial(load_model, cast("str | Path", model), dtype, revision)
        _close_at_exit()
        self._thread = _Thread(load)
        # atexit is _close_all's; SimpleQueue.put may be called by the garbage collector
        weakref.finalize(self, self._thread.queue.put, None).atexit = False
        self._thread.start()

    def wait_until_ready(self, timeout: float | None = None) -> None:
        """Waits until the model is loaded. Nobody needs to; requests wait for it, too.

        Raises:
            TimeoutError: it took more than `timeout` seconds.
            ModelNotFoundError, ConfigError, WeightsError: what `load` raised.
            RequestCancelled: the worker is closed.
        """
        if not self._thread.loaded.wait(timeout):
            raise TimeoutError(f"the model is not loaded after {timeout} seconds")
        if self._thread.error is not None:
            raise self._thread.error

    def submit(
        self,
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
        cache_options: CacheOptions = NO_CACHE_OPTIONS,
        logprobs: bool = False,
        latest: str | None = None,
    ) -> Request:
        """Asks, from any thread; never waits.

        Whatever goes wrong is raised by the request: what `stream_generate` raises, what `load`
        raised, or `RequestCancelled` where the worker is closed.

        Args:
            prompt, images, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty,
                repetition_context_size, seed, stop, tools, image_options, cache_options: as for
                `stream_generate`. Images are read when the request's turn comes, so an array may
                not change until then.
            logprobs: keep the log-probabilities of each response, (vocab,) float32, 0.3 MB or so;
                otherwise they are empty.
            latest: a name, such as "camera", under which only the last request waits: an older one
                that has not begun is cancelled, one that has goes on.
        """
        ask = partial(
            stream_generate,
            prompt=prompt,
            images=images,
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
            cache_options=cache_options,
        )
        request = Request(ask, logprobs)
        self._thread.put(request, latest)
        return request

    def close(self, timeout: float | None = None) -> None:
        """Cancels every request and waits for the thread, which frees the model; may be repeated.

        Waits for the token, the prompt or the loading under way, `timeout` seconds at most.
        """
        self._thread.stop()
        self._thread.join(timeout)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Thread(threading.Thread):
    """Does the work. It does not know its `Worker`, so a forgotten one can be collected."""

    def __init__(self, load: Callable[[], Parts]) -> None:
        # the interpreter would wait for any other thread before it tells us of its exit
        super().__init__(target=self._serve, args=(load,), name="mlx_lfm2vl.Worker", daemon=True)
        self.queue: SimpleQueue[Request | None] = SimpleQueue()
        self.lock = threading.Lock()  # nothing enters the queue once `closed` is set
        self.closed = False
        self.loaded = threading.Event()
        self.error: BaseException | None = None  # what a request meets that comes too late
        self.latest: weakref.WeakValueDictionary[str, Request] = weakref.WeakValueDictionary()

    def put(self, request: Request, latest: str | None) -> None:
        with self.lock:
            if self.closed:
                request._finish(self.error or RequestCancelled("the worker is closed"))
                return
            if latest is not None:
                older = self.latest.get(latest)
                if older is not None:
                    older._drop(f"a later request for {latest!r} took its place")
                self.latest[latest] = request
            self.queue.put(request)

    def stop(self) -> None:
        with self.lock:
            self.closed = True
        self.queue.put(None)

    def _serve(self, load: Callable[[], Parts]) -> None:
        error: BaseException = RequestCancelled("the worker is closed")
        try:
            self._work(load)  # the model lives and dies in there
        except BaseException as raised:  # noqa: BLE001 - its place is in the caller's thread
            error = _without_frames(raised)
        mx.clear_cache()
        # streams that end after join, with the system's thread, may meet the end of the process:
        # "terminate called without an active exception"
        mx.clear_streams()
        with self.lock:
            self.closed, self.error = True, error
        self.loaded.set()
        while not self.queue.empty():
            request = self.queue.get()
            if request is not None:
                request._finish(error)

    def _work(self, load: Callable[[], Parts]) -> None:
        model, processor = load()
        self.loaded.set()
        while not self.closed and (request := self.queue.get()) is not None:
            error: BaseException | None = None
            try:
                self._answer(request, model, processor)
            except BaseException as raised:  # noqa: BLE001 - its place is in the caller's thread
                error = _without_frames(raised)
            mx.synchronize()  # the step that was under way gives its memory back, too
            mx.clear_cache()
            request._finish(error)
            del request, error  # or they would live until the next one
        del model, processor  # a traceback that a caller keeps leads back to this frame

    def _answer(
        self, request: Request, model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor
    ) -> None:
        ask = request._begin()
        if ask is None:
            return
        generator = cast("Generator[GenerationResponse, None, None]", ask(model, processor))
        with closing(generator) as responses:
            for response in responses:
                if request._logprobs:
                    mx.eval(response.logprobs)  # no other thread could
                else:
                    response = replace(response, logprobs=_no_logprobs())
                request._add(response)
                if self.closed:
                    request.cancel("the worker is closed")
                if request.done:
                    return


@cache
def _no_logprobs() -> mx.array:
    """(0,), of no stream, so any thread may look at it."""
    return mx.array([])


def _without_frames(error: BaseException) -> BaseException:
    """An exception that holds no model and no cache through the frames of its traceback."""
    traceback.clear_frames(error.__traceback__)
    # the first frame is still running
    return error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)


def _wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed, nobody waits
        loop.call_soon_threadsafe(event.set)


@cache
def _close_at_exit() -> None:
    """Registers `_close_all`, once."""
    atexit.register(_close_all)


def _close_all() -> None:
    """A thread inside MLX must not meet the end of the interpreter."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, _Thread)]
    for thread in threads:
        thread.stop()
    for thread in threads:
        thread.join(EXIT_PATIENCE)
