"""A worker's engine: many at once, pictures once, sessions, asyncio, and a process that forks."""

import asyncio
import os
import threading
import time

import mlx.core as mx
import pytest

from mlx_lfm2vl import AnswerCancelled, ImageError, Lfm2VlError, PromptError, Worker, generate
from mlx_lfm2vl.serving import worker as worker_module

from .checkpoints.pictures import picture
from .helpers import WAIT, Gate, load_v5

FOUR = [picture(60, 40, n) for n in range(4)]


@pytest.fixture
def worker():
    with Worker(load=load_v5, batch_size=8) as worker:
        yield worker


@pytest.fixture(scope="module")
def parts():
    return load_v5()


def turn(text, *images):
    items = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [*items, {"type": "text", "text": text}]}


def test_32_threads_about_4_pictures(worker, parts, work):
    """The tower runs once per picture, and a step is as wide as it may be."""
    asked = [f"Question {n}, please?" for n in range(32)]
    expected = [
        generate(*parts, asked[n], FOUR[n % 4], max_tokens=25, temperature=0) for n in range(32)
    ]
    work.clear()
    answers = [None] * 32
    start = threading.Barrier(32)

    def ask(n):
        start.wait()
        answer = worker.submit(asked[n], FOUR[n % 4], max_tokens=25, temperature=0)
        answers[n] = answer.result(WAIT)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert answers == expected
    assert sum(work.views) == 4
    assert max(work.steps) == 8


def test_tasks_and_groups_take_an_answer(worker, parts):
    expected = generate(*parts, "Hello", max_tokens=8, temperature=0)

    def ask():
        return worker.submit("Hello", max_tokens=8, temperature=0)

    async def main():
        answer = ask()
        first, second = asyncio.create_task(answer), asyncio.create_task(answer)
        async with asyncio.TaskGroup() as group:
            third = group.create_task(ask())
            fourth = group.create_task(answer)
        together = await asyncio.gather(ask(), answer, first, second)
        return [*together, third.result(), fourth.result(), await answer]

    assert asyncio.run(main()) == [expected] * 7


def test_a_waiter_that_is_cancelled_does_not_cancel_the_others(worker):
    gate = Gate()
    answer = worker.submit("What?", max_tokens=3, logits_processors=[gate])

    async def main():
        tasks = [asyncio.create_task(answer) for _ in range(3)]
        await asyncio.sleep(0.05)
        tasks[0].cancel()
        await asyncio.sleep(0.05)
        assert not answer.done
        gate.opened.set()
        texts = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(texts[0], asyncio.CancelledError)
        return texts[1:]

    assert asyncio.run(main()) == [answer.result(WAIT)] * 2
    alone = worker.submit("What?", max_tokens=10_000, logit_bias={4: -100})  # 4 would end it

    async def give_up():
        task = asyncio.create_task(alone)
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(give_up())
    assert alone.done, "nobody else wanted it"


def test_async_with():
    async def main():
        async with Worker(load=load_v5) as worker:
            await worker.ready()
            text = await worker.submit("Hello", max_tokens=3)
        with pytest.raises(AnswerCancelled, match="closed"):
            await worker.submit("Hello")
        return text

    assert asyncio.run(main())


