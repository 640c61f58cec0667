"""A traced step computes to the bit what the plain modules compute over the same buffers."""

import gc

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten

from mlx_lfm2vl.checkpoints.adapters import AdaptedLinear, Update
from mlx_lfm2vl.generation import decoding
from mlx_lfm2vl.generation.decoding import decode_step
from mlx_lfm2vl.generation.engine import Batch, Engine, Row, prefill
from mlx_lfm2vl.models.cache import copy_cache
from mlx_lfm2vl.models.layers import JointProjections
from mlx_lfm2vl.options import CacheOptions

from .conftest import random_language_model

LAYERS = ("conv", "full_attention", "conv")
PLAIN, WINDOW = CacheOptions(), CacheOptions(24, 6)
INTEGERS = CacheOptions(kv_bits=8, quantized_kv_start=0)


@pytest.fixture(autouse=True)
def joining(monkeypatch):
    """Projections are joined as on a GPU."""
    monkeypatch.setattr(decoding, "backend", lambda: "metal")


class Slots:
    """A cache of one attention layer, with all of its slots looked at; nothing clever."""

    def __init__(self, entry, capacity):
        self.entry, self.arrays = entry, entry.padded(entry.state, capacity)

    def grow(self, capacity):
        self.arrays = self.entry.padded(self.arrays, capacity)

    @property
    def offset(self):
        return mx.array([self.entry.offset])

    def make_mask(self, length):
        last = min(self.entry.offset, (self.entry.max_size or 1 << 30) - 1)
        return (mx.arange(self.arrays[0].shape[2]) <= last)[None, None, None]

    def update_and_fetch(self, keys, values):
        slot = self.entry.slot(self.entry.offset)
        for array, part in zip(self.arrays, self.entry._parts(keys, values), strict=True):
            array[:, :, slot : slot + 1] = part
        self.entry.offset += 1
        return self.entry._pair(self.arrays)

    def attend(self, *args):
        return self.entry.attend(*args)


def apart(self, x):
    flat = x.reshape(-1, x.shape[-1])
    return [self[name](flat) for name in self.TOGETHER]


def make(kind):
    model = random_language_model(*LAYERS)
    if kind != "float32":
        model.set_dtype(mx.bfloat16)
    if kind in ("8", "4"):
        nn.quantize(model, 64, int(kind))
    if kind == "mixed":  # no two of a group alike
        bits = {"q_proj": 4, "w1": 8}
        nn.quantize(
            model,
            64,
            class_predicate=lambda path, _: (
                bits.get(path.rpartition(".")[2], 0)
                and {"bits": bits[path.rpartition(".")[2]], "group_size": 64}
            ),
        )
    model.eval()
    return model


def read(model, length, options):
    cache = model.make_cache(options, 5)
    ids = [(7 * n + length) % 300 for n in range(length)]
    for _ in prefill(model, model.embed(mx.array(ids)), cache, options, 16):
        pass
    return cache


def check(model, monkeypatch, tokens=5, options=PLAIN, rows=1):
    """Logits of a batch against those of each of its rows from the plain modules."""
    caches = [read(model, 20 + 9 * n, options) for n in range(rows)]
    twins = [copy_cache(cache) for cache in caches]
    batch = Batch(model, None)
    for cache in caches:
        row = Row([0], 1000, cache=cache)
        row.offset, row.y = cache[0].offset, mx.array([0])
        batch.join(row)
    plain = [[Slots(e, batch.capacity) if e.has_slots else e for e in twin] for twin in twins]
    for token in range(tokens):
        ids = [(5 * token + n) % 300 for n in range(rows)]
        batch.y = mx.array(ids)
        batch._launch()
        for entry in (e for cache in plain for e in cache if isinstance(e, Slots)):
            entry.grow(batch.capacity)
        with monkeypatch.context() as patch:
            patch.setattr(JointProjections, "project", apart)
            for row, one, cache in zip(batch.rows, ids, plain, strict=True):
                logits = model(mx.array([[one]]), cache)[:, -1]
                expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
                assert mx.array_equal(row.logprobs, expected), token


KINDS = ("float32", "bfloat16", "8", "4", "mixed")


def joint(model):
    return [m.joint is not None for m in model.modules() if isinstance(m, JointProjections)]


