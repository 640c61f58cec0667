"""From tokens to an answer: text, end, statistics."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import NamedTuple

import mlx.core as mx

from ..errors import AnswerError
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import Question
from ..prompts.tool_calls import CALL_END, CALL_START, ToolCall, parse_block
from .tools import ToolCallDelta, ToolCallStream


@dataclass(frozen=True)
class GenerationResponse:
    """One step of an answer; the fields of mlx-lm's, and more.

    Attributes:
        text: what became certain with this token; may be empty, never half a character. Tool calls
            stand in it with their marks.
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
        content: the part of the text that belongs to no tool call. What stands between the marks
            and is no call comes here when its end mark has come.
        tool_calls: those that this token completed.
        tool_call_deltas: what became certain of calls that are still being written.
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
    content: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_deltas: tuple[ToolCallDelta, ...] = ()


class Piece(NamedTuple):
    """What a token adds to an answer; see `GenerationResponse`."""

    text: str
    finish_reason: str | None
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_deltas: tuple[ToolCallDelta, ...] = ()


def eos_token_ids(processor: Lfm2VlProcessor) -> tuple[int, ...]:
    """The tokens that end an answer."""
    ids = processor.generation_config.eos_token_ids
    return tuple(ids) if ids else (processor.tokenizer.eos_token_id,)


class Answer:
    """Turns tokens into text and knows when to end."""

    def __init__(self, processor: Lfm2VlProcessor, question: Question) -> None:
        tokenizer = processor.tokenizer
        self.eos_token_ids = frozenset(eos_token_ids(processor))
        self.tokenizer, self.detokenizer = tokenizer, tokenizer.detokenizer()
        self.stop = question.stop
        self.left = question.max_tokens
        self.held = ""  # text that may be the beginning of a stop text
        # calls are found by the marks' ids: text that spells a mark is text
        self.call_start = tokenizer.special_tokens.get(CALL_START)
        self.call_end = tokenizer.special_tokens.get(CALL_END)
        self.call: ToolCallStream | None = None  # the one in work
        self.calls = 0

    def add(self, token: int) -> Piece:
        """Takes a token; returns what to show and the reason to end, if any."""
        self.left -= 1
        if token in self.eos_token_ids:
            return self._finish("stop")
        if token == (self.call_start if self.call is None else self.call_end):
            piece = self._open_call() if self.call is None else self._close_call(CALL_END)
            ended = piece.finish_reason is not None or self.left > 0
            return piece if ended else self._finish("length", piece)
        self.detokenizer.add_token(token)
        if self.call is not None:
            text = self.detokenizer.last_segment
            piece = Piece(text, None, "", (), tuple(self.call.add(text)))
            return piece if self.left > 0 else self._finish("length", piece)
        self.held += self.detokenizer.last_segment
        if (cut := self._stop_place()) >= 0:
            return Piece(self.held[:cut], "stop", self.held[:cut])
        if self.left == 0:
            return self._finish("length")
        keep = max((_overlap(self.held, s) for s in self.stop), default=0)
        text = self.held[: len(self.held) - keep]
        self.held = self.held[len(text) :]
        return Piece(text, None, text)

    def _stop_place(self) -> int:
        """Where the first stop text begins in what is held; -1 if there is none."""
        return min((place for s in self.stop if (place := self.held.find(s)) >= 0), default=-1)

    def _flush(self) -> str:
        """The text that the detokenizer still holds; it begins anew."""
        self.detokenizer.finalize()
        text = self.detokenizer.last_segment
        self.detokenizer = self.tokenizer.detokenizer()
        return text

    def _open_call(self) -> Piece:
        self.held += self._flush()
        if (cut := self._stop_place()) >= 0:
            return Piece(self.held[:cut], "stop", self.held[:cut])
        before, self.held, self.call = self.held, "", ToolCallStream(self.calls)
        return Piece(before + CALL_START, None, before)

    def _close_call(self, mark: str) -> Piece:
        """Ends the call in work; what is none becomes text."""
        assert self.call is not None
        text, call, self.call = self._flush(), self.call, None
        deltas = tuple(call.add(text))
        try:
            found = [
                replace(c, id=f"call_{self.calls + n}")
                for n, c in enumerate(parse_block(call.text))
            ]
        except AnswerError:
            return Piece(text + mark, None, CALL_START + call.text + mark, (), deltas)
        self.calls += len(found)
        return Piece(text + mark, None, "", tuple(found), deltas)

    def _finish(self, reason: str, before: Piece | None = None) -> Piece:
        """Ends the answer, of which this token has brought `before`."""
        if self.call is not None:
            last = self._close_call("")
            if before is not None:
                text = before.text + last.text
                deltas = before.tool_call_deltas + last.tool_call_deltas
                last = Piece(text, None, before.content + last.content, last.tool_calls, deltas)
            return last._replace(finish_reason=reason)
        if before is not None:
            return before._replace(finish_reason=reason)
        self.held += self._flush()
        cut = self._stop_place()
        text = self.held if cut < 0 else self.held[:cut]
        return Piece(text, reason if cut < 0 else "stop", text)


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
        self, piece: Piece, token: int, logprobs: mx.array, closed: bool = False
    ) -> GenerationResponse:
        """The response for the next token."""
        now = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first = now
        waited = self.first - self.start
        return GenerationResponse(
            text=piece.text,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=self.prompt_tokens,
            prompt_tps=self.prompt_tokens / waited,
            generation_tokens=self.tokens,
            # the first token belongs to the prompt's time
            generation_tps=(self.tokens - 1) / (now - self.first) if self.tokens > 1 else 0.0,
            peak_memory=mx.get_peak_memory() / 1e9,
            finish_reason=piece.finish_reason,
            image_tokens=self.image_tokens,
            vision_time=self.vision_time,
            time_to_first_token=waited,
            closed=closed,
            content=piece.content,
            tool_calls=piece.tool_calls,
            tool_call_deltas=piece.tool_call_deltas,
        )
