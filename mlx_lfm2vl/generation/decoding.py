"""One token through the language model: traced once, then replayed.

To build the graph of a step in Python can take longer than a GPU takes to compute it. Here
`mx.compile` keeps the graph. What changes from token to token goes in as arrays of fixed shape:
keys and values as whole buffers, with a mask over the room that is still empty. Only where a
buffer grows, by a block, the step is traced again.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import mlx.core as mx

from ..models.cache import Cache, ConvCache, KVCache, RotatingKVCache
from ..models.lfm2 import Lfm2ForCausalLM


class DecodeStep:
    """Tokens of one answer, one after the other.

    Made for an answer and dropped after it: weights are constants of the traced graph, so what
    changes them meanwhile has no effect.
    """

    def __init__(self, language_model: Lfm2ForCausalLM) -> None:
        self.language_model = language_model
        self.first_attention = language_model.model.first_attention
        # a weight that nobody has read yet would be read from the file at every token
        mx.async_eval(language_model.parameters())
        self.traced = mx.compile(partial(forward, language_model))

    def __call__(self, token_ids: mx.array, cache: list[Cache]) -> mx.array:
        """Token (1,) -> logits (1, vocab) of the next one; fills the cache in place."""
        attention = cache[self.first_attention]
        if not isinstance(attention, (KVCache, RotatingKVCache)):  # integers
            return self._untraced(token_ids, cache)
        entries = cast(list[KVCache | RotatingKVCache | ConvCache], cache)
        offset, slot = attention.offset, attention.next_slot
        if slot == attention.room:  # in all layers alike
            for entry in entries:
                if not isinstance(entry, ConvCache):
                    entry.make_room()
        states = [entry.state for entry in entries]
        logits, states = self.traced(token_ids, mx.array([offset]), mx.array([slot]), states)
        for entry, state in zip(entries, states, strict=True):
            entry.advance(state)
        return logits

    def _untraced(self, token_ids: mx.array, cache: list[Cache]) -> mx.array:
        hidden = self.language_model.model(self.language_model.embed(token_ids)[None], cache)
        return self.language_model.logits(hidden.last_hidden_state[:, -1])


class Slots(NamedTuple):
    """Keys and values while a step is traced; duck-typed like the caches.

    Attributes:
        arrays: keys and values, (batch, kv heads, slots, head dim).
        offset: position of the token, (1,).
        slot: where it goes, (1,).
    """

    arrays: list[mx.array]
    offset: mx.array
    slot: mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes (batch, kv heads, 1, head dim) into the slot; returns all slots."""
        for i, new in enumerate((keys, values)):
            self.arrays[i] = mx.slice_update(self.arrays[i], new, self.slot, axes=(2,))
        return self.arrays[0], self.arrays[1]

    def make_mask(self, length: int) -> mx.array:
        """Boolean (1, 1, 1, slots): the slots up to the token's position, or all."""
        slots = mx.arange(self.arrays[0].shape[2])
        return (slots <= self.offset)[None, None, None]


def forward(
    language_model: Lfm2ForCausalLM,
    token_ids: mx.array,
    offset: mx.array,
    slot: mx.array,
    states: list[list[mx.array]],
) -> tuple[mx.array, list[list[mx.array]]]:
    """Token (1,) and each layer's state -> logits (1, vocab) and the new states."""
    cache: list[Any] = []
    for layer, arrays in zip(language_model.layers, states, strict=True):
        if layer.is_attention_layer:
            cache.append(Slots(list(arrays), offset, slot))
        else:
            entry = ConvCache()
            [entry.inputs] = arrays
            cache.append(entry)
    hidden = language_model.model(language_model.embed(token_ids)[None], cache).last_hidden_state
    states = [entry.arrays if isinstance(entry, Slots) else entry.state for entry in cache]
    return language_model.logits(hidden[:, -1]), states
