"""Rotating and quantized caches against the definition of what they compute."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import RotatingKVCache as MlxLmRotatingKVCache

from mlx_lfm2vl import ConfigError, PromptError, generate
from mlx_lfm2vl.generation.generate import generate_step
from mlx_lfm2vl.models.cache import (
    KVCache,
    QuantizedKVCache,
    attention,
    blocks,
    cache_nbytes,
    copy_cache,
)
from mlx_lfm2vl.models.lfm2 import Lfm2Model, Masks
from mlx_lfm2vl.options import CacheOptions

from .checkpoints.pictures import picture
from .helpers import TOLERANCE, relative


def seen(length: int, size: int, keep: int) -> mx.array:
    """The definition: pinned positions and the last size - keep, the token itself included."""
    keys, queries = mx.arange(length), mx.arange(length)[:, None]
    return (keys <= queries) & ((keys < keep) | (keys > queries - (size - keep)))


def reference(model, embeddings, size, keep, monkeypatch) -> mx.array:
    """Logits (tokens, vocab) of the whole history at once, under the explicit mask."""
    mask = seen(embeddings.shape[0], size, keep)
    with monkeypatch.context() as patch:
        patch.setattr(Lfm2Model, "_masks", lambda *_: Masks(mask))
        return model(inputs_embeds=embeddings[None]).logits[0]


@pytest.fixture(params=["text", "image"])
def prompt(request, loaded):
    """(model, ids, embeddings) of a short prompt with and without an image."""
    model, processor = loaded()
    images = [picture(60, 40)] if request.param == "image" else None
    made = processor("Count!", images)
    return model, made.token_ids, model.embed_prompt(made)


@pytest.mark.parametrize("more", [0, 9])
@pytest.mark.parametrize("pinned", ["prompt", "few", "none"])
def test_rotating_equals_the_explicit_mask_at_every_step(prompt, pinned, more, monkeypatch):
    model, ids, embeddings = prompt
    size = 2 * len(ids) + more
    keep = {"prompt": None, "few": 3, "none": 0}[pinned]
    cache = model.make_cache(CacheOptions(size, keep), len(ids))
    tokens, logprobs = [], []
    for token, step in generate_step(
        ids, model, max_tokens=6 * size, input_embeddings=embeddings, prompt_cache=cache
    ):
        tokens.append(token)
        logprobs.append(step)
    whole = mx.concatenate([embeddings, model.embed(tokens)[0]])[:-1]
    logits = reference(model, whole, size, len(ids) if keep is None else keep, monkeypatch)
    logits = logits[len(ids) - 1 :]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert relative(mx.stack(logprobs), expected) < TOLERANCE
    assert mx.argmax(expected, axis=-1).tolist() == tokens
    layer = next(entry for entry in cache if isinstance(entry, KVCache))
    assert layer.capacity <= blocks(size), "it has grown beyond its window"
    unbounded = model(inputs_embeds=whole[None]).logits[0, -1]
    assert relative(logits[-1], unbounded) > 100 * TOLERANCE, "the window changed nothing"


@pytest.mark.parametrize("step", [1, 2, 5, 13, 1000])
@pytest.mark.parametrize(("size", "keep"), [(8, 0), (8, 3), (20, 7), (64, 5)])
def test_rotating_prefill_in_pieces(prompt, step, size, keep, monkeypatch):
    """A prompt longer than the window slides through it, in pieces or at once."""
    model, ids, embeddings = prompt
    embeddings = mx.concatenate([embeddings, embeddings * 0.5])
    ids = ids * 2
    cache = model.make_cache(CacheOptions(size, keep))
    steps = list(
        generate_step(
            ids,
            model,
            max_tokens=5,
            input_embeddings=embeddings,
            prompt_cache=cache,
            prefill_step_size=step,
        )
    )
    tokens = [token for token, _ in steps]
    whole = mx.concatenate([embeddings, model.embed(tokens)[0]])[:-1]
    logits = reference(model, whole, size, keep, monkeypatch)[len(ids) - 1 :]
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert relative(mx.stack([logprobs for _, logprobs in steps]), expected) < TOLERANCE


@pytest.mark.parametrize("keep", [0, 4])
def test_rotating_cache_of_mlx_lm(keep):
    """Where mlx-lm's cache means the same (token by token), it sees the same keys."""
    ours, theirs = KVCache(16, keep), MlxLmRotatingKVCache(16, keep)
    for position in range(70):
        keys = mx.full((1, 1, 1, 1), position)
        a, _ = ours.update_and_fetch(keys, keys)
        b, _ = theirs.update_and_fetch(keys, keys)
        assert sorted(a.flatten().tolist()) == sorted(b.flatten().tolist())
        assert ours.offset == theirs.offset


def test_the_conv_state_is_exact(prompt):
    """Rotation touches attention only: the first layer's state is that of the whole history."""
    model, ids, embeddings = prompt
    bounded = model.make_cache(CacheOptions(2 * len(ids)), len(ids))
    free = model.make_cache()
    steps = generate_step(
        ids, model, max_tokens=100, input_embeddings=embeddings, prompt_cache=bounded
    )
    tokens = [token for token, _ in steps]
    whole = mx.concatenate([embeddings, model.embed(tokens)[0]])[:-1]
    model(inputs_embeds=whole[None], cache=free)
    first = next(i for i, layer in enumerate(model.layers) if not layer.is_attention_layer)
    for one, other in zip(bounded[first].arrays, free[first].arrays, strict=True):
        assert relative(one, other) < TOLERANCE
    assert bounded[first].offset == free[first].offset == len(ids) + 99


