"""`/v1/responses`, without anything that is kept between requests."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from ...options import MOST, ImageOptions
from .asking import (
    MAX_TOP_LOGPROBS,
    Ask,
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
from .errors import HttpError, refused
from .fields import Fields
from .running import Delta, Run, Update

INCLUDED = ("message.output_text.logprobs", "reasoning.encrypted_content")  # there is no reasoning


def read_responses(body: Any) -> Ask:
    """A request.

    Raises:
        HttpError: 400, naming what is wrong or not supported.
    """
    given = Fields(body)
    read_common(given)
    given.only(
        previous_response_id=(), conversation=(), background=(False,), background_options=(),
        context_management=(), prompt=(), max_tool_calls=(), truncation=("disabled",),
        access_programs=(), image=(),
    )  # fmt: skip
    _read_reasoning(given)
    items, image_options = given.need("input", str, list), read_image_options(given)
    stream, _ = read_stream(given)
    include = given.get("include", list, default=[])
    if not all(item in INCLUDED for item in include):
        raise refused("include", f"may hold {' and '.join(INCLUDED)}", include)
    top_logprobs = read_count(given, "top_logprobs", 0, MAX_TOP_LOGPROBS)
    wants_logprobs = INCLUDED[0] in include or top_logprobs is not None
    instructions = given.get("instructions", str)
    ask = Ask(
        model=given.get("model", str),
        messages=[],
        settings={
            **read_sampling(given),
            "seed": read_count(given, "seed", -(2**63), 2**64 - 1),
            "stop": read_stop(given),
            **_read_text(given),
            **read_tools(given, wrapped=False),
        },
        max_tokens=read_count(given, "max_output_tokens", 1, MOST),
        stream=stream,
        top_logprobs=(top_logprobs or 0) if wants_logprobs else None,
    )
    given.end()
    first = [] if instructions is None else [{"role": "system", "content": instructions}]
    ask.messages = [*first, *read_input(items, image_options)]
    kept = ("temperature", "top_p", "max_output_tokens", "metadata", "text", "user")
    ask.echo = {name: body.get(name) for name in (*kept, "top_logprobs", "instructions")}
    for name, default in (("parallel_tool_calls", True), ("tool_choice", "auto"), ("tools", [])):
        ask.echo[name] = default if body.get(name) is None else body[name]
    return ask


def _read_reasoning(given: Fields) -> None:
    inner = Fields(given.get("reasoning", dict, default={}), "reasoning")
    inner.only(effort=("none",), summary=("auto",), generate_summary=("auto",), context=())
    inner.end()


def _read_text(given: Fields) -> dict[str, Any]:
    inner = Fields(given.get("text", dict, default={}), "text")
    inner.only(verbosity=("medium",))
    form = read_form(given, inner.get("format", dict), "text.format")
    inner.end()
    return form


def read_input(items: str | list[Any], image_options: ImageOptions) -> list[dict[str, Any]]:
    """A conversation in the `transformers` form."""
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    if not items:
        raise refused("input", "must have one item or more")
    return [
        _input(Fields(item, f"input[{place}]"), image_options) for place, item in enumerate(items)
    ]


def _input(given: Fields, image_options: ImageOptions) -> dict[str, Any]:
    kind = given.get("type", str, default="message")
    for name in ("id", "status", "phase"):
        given.get(name, str)
    if kind == "function_call":
        given.get("call_id", str)
        function = {"name": given.need("name", str), "arguments": given.need("arguments", str)}
        given.end()
        call = {"type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        given.need("call_id", str)
        output = given.need("output", str, list)
        content = read_content(given, "output", output, "tool", image_options)
        given.end()
        return {"role": "tool", "content": content}
    if kind != "message":
        raise HttpError(
            400, f"{given.name('type')} {kind!r:.50} is not supported",
            given.name("type"), "unsupported_parameter",
        )  # fmt: skip
    role = given.need("role", str)
    if role not in ("system", "developer", "user", "assistant"):
        right = "must be system, developer, user or assistant"
        raise refused(given.name("role"), right, role)
    content = read_content(given, "content", given.need("content", str, list), role, image_options)
    given.end()
    return {"role": "system" if role == "developer" else role, "content": content}


class ResponsesWriter:
    """The bodies of the response to one request."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.created = time.time()
        self.output: list[dict[str, Any]] = []  # items; only the last one may be in work
        self.events: list[dict[str, Any]] = []  # not yet sent
        self.sent = 0
        self.logprobs: list[Any] = []  # of the message in work

    def whole(self) -> dict[str, Any]:
        """All of it, when the answer has ended."""
        self.news(self.run.choices[0].whole())
        self._close()
        return self._response()

    def begin(self) -> list[dict[str, Any]]:
        """The first events, before anything is known."""
        for kind in ("created", "in_progress"):
            self._event(f"response.{kind}", response=self._response("in_progress"))
        return self._taken()

    def news(self, update: Update) -> list[dict[str, Any]]:
        """Events for what has come."""
        if update.text or update.scores:
            self._text(update.text, update.scores)
        for delta in update.deltas:
            self._call(delta)
        return self._taken()

    def end(self) -> list[dict[str, Any]]:
        """The last events."""
        if not self.output:
            self._text("", [])
        self._close()
        response = self._response()
        self._event(f"response.{response['status']}", response=response)
        return self._taken()

    def _event(self, kind: str, **values: Any) -> None:
        self.events.append({"type": kind, "sequence_number": self.sent, **values})
        self.sent += 1

    def _taken(self) -> list[dict[str, Any]]:
        events, self.events = self.events, []
        return events

    @property
    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self.output) - 1, "item_id": self.output[-1]["id"]}

    def _open(self, item: dict[str, Any]) -> None:
        self._close()
        self.output.append(item)
        index = len(self.output) - 1
        self._event("response.output_item.added", output_index=index, item=_copy(item))

    def _text(self, text: str, scores: Sequence[Any]) -> None:
        if not self.output or self.output[-1]["type"] != "message":
            item = {"type": "message", "role": "assistant", "content": []}
            self._open({"id": f"msg_{uuid.uuid4().hex}", "status": "in_progress", **item})
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.output[-1]["content"] = [part]
            place = {**self._place, "content_index": 0}
            self._event("response.content_part.added", part=dict(part), **place)
        self.output[-1]["content"][0]["text"] += text
        self.output[-1]["content"][0]["logprobs"] += scores
        place = {**self._place, "content_index": 0, "logprobs": list(scores)}
        self._event("response.output_text.delta", delta=text, **place)

    def _call(self, delta: Delta) -> None:
        if delta.name is not None:
            item = {"type": "function_call", "call_id": delta.id, "name": delta.name}
            item |= {"id": f"fc_{uuid.uuid4().hex}", "status": "in_progress", "arguments": ""}
            self._open(item)
        self.output[-1]["arguments"] += delta.arguments
        if delta.arguments:
            kind = "response.function_call_arguments.delta"
            self._event(kind, delta=delta.arguments, **self._place)

    def _close(self) -> None:
        """Ends the item in work."""
        if not self.output or self.output[-1]["status"] == "completed":
            return
        item, place = self.output[-1], self._place
        item["status"] = "completed"
        if item["type"] == "message":
            [part] = item["content"]
            place["content_index"] = 0
            text, logprobs = part["text"], part["logprobs"]
            self._event("response.output_text.done", text=text, logprobs=logprobs, **place)
            self._event("response.content_part.done", part=part, **place)
        else:
            kind, named = "response.function_call_arguments.done", item["name"]
            self._event(kind, name=named, arguments=item["arguments"], **place)
        index = len(self.output) - 1
        self._event("response.output_item.done", output_index=index, item=item)

    def _response(self, status: str | None = None) -> dict[str, Any]:
        choice, ask = self.run.choices[0], self.run.ask
        cut = choice.finish_reason == "length"
        status = status or ("incomplete" if cut else "completed")
        usage = self.run.usage()
        text = ask.echo.get("text") or {"format": {"type": "text"}}
        return {
            "id": f"resp_{self.run.id}", "object": "response", "created_at": self.created,
            "model": self.run.model, "status": status, "output": list(self.output), "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "previous_response_id": None, "store": False, "truncation": "disabled",
            "background": False, "reasoning": {"effort": None, "summary": None},
            **ask.echo, "text": text,
            "usage": None if status == "in_progress" else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                    "cache_write_tokens": 0,
                    "image_tokens": usage["prompt_tokens_details"]["image_tokens"],
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }  # fmt: skip


def responses_event(body: dict[str, Any]) -> bytes:
    """An event of a stream, with its name."""
    kind = body.get("type", "error")
    if "error" in body and "type" not in body:  # as the clients of both protocols know it
        body = {"type": kind, "sequence_number": 0, **body["error"], "error": body["error"]}
        body["type"] = kind
    data = json.dumps(body, ensure_ascii=False)
    return f"event: {kind}\ndata: {data}\n\n".encode()


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(item))
