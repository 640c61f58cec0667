"""Conversations for the chat templates of the published checkpoints, in the transformers form."""

from __future__ import annotations

import hashlib
import random
from typing import Any

IMAGE = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather at a place — <b>today</b> & tomorrow",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CALL = {"function": {"name": "get_weather", "arguments": {"place": "O'Hare", "days": 2}}}
MANY_ARGUMENTS = {
    "function": {
        "name": "f",
        "arguments": {
            "a": 1.5,
            "b": True,
            "c": None,
            "d": [1, "x"],
            "e": {"k": "v"},
            "f": "a\\b\nc",
        },
    }
}

STRING_ARGUMENTS = {"function": {"name": "f", "arguments": '{"a": 1}'}}

# name -> (messages, options of the rendering)
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([user("Hello there!")], {}),
    "no generation prompt": ([user("Hello")], {"add_generation_prompt": False}),
    "text items": ([user([text("Hello "), text("again")])], {}),
    "one image": ([user([IMAGE, text("What is this?")])], {}),
    "image after text": ([user([text("Look: "), IMAGE])], {}),
    "two interleaved images": (
        [user([text("First"), IMAGE, text("second"), IMAGE, text("differ?")])],
        {},
    ),
    "system string": ([{"role": "system", "content": "Be brief."}, user("Hi")], {}),
    "system list": ([{"role": "system", "content": [text("Be "), text("brief.")]}, user("Hi")], {}),
    "several turns": (
        [user([IMAGE, text("What?")]), assistant("A cat."), user("What colour?")],
        {},
    ),
    "ends with the assistant": (
        [user("Hi"), assistant("Hello!")],
        {"add_generation_prompt": False},
    ),
    "assistant as list": ([user("Hi"), assistant([text("Hel"), text("lo!")]), user("More")], {}),
    "past thinking is dropped": (
        [user("2+2?"), assistant("<think>easy</think> 4"), user("3+3?")],
        {},
    ),
    "last thinking is kept": (
        [user("2+2?"), assistant("<think>easy</think>4")],
        {"add_generation_prompt": False},
    ),
    "keep past thinking": (
        [user("2+2?"), assistant("<think>easy</think>4"), user("3+3?"), assistant("6"), user("?")],
        {"variables": {"keep_past_thinking": True, "preserve_thinking": True}},
    ),
    "thinking field": (
        [
            user("2+2?"),
            assistant("4", thinking="easy"),
            user("3+3?"),
            assistant("6", thinking="hm"),
        ],
        {"add_generation_prompt": False},
    ),
    "reasoning content field": (
        [user("2+2?"), assistant("4", reasoning_content="easy")],
        {"add_generation_prompt": False},
    ),
    "tools": ([user("Weather in Zürich?")], {"tools": [WEATHER]}),
    "tools and system": (
        [{"role": "system", "content": "Help."}, user("Weather?")],
        {"tools": [WEATHER, WEATHER]},
    ),
    "tool call": (
        [user("Weather?"), assistant("Let me see.", tool_calls=[CALL])],
        {"tools": [WEATHER], "add_generation_prompt": False},
    ),
    "tool call and answer": (
        [
            user("Weather?"),
            assistant("", tool_calls=[CALL, MANY_ARGUMENTS]),
            {"role": "tool", "content": '{"degrees": 21, "sky": "<clear>"}'},
        ],
        {"tools": [WEATHER]},
    ),
    "tool call without content": (
        [user("Weather?"), {"role": "assistant", "tool_calls": [CALL]}, user("Well?")],
        {},
    ),
    "content is none": ([user("Hi"), assistant(None, tool_calls=[CALL])], {}),
    "arguments as a string": (
        [
            user("Hi"),
            assistant("", tool_calls=[{"function": {"name": "f", "arguments": '{"a": 1}'}}]),
        ],
        {},
    ),
    "unknown item": ([user([{"type": "audio", "audio": "a<b>.wav"}, text("Hear?")])], {}),
    "unicode and space": ([user("  日本語 👩‍👩‍👧 naïve e\u0301 \n\n trailing  ")], {}),
    "empty content": ([user("")], {}),
    "only an image": ([user([IMAGE])], {}),
    "markup": ([user("a < b && c > 'd' \"e\" {{ x }} {% y %}")], {}),
    "continue string": (
        [user("Count"), assistant("one, two,")],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
    "continue with trailing space": (
        [user("Count"), assistant("one, two, ")],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
    "continue list": (
        [user([IMAGE, text("Count")]), assistant([text("one, two,")])],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
    "continue a user": (
        [user("The capital of France is")],
        {"add_generation_prompt": False, "continue_final_message": True},
    ),
}


def made_texts(count: int = 300) -> list[str]:
    """Texts from many corners of Unicode, the same each time."""
    pick = random.Random(17)
    pools = [
        "abcdefghijklmnopqrstuvwxyz     .,;:'\"!?-_()[]{}<>|/\\\n\t0123456789",
        "äöüßéèñçøåœ ßæþð",
        "日本語漢字仮名交じり文 。、「」",
        "한국어 조선말 ",
        "русский текст Ελληνικά עברית العربية हिन्दी ไทย ",
        "😀🎉👩‍👩‍👧‍👦🏳️‍🌈👍🏽❤️🇩🇪",
        "e\u0301a\u0308\u200d\u200b\ufeff\u00a0\u2028 ",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢𐍈𠜎",
        "\x00\x01\x07\x1b\x7f\r\n\t ",
    ]
    texts = ["", " ", "\n\n\n", "a" * 500, "don't DON'T we'll", "1234567890" * 9]
    while len(texts) < count:
        chosen = pick.sample(pools, pick.randint(1, 3))
        texts.append("".join(pick.choice(pick.choice(chosen)) for _ in range(pick.randint(1, 60))))
    return texts


def digest(ids: list[int]) -> str:
    """Ids in short: how many, and a hash."""
    text = ",".join(map(str, ids))
    return f"{len(ids)}:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
