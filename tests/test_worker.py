"""The worker: many threads, asyncio, cancellation, errors, its end, and what it leaves behind."""

import asyncio
import gc
import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl import (
    AnswerCancelled,
    ImageError,
    ModelNotFoundError,
    PendingAnswer,
    PromptError,
    Worker,
    generate,
)
from mlx_lfm2vl.generation.decoding import DecodeStep
from mlx_lfm2vl.generation.memory import CACHE_LIMIT
from mlx_lfm2vl.serving.pending import news

from .checkpoints.pictures import picture
from .helpers import WAIT, Gate, load_v5

FOLDER = Path(__file__).parent / "checkpoints" / "v5"


@pytest.fixture
def worker():
    with Worker(load=load_v5) as worker:
        yield worker


def worker_threads():
    return [t for t in threading.enumerate() if t.name.startswith("mlx_lfm2vl")]


@pytest.fixture
def gate(worker):
    gate = Gate()
    gate.request = worker.submit("What?", max_tokens=1, logits_processors=[gate])
    assert gate.entered.wait(WAIT)
    yield gate
    gate.opened.set()


def test_32_threads_get_the_answers_of_generate(worker):
    """A third cancel at some point, one asks for an image that is not there."""
    count, failing = 32, 10
    model, processor = load_v5()
    questions = [
        {
            "prompt": f"Question {n}?",
            "images": picture(60, 40, n) if n % 2 else None,
            "max_tokens": 8,
            "seed": n,
            "temperature": 2.0,
        }
        for n in range(count)
    ]
    expected = [generate(model, processor, **question) for question in questions]
    assert len(set(expected)) > count // 2
    questions[failing]["images"] = "no_such_file.jpg"
    points = random.Random(0)
    cancel_after = {n: points.randrange(8) for n in range(count) if n % 3 == 0}
    outcomes = [None] * count
    start = threading.Barrier(count)

    def ask(n):
        start.wait()
        request = worker.submit(**questions[n])
        try:
            if n in cancel_after:
                for seen, _ in enumerate(request, 1):
                    if seen > cancel_after[n]:
                        break
                # where the answer was faster than we, that is no error
                outcomes[n] = "cancelled" if request.cancel() else request.result(WAIT)
            else:
                outcomes[n] = request.result(WAIT)
        except ImageError as error:
            outcomes[n] = error

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    for n in range(count):
        if n == failing:
            assert isinstance(outcomes[n], ImageError)
        else:
            assert outcomes[n] == expected[n] or (n in cancel_after and outcomes[n] == "cancelled")
    assert outcomes.count("cancelled") > 0
    assert worker.submit(**questions[0]).result(WAIT) == expected[0]


def test_responses_in_order_and_again(worker):
    request = worker.submit("Hello", max_tokens=9, temperature=0)
    responses = list(request)
    assert [response.generation_tokens for response in responses] == list(range(1, 10))
    assert responses[-1].finish_reason == "length"
    assert all(response.logprobs.size == 0 for response in responses)
    assert "".join(response.text for response in responses) == request.text == request.result()
    assert [r.token for r in request] == [r.token for r in request.responses]
    assert request.done
    assert not request.cancel()


def test_logprobs_may_be_used_in_the_callers_thread(worker):
    for response in worker.submit("Hello", max_tokens=3, temperature=0, logprobs=True):
        assert mx.argmax(response.logprobs).item() == response.token


def test_a_look_at_each_response_in_the_workers_thread(worker):
    seen = []

    def look(response):
        name = threading.current_thread().name
        seen.append((name, response.token, response.logprobs[response.token].item()))

    answer = worker.submit("What?", max_tokens=3, temperature=0, look=look)
    answer.result(WAIT)
    assert [token for _, token, _ in seen] == [r.token for r in answer.responses]
    assert {name for name, _, _ in seen} == {"mlx_lfm2vl.Worker"}
    assert all(logprob <= 0 for *_, logprob in seen)


