"""The engine: rows of every kind join, leave and are cancelled, and each is as if it were alone."""

import ast
import random
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_lfm2vl
from mlx_lfm2vl import CacheOptions, PrefixStore, Question
from mlx_lfm2vl.generation.engine import Engine, Row
from mlx_lfm2vl.generation.generate import run

from .checkpoints.pictures import picture
from .helpers import random_language_model

KINDS = (
    CacheOptions(),
    CacheOptions(64, 8),
    CacheOptions(kv_bits=8, quantized_kv_start=0),
    CacheOptions(kv_bits=4, kv_group_size=32, quantized_kv_start=50),
)
Tokens = list[tuple[int, list[float]]]


class TextRow(Row):
    """A row of random tokens, of the kind and length that its number says."""

    def __init__(self, model, number: int) -> None:
        chance = random.Random(number)
        ids = [chance.randrange(300) for _ in range(chance.randrange(1, 100))]
        options = KINDS[number % len(KINDS)]
        cache = model.make_cache(options, 5)
        super().__init__(ids, chance.randrange(1, 90), cache=cache, cache_options=options)
        self.model = model

    def embed(self, start: int, stop: int) -> mx.array:
        return self.model.embed(mx.array(self.token_ids[start:stop]))


@pytest.fixture(scope="module")
def model():
    return random_language_model("conv", "full_attention", "conv", "full_attention", "conv")


def told(response) -> tuple[int, list[float]]:
    token, logprobs = response
    return token, logprobs.tolist()


@pytest.fixture(scope="module")
def alone(model) -> dict[int, Tokens]:
    found = {}
    for number in range(16):
        engine = Engine(model, prefill_step_size=40)
        row = engine.begin(TextRow(model, number))
        found[number] = [told(response) for response in run(engine, row)]
        assert len(found[number]) == row.max_tokens
    return found


@pytest.mark.parametrize("fair", [True, False])
def test_each_row_is_as_if_alone_to_the_bit(fair, model, alone):
    """Rotating, quantized and plain rows, some of which begin late, and some are cancelled."""
    engine = Engine(model, max_rows=5, fair=fair, prefill_step_size=40)
    chance, waiting = random.Random(7), list(range(16))
    rows: dict[Row, int] = {}
    found: dict[int, Tokens] = {number: [] for number in range(16)}
    cancelled = {}
    before = mx.get_active_memory()
    while waiting or not engine.is_idle:
        while waiting and chance.random() < 0.4:
            number = waiting.pop(0)
            rows[engine.begin(TextRow(model, number))] = number
        for row, response, error in engine.step():
            assert error is None
            assert row not in cancelled, "something came after the end"
            found[rows[row]].append(told(response))
        for row, number in rows.items():
            if number % 5 == 4 and row not in cancelled and len(row.tokens) > 3:
                engine.cancel(row)
                cancelled[row] = number
    assert len(cancelled) == 3
    for row, number in rows.items():
        expected = alone[number]
        assert found[number] == (expected[: len(row.tokens)] if row in cancelled else expected)
    assert engine.batches == {}
    del engine, rows, row, response, cancelled
    mx.synchronize()
    assert mx.get_active_memory() < before + 4096, "more is left than constants of traces"


def test_an_error_ends_one_row_and_no_other(model, alone):
    class Broken(TextRow):
        def take(self, token, logprobs):
            if len(self.tokens) == 5:
                raise RuntimeError("no")
            return super().take(token, logprobs)

    class Unreadable(TextRow):
        def embed(self, start, stop):
            raise OSError("gone")

    engine = Engine(model, max_rows=4)
    rows = [engine.begin(kind(model, n)) for kind, n in ((TextRow, 0), (Broken, 4), (TextRow, 8))]
    rows.append(engine.begin(Unreadable(model, 12)))
    errors, tokens = {}, {row: [] for row in rows}
    while not engine.is_idle:
        for row, response, error in engine.step():
            if error is not None:
                errors[row] = str(error)
            else:
                tokens[row].append(told(response))
    assert errors == {rows[1]: "no", rows[3]: "gone"}
    assert tokens[rows[0]] == alone[0]
    assert tokens[rows[2]] == alone[8]


def test_a_row_that_waits_is_told_its_token_before_the_next_step(model):
    """What constraints need: a processor sees each token before it is asked again."""
    seen = []

    class Processor:
        needs_token = True

        def __call__(self, tokens, logits):
            seen.append(list(row.tokens))
            return logits

    engine = Engine(model, max_rows=2)
    row = TextRow(model, 8)
    row.max_tokens, row.logits_processors = 6, [Processor()]
    other = TextRow(model, 0)
    for started in (other, row):
        engine.begin(started)
    answer = []
    while not engine.is_idle:
        answer += [event.response[0] for event in engine.step() if event.row is row]
    assert seen == [answer[:n] for n in range(6)]


def test_prompts_are_read_in_pieces_between_steps(model):
    """A long prompt does not stop those who answer already."""
    engine = Engine(model, max_rows=2, prefill_step_size=10)
    first, second = TextRow(model, 0), TextRow(model, 8)
    first.max_tokens, second.token_ids = 40, [5] * 100
    engine.begin(first)
    while not first.tokens:
        engine.step()
    engine.begin(second)
    before = len(first.tokens)
    while not second.tokens:
        engine.step()
    assert len(first.tokens) - before >= 8


def test_pictures_that_were_seen_are_not_encoded_again(loaded, work):
    """Neither with the same beginning, nor behind another text, nor in the same batch."""
    model, processor = loaded()
    engine = Engine(model, processor, max_rows=8, prefixes=PrefixStore())
    picture_item = {"type": "image", "image": picture(60, 40, 1)}

    def ask(*items):
        return engine.add(Question([{"role": "user", "content": list(items)}], max_tokens=2))

    rows = [ask(picture_item, {"type": "text", "text": f"{n}?"}) for n in range(5)]
    rows.append(ask({"type": "text", "text": "Look: "}, picture_item))
    while not engine.is_idle:
        engine.step()
    assert sum(work.views) == 1
    assert [row.encoded_images for row in rows] == [1, 0, 0, 0, 0, 0]
    assert all(row.reused > 0 for row in rows[1:5])


def modules() -> dict[str, ast.Module]:
    folder = Path(mlx_lfm2vl.__file__).parent
    return {str(p.relative_to(folder)): ast.parse(p.read_text()) for p in folder.rglob("*.py")}


def calls(tree: ast.AST, name: str) -> int:
    found = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(getattr(f, "attr", getattr(f, "id", None)) == name for f in found)


def test_one_loop_decodes_and_one_place_embeds():
    places = {path: calls(tree, "decode_step") for path, tree in modules().items()}
    assert {path for path, count in places.items() if count} == {"generation/engine.py"}
    places = {path: calls(tree, "encode_images") for path, tree in modules().items()}
    assert set(filter(places.get, places)) <= {"models/lfm2_vl.py", "measuring/stages.py",
                                               "conversion/report.py"}  # fmt: skip


def test_nobody_switches_on_kinds_of_caches():
    kinds = {"KVCache", "QuantizedKVCache", "ConvCache", "KVStep", "QuantizedKVStep"}
    for path, tree in modules().items():
        if path == "models/cache.py":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "isinstance",
                "type",
            ):
                named = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                assert named.isdisjoint(kinds), path
