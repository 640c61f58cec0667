"""Device memory stays where it is, however long one talks."""

import gc

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_lfm2vl import (
    CacheOptions,
    Question,
    Sampling,
    Session,
    Worker,
    batch_generate,
    generate,
    load,
    stream_generate,
)
from mlx_lfm2vl.generation import memory
from mlx_lfm2vl.generation.generate import generate_step

from .checkpoints.pictures import picture

GREEDY = Sampling(temperature=0)


def live() -> tuple[int, int]:
    """Bytes in use, and arrays alive; what MLX only keeps for reuse does not count."""
    gc.collect()
    mx.clear_cache()
    return mx.get_active_memory(), sum(isinstance(o, mx.array) for o in gc.get_objects())


@pytest.fixture
def steady(loaded):
    """Runs a task once, then often; memory after the last must be that after the first."""

    def check(task, times: int) -> None:
        task()
        first, arrays = live()
        for _ in range(times):
            task()
        last, arrays_left = live()
        assert abs(last - first) <= 0.01 * first
        assert arrays_left <= arrays

    return check


@pytest.mark.slow
def test_5000_tokens_in_a_bounded_cache(loaded, steady):
    model, processor = loaded()
    ids = processor("Count!").token_ids
    options = CacheOptions(2 * len(ids))
    steady(lambda: list(generate_step(ids, model, max_tokens=1000, cache_options=options)), 5)


@pytest.mark.slow
def test_200_turns(loaded, steady):
    session = Session(*loaded())
    session.see(picture(60, 40))

    def turn():
        session.send("What is it?", sampling=GREEDY, max_tokens=3)
        session.undo()

    turn()
    steady(turn, 200)


@pytest.mark.slow
def test_200_questions(loaded, steady):
    session = Session(*loaded())
    session.see(picture(60, 40))
    steady(lambda: session.ask("What is it?", sampling=GREEDY, max_tokens=3), 200)


@pytest.mark.slow
def test_50_batches(loaded, steady):
    image = picture(60, 40)
    requests = [Question("What?", image, max_tokens=n + 1, sampling=GREEDY) for n in range(5)]
    steady(lambda: batch_generate(*loaded(), requests, batch_size=3), 50)


# ---- limits, with a device that only notes them


class Device:
    """Limits as a Mac has them, and how often each was set."""

    def __init__(self, monkeypatch):
        self.wired, self.cache, self.calls = 7, 1 << 40, []
        monkeypatch.setattr(memory, "LIMITS", memory.MemoryLimits())
        monkeypatch.setattr(memory, "backend", lambda: "metal")
        monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1e12})
        monkeypatch.setattr(mx, "set_wired_limit", lambda limit: self.set("wired", limit))
        monkeypatch.setattr(mx, "set_cache_limit", lambda limit: self.set("cache", limit))

    def set(self, name, limit):
        if limit < 0:
            raise ValueError("no such limit")
        before = getattr(self, name)
        setattr(self, name, limit)
        self.calls.append(name)
        return before

    @property
    def is_as_before(self):
        return (self.wired, self.cache) == (7, 1 << 40)


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def nbytes(model):
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def test_one_limit_for_answers_that_interleave(loaded, fixtures, device):
    model, processor = loaded()
    other, others = load(fixtures / "untied", dtype="float32")
    settings = {"max_tokens": 4, "sampling": GREEDY}
    first = stream_generate(model, processor, "Hi", **settings)
    assert device.is_as_before, "nothing generates yet"
    next(first)
    alone = nbytes(model) * 5 // 4
    assert (device.wired, device.cache) == (alone, memory.CACHE_LIMIT)
    second = Session(model, processor).stream_ask("Hello", **settings)
    third = stream_generate(other, others, "Hi", **settings)
    next(second)
    assert device.calls == ["cache", "wired"], "set once, not for each answer"
    next(third)
    assert device.wired == (nbytes(model) + nbytes(other)) * 5 // 4
    list(first)
    assert device.wired > alone, "others still generate"
    second.close()
    assert device.wired > alone
    list(third)
    assert device.is_as_before


def test_limits_of_a_batch_and_of_a_worker(loaded, device):
    model, processor = loaded()
    questions = [Question(text, max_tokens=2) for text in ("a", "b", "c")]
    batch_generate(model, processor, questions, batch_size=2)
    assert device.is_as_before
    assert device.calls == ["cache", "wired"] * 2
    with Worker(load=lambda: (model, processor)) as worker:
        for _ in range(3):
            worker.submit("Hi", max_tokens=2).result()
        assert device.calls == ["cache", "wired"] * 3
        assert device.wired > 7
    assert device.is_as_before


def test_nothing_stays_wired_after_an_error(loaded, device, monkeypatch):
    model, processor = loaded()

    def fail(*_):
        raise RuntimeError("no")

    settings = {"max_tokens": 3, "sampling": GREEDY}
    with pytest.raises(RuntimeError, match="no"):
        generate(model, processor, "Hi", logits_processors=[fail], **settings)
    assert device.is_as_before
    stream = stream_generate(model, processor, "Hi", **settings)
    next(stream)
    assert not device.is_as_before
    del stream
    assert device.is_as_before, "a stream that is forgotten"
    with monkeypatch.context() as patch:
        patch.setattr(mx, "synchronize", fail)
        with pytest.raises(RuntimeError, match="no"):
            generate(model, processor, "Hi", **settings)
        assert device.is_as_before
    with monkeypatch.context() as patch:
        patch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": -1})
        with pytest.raises(ValueError, match="no such limit"):
            generate(model, processor, "Hi", **settings)
        assert device.is_as_before
    generate(model, processor, "Hi", **settings)
    assert device.is_as_before


def test_the_limits_of_a_machine_and_of_its_user_hold(loaded, device, monkeypatch):
    model, _ = loaded()
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 1000})
    device.cache = 5
    with memory.memory_limits(model):
        assert (device.wired, device.cache) == (1000, 5)
    assert (device.wired, device.cache) == (7, 5)
    for backend in ("cpu", "cuda"):
        device.calls.clear()
        monkeypatch.setattr(memory, "backend", lambda backend=backend: backend)
        with memory.memory_limits(model):
            pass
        assert set(device.calls) == {"cache"}, "only Metal wires memory"


def test_memory_waits_for_the_next_answer(loaded, monkeypatch):
    """Neither answers nor an idle worker throw away what the next answer takes again."""
    model, processor = loaded()
    cleared = []
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    list(generate_step(processor("Count!").token_ids, model, max_tokens=300))
    with Worker(load=lambda: (model, processor)) as worker:
        worker.submit("Hi", max_tokens=2).result()
        worker.submit("Hi", max_tokens=2).result()
        assert not cleared
    assert cleared == [1], "a worker that ends gives everything back"
