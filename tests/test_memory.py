"""Device memory stays where it is, however long one talks."""

import gc

import mlx.core as mx
import pytest

from mlx_lfm2vl import CacheOptions, Question, Sampling, Session, batch_generate
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


def test_5000_tokens_in_a_bounded_cache(loaded, steady):
    model, processor = loaded()
    ids = processor("Count!").token_ids
    options = CacheOptions(2 * len(ids))
    steady(lambda: list(generate_step(ids, model, max_tokens=1000, cache_options=options)), 5)


def test_200_turns(loaded, steady):
    session = Session(*loaded())
    session.see(picture(60, 40))

    def turn():
        session.send("What is it?", sampling=GREEDY, max_tokens=3)
        session.undo()

    turn()
    steady(turn, 200)


def test_200_questions(loaded, steady):
    session = Session(*loaded())
    session.see(picture(60, 40))
    steady(lambda: session.ask("What is it?", sampling=GREEDY, max_tokens=3), 200)


def test_50_batches(loaded, steady):
    image = picture(60, 40)
    requests = [Question("What?", image, max_tokens=n + 1, sampling=GREEDY) for n in range(5)]
    steady(lambda: batch_generate(*loaded(), requests, batch_size=3), 50)
