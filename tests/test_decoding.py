"""The replayed decode step against the model itself, and what each stage may cost."""

import gc
import re
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest

from mlx_lfm2vl import (
    Question,
    Sampling,
    Session,
    Worker,
    batch_generate,
    generate,
    load,
    stream_generate,
)
from mlx_lfm2vl.checkpoints.adapters import AdaptedLinear, Update
from mlx_lfm2vl.generation import engine
from mlx_lfm2vl.generation.engine import Batch, Row, prefill
from mlx_lfm2vl.generation.generate import generate_step
from mlx_lfm2vl.models.cache import CPU_BLOCK, attention, copy_cache
from mlx_lfm2vl.options import CacheOptions

from .checkpoints.pictures import picture
from .helpers import TOLERANCE, random_language_model, relative

OPERATIONS = 235  # of one decode step of the small checkpoint


def read(loaded, length, options=None):
    """A language model, and a cache that holds so many positions."""
    model, _ = loaded()
    cache = model.make_cache(options, 0)
    embeddings = model.embed([5 + n % 90 for n in range(length)])[0]
    for _ in prefill(model.language_model, embeddings, cache):
        pass
    return model.language_model, cache


def read_language(model, length):
    """A cache of a language model alone."""
    cache = model.make_cache()
    for _ in prefill(model, model.embed(mx.array([5] * length)), cache):
        pass
    return cache


class TokenRow(Row):
    """An answer of a language model alone."""

    def __init__(self, model, token_ids, max_tokens):
        super().__init__(token_ids, max_tokens, cache=model.make_cache())
        self.model = model

    def embed(self, start, stop):
        return self.model.embed(mx.array(self.token_ids[start:stop]))


class DecodeStep:
    """The replayed step of one row, as the engine takes it: token -> log-probabilities."""

    def __init__(self, model, cache):
        self.row = Row([0], 1000, cache=cache, keep_cache=True)
        self.row.offset, self.row.y = cache[0].offset, mx.array([0])
        self.batch = Batch(model, None)
        self.batch.join(self.row)

    def __call__(self, token):
        self.batch.y = mx.array([token])
        self.batch._launch()
        return self.row.logprobs

    def end(self):
        """Gives the cache back."""
        self.row.finished = True
        self.batch.leave(lambda row: True)


def logprobs_of(logits):
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("options", [None, CacheOptions(270, 9)], ids=["plain", "rotating"])
def test_each_step_equals_the_model(loaded, work, options, monkeypatch):
    """Over the end of a reserve, and over that of the window."""
    monkeypatch.setattr(engine, "CPU_RESERVE", 256)
    model, cache = read(loaded, 245, options)
    twin = copy_cache(cache)
    model.decode_step = None
    step = DecodeStep(model, cache)
    step.batch.capacity = 256
    step.batch.states = [
        [a[:, :, :256] if a.ndim == 4 else a for a in s] for s in step.batch.states
    ]
    work.clear()
    for n in range(40):
        expected = logprobs_of(model(mx.array([[7 + n]]), twin)[:, -1])
        assert relative(step(7 + n), expected) < TOLERANCE
    step.end()
    assert [entry.offset for entry in cache] == [entry.offset for entry in twin]
    assert work.passes == [1] * 80
    assert work.traces == 2, "once for each size of the buffers"


def test_answers_of_every_entrance_share_one_trace(fixtures, work, monkeypatch):
    """Of any length below the reserve, about pictures or not."""
    monkeypatch.setattr(engine, "CPU_RESERVE", engine.RESERVE)
    model, processor = load(fixtures / "v5", dtype="float32")
    settings = {"sampling": Sampling(temperature=0)}
    generate(model, processor, "Hi", max_tokens=3, **settings)
    assert work.traces == 1
    generate(model, processor, "Another one, and longer", max_tokens=500, **settings)
    generate(model, processor, "What is it?", picture(90, 60), max_tokens=9, **settings)
    generate(model, processor, "Hi", max_tokens=5, temperature=1.0, seed=1)
    batch_generate(model, processor, ["Hi", "Hello"], batch_size=1)
    list(generate_step([5] * 900, model, max_tokens=120))
    session = Session(model, processor)
    session.see(picture(60, 40))
    for question in ("What is it?", "And what colour has it?"):
        session.ask(question, max_tokens=4, **settings)
        session.send(question, max_tokens=4, **settings)
    assert work.traces == 1
    with Worker(load=lambda: (model, processor)) as worker:
        for length in (5, 9):
            worker.submit("Hi", max_tokens=length).result()
    assert work.traces == 2, "MLX keeps traces for each thread"