def test_each_waiter_gets_an_exception_of_its_own(worker):
    answer = worker.submit("What?", "missing.png")
    errors = []
    for _ in range(50):
        with pytest.raises(ImageError, match="missing") as caught:
            answer.result(WAIT)
        errors.append(caught.value)
    assert len(set(map(id, errors))) == 50

    def depth(error):
        traceback, count = error.__traceback__, 0
        while traceback is not None:
            traceback, count = traceback.tb_next, count + 1
        return count

    assert depth(errors[-1]) == depth(errors[0]), "each raising has left an entry"
    assert depth(answer._error) < 20


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python 3.12 warns of forks
def test_after_a_fork_there_is_a_clear_error(worker):
    answer = worker.submit("Hello", max_tokens=2)
    assert answer.result(WAIT) is not None
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        said = []
        for ask in (
            lambda: worker.submit("Hello").result(WAIT),
            lambda: answer.result(WAIT),
            worker.wait_until_ready,
        ):
            try:
                ask()
            except Lfm2VlError as error:
                said.append(str(error))
        worker.close()
        os.write(writer, "\n".join(said).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    assert len(lines) == 3
    assert all("belongs to process" in line and "os.fork()" in line for line in lines)


def test_a_session_keeps_its_pictures(worker, parts, work):
    session = worker.session(system="Be brief.")
    mx.eval(parts[0].parameters())
    work.clear()
    session.see(FOUR[0])
    asked = [session.ask(f"Question {n}?", max_tokens=5, temperature=0) for n in range(3)]
    system = {"role": "system", "content": "Be brief."}
    texts = [answer.result(WAIT) for answer in asked]
    assert sum(work.views) == 1
    assert all(answer.usage.encoded_images == 0 for answer in asked)
    for n, text in enumerate(texts):
        question = [system, turn(f"Question {n}?", FOUR[0])]
        assert text == generate(*parts, question, max_tokens=5, temperature=0)
    assert session.messages == [system]


def test_a_picture_is_read_before_it_is_asked_about(worker, monkeypatch):
    """Though the question is prepared first."""
    asked, prepared = threading.Event(), worker_module._prepared

    def later(question, processor):
        done = prepared(question, processor)
        if "Why?" in str(question.prompt):
            asked.set()
        else:
            assert asked.wait(WAIT)
            time.sleep(0.3)  # in which the question could begin
        return done

    monkeypatch.setattr(worker_module, "_prepared", later)
    session = worker.session()
    session.see(FOUR[2])
    answer = session.ask("Why?", max_tokens=5)
    answer.result(WAIT)
    assert answer.usage.encoded_images == 0


def test_turns_of_a_session_follow_each_other(worker, parts):
    """Though they are asked at once, and a question between them is about what was said."""
    session = worker.session()
    session.see(FOUR[1])
    settings = {"max_tokens": 5, "temperature": 0}
    first, aside = session.send("What is it?", **settings), session.ask("Why?", **settings)
    second = session.send("And where?", **settings)
    history = [turn("What is it?", FOUR[1])]
    for answer, text in ((first, None), (aside, "Why?"), (second, "And where?")):
        asked = history if text is None else [*history, turn(text)]
        assert answer.result(WAIT) == generate(*parts, asked, **settings)
        if answer is first:
            history.append({"role": "assistant", "content": first.result()})
    assert [m["role"] for m in session.messages] == ["user", "assistant"] * 2
    session.undo()
    assert len(session.messages) == 2
    session.reset()
    assert session.messages == []
    with pytest.raises(PromptError, match="no turn to undo"):
        session.undo()


def test_a_picture_that_cannot_be_read_leaves_the_session(worker, parts):
    session = worker.session()
    seen = session.see("missing.png")
    with pytest.raises(ImageError, match=r"missing\.png does not exist"):
        seen.result(WAIT)
    text = session.ask("What?", max_tokens=3, temperature=0).result(WAIT)
    assert text == generate(*parts, "What?", max_tokens=3, temperature=0)
    with pytest.raises(PromptError, match="the prompt is empty"):
        session.ask(" ").result(WAIT)


def test_a_turn_that_is_cancelled_is_not_kept_and_the_next_one_comes(worker):
    session = worker.session()
    gate = Gate()
    first = session.send("One?", max_tokens=5, logits_processors=[gate])
    second = session.send("Two?", max_tokens=2)
    assert gate.entered.wait(WAIT)
    first.cancel()
    gate.opened.set()
    assert second.result(WAIT) is not None
    assert len(session.messages) == 2
    worker.close()
    with pytest.raises(AnswerCancelled):
        session.send("Three?").result(WAIT)


def test_nothing_waits_on_the_event_loop(worker):
    """While the worker is busy, every call returns at once."""
    gate = Gate()
    busy = worker.submit("What?", max_tokens=1, logits_processors=[gate])
    assert gate.entered.wait(WAIT)

    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0)
                ticks += 1

        ticking = asyncio.create_task(tick())
        session = worker.session()
        answers = [session.see(FOUR[2]), session.ask("A?", max_tokens=1), session.send("B?")]
        answers.append(worker.submit("C?", FOUR[3], max_tokens=1))
        waits = [asyncio.create_task(answer) for answer in answers]
        await asyncio.sleep(0.05)
        assert ticks > 100
        assert not any(task.done() for task in waits)
        gate.opened.set()
        await asyncio.gather(*waits)
        ticking.cancel()

    asyncio.run(main())
    assert busy.done
