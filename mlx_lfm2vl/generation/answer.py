"""From tokens to an answer: text, end, statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass

import mlx.core as mx

from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import Question


@dataclass(frozen=True)
class GenerationResponse:
    """One step of an answer; the fields of mlx-lm's, and more.

    Attributes:
        text: what became certain with this token; may be empty, never half a character.
        token: the token's id.
        logprobs: (vocab,) log-probabilities it was chosen from.
        from_draft: always False, there is no draft model.
        prompt_tokens: positions of the prompt, images included.
        prompt_tps: prompt positions per second, vision included.
        generation_tokens: tokens so far.
        generation_tps: tokens per second since the first one.
        peak_memory: GB so far in this process.
        finish_reason: "stop", "length", or None while it continues.
        image_tokens: image tokens of each image.
        vision_time: seconds in the vision tower, if it was measured.
        time_to_first_token: seconds from prompt to first token.
        closed: whether the answer is whole, although it was at its limit: a form was asked for, and
            it was brought to its end or had just reached it.
    """

    text: str
    token: int
    logprobs: mx.array
    from_draft: bool
    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    peak_memory: float
    finish_reason: str | None
    image_tokens: tuple[int, ...]
    vision_time: float | None
    time_to_first_token: float
    closed: bool = False


def eos_token_ids(processor: Lfm2VlProcessor) -> tuple[int, ...]:
    """The tokens that end an answer."""
    ids = processor.generation_config.eos_token_ids
    return tuple(ids) if ids else (processor.tokenizer.eos_token_id,)


class Answer:
    """Turns tokens into text and knows when to end."""

    def __init__(self, processor: Lfm2VlProcessor, question: Question) -> None:
        tokenizer = processor.tokenizer
        self.eos_token_ids = frozenset(eos_token_ids(processor))
        self.detokenizer = tokenizer.detokenizer()
        self.stop = question.stop
        self.left = question.max_tokens
        self.held = ""  # text that may be the beginning of a stop text

    def add(self, token: int) -> tuple[str, str | None]:
        """Takes a token; returns the text to show and the reason to end, if any."""
        self.left -= 1
        if token in self.eos_token_ids:
            return self._finish("stop")
        self.detokenizer.add_token(token)
        self.held += self.detokenizer.last_segment
        cut = min((place for s in self.stop if (place := self.held.find(s)) >= 0), default=-1)
        if cut >= 0:
            return self.held[:cut], "stop"
        if self.left == 0:
            return self._finish("length")
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        text = self.held[: len(self.held) - keep]
        self.held = self.held[len(text) :]
        return text, None

    def _finish(self, reason: str) -> tuple[str, str]:
        self.detokenizer.finalize()
        text = self.held + self.detokenizer.last_segment
        cut = min((place for s in self.stop if (place := text.find(s)) >= 0), default=len(text))
        return text[:cut], "stop" if cut < len(text) else reason


def _overlap(text: str, stop: str) -> int:
    """How many last characters of a text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Clock:
    """Measures one answer, from the moment it is made."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt_tokens = len(prompt.token_ids)
        self.image_tokens = tuple(image.image_tokens for image in prompt.images)
        self.vision_time: float | None = None
        self.start = time.perf_counter()
        self.first = 0.0
        self.tokens = 0

    def response(
        self,
        text: str,
        token: int,
        logprobs: mx.array,
        finish_reason: str | None,
        closed: bool = False,
    ) -> GenerationResponse:
        """The response for the next token."""
        now = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first = now
        waited = self.first - self.start
        return GenerationResponse(
            text=text,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=self.prompt_tokens,
            prompt_tps=self.prompt_tokens / waited,
            generation_tokens=self.tokens,
            # the first token belongs to the prompt's time
            generation_tps=(self.tokens - 1) / (now - self.first) if self.tokens > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=finish_reason,
            image_tokens=self.image_tokens,
            vision_time=self.vision_time,
            time_to_first_token=waited,
            closed=closed,
        )