def test_traces_of_a_model_that_is_gone_are_not_taken_for_another():
    """Models that differ in a number alone, one after the other, each used in two threads."""

    def steps(model):
        found = [logprobs for _, logprobs in generate_step(list(range(5, 25)), model, max_tokens=4)]
        mx.eval(found)
        return found

    def make(n):
        model = random_language_model("conv", "full_attention")
        for layer in model.layers:
            layer.operator_norm.eps = 10.0 ** (n / 2 - 5)
        return model

    with ThreadPoolExecutor(1) as thread:
        for n in range(12):
            model = make(n)
            found = [steps(model), thread.submit(steps, model).result()]
            model.decode_step = None
            gc.collect()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(engine, "backend", lambda: "cuda")  # which traces nothing
                expected = steps(model)
            for each in found:
                assert max(map(relative, each, expected)) < TOLERANCE
            del model, found
            gc.collect()


def test_what_traces_again(fixtures, work, monkeypatch):
    """Another type, training and adapters, once each; long answers once in each reserve."""
    monkeypatch.setattr(engine, "CPU_RESERVE", 256)
    model, _ = load(fixtures / "v5", dtype="float32")
    language = model.language_model

    def traces(tokens=5):
        before = work.traces
        list(generate_step([5] * 20, model, max_tokens=tokens))
        return work.traces - before

    assert [traces(), traces(9)] == [1, 0]
    assert traces(1000) == 3, "512, 768 and 1024 slots"
    assert traces(1000) == 0
    model.set_dtype(mx.bfloat16)
    assert [traces(), traces()] == [1, 0]
    model.train()
    model.eval()
    assert traces() == 0, "nothing has changed"
    attention = next(layer for layer in language.layers if layer.is_attention_layer).self_attn
    linear, hidden = attention.q_proj, attention.q_proj.weight.shape[1]
    update = Update(mx.ones((hidden, 2)), mx.ones((2, len(linear.weight))), None)
    attention.q_proj = AdaptedLinear(linear, update, 0.5)
    assert [traces(), traces()] == [1, 0]


@pytest.mark.parametrize(
    "options",
    [None, CacheOptions(40, 9), CacheOptions(kv_bits=8, quantized_kv_start=0)],
    ids=["plain", "rotating", "integers"],
)
def test_cuda_decodes_one_row_without_a_mask(wide, work, monkeypatch, options):
    """As the traced step up to rounding; several rows are traced there, too."""
    settings = {"max_tokens": 60, "cache_options": options or CacheOptions()}
    ids = list(range(5, 25))

    def steps():
        return [*generate_step(ids, wide, **settings)]

    expected = steps()
    monkeypatch.setattr(engine, "backend", lambda: "cuda")
    work.clear()
    found = steps()
    assert work.traces == 0
    assert work.passes == [20] + [1] * 59
    assert [token for token, _ in found] == [token for token, _ in expected]
    for (_, logprobs), (_, right) in zip(found, expected, strict=True):
        assert relative(logprobs, right) < TOLERANCE


def test_cuda_traces_rows_that_come_and_go(loaded, work, monkeypatch):
    model, processor = loaded()
    model.language_model.decode_step = None
    questions = [
        Question(text, max_tokens=n, sampling=Sampling(temperature=0))
        for n, text in ((9, "Hi"), (3, "Hello, you"))
    ]
    expected = [result.tokens for result in batch_generate(model, processor, questions)]
    monkeypatch.setattr(engine, "backend", lambda: "cuda")
    work.clear()
    found = [result.tokens for result in batch_generate(model, processor, questions)]
    assert found == expected
    assert work.steps == [2, 2, 2], "the longer answer ends alone"
    assert work.passes[-5:] == [1] * 5


def test_empty_slots_are_not_seen(loaded):
    model, cache = read(loaded, 20)
    expected = DecodeStep(model, copy_cache(cache))(9)
    step = DecodeStep(model, cache)
    for array in (array for arrays in step.batch.states for array in arrays if array.ndim == 4):
        assert array.shape[2] > 21
        array[..., 21:, :] = 1e3
    assert relative(step(9), expected) < TOLERANCE


def test_a_copy_of_the_cache_stays_as_it_is(loaded):
    model, cache = read(loaded, 20)
    kept = copy_cache(cache)
    before = [[array.tolist() for array in entry.state] for entry in kept]
    step = DecodeStep(model, cache)
    for n in range(3):
        mx.eval(step(n + 4))
    assert [[array.tolist() for array in entry.state] for entry in kept] == before


