"""The language model, LFM2: gated short convolutions, grouped-query attention, SwiGLU.

After `transformers`' `modeling_lfm2.py`. `Lfm2ForCausalLM(inputs, cache, input_embeddings)` is
mlx-lm's protocol, so mlx-lm's own generation drives it, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, PromptError
from ..options import CacheOptions
from .cache import Cache, ConvCache, attention, causal_mask, make_attention_cache
from .config import Lfm2Config
from .layers import JointProjections, checkpointed, gated_sum, swiglu


class Rotary(NamedTuple):
    """Where the tokens stand: after `offset` others, or at explicit angles.

    `offset` is an int, or (batch,) if rows differ. cos and sin are (batch, 1, tokens, head
    dim), None if positions simply count up.
    """

    offset: int | mx.array
    cos: mx.array | None = None
    sin: mx.array | None = None


class Masks(NamedTuple):
    """What tokens may see.

    Attributes:
        attention: "causal", None (a single token sees everything) or boolean
            (batch, 1, tokens, positions).
        padding: (batch, tokens, 1), False on padding; None if there is none.
    """

    attention: mx.array | str | None
    padding: mx.array | None = None


class Lfm2Output(NamedTuple):
    """Hidden states after the final norm: (batch, tokens, hidden); the rest if asked for.

    `hidden_states`: the embeddings, each layer's output, the last one after the final norm.
    `attentions`: (batch, heads, tokens, positions) per attention layer.
    """

    last_hidden_state: mx.array
    hidden_states: list[mx.array] | None = None
    attentions: list[mx.array] | None = None


class Lfm2Attention(JointProjections):
    """Grouped-query attention with normalised queries and keys, and rotary positions."""

    TOGETHER = ("q_proj", "k_proj", "v_proj")

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.head_dim = dim
        self.rope_theta = config.rope_theta
        self.scale = dim**-0.5
        self.q_proj = nn.Linear(hidden, self.num_heads * dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_key_value_heads * dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_key_value_heads * dim, bias=False)
        self.out_proj = nn.Linear(self.num_heads * dim, hidden, bias=False)
        self.q_layernorm = nn.RMSNorm(dim, eps=config.norm_eps)
        self.k_layernorm = nn.RMSNorm(dim, eps=config.norm_eps)

    def __call__(
        self,
        x: mx.array,
        masks: Masks,
        rotary: Rotary,
        cache: Any = None,  # a `cache.KVCache`
        attentions: list[mx.array] | None = None,
        skip: int = 0,
    ) -> mx.array:
        """(batch, tokens, hidden) -> (batch, tokens - skip, hidden); the first ones only speak."""
        batch, length, hidden = x.shape
        # (batch·tokens, heads·dim) -> (batch, heads, tokens, dim)
        queries, keys, values = self.project(x)
        if skip > 0:
            queries = self.q_proj(x[:, skip:].reshape(-1, hidden))
        queries = queries.reshape(batch, length - skip, self.num_heads, -1)
        queries = self.q_layernorm(queries).transpose(0, 2, 1, 3)
        keys = keys.reshape(batch, length, self.num_key_value_heads, -1)
        keys = self.k_layernorm(keys).transpose(0, 2, 1, 3)
        values = values.reshape(batch, length, self.num_key_value_heads, -1)
        values = values.transpose(0, 2, 1, 3)
        later = rotary if skip == 0 else Rotary(rotary.offset + skip)
        queries, keys = self._rotate(queries, later), self._rotate(keys, rotary)
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        mask = masks.attention
        if skip > 0 and isinstance(mask, mx.array):
            mask = mask[..., skip:, :]
        attend = attention if cache is None else cache.attend
        out = attend(queries, keys, values, mask, self.scale)
        if attentions is not None:
            attentions.append(self._weights(queries, keys, mask))
        out = self.out_proj(out.transpose(0, 2, 1, 3).reshape(batch * (length - skip), -1))
        return out.reshape(batch, length - skip, -1)

    def _rotate(self, x: mx.array, rotary: Rotary) -> mx.array:
        if rotary.cos is None or rotary.sin is None:
            return mx.fast.rope(
                x,
                self.head_dim,
                traditional=False,
                base=self.rope_theta,
                scale=1.0,
                offset=rotary.offset,
            )
        half = self.head_dim // 2
        turned = mx.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        return x * rotary.cos.astype(x.dtype) + turned * rotary.sin.astype(x.dtype)

    def _weights(self, queries: mx.array, keys: mx.array, mask: mx.array | str | None) -> mx.array:
        """Attention weights (batch, heads, tokens, positions), for those who want to see them."""
        groups = self.num_heads // self.num_key_value_heads
        scores = (queries * self.scale) @ mx.repeat(keys, groups, axis=1).swapaxes(-1, -2)
        if isinstance(mask, str):
            mask = causal_mask(queries.shape[2], keys.shape[2] - queries.shape[2])
        if mask is not None:
            scores = mx.where(mask, scores, mx.finfo(scores.dtype).min)
        return mx.softmax(scores, axis=-1, precise=True)


class Lfm2ShortConv(nn.Module):
    """A depthwise causal convolution over a few tokens, gated on both sides."""

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__()
        hidden, bias = config.hidden_size, config.conv_bias
        self.kernel_size = config.conv_L_cache
        self.conv = nn.Conv1d(hidden, hidden, self.kernel_size, groups=hidden, bias=bias)
        self.in_proj = nn.Linear(hidden, 3 * hidden, bias=bias)
        self.out_proj = nn.Linear(hidden, hidden, bias=bias)

    def __call__(self, x: mx.array, masks: Masks, cache: ConvCache | None = None) -> mx.array:
        if masks.padding is not None:
            x = mx.where(masks.padding, x, 0)
        before, after, x = mx.split(self.in_proj(x), 3, axis=-1)
        # (hidden, kernel, 1) -> one (1, 1, hidden) per shift
        weights = [*mx.split(self.conv.weight.T, self.kernel_size, axis=1)]
        shifted = self._shifted(before * x, cache)
        return self.out_proj(gated_sum(after, shifted, weights, self.conv.get("bias")))

    def _shifted(self, x: mx.array, cache: ConvCache | None) -> list[mx.array]:
        """What each weight is for: inputs that come before x, and x itself, all in its shape."""
        batch, length, hidden = x.shape
        keep = self.kernel_size - 1
        state = cache.arrays if cache is not None else []
        if not state:
            state = [mx.zeros((batch, 1, hidden), x.dtype)] * keep
        if length == 1:  # nothing is joined: all of it becomes one kernel
            shifted = [*state, x]
            kept = shifted[1:]
        else:
            padded = mx.concatenate([*state, x], axis=1)
            shifted = [padded[:, i : i + length] for i in range(self.kernel_size)]
            # taken, not sliced: a slice would keep the whole of x alive
            last = mx.take(padded, mx.arange(length, length + keep), axis=1)
            kept = [*mx.split(last, keep, axis=1)]
        if cache is not None:
            cache.arrays = kept
            cache.offset += length
        return shifted


class Lfm2MLP(JointProjections):
    """SwiGLU feed-forward."""

    TOGETHER = ("w1", "w3")

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.feed_forward_size, bias=False)
        self.w2 = nn.Linear(config.feed_forward_size, config.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate, up = self.project(x)
        return self.w2(swiglu(gate, up)).reshape(x.shape)


class Lfm2DecoderLayer(nn.Module):
    """Attention or convolution, then feed-forward; pre-norm, with residuals."""

    def __init__(self, config: Lfm2Config, layer_type: str) -> None:
        super().__init__()
        self.is_attention_layer = layer_type == "full_attention"
        if self.is_attention_layer:
            self.self_attn = Lfm2Attention(config)
        else:
            self.conv = Lfm2ShortConv(config)
        self.feed_forward = Lfm2MLP(config)
        self.operator_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)

    def __call__(
        self,
        x: mx.array,
        masks: Masks,
        rotary: Rotary,
        cache: Any = None,  # KVCache or ConvCache, as the layer is
        attentions: list[mx.array] | None = None,
        skip: int = 0,  # first tokens that others may see, but nobody asks for
    ) -> mx.array:
        normed = self.operator_norm(x)
        if self.is_attention_layer:
            x = x[:, skip:] + self.self_attn(normed, masks, rotary, cache, attentions, skip)
        else:
            x = x + self.conv(normed, masks, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Lfm2Model(nn.Module):
    """Embeddings, layers and the final norm, without the vocabulary head."""

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.rope_theta = config.rope_theta
        self.first_attention = config.layer_types.index("full_attention")
        layers, kernel_size = len(config.layer_types), config.conv_L_cache
        self.last_attention = max(
            i for i, kind in enumerate(config.layer_types) if kind == "full_attention"
        )
        # convolutions after it look back as far as this from the last token
        self.last_tokens = 1 + (layers - 1 - self.last_attention) * (kernel_size - 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Lfm2DecoderLayer(config, kind) for kind in config.layer_types]
        self.embedding_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False

    def __call__(
        self,
        embeddings: mx.array,
        cache: Sequence[Cache] | None = None,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        last_only: bool = False,
    ) -> Lfm2Output:
        """(batch, tokens, hidden) -> (batch, tokens, hidden).

        Args:
            cache: one entry per layer, filled in place.
            attention_mask: (batch, positions so far and new), 1 on tokens and 0 on padding.
            position_ids: (batch, tokens); by default they count up from the cache's offset.
            last_only: compute (batch, 1, hidden) of the last token and what the cache keeps, and
                nothing else; for batches without padding.
        """
        masks = self._masks(embeddings.shape[1], cache, attention_mask)
        offset = 0 if cache is None else cache[self.first_attention].offset
        rotary = self._rotary(offset, position_ids)
        hidden_states = [embeddings]
        attentions: list[mx.array] | None = [] if output_attentions else None
        x = embeddings
        unasked = max(0, x.shape[1] - self.last_tokens) if last_only else 0
        for i, layer in enumerate(self.layers):
            again = self.gradient_checkpointing and self.training
            call = checkpointed(layer) if again else layer
            skip = unasked if i == self.last_attention else 0
            x = call(x, masks, rotary, None if cache is None else cache[i], attentions, skip)
            if cache is not None and i > self.last_attention:
                entry: Any = cache[i]  # a ConvCache
                entry.offset += unasked
            if output_hidden_states:
                hidden_states.append(x)
        x = self.embedding_norm(x[:, -1:] if last_only else x)
        hidden_states[-1] = x
        return Lfm2Output(x, hidden_states if output_hidden_states else None, attentions)

    def _masks(
        self, length: int, cache: Sequence[Cache] | None, attention_mask: mx.array | None
    ) -> Masks:
        attention_cache: Any = None if cache is None else cache[self.first_attention]
        if attention_mask is None:
            if attention_cache is None:
                return Masks("causal" if length > 1 else None)
            return Masks(attention_cache.make_mask(length))
        real = attention_mask.astype(mx.bool_)  # (batch, offset + length)
        offset = real.shape[1] - length
        seen = causal_mask(length, offset) & real[:, None, None, :]
        # padding sees itself, or its softmax over nothing would spread NaN
        itself = mx.arange(length)[:, None] + offset == mx.arange(length + offset)
        return Masks(seen | itself, real[:, -length:, None])

    def _rotary(self, offset: int | mx.array, position_ids: mx.array | None) -> Rotary:
        if position_ids is None:
            return Rotary(offset)
        exponents = mx.arange(0, self.head_dim, 2, dtype=mx.float32) / self.head_dim
        angles = position_ids[:, None, :, None] * (self.rope_theta**-exponents)
        angles = mx.concatenate([angles, angles], axis=-1)
        return Rotary(offset, mx.cos(angles), mx.sin(angles))


class Lfm2ForCausalLM(nn.Module):
    """The language model with its vocabulary head, tied to the embeddings or not."""

    def __init__(self, config: Lfm2Config) -> None:
        super().__init__()
        self.model = Lfm2Model(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.decode_step: Any = None  # kept here by `generation.decoding`, as long as the model

    def __call__(
        self,
        inputs: mx.array,
        cache: Sequence[Cache] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Token ids (batch, tokens), or embeddings instead -> logits (batch, tokens, vocab)."""
        embeddings = self.embed(inputs) if input_embeddings is None else input_embeddings
        return self.logits(self.model(embeddings, cache).last_hidden_state)

    @property
    def vocab_size(self) -> int:
        """Rows of the embeddings."""
        return int(self.model.embed_tokens.weight.shape[0])

    def embed(self, token_ids: mx.array) -> mx.array:
        """(batch, tokens) -> (batch, tokens, hidden)."""
        # embeddings quantized to small floats come out as bfloat16, whatever the rest computes in
        dtype = self.model.embedding_norm.weight.dtype
        return self.model.embed_tokens(token_ids).astype(dtype)

    def logits(self, hidden: mx.array) -> mx.array:
        """(..., hidden) -> (..., vocab)."""
        if "lm_head" in self:
            return self.lm_head(hidden)
        return self.model.embed_tokens.as_linear(hidden)

    @property
    def layers(self) -> list[Lfm2DecoderLayer]:
        return self.model.layers

    def make_cache(self, options: CacheOptions | None = None, first_turn: int = 0) -> list[Cache]:
        """An empty cache, one entry per layer.

        Args:
            options: how attention layers remember; by default everything.
            first_turn: positions that a rotating cache pins by default, see `CacheOptions`.

        Raises:
            ConfigError: keys and values cannot be quantized so.
        """
        options = options if options is not None else CacheOptions()
        widths = [layer.self_attn.head_dim for layer in self.layers if layer.is_attention_layer]
        if options.kv_bits is not None and any(width % options.kv_group_size for width in widths):
            raise ConfigError(
                f"kv_group_size is {options.kv_group_size}; it must divide the head dimension of "
                f"this model, {widths[0]}"
            )
        return [
            make_attention_cache(options, first_turn) if layer.is_attention_layer else ConvCache()
            for layer in self.layers
        ]


def check_token_ids(token_ids: Sequence[int], size: int) -> list[int]:
    """The ids as ints; a PromptError names one that a vocabulary of this size does not have.

    The device does not check: what lies beyond the embeddings would be read, or crash.
    """
    try:
        ids = list(map(index, token_ids))
        wrong = [token for token in ids if not 0 <= token < size]
    except TypeError:  # no whole number
        wrong = [token for token in token_ids if not hasattr(token, "__index__")]
    if wrong:
        raise PromptError(
            f"token id {wrong[0]!r} is not in the vocabulary of {size} tokens, 0 to {size - 1}"
        )
    return ids
