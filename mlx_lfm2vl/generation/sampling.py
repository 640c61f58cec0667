"""Samplers and logits processors with mlx-lm's signatures.

Everything stays on the device; nothing here reads a value.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
    seed: int | None = None,
) -> Sampler:
    """A sampler; temperature 0 takes the most likely token.

    Args:
        temp: divides the log-probabilities.
        top_p: keep the most likely tokens that together have this probability; 0 or 1 keeps all.
        min_p: drop tokens below this fraction of the most likely one's probability.
        min_tokens_to_keep: how many `min_p` leaves at least.
        top_k: keep so many most likely tokens; 0 keeps all.
        seed: draws from a key of its own, so that nothing else can change what comes; None draws
            from MLX's global state.
    """
    if temp == 0:
        return lambda logprobs: mx.argmax(logprobs, axis=-1)
    key = None if seed is None else mx.random.key(seed)

    def sampler(logprobs: mx.array) -> mx.array:
        nonlocal key
        if 0 < top_p < 1:
            logprobs = apply_top_p(logprobs, top_p)
        if min_p > 0:
            logprobs = apply_min_p(logprobs, min_p, min_tokens_to_keep)
        if 0 < top_k < logprobs.shape[-1]:
            logprobs = apply_top_k(logprobs, top_k)
        draw = None
        if key is not None:
            key, draw = mx.random.split(key)
        return mx.random.categorical(logprobs * (1 / temp), key=draw)

    return sampler


def make_logits_processors(
    repetition_penalty: float | None = None, repetition_context_size: int = 20
) -> list[LogitsProcessor]:
    """The logits processors that settings ask for.

    Args:
        repetition_penalty: see `make_repetition_penalty`; None or 1 for none.
        repetition_context_size: how many last tokens it looks at.
    """
    if repetition_penalty is None or repetition_penalty == 1:
        return []
    return [make_repetition_penalty(repetition_penalty, repetition_context_size)]


def from_settings(
    sampling: SamplingConfig, seed: int | None = None
) -> tuple[Sampler | None, list[LogitsProcessor]]:
    """Sampler (None for greedy decoding) and logits processors for settings."""
    sampler = None
    if sampling.temperature > 0:
        sampler = make_sampler(
            sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k, seed=seed
        )
    return sampler, make_logits_processors(
        sampling.repetition_penalty, sampling.repetition_context_size
    )


def apply_top_k(logprobs: mx.array, top_k: int) -> mx.array:
    """Keeps the `top_k` most likely tokens: (..., vocab) -> (..., vocab)."""
    rest = mx.argpartition(-logprobs, kth=top_k - 1, axis=-1)[..., top_k:]
    return mx.put_along_axis(logprobs, rest, mx.array(-math.inf, logprobs.dtype), axis=-1)


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
