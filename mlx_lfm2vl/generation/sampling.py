"""Samplers and logits processors with mlx-lm's signatures.

Everything stays on the device; nothing here reads a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import mlx.core as mx

from ..options import SamplingConfig

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (batch, vocab) -> tokens (batch,)
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]  # tokens so far, logits -> logits


def make_sampler(
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    min_tokens_to_keep: int = 1,
    top_k: int = 0,
    xtc_probability: float = 0.0,
    xtc_threshold: float = 0.1,
    xtc_special_tokens: Sequence[int] = (),
    seed: int | None = None,
) -> Sampler:
    """A sampler; temperature 0 takes the most likely token.

    Args:
        temp: divides the log-probabilities.
        top_p: keep the most likely tokens that together have this probability; 0 or 1 keeps all.
        min_p: drop tokens below this fraction of the most likely one's probability.
        min_tokens_to_keep: how many `min_p` leaves at least.
        top_k: keep so many most likely tokens; 0 keeps all.
        xtc_probability, xtc_threshold, xtc_special_tokens: see `apply_xtc`.
        seed: draws from a key of its own, so that nothing else can change what comes; None draws
            from MLX's global state.
    """
    if temp == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    key = None if seed is None else mx.random.key(seed)

    def draw() -> mx.array | None:
        nonlocal key
        if key is None:
            return None
        key, part = mx.random.split(key)
        return part

    def sampler(logprobs: mx.array) -> mx.array:
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p, min_tokens_to_keep)
        if xtc_probability > 0:
            chance = mx.random.uniform(key=draw())
            left = apply_xtc(logprobs, xtc_threshold, xtc_special_tokens)
            logprobs = mx.where(chance > xtc_probability, logprobs, left)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, top_k)
        return mx.random.categorical(logprobs * (1 / temp), key=draw())

    return sampler


def make_logits_processors(
    logit_bias: Mapping[int, float] | None = None,
    repetition_penalty: float | None = None,
    repetition_context_size: int = 20,
    presence_penalty: float | None = None,
    presence_context_size: int = 20,
    frequency_penalty: float | None = None,
    frequency_context_size: int = 20,
) -> list[LogitsProcessor]:
    """The logits processors that settings ask for; None, and what changes nothing, for none.

    Args:
        logit_bias: added to the logits of tokens, by id.
        repetition_penalty, presence_penalty, frequency_penalty: see `make_repetition_penalty` and
            the others.
        repetition_context_size, presence_context_size, frequency_context_size: how many last
            tokens each of them looks at.
    """
    processors: list[LogitsProcessor] = []
    if logit_bias:
        processors.append(make_logit_bias(logit_bias))
    if repetition_penalty is not None and repetition_penalty != 1:
        processors.append(make_repetition_penalty(repetition_penalty, repetition_context_size))
    if presence_penalty:
        processors.append(make_presence_penalty(presence_penalty, presence_context_size))
    if frequency_penalty:
        processors.append(make_frequency_penalty(frequency_penalty, frequency_context_size))
    return processors


def from_settings(
    sampling: SamplingConfig, seed: int | None = None
) -> tuple[Sampler | None, list[LogitsProcessor]]:
    """Sampler (None for greedy decoding) and logits processors for settings."""
    sampler, size = None, sampling.repetition_context_size
    if sampling.temperature > 0:
        sampler = make_sampler(
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            top_k=sampling.top_k,
            xtc_probability=sampling.xtc_probability,
            xtc_threshold=sampling.xtc_threshold,
            seed=seed,
        )
    return sampler, make_logits_processors(
        sampling.logit_bias,
        sampling.repetition_penalty,
        size,
        sampling.presence_penalty,
        size,
        sampling.frequency_penalty,
        size,
    )


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keeps the `top_k` most likely tokens: (..., vocab) -> (..., vocab)."""
    rest = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, rest, mx.array(-math.inf, logprobs.dtype), axis=-1)


def apply_xtc(logprobs: mx.array, threshold: float, special_tokens: Sequence[int] = ()) -> mx.array:
    """Leaves out the tokens above a probability but the least likely of them: (..., vocab) -> same.

    Source: https://github.com/oobabooga/text-generation-webui/pull/6335
    """
    probabilities = mx.softmax(logprobs, -1)
    above = mx.where(probabilities > threshold, probabilities, math.inf)
    drop = probabilities > above.min(axis=-1, keepdims=True)
    if special_tokens:
        drop[..., mx.array(list(special_tokens))] = False
    return mx.where(drop, -math.inf, logprobs)


def apply_min_p(logprobs: mx.array, min_p: float, min_tokens_to_keep: int = 1) -> mx.array:
    """Drops tokens less likely than `min_p` times the most likely: (..., vocab) -> same.

    Paper: https://arxiv.org/abs/2407.01082
    """
    drop = logprobs < logprobs.max(axis=-1, keepdims=True) + math.log(min_p)
    if min_tokens_to_keep > 1:
        best = mx.argpartition(-logprobs, kth=min_tokens_to_keep - 1, axis=-1)
        drop = mx.put_along_axis(drop, best[..., :min_tokens_to_keep], mx.array(False), axis=-1)
    return mx.where(drop, -math.inf, logprobs)


def apply_top_p(logprobs: mx.array, top_p: float) -> mx.array:
    """Keeps the smallest set of most likely tokens whose probability reaches `top_p`.

    (..., vocab) -> (..., vocab). Paper: https://arxiv.org/abs/1904.09751
    """
    ascending = mx.sort(logprobs, axis=-1)
    probabilities = mx.exp(ascending.astype(mx.float32))
    above = mx.cumsum(probabilities, axis=-1, reverse=True, inclusive=False)
    total = probabilities.sum(axis=-1, keepdims=True)
    dropped = (above >= top_p * total).sum(axis=-1, keepdims=True)
    least = mx.take_along_axis(ascending, dropped, axis=-1)
    return mx.where(logprobs < least, -math.inf, logprobs)


def make_repetition_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """Makes tokens that came recently less likely.

    Positive logits are divided by `penalty`, negative ones multiplied.
    Paper: https://arxiv.org/abs/1909.05858

    Args:
        penalty: more than 1 discourages.
        context_size: how many last tokens count, prompt included.
    """

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[-context_size:]
        chosen = logits[:, recent]
        logits[:, recent] = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
        return logits

    return processor


def make_presence_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """Subtracts `penalty` from the logits of tokens among the last `context_size`."""

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        recent = tokens[-context_size:]
        logits[:, recent] -= penalty
        return logits

    return processor


def make_frequency_penalty(penalty: float, context_size: int = 20) -> LogitsProcessor:
    """Subtracts `penalty` for each time that a token came among the last `context_size`."""

    def processor(tokens: mx.array, logits: mx.array) -> mx.array:
        return logits.at[:, tokens[-context_size:]].subtract(penalty)

    return processor


def make_logit_bias(bias: Mapping[int, float]) -> LogitsProcessor:
    """Adds a number to the logits of some tokens."""
    ids, values = mx.array(list(bias)), mx.array(list(bias.values()))
    return lambda tokens, logits: logits.at[:, ids].add(values.astype(logits.dtype))
