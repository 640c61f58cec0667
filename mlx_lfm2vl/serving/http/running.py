"""`Run`: the answers to one request, on their way."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...generation.answer import GenerationResponse
from ...generation.tools import ToolCallDelta
from ...prompts.tool_calls import ToolCall
from ..pending import PendingAnswer, news
from .asking import Ask
from .metrics import Metrics
from .scores import Scores

KEEPALIVE = 5.0  # seconds of silence after which a stream shows that it lives


@dataclass(frozen=True)
class Delta:
    """What became certain of a tool call.

    Attributes:
        index: which call of the answer.
        id: of the call.
        name: of the tool, when the call begins.
        arguments: a part of their JSON text.
    """

    index: int
    id: str
    name: str | None
    arguments: str


class Update(NamedTuple):
    """What has come of an answer since the last time: text first, then calls."""

    choice: Choice
    text: str
    scores: list[dict[str, Any]]
    deltas: list[Delta]


class Choice:
    """One answer of a request.

    Attributes:
        text: so far, without tool calls.
        calls: that are whole.
        finish_reason: once it has ended.
        last, newest: its newest response and update.
    """

    def __init__(self, index: int, pending: PendingAnswer, scores: Scores | None) -> None:
        self.index, self.pending, self._scores = index, pending, scores
        self.text = ""
        self.calls: list[ToolCall] = []
        self.finish_reason: str | None = None
        self.last: GenerationResponse | None = None
        self.newest: Update | None = None
        self._told = 0
        self._ids: list[str] = []  # of calls that have begun

    def take(self, responses: Sequence[GenerationResponse]) -> list[Update]:
        """Takes what has come; returns it, as much together as keeps its order."""
        updates: list[Update] = []
        for response in responses:
            if not updates or (response.content and updates[-1].deltas):
                updates.append(Update(self, "", [], []))
            deltas = [self._delta(delta) for delta in response.tool_call_deltas]
            _, text, scores, before = updates[-1]
            updates[-1] = Update(self, text + response.content, scores, [*before, *deltas])
            self.text += response.content
            self.calls += response.tool_calls
        self.last = responses[-1]
        self.finish_reason = self.last.finish_reason
        if self.calls and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        if self._scores is not None:
            updates[0].scores.extend(self._scores.found[self._told :])
            self._told += len(updates[0].scores)
        self.newest = updates[-1]
        return updates

    def whole(self) -> Update:
        """All that has come."""
        scores = [] if self._scores is None else self._scores.found
        deltas = [
            Delta(n, call_id(), call.name, json.dumps(call.arguments, ensure_ascii=False))
            for n, call in enumerate(self.calls)
        ]
        return Update(self, self.text, scores, deltas)

    def _delta(self, delta: ToolCallDelta) -> Delta:
        if delta.index == len(self._ids):
            self._ids.append(call_id())
        return Delta(delta.index, self._ids[delta.index], delta.name, delta.arguments)


def call_id() -> str:
    """A name for a tool call that no other has."""
    return f"call_{uuid.uuid4().hex[:24]}"


class Run:
    """The answers to one request.

    Attributes:
        id: a part of the response's.
        ask: the request.
        model: the name of the model that answers.
        choices: the answers.
        started: when it was asked, by `time.perf_counter`.
        seconds: that it may take.
        waited: seconds to the first token, once that has come.
        holds_place: whether its request still has a place of its own in the queue.
    """

    def __init__(
        self, ask: Ask, model: str, choices: list[Choice], started: float, seconds: float
    ) -> None:
        self.id = uuid.uuid4().hex
        self.ask, self.model, self.choices = ask, model, choices
        self.started, self.seconds = started, seconds
        self.waited: float | None = None
        self.holds_place = True

    @property
    def left(self) -> int:
        """How many of its answers have not ended, without one that its request stands for."""
        left = sum(not choice.pending.done for choice in self.choices)
        return max(0, left - self.holds_place)

    async def news(self) -> AsyncGenerator[list[Update], None]:
        """What comes of all answers; an empty list if nothing did for a while.

        Raises:
            TimeoutError: the time for a request is over.
            Lfm2VlError, RuntimeError: what an answer raised.
        """
        async with aclosing(news([c.pending for c in self.choices], self._patience())) as found:
            async for responses in found:
                if time.perf_counter() - self.started > self.seconds:
                    raise TimeoutError(f"no answer within {self.seconds:g} seconds")
                if responses and self.waited is None:
                    self.waited = time.perf_counter() - self.started
                yield [u for place, new in responses for u in self.choices[place].take(new)]

    def _patience(self) -> float:
        return min(KEEPALIVE, self.seconds / 2)

    async def finish(self) -> None:
        """Waits for all of it."""
        async with aclosing(self.news()) as found:
            async for _ in found:
                pass

    def cancel(self, reason: str = "the client has gone") -> None:
        """Ends what has not ended."""
        for choice in self.choices:
            choice.pending.cancel(reason)

    def progress(self) -> str:
        """How far the prompt is read."""
        parts = [c.pending.progress for c in self.choices if c.pending.progress is not None]
        return "waiting" if not parts else "{}/{}".format(*parts[0])

    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them: the prompt once, all answers."""
        first = self.choices[0].pending.usage
        generated = sum(c.last.generation_tokens for c in self.choices if c.last is not None)
        images = 0 if self.choices[0].last is None else sum(self.choices[0].last.image_tokens)
        prompt = 0 if first is None else first.prompt_tokens
        cached = 0 if first is None else first.reused_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": cached, "image_tokens": images},
        }

    def timings(self) -> dict[str, Any]:
        """Speeds of the first answer, by llama.cpp's names."""
        choice = self.choices[0]
        last, usage = choice.last, choice.pending.usage
        if last is None or usage is None:
            return {}
        prompt, tokens = last.time_to_first_token, last.generation_tokens
        predicted = (tokens - 1) / last.generation_tps if last.generation_tps else 0.0
        return {
            "cache_n": usage.reused_tokens,
            "prompt_n": usage.processed_tokens,
            "prompt_ms": round(prompt * 1e3, 3),
            "prompt_per_second": round(usage.processed_tokens / prompt, 3),
            "predicted_n": tokens,
            "predicted_ms": round(predicted * 1e3, 3),
            "predicted_per_second": round(last.generation_tps, 3),
            "first_token_ms": round((self.waited or 0.0) * 1e3, 3),
        }

    def count(self, metrics: Metrics) -> None:
        """Adds what it cost to the metrics."""
        if self.waited is not None:
            metrics.first_token(self.waited)
        for choice in self.choices:
            last, usage = choice.last, choice.pending.usage
            if last is not None:
                metrics.add("generated_tokens_total", last.generation_tokens)
            if last is None or usage is None:
                continue
            metrics.add("prompt_tokens_total", usage.prompt_tokens)
            metrics.add("cached_tokens_total", usage.reused_tokens)
            metrics.add("encoded_images_total", usage.encoded_images)
            metrics.add("prefill_seconds_total", last.time_to_first_token)
            if last.generation_tps > 0:
                seconds = (last.generation_tokens - 1) / last.generation_tps
                metrics.add("decode_seconds_total", seconds)
                metrics.add("decoded_tokens", last.generation_tokens - 1)