def test_a_look_that_fails_ends_its_answer_alone(worker):
    other = worker.submit("What?", max_tokens=5, temperature=0)
    wrong = worker.submit("What?", max_tokens=100, look=lambda response: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        wrong.result(WAIT)
    assert other.result(WAIT) == worker.submit("What?", max_tokens=5, temperature=0).result(WAIT)
    assert worker.active == 0


def test_news_of_several_answers_come_together(worker):
    async def main():
        answers = [worker.submit(f"What? {n}", max_tokens=4, temperature=0) for n in range(3)]
        found = [[], [], []]
        async for some in news(answers):
            for place, responses in some:
                found[place] += responses
        assert found == [answer.responses for answer in answers]

    asyncio.run(main())


def test_who_waits_for_several_and_is_cancelled_cancels_all(worker, gate):
    async def main():
        gone = [worker.submit("What?", max_tokens=1000) for _ in range(2)]
        task = asyncio.create_task(anext(news(gone)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert all(answer.done for answer in gone)

    asyncio.run(main())


def test_asyncio(worker):
    model, processor = load_v5()
    expected = generate(model, processor, "Hello", max_tokens=12, temperature=0)

    async def consume(request):
        return "".join([response.text async for response in request])

    async def main():
        requests = [worker.submit("Hello", max_tokens=12, temperature=0) for _ in range(4)]
        texts = await asyncio.gather(*map(consume, requests[:3]), consume(requests[0]))
        with pytest.raises(ImageError, match="no_such_file"):
            await worker.submit("Hello", "no_such_file.jpg")
        return [*texts, await requests[3]]

    assert asyncio.run(main()) == [expected] * 5


def test_a_cancelled_task_cancels_its_request(worker, gate):
    request = worker.submit("Hello", max_tokens=1000)

    async def main():
        await asyncio.wait_for(request, 0.05)

    with pytest.raises((TimeoutError, asyncio.TimeoutError)):
        asyncio.run(main())
    assert request.done
    assert request.responses == []
    with pytest.raises(AnswerCancelled):
        request.result()


def test_an_event_loop_that_is_gone_harms_nobody(worker, gate):
    request = worker.submit("Hello", max_tokens=3)
    loop = asyncio.new_event_loop()
    responses = aiter(request)
    waiting = loop.create_task(responses.__anext__())
    loop.run_until_complete(asyncio.sleep(0.01))
    waiting._log_destroy_pending = False
    loop.close()
    gate.opened.set()
    assert len(request.result(WAIT)) > 0


def test_only_the_latest_frame_waits(worker, gate):
    ask = partial(worker.submit, max_tokens=2)
    frames = [ask(f"Frame {n}?", picture(40, 40, n), latest="camera") for n in range(5)]
    other = ask("Another?", latest="microphone")
    plain = ask("A third?")
    for frame in frames[:-1]:
        assert frame.done, "dropped at once, not when its turn comes"
        with pytest.raises(AnswerCancelled, match="later question for 'camera'"):
            frame.result()
    gate.opened.set()
    for request in (frames[-1], other, plain):
        request.result(WAIT)
        assert len(request.responses) == 2


def test_the_running_frame_goes_on(worker):
    first = worker.submit("Frame?", max_tokens=40, temperature=0, latest="camera")
    next(iter(first))
    second = worker.submit("Frame?", max_tokens=2, latest="camera")
    second.result(WAIT)
    assert len(list(first)) > 2


def test_cancel_takes_effect_within_one_token(work):
    with Worker(load=load_v5) as worker:
        request = worker.submit("Hello", max_tokens=2000, temperature=0)
        responses = iter(request)
        for _ in range(5):
            next(responses)
        request.cancel()
        made = len(work.passes)
        kept = len(request.responses)
        worker.submit("Hello", max_tokens=1, temperature=0).result(WAIT)
        # the token under way, the step that runs ahead of it, and the one token of the second
        assert len(work.passes) - made <= 3
        assert len(request.responses) == kept, "a response came after cancel"
        with pytest.raises(AnswerCancelled):
            list(request)


def test_an_error_reaches_its_caller_as_itself(worker):
    for settings, kind in [
        ({"prompt": " "}, PromptError),
        ({"prompt": "What?", "images": b"no image"}, ImageError),
        ({"prompt": "What?", "max_tokens": 0}, PromptError),
        ({"prompt": "What?", "images": 3.5}, ImageError),
    ]:
        request = worker.submit(**settings)
        with pytest.raises(kind):
            request.result(WAIT)
        with pytest.raises(kind):
            list(request)
        assert request.done
        assert request.text == ""
    assert worker.submit("Hello", max_tokens=1).result(WAIT) is not None


def test_result_may_time_out(worker, gate):
    request = worker.submit("Hello", max_tokens=1)
    with pytest.raises(TimeoutError):
        request.result(0.01)
    gate.opened.set()
    assert request.result(WAIT) is not None
    assert gate.request.result(WAIT) is not None


def test_a_load_error_reaches_everyone(tmp_path):
    with Worker(tmp_path / "nowhere") as worker:
        with pytest.raises(ModelNotFoundError):
            worker.wait_until_ready(WAIT)
        request = worker.submit("Hello")  # early or late, the error comes in the same way
        with pytest.raises(ModelNotFoundError):
            request.result(WAIT)
    started = threading.Event()

    def load_slowly():
        assert started.wait(WAIT)
        raise OSError("the disk is on fire")

    with Worker(load=load_slowly) as worker:
        request = worker.submit("Hello")
        with pytest.raises(TimeoutError):
            worker.wait_until_ready(0.01)
        started.set()
        with pytest.raises(OSError, match="on fire"):
            request.result(WAIT)
    with pytest.raises(TypeError, match="either model or load"):
        Worker()


def test_close_ends_everything(worker):
    running = worker.submit("Hello", max_tokens=1_000_000)
    next(iter(running))
    waiting = worker.submit("Hello")
    worker.wait_until_ready()
    worker.close()
    worker.close()
    for request in (running, waiting):
        with pytest.raises(AnswerCancelled, match="worker is closed"):
            request.result(WAIT)
    with pytest.raises(AnswerCancelled, match="worker is closed"):
        worker.submit("Hello").result(WAIT)
    assert worker_threads() == []


def test_a_forgotten_worker_answers_and_ends():
    request = Worker(load=load_v5).submit("Hello", max_tokens=5)
    gc.collect()
    (thread,) = (t for t in worker_threads() if t.name == "mlx_lfm2vl.Worker")
    assert request.result(WAIT) is not None
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize("moment", ["loading", "answering", "waiting"])
def test_interpreter_exit_does_not_hang(moment):
    code = f"""
from mlx_lfm2vl.serving.worker import Worker
worker = Worker({str(FOLDER)!r}, dtype="float32")
request = worker.submit("Hello", max_tokens=1_000_000 if {moment!r} == "answering" else 2)
if {moment!r} != "loading":
    next(iter(request))
if {moment!r} == "waiting":
    request.result()
print("end")
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=WAIT, cwd=FOLDER
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "end\n", "")


def test_memory_after_50_requests_is_that_after_the_first(worker):
    image = np.asarray(picture(200, 120, 1))
    kept = []

    def ask(n):
        request = worker.submit("What is it?", image, max_tokens=6, seed=n, temperature=1.0)
        if n % 3 == 1:
            next(iter(request))
            request.cancel()
        elif n % 3 == 2:
            bad = worker.submit("What?", b"no image")
            with pytest.raises(ImageError) as caught:
                bad.result(WAIT)
            kept.append(caught.value)
        kept.append(request)

    def memory():
        """When all has ended and the worker waits again."""
        for request in kept:
            if isinstance(request, PendingAnswer) and not request.done:
                request.result(WAIT)
        found = []
        while len(found) < 3 or len(set(found[-3:])) > 1:
            time.sleep(0.05)
            found.append((mx.get_active_memory(), mx.get_cache_memory()))
        return found[-1]

    ask(0)
    first, _ = memory()
    for n in range(1, 51):
        ask(n)
    active, cached = memory()
    assert active == pytest.approx(first, rel=0.01)
    assert cached < CACHE_LIMIT


def test_an_error_in_the_midst_keeps_no_memory(monkeypatch):
    """The traceback that a caller keeps does not keep the caches, nor the model."""
    step, steps = DecodeStep.__call__, []

    def failing(self, *args):
        steps.append(1)
        if len(steps) == 10:
            raise RuntimeError("out of memory")
        return step(self, *args)

    monkeypatch.setattr(DecodeStep, "__call__", failing)
    gc.collect()
    before = mx.get_active_memory()
    with Worker(load=load_v5) as worker:
        request = worker.submit("Hello", max_tokens=50)
        with pytest.raises(RuntimeError, match="out of memory") as caught:
            request.result(WAIT)
        assert any("failing" in str(entry) for entry in caught.traceback)
    gc.collect()
    assert mx.get_active_memory() - before < 10_000