def test_integers_are_traced_too(wide, work):
    options = CacheOptions(kv_bits=8, quantized_kv_start=8)
    wide.decode_step = None
    steps = list(generate_step(list(range(5)), wide, max_tokens=8, cache_options=options))
    assert len(steps) == 8
    assert work.passes == [5] + [1] * 7
    assert work.traces == 2, "three tokens were read before there were integers"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 40])
@pytest.mark.parametrize("convolutions", [0, 1, 3], ids="{} behind".format)
def test_the_last_token_alone_is_as_among_the_others(convolutions, length):
    """Logits and cache, in one piece and behind what was read before."""
    last = ["conv"] * convolutions
    model = random_language_model("conv", "full_attention", "conv", "full_attention", *last)
    embeddings = model.embed(mx.array([[5 + n for n in range(2 * length)]]))
    whole, short = model.make_cache(), model.make_cache()
    for part in (embeddings[:, :length], embeddings[:, length:]):
        expected = model.model(part, whole).last_hidden_state[:, -1:]
        found = model.model(part, short, last_only=True).last_hidden_state
        assert found.shape[1] == 1
        assert relative(found, expected) < TOLERANCE
    for one, other in zip(whole, short, strict=True):
        assert one.offset == other.offset == 2 * length
        for a, b in zip(one.state, other.state, strict=True):
            assert relative(a, b) < TOLERANCE


# ---- what each stage may cost: counted, not timed


def operations(outputs, tmp_path) -> int:
    """Nodes of the graph that computes arrays; a fused kernel is one."""
    path = tmp_path / "graph.dot"
    mx.export_to_dot(str(path), outputs)
    return len(re.findall(r"shape=rectangle", path.read_text()))


def test_operations_of_a_decode_step(loaded, tmp_path):
    model, cache = read(loaded, 20)
    mx.eval([entry.state for entry in cache])
    plain = operations(model(mx.array([[9]]), copy_cache(cache)), tmp_path)
    traced = operations(DecodeStep(model, cache)(9), tmp_path)
    assert traced <= OPERATIONS, "a decode step has grown"
    assert traced < 0.6 * plain


def peak_of_steps(model, monkeypatch, turns):
    """Bytes that steps take, and those of the buffers, while each last step is still read."""
    monkeypatch.setattr(Batch, "takes_turns", turns)
    batch = DecodeStep(model, read_language(model, 9)).batch
    for _ in range(4):  # the first ones trace, and make the second set
        batch._launch()
    mx.eval(batch.y, batch.states)
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(3):
        reading = batch.states, batch.y  # as a command buffer in flight does
        batch._launch()
        mx.eval(batch.y)
        del reading
    mx.synchronize()
    buffers = sum(array.nbytes for arrays in batch.states for array in arrays)
    return mx.get_peak_memory() - before, buffers


def test_no_step_copies_buffers_that_are_still_read(wide, monkeypatch):
    """A GPU that is behind holds the buffers of the last step; with two sets that does not hurt."""
    peak, buffers = peak_of_steps(wide, monkeypatch, turns=False)
    assert peak > 0.9 * buffers, "nothing holds them, so the test proves nothing"
    peak, buffers = peak_of_steps(wide, monkeypatch, turns=True)
    assert peak < 0.1 * buffers


@pytest.mark.parametrize(
    ("backend", "offset", "window", "slots"),
    [
        ("metal", 20, None, 1024), ("metal", 1023, None, 1024), ("metal", 1024, None, 2048),
        ("cuda", 2000, 300, 512), ("cpu", 0, None, 128), ("cpu", 3, None, 128),
        ("cpu", 127, None, 128),
        ("cpu", 128, None, 256), ("cpu", 1000, None, 1024), ("cpu", 2048, None, 2304),
        ("cpu", 30_000, None, 30_720), ("cpu", 100, 300, 128), ("cpu", 2000, 300, 384),
    ],
)  # fmt: skip
def test_few_sizes_of_buffers(wide, monkeypatch, backend, offset, window, slots):
    """A CPU looks at few slots that hold nothing; a GPU traces steps again as seldom as can be."""
    monkeypatch.setattr(engine, "backend", lambda: backend)
    row = engine.Row([5] * offset, 9, cache=wide.make_cache(CacheOptions(window, window and 9)))
    row.offset = offset
    assert engine.slots_for(row) == slots


def test_buffers_grow_with_an_answer(wide):
    """And hold what they must at each of its tokens."""
    engine_, sizes = engine.Engine(wide), []
    row = TokenRow(wide, [5] * 120, 30)
    engine_.begin(row)
    while not row.finished:
        engine_.step()
        sizes += [(row.offset, batch.capacity) for batch in engine_.batches.values()]
    assert all(offset <= capacity for offset, capacity in sizes)
    assert [capacity for _, capacity in sizes] == sorted(c for _, c in sizes)
    assert {capacity for _, capacity in sizes} == {128, 256}


