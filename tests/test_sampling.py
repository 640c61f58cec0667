"""Samplers and processors do what mlx-lm's do: same filters, same draws from the same seed."""

from dataclasses import replace

import mlx.core as mx
import mlx_lm.sample_utils as oracle
import pytest

from mlx_lfm2vl import ConfigError, Sampling
from mlx_lfm2vl.generation.sampling import (
    apply_min_p,
    apply_top_k,
    apply_top_p,
    make_logits_processors,
    make_repetition_penalty,
    make_sampler,
)
from mlx_lfm2vl.options import FAMILY_SAMPLING, SamplingConfig

VOCAB = 500


def random_logprobs(seed: int, rows: int = 3) -> mx.array:
    logits = mx.random.normal((rows, VOCAB), key=mx.random.key(seed)) * 3
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("ours", "theirs", "arguments"),
    [
        (apply_top_k, oracle.apply_top_k, (1,)),
        (apply_top_k, oracle.apply_top_k, (40,)),
        (apply_min_p, oracle.apply_min_p, (0.15,)),
        (apply_min_p, oracle.apply_min_p, (0.5, 7)),
        (apply_top_p, oracle.apply_top_p, (0.3,)),
        (apply_top_p, oracle.apply_top_p, (0.95,)),
    ],
)
def test_filters_equal_mlx_lm(ours, theirs, arguments, seed):
    logprobs = random_logprobs(seed)
    kept = ours(logprobs, *arguments)
    assert mx.array_equal(kept, theirs(logprobs, *arguments))
    assert 0 < mx.isfinite(kept).sum().item() < kept.size, "the filter did nothing"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temp": 0.7},
        {"temp": 0.1, "min_p": 0.15},
        {"temp": 0.2, "top_k": 50},
        {"temp": 1.3, "top_p": 0.9, "min_p": 0.02, "top_k": 20},
        {"temp": 1.0, "min_p": 0.9, "min_tokens_to_keep": 5},
        {"temp": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.02},
        {"temp": 1.0, "xtc_probability": 1.0, "xtc_threshold": 0.02, "xtc_special_tokens": [3, 5]},
    ],
)
def test_sampler_draws_the_tokens_of_mlx_lm(settings):
    draws = []
    for make in (make_sampler, oracle.make_sampler):
        mx.random.seed(7)
        sampler = make(**settings)
        draws.append([sampler(random_logprobs(seed)).tolist() for seed in range(20)])
    assert draws[0] == draws[1]


@pytest.mark.parametrize("context", [1, 20, 1000])
def test_repetition_penalty_equals_mlx_lm(context):
    tokens = mx.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 4)
    logits = random_logprobs(3, rows=1) + 6
    ours = make_repetition_penalty(1.3, context)(tokens, mx.array(logits))
    theirs = oracle.make_repetition_penalty(1.3, context)(tokens, mx.array(logits))
    assert mx.array_equal(ours, theirs)
    assert not mx.array_equal(ours, logits)


@pytest.mark.parametrize(
    "settings",
    [
        {"logit_bias": {3: 2.5, 77: -9.0}},
        {"presence_penalty": 0.7},
        {"frequency_penalty": 0.4, "frequency_context_size": 7},
        {"repetition_penalty": 1.3, "presence_penalty": -0.5, "frequency_penalty": 1.1},
    ],
)
def test_processors_equal_mlx_lm(settings):
    tokens = mx.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5] * 4)
    ours = theirs = random_logprobs(3, rows=1) + 6
    for processor in make_logits_processors(**settings):
        ours = processor(tokens, mx.array(ours))
    for processor in oracle.make_logits_processors(**settings):
        theirs = processor(tokens, mx.array(theirs))
    assert mx.array_equal(ours, theirs)
    assert not mx.array_equal(ours, random_logprobs(3, rows=1) + 6)


def test_what_changes_nothing_costs_nothing():
    assert make_logits_processors({}, 1.0, 20, 0.0, 20, 0.0) == []
    assert make_logits_processors() == []
    assert len(make_logits_processors({1: 2.0}, 1.05, 20, 0.5, 20, 0.5)) == 4


def test_temperature_zero_alone_is_plain_greedy():
    assert Sampling(temperature=0).apply(FAMILY_SAMPLING) == SamplingConfig()
    kept = Sampling(temperature=0, repetition_penalty=1.2).apply(FAMILY_SAMPLING)
    assert kept == SamplingConfig(repetition_penalty=1.2)
    assert Sampling(top_k=5).apply(FAMILY_SAMPLING) == replace(FAMILY_SAMPLING, top_k=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 1.5},
        {"top_k": -3},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_context_size": 0},
        {"presence_penalty": float("nan")},
        {"xtc_threshold": 0.6},
        {"logit_bias": [1]},
    ],
)
def test_impossible_settings_are_named(wrong):
    (name,) = wrong
    with pytest.raises(ConfigError, match=f"{name} is .*; it must be"):
        Sampling(**wrong)
