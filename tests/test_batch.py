"""Batches: each row gets the answer that it would get alone."""

import random

import pytest

from mlx_lfm2vl import (
    ImageError,
    PromptError,
    Question,
    Sampling,
    batch_generate,
    generate,
    stream_batch,
    stream_generate,
)

from .checkpoints.pictures import picture

GREEDY = Sampling(temperature=0)


def rows(count: int = 16) -> list[Question]:
    """Ragged rows: no, one and several images, short and long texts, own lengths and stops."""
    pick = random.Random(4)
    made = []
    for n in range(count):
        images = [picture(40 + 7 * n, 30 + 5 * i, n + i) for i in range(pick.choice([0, 1, 1, 3]))]
        text = " ".join(["Count the cats."] * pick.randint(1, 6))
        stop = ("e",) if n % 5 == 4 else ()
        made.append(
            Question(
                text, images, max_tokens=pick.choice([1, 2, 7, 20, 33]), sampling=GREEDY, stop=stop
            )
        )
    return made


def alone(loaded, request: Question) -> str:
    return generate(
        *loaded(),
        request.prompt,
        request.images,
        max_tokens=request.max_tokens,
        temperature=0,
        stop=request.stop,
    )


@pytest.fixture(scope="module")
def expected(loaded):
    return [alone(loaded, request) for request in rows()]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 16, 100])
def test_each_row_equals_its_single_run_at_every_size(size, loaded, expected):
    results = batch_generate(*loaded(), rows(), batch_size=size)
    assert [result.index for result in results] == list(range(16))
    assert [result.text for result in results] == expected
    for result, request in zip(results, rows(), strict=True):
        prompt = loaded()[1](request.prompt, request.images)
        assert result.prompt_tokens == len(prompt.token_ids)
        assert len(result.image_tokens) == len(request.images)
        assert len(result.tokens) <= request.max_tokens


def test_neighbours_change_nothing(loaded, expected):
    order = list(range(16))
    for seed in range(3):
        random.Random(seed).shuffle(order)
        results = batch_generate(*loaded(), [rows()[i] for i in order[:9]], batch_size=4)
        assert [result.text for result in results] == [expected[i] for i in order[:9]]


def test_results_come_as_they_finish_and_rows_join_late(loaded, expected):
    requested, finished = [], []

    def feed():
        for n, request in enumerate(rows()):
            requested.append(n)
            yield request

    for result in stream_batch(*loaded(), feed(), batch_size=3):
        assert len(requested) - len(finished) <= 3, "more rows were taken than are in work"
        finished.append(result.index)
        assert result.text == expected[result.index]
    assert sorted(finished) == list(range(16))
    assert finished != sorted(finished), "rows of other lengths ended in order"


def test_rows_decode_together(loaded, work):
    """Counted, not timed: a step of eight rows is one pass through the model."""
    questions = [Question("Count" + "!" * n, max_tokens=10, sampling=GREEDY) for n in range(8)]
    prompts = [len(question.prepare(loaded()[1]).token_ids) for question in questions]
    batch_generate(*loaded(), questions, batch_size=8)
    assert work.passes[:8] == prompts, "a prompt is read in one pass"
    assert work.steps == [8] * 9


def test_sampled_rows_with_seeds_do_not_depend_on_neighbours(loaded):
    hot = Sampling(temperature=2.0, min_p=0.01, repetition_penalty=1.2)
    requests = [Question("Count", max_tokens=12, sampling=hot, seed=n) for n in range(6)]
    requests[3] = Question("Count", max_tokens=12, sampling=GREEDY)
    together = [result.text for result in batch_generate(*loaded(), requests, batch_size=6)]
    in_pairs = [result.text for result in batch_generate(*loaded(), requests, batch_size=2)]
    assert together == in_pairs
    assert len(set(together)) > 3
    for n in (0, 5):
        single = stream_generate(
            *loaded(),
            "Count",
            max_tokens=12,
            temperature=2.0,
            min_p=0.01,
            repetition_penalty=1.2,
            seed=n,
        )
        assert "".join(response.text for response in single) == together[n]


def test_plain_texts_and_progress(loaded):
    seen = []
    results = batch_generate(*loaded(), ["Hello", "Count!"], progress=seen.append)
    assert len(results) == 2
    assert seen == [1, 2]
    assert batch_generate(*loaded(), []) == []


def test_bad_rows(loaded, tmp_path):
    with pytest.raises(ImageError, match="missing"):
        batch_generate(*loaded(), [Question("a", [tmp_path / "missing.png"])])
    with pytest.raises(PromptError, match="batch_size is 0"):
        batch_generate(*loaded(), ["a"], batch_size=0)
    with pytest.raises(PromptError, match="max_tokens is 0"):
        batch_generate(*loaded(), [Question("a", max_tokens=0)])