def test_when_there_are_two_sets(wide, monkeypatch):
    """On a GPU, if a copy takes longer than a few kernels, and memory is small beside a model's."""
    batch = DecodeStep(wide, read_language(wide, 9)).batch
    nbytes = sum(array.nbytes for arrays in batch.states for array in arrays)
    for backend, least, weights, expected in (
        ("metal", nbytes, 4 * nbytes, True),
        ("cuda", nbytes, 4 * nbytes, True),
        ("cpu", nbytes, 4 * nbytes, False),
        ("metal", nbytes + 1, 4 * nbytes, False),
        ("metal", nbytes, 4 * nbytes - 4, False),
    ):
        monkeypatch.setattr(engine, "backend", lambda backend=backend: backend)
        monkeypatch.setattr(engine, "TURNS_FROM", least)
        batch.weight_bytes = weights
        assert batch.takes_turns == expected


@pytest.mark.parametrize(("length", "before"), [(1, 5), (128, 0), (300, 0), (300, 70)])
def test_attention_in_blocks_is_attention(length, before, monkeypatch):
    """On a CPU few of the scores that the causal mask hides are computed at all."""
    mx.random.seed(0)
    whole, scores = mx.fast.scaled_dot_product_attention, []

    def counted(queries, keys, values, **settings):
        scores.append(queries.shape[2] * keys.shape[2])
        return whole(queries, keys, values, **settings)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", counted)
    queries = mx.random.normal((2, 4, length, 8))
    keys, values = mx.random.normal((2, 2, 2, before + length, 8))
    mask = "causal" if length > 1 else None
    out = attention(queries, keys, values, mask, 0.3)
    expected = whole(queries, keys, values, scale=0.3, mask=mask)
    assert mx.abs(out - expected).max().item() < 1e-5  # other sums of the same float32 terms
    seen = sum(before + n + 1 for n in range(length))
    assert sum(scores) < seen + length * CPU_BLOCK / 2 + 1


def test_a_picture_is_seen_once_and_only_last_positions_meet_the_vocabulary(loaded, work):
    model, processor = loaded()
    image = picture(200, 130)
    prompt = processor("What?", image)
    generate(model, processor, prompt, max_tokens=5, temperature=0)
    assert sum(work.views) == len(prompt.spatial_shapes)
    assert work.passes == [len(prompt.token_ids), 1, 1, 1, 1]
    assert work.projected == [1] * 5


def test_a_second_question_costs_its_own_text(loaded, work):
    model, processor = loaded()
    session = Session(model, processor)
    session.see(picture(200, 130))
    session.ask("What?", sampling=Sampling(temperature=0), max_tokens=2)
    work.clear()
    session.ask("Where?", sampling=Sampling(temperature=0), max_tokens=2)
    prompt = processor("Where?", picture(200, 130))
    assert work.views == []
    assert work.passes == [len(prompt.token_ids) - prompt.images[-1].stop, 1]


@pytest.fixture
def waits(monkeypatch):
    """Each time that the host waits for the device."""
    found = []

    def watched(name, right):
        def call(*args, **kwargs):
            found.append(name)
            return right(*args, **kwargs)

        return call

    for name in ("item", "tolist", "__array__", "__int__", "__float__", "__bool__"):
        monkeypatch.setattr(mx.array, name, watched(name, getattr(mx.array, name)))
    for name in ("eval", "synchronize"):
        monkeypatch.setattr(mx, name, watched(name, getattr(mx, name)))
    return found


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 20, "seed": 3}])
def test_the_host_waits_once_per_token(loaded, waits, settings):
    """And never on the way to the first one."""
    model, processor = loaded()
    options = {"temperature": 0} | settings
    stream = stream_generate(model, processor, "What?", picture(200, 130), max_tokens=6, **options)
    for n, _ in enumerate(stream, 1):
        assert waits == ["item"] * n
    assert n == 6


def test_memory_of_vision_does_not_grow_with_views(loaded):
    """But for the pixels and the image tokens themselves."""
    model, _ = loaded()

    def peak(views):
        shapes = [(16, 16), (8, 8)] * views  # no two neighbours of one shape
        pixels = np.zeros((views * 320, 768), np.uint8)
        mx.synchronize()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        features = model.encode_images(pixels, shapes)
        mx.eval(features)
        return mx.get_peak_memory() - before - pixels.nbytes - 2 * features.nbytes

    peak(1)
    assert peak(40) < 1.1 * peak(2)
