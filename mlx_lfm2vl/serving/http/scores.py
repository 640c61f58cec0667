"""Log-probabilities of tokens in OpenAI's form, taken while the worker has them."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import mlx.core as mx

from ...generation.answer import GenerationResponse
from ...prompts.processor import Lfm2VlProcessor

LEAST = -9999.0  # stands for minus infinity, which JSON does not have


class Scores:
    """Looks at each response of an answer in the worker's thread.

    Attributes:
        found: for each token its entry of `logprobs.content`; none for one that ends the answer.
    """

    def __init__(self, processor: Lfm2VlProcessor, count: int) -> None:
        self.processor, self.count = processor, count
        self.ends = {processor.tokenizer.eos_token_id, *processor.generation_config.eos_token_ids}
        self.found: list[dict[str, Any]] = []

    def __call__(self, response: GenerationResponse) -> None:
        if response.token in self.ends:
            return
        logprobs, count = response.logprobs, self.count
        best: list[int] = []
        if count > 0:
            best = cast("list[int]", mx.argpartition(-logprobs, count - 1)[:count].tolist())
        ids = [response.token, *best]
        values = cast("list[float]", logprobs[mx.array(ids)].tolist())
        entries = [
            {**token_text(self.processor, token), "logprob": max(value, LEAST)}
            for token, value in zip(ids, values, strict=True)
        ]
        top = sorted(entries[1:], key=lambda entry: -entry["logprob"])
        self.found.append({**entries[0], "top_logprobs": top})


def token_text(processor: Lfm2VlProcessor, token: int) -> dict[str, Any]:
    """What a token stands for: text, and bytes, since it may be a part of a character."""
    text = processor.decode([token])
    data = text.encode()
    if "\ufffd" in text:
        name = processor.tokenizer.tokenizer.id_to_token(token) or ""
        table = byte_table()
        if all(character in table for character in name):
            data = bytes(table[character] for character in name)
    return {"token": text, "bytes": list(data)}


@cache
def byte_table() -> dict[str, int]:
    """The characters by which byte-level tokenizers write bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): b for n, b in enumerate(others)}