def test_half_of_the_window_is_for_the_answer(loaded):
    model, processor = loaded()
    length = len(processor("Count!").token_ids)
    with pytest.raises(PromptError, match=f"takes {length} positions, more than half"):
        generate(model, processor, "Count!", cache_options=CacheOptions(2 * length - 1))
    assert generate(
        model, processor, "Count!", cache_options=CacheOptions(2 * length), max_tokens=50
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_kv_size": 1}, "max_kv_size is 1"),
        ({"keep": 3}, "keep is 3; it must be left out"),
        ({"max_kv_size": 8, "keep": 8}, "keep is 8"),
        ({"kv_bits": 3}, "kv_bits is 3; it must be 4 or 8"),
        ({"kv_bits": 8, "max_kv_size": 100}, "rotating cache is not quantized"),
        ({"kv_bits": 8, "kv_group_size": 10}, "kv_group_size is 10"),
        ({"kv_bits": 8, "quantized_kv_start": -1}, "quantized_kv_start is -1"),
    ],
)
def test_cache_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        CacheOptions(**options)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("start", [0, 10, 25])
def test_quantized_cache_is_attention_over_its_integers(bits, start, wide, monkeypatch):
    """As a cache of floats that hold what the integers say."""
    ids = list(range(5, 25))
    options = CacheOptions(kv_bits=bits, quantized_kv_start=start)
    cache = wide.make_cache(options)
    steps = list(
        generate_step(
            ids, wide, max_tokens=20, cache_options=options, prompt_cache=cache, prefill_step_size=6
        )
    )
    assert isinstance(cache[1], QuantizedKVCache)
    assert cache[0].arrays[0].dtype == mx.float32
    plain = list(generate_step(ids, wide, max_tokens=20, prefill_step_size=6))
    error = relative(steps[-1][1], plain[-1][1])
    assert 1e-6 < error < (0.2 if bits == 4 else 0.02), "not quantized, or not the same history"

    def over_floats(self, queries, keys, values, mask, scale):
        floats = [mx.dequantize(*part, self.group_size, self.bits) for part in (keys, values)]
        return attention(queries, *floats, mask, scale)

    monkeypatch.setattr(QuantizedKVCache, "attend", over_floats)
    wide.decode_step = None  # traced with the right one
    exact = list(
        generate_step(ids, wide, max_tokens=20, cache_options=options, prefill_step_size=6)
    )
    for (_, ours), (_, theirs) in zip(steps, exact, strict=True):
        assert relative(ours, theirs) < TOLERANCE


def test_quantized_cache_is_smaller(wide):
    sizes = {}
    for bits in (None, 8, 4):
        options = CacheOptions(kv_bits=bits, quantized_kv_start=0)
        cache = wide.make_cache(options)
        list(
            generate_step([1] * 500, wide, max_tokens=2, cache_options=options, prompt_cache=cache)
        )
        sizes[bits] = cache[1].nbytes
    assert sizes[8] < 0.3 * sizes[None]
    assert sizes[4] < 0.17 * sizes[None]


@pytest.mark.parametrize("kind", ["plain", "rotating", "quantized"])
def test_a_copy_shares_nothing_that_changes(kind, wide):
    options = {
        "plain": CacheOptions(),
        "rotating": CacheOptions(16, 4),
        "quantized": CacheOptions(kv_bits=8, quantized_kv_start=0),
    }[kind]
    cache = wide.make_cache(options)
    list(
        generate_step(
            list(range(20)), wide, max_tokens=2, cache_options=options, prompt_cache=cache
        )
    )
    twin = copy_cache(cache)
    before = [np.array(array) for entry in twin for array in entry.copy().state]
    first = wide(mx.array([[7]]), cache=cache)
    wide(mx.array([[8]]), cache=cache)
    after = [np.array(array) for entry in twin for array in entry.copy().state]
    assert all(np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    assert mx.array_equal(wide(mx.array([[7]]), cache=twin), first)
    assert cache_nbytes(twin) > 0


def test_kv_cache_grows_in_blocks():
    cache, shapes = KVCache(), set()
    for _ in range(600):
        cache.update_and_fetch(mx.zeros((1, 1, 1, 4)), mx.zeros((1, 1, 1, 4)))
        shapes.add(cache.capacity)
    assert shapes == {256, 512, 768}


def test_a_prompt_follows_what_its_cache_holds(wide):
    """As in mlx-lm: each call brings only what is new."""
    ids = [n % 200 for n in range(3, 40)]
    whole = [token for token, _ in generate_step(ids, wide, max_tokens=9)]
    cache, seen = wide.make_cache(), []
    assert list(generate_step(ids[:-3], wide, max_tokens=0, prompt_cache=cache)) == []
    steps = generate_step(
        ids[-3:], wide, max_tokens=4, prompt_cache=cache,
        logits_processors=[lambda tokens, logits: seen.append(tokens.tolist()) or logits],
    )  # fmt: skip
    tokens = [token for token, _ in steps]
    assert [cache[0].offset, seen[0]] == [len(ids) + 3, ids[-3:]]
    tokens += [
        token for token, _ in generate_step(tokens[-1:], wide, max_tokens=5, prompt_cache=cache)
    ]
    assert tokens == whole
