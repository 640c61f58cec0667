"""`/v1/chat/completions`: its requests and its responses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from ...options import MOST, ImageOptions
from .asking import (
    MAX_CHOICES,
    MAX_TOP_LOGPROBS,
    Ask,
    read_bias,
    read_common,
    read_content,
    read_count,
    read_form,
    read_image_options,
    read_sampling,
    read_stop,
    read_stream,
    read_tools,
)
from .errors import refused
from .fields import Fields
from .running import Choice, Delta, Run, Update

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_chat(body: Any) -> Ask:
    """A request.

    Raises:
        HttpError: 400, naming what is wrong or not supported.
    """
    given = Fields(body)
    read_common(given)
    given.only(
        modalities=(["text"],), audio=(), prediction=(), web_search_options=(), functions=(),
        function_call=(), reasoning_effort=("none",), verbosity=("medium",),
    )  # fmt: skip
    messages, image_options = given.need("messages", list), read_image_options(given)
    stream, include_usage = read_stream(given)
    wants_logprobs = given.get("logprobs", bool, default=False)
    top_logprobs = read_count(given, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    if top_logprobs is not None and not wants_logprobs:
        raise refused("top_logprobs", "needs logprobs", top_logprobs)
    ask = Ask(
        model=given.get("model", str),
        messages=[],
        settings={
            **read_sampling(given),
            "logit_bias": read_bias(given),
            "seed": read_count(given, "seed", -(2**63), 2**64 - 1),
            "stop": read_stop(given),
            **read_form(given, given.get("response_format", dict), "response_format"),
            **read_tools(given, wrapped=True),
        },
        max_tokens=_max_tokens(given),
        n=read_count(given, "n", 1, MAX_CHOICES, 1),
        stream=stream,
        include_usage=include_usage,
        top_logprobs=(top_logprobs or 0) if wants_logprobs else None,
    )
    given.end()
    ask.messages = read_messages(messages, image_options)
    return ask


def _max_tokens(given: Fields) -> int | None:
    names = ("max_completion_tokens", "max_tokens")
    found = {read_count(given, name, 1, MOST) for name in names} - {None}
    if len(found) > 1:
        raise refused("max_tokens", "and max_completion_tokens must be the same")
    return found.pop() if found else None


def read_messages(messages: list[Any], image_options: ImageOptions) -> list[dict[str, Any]]:
    """A conversation in the `transformers` form."""
    if not messages:
        raise refused("messages", "must have one message or more")
    return [
        _message(Fields(message, f"messages[{place}]"), image_options)
        for place, message in enumerate(messages)
    ]


def _message(given: Fields, image_options: ImageOptions) -> dict[str, Any]:
    role = given.need("role", str)
    if role not in ROLES:
        raise refused(given.name("role"), f"must be one of {', '.join(ROLES)}", role)
    given.get("name", str)  # the models know no names
    given.only(refusal=(), audio=(), function_call=(), annotations=([],))
    content = given.get("content", str, list)
    more: dict[str, Any] = {}
    if role == "tool":
        given.need("tool_call_id", str)
    if role == "assistant" and (calls := given.get("tool_calls", list)):
        more["tool_calls"] = [
            _call(Fields(call, f"{given.name('tool_calls')}[{n}]")) for n, call in enumerate(calls)
        ]
        content = content or ""
    if content is None:
        raise refused(given.name("content"), "is missing")
    content = read_content(given, "content", content, role, image_options)
    given.end()
    return {"role": "system" if role == "developer" else role, "content": content, **more}


def _call(given: Fields) -> dict[str, Any]:
    """A tool call of the history."""
    given.get("id", str)
    given.only(type=("function",))
    function = Fields(given.need("function", dict), given.name("function"))
    name, arguments = function.need("name", str), function.need("arguments", str)
    function.end()
    given.end()
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


class ChatWriter:
    """The bodies of the response to one request."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.id = f"chatcmpl-{run.id}"
        self.created = int(time.time())

    def _body(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id, "object": kind, "created": self.created, "model": self.run.model,
            "choices": choices,
        }  # fmt: skip

    def whole(self) -> dict[str, Any]:
        """All of it, when all answers have ended."""
        choices = [self._choice(choice.whole()) for choice in self.run.choices]
        usage = {"usage": self.run.usage(), "timings": self.run.timings()}
        return {**self._body("chat.completion", choices), **usage}

    def _choice(self, update: Update) -> dict[str, Any]:
        text = update.text if update.text or not update.deltas else None
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if update.deltas:
            calls = [_delta(delta) for delta in update.deltas]
            message["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
        return {
            "index": update.choice.index, "message": message,
            "finish_reason": update.choice.finish_reason,
            "logprobs": self._logprobs(update.scores),
        }  # fmt: skip

    def begin(self) -> list[dict[str, Any]]:
        """The first chunks, before anything is known."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(choice, delta) for choice in self.run.choices]

    def news(self, update: Update) -> list[dict[str, Any]]:
        """Chunks for what has come of an answer."""
        choice, text, scores, deltas = update
        chunks = []
        if text or scores:
            chunks.append(self._chunk(choice, {"content": text}, None, scores))
        if deltas:
            chunks.append(self._chunk(choice, {"tool_calls": [_delta(delta) for delta in deltas]}))
        if choice.finish_reason is not None and update is choice.newest:
            chunks.append(self._chunk(choice, {}, choice.finish_reason))
        return chunks

    def end(self) -> list[dict[str, Any]]:
        """The last chunks."""
        if not self.run.ask.include_usage:
            return []
        usage = {"usage": self.run.usage(), "timings": self.run.timings()}
        return [{**self._body("chat.completion.chunk", []), **usage}]

    def _chunk(
        self,
        choice: Choice,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        scores: Sequence[Any] = (),
    ) -> dict[str, Any]:
        body = {
            "index": choice.index, "delta": delta, "finish_reason": finish_reason,
            "logprobs": self._logprobs(scores) if scores else None,
        }  # fmt: skip
        return self._body("chat.completion.chunk", [body])

    def _logprobs(self, scores: Sequence[Any]) -> dict[str, Any] | None:
        if self.run.ask.top_logprobs is None:
            return None
        return {"content": list(scores), "refusal": None}


def _delta(delta: Delta) -> dict[str, Any]:
    function = {"name": delta.name} if delta.name is not None else {}
    begins = {"id": delta.id, "type": "function"} if delta.name is not None else {}
    function["arguments"] = delta.arguments
    return {"index": delta.index, **begins, "function": function}