@pytest.mark.parametrize("kind", KINDS)
def test_300_tokens(kind, monkeypatch):
    model = make(kind)
    check(model, monkeypatch, 300)
    assert all(joint(model)) if kind != "mixed" else not any(joint(model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [PLAIN, WINDOW], ids=["plain", "window"])
def test_a_batch(kind, options, monkeypatch):
    check(make(kind), monkeypatch, 12, options, rows=3)


@pytest.mark.parametrize("kind", ["float32", "4"])
@pytest.mark.parametrize("options", [PLAIN, WINDOW, INTEGERS], ids=["plain", "window", "integers"])
def test_two_sets_of_buffers(kind, options, monkeypatch):
    """Written in turn, alone and in a batch whose rows come and go."""
    monkeypatch.setattr(Batch, "takes_turns", True)
    model = make(kind)
    check(model, monkeypatch, 12, options)
    check(model, monkeypatch, 12, options, rows=3)
    engines = []
    for turns in (True, False):
        monkeypatch.setattr(Batch, "takes_turns", turns)
        engine, found = Engine(model, max_rows=3), []
        for number in range(5):
            row = Row([3 + number] * (4 + 3 * number), 6 + 5 * number, cache_options=options)
            row.cache = model.make_cache(options, 2)
            row.embed = lambda a, b, row=row: model.embed(mx.array(row.token_ids[a:b]))
            engine.begin(row)
        while not engine.is_idle:
            found += [(*event.response[:1], event.response[1].tolist()) for event in engine.step()]
        engines.append(found)
    assert len(engines[0]) == sum(6 + 5 * number for number in range(5))
    assert engines[0] == engines[1]


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_nothing_is_stale(kind, monkeypatch):
    """After a training step, another type, new weights, adapters, and without them again."""
    model = make(kind)
    check(model, monkeypatch)
    step = model.decode_step
    model.train()
    assert decode_step(model)[0] is not step
    assert not any(joint(model)), "weights are apart while they learn"

    def loss(ids):
        return nn.losses.cross_entropy(model(ids)[:, :-1], ids[:, 1:]).mean()

    _, gradients = nn.value_and_grad(model, loss)(mx.array([[1, 2, 3, 4, 5, 6]]))
    SGD(0.5).update(model, gradients)
    model.eval()
    check(model, monkeypatch)
    model.set_dtype(mx.bfloat16 if kind == "float32" else mx.float32)
    check(model, monkeypatch)
    mlp, attention = model.layers[0].feed_forward, model.layers[1].self_attn
    mlp.w3.weight = mlp.w3.weight * 2
    check(model, monkeypatch)
    model.load_weights([(n, a * 0.9) for n, a in tree_flatten(model.parameters())])
    check(model, monkeypatch)
    assert all(joint(model))
    linear = attention.k_proj
    update = Update(mx.random.normal((256, 4)), mx.random.normal((4, 128)), None)
    attention.k_proj = AdaptedLinear(linear, update, 0.3)
    check(model, monkeypatch)
    assert attention.joint is None
    attention.k_proj = linear
    check(model, monkeypatch)
    assert all(joint(model))


@pytest.mark.parametrize("kind", ["float32", "4"])
def test_joint_weights_take_no_more_memory(kind):
    model = make(kind)
    mx.eval(model.parameters())
    names = [(name, array.shape, array.dtype) for name, array in tree_flatten(model.parameters())]
    values = {name: array.tolist() for name, array in tree_flatten(model.parameters())}
    gc.collect()  # what other tests left must not come or go meanwhile
    mx.synchronize()
    before = mx.get_active_memory()
    _, weights = decode_step(model)
    assert len(weights) < len(names)
    del weights
    mx.synchronize()
    assert all(joint(model))
    assert mx.get_active_memory() < 1.1 * before
    now = tree_flatten(model.parameters())
    assert [(name, array.shape, array.dtype) for name, array in now] == names
    assert all(array.tolist() == values[name] for name, array in now)
    model.train()
    model.load_weights([(name, array + 1) for name, array in now])
    del now
    model(mx.array([[1]]))
    mx.eval(model.parameters())
    gc.collect()
    mx.synchronize()
    assert mx.get_active_memory() < 1.1 * before, "old weights are kept"
