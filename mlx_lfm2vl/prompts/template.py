"""Chat templates in a sandbox, as `transformers` sets it up, and text that stays text in them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, PromptError

if TYPE_CHECKING:
    import jinja2
from .messages import Message

# The model's own words and the developer's; whatever else comes in is plain text
TRUSTED_ROLES = ("assistant", "system")

# Names under which a message's reasoning is passed
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

# Noncharacters that stand around what the assistant wrote, while masks are made
ASSISTANT_START, ASSISTANT_END = "\U0001fffe", "\U0001ffff"


def render_template(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    """What a template writes; a PromptError if it refuses, fails, or does not come to an end."""
    from .sandbox import MOST_CHARACTERS

    parts, size = [], 0
    template.environment.begin()  # type: ignore[attr-defined]
    try:
        for part in template.generate(**context):
            parts.append(part)
            size += len(part)
            if size > MOST_CHARACTERS:
                raise PromptError(f"the chat template writes more than {MOST_CHARACTERS} letters")
    except PromptError:
        raise
    except Exception as error:  # noqa: BLE001 - a template may raise anything
        reason = str(error) or type(error).__name__
        raise PromptError(f"the chat template refuses this conversation: {reason:.300}") from None
    return "".join(parts)


def _has_generation_marks(template: str | None) -> bool:
    return template is not None and re.search(r"{%-?\s*generation\b", template) is not None


class TextGuard:
    """Breaks the names of special tokens inside untrusted text, so that they stay text.

    A noncharacter that occurs nowhere in the conversation goes inside each name, survives the
    template, and is taken out again before encoding.
    """

    def __init__(
        self,
        image_token: str,
        special: re.Pattern[str],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        try:
            everything = "".join(_strings(messages)) + "".join(_strings(tools))
        except RecursionError:
            raise PromptError("messages or tools are nested too deeply") from None
        candidates = chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
        self.mark = next(chr(c) for c in candidates if chr(c) not in everything)
        self._image = re.compile(re.escape(image_token))
        self._special = special
        self.tools = None if tools is None else [self._break(tool, special) for tool in tools]
        self.messages = [self._guard_message(message) for message in messages]

    def restore(self, text: str) -> str:
        """Takes the marks out again."""
        return text.replace(self.mark, "")

    def _guard_message(self, message: Message) -> dict[str, Any]:
        trusted = message.get("role") in TRUSTED_ROLES
        pattern = self._image if trusted else self._special
        guarded = {key: self._break(value, pattern) for key, value in message.items()}
        content = guarded.get("content")
        if isinstance(content, list):
            self._break_across(content, pattern)
        return guarded

    def _break_across(self, items: list[Any], pattern: re.Pattern[str]) -> None:
        # two texts must not join into a name, either
        texts = [_text_of(item) for item in items]
        joined = "".join(texts)
        cuts = [match.start() + 1 for match in pattern.finditer(joined)]
        start = 0
        for place, text in enumerate(texts):
            inside = [cut - start for cut in cuts if start < cut <= start + len(text)]
            start += len(text)
            for cut in reversed(inside):
                text = text[:cut] + self.mark + text[cut:]
            if inside:
                items[place] = (
                    text if isinstance(items[place], str) else {**items[place], "text": text}
                )

    def _break(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0][0] + self.mark + match[0][1:], value)
        if isinstance(value, Mapping):
            return {
                self._break(key, pattern): self._break(item, pattern) for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._break(item, pattern) for item in value]
        return value


def _text_of(item: Any) -> str:
    if isinstance(item, Mapping):
        item = item.get("text")
    return item if isinstance(item, str) else ""


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


def _with_reasoning(message: Message) -> dict[str, Any]:
    # templates read a message's reasoning under different names, callers write it under others
    reasoning = next(
        (message[key] for key in REASONING_FIELDS if message.get(key) is not None), None
    )
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _tag_final_message(messages: Sequence[Message]) -> list[Message]:
    last = dict(messages[-1]) if messages else {}
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + CONTINUE_TAG
        return [*messages[:-1], last]
    items = [dict(item) for item in content] if isinstance(content, (list, tuple)) else []
    for item in reversed(items):
        if "text" in item:
            item["text"] += CONTINUE_TAG
            return [*messages[:-1], {**last, "content": items}]
    raise PromptError("continue_final_message needs a last message with text")


def _cut_at_tag(rendered: str) -> str:
    place = rendered.rfind(CONTINUE_TAG.strip())
    if place < 0:
        raise PromptError("the chat template drops the last message, so it cannot be continued")
    kept_space = rendered[place:].startswith(CONTINUE_TAG)
    return rendered[:place] if kept_space else rendered[:place].rstrip()


def compile_template(source: str, mark_generation: bool = False) -> jinja2.Template:
    """Compiles a chat template in a sandbox, with the names `transformers` offers.

    `mark_generation` puts `ASSISTANT_START` and `ASSISTANT_END` around generation blocks.
    """
    import jinja2
    from jinja2.ext import Extension

    from .sandbox import MOST_SOURCE, BoundedEnvironment

    if len(source) > MOST_SOURCE:
        raise ConfigError(
            f"chat_template.jinja has {len(source)} characters; at most {MOST_SOURCE} are compiled"
        )

    class GenerationMarks(Extension):
        """`{% generation %}` … `{% endgeneration %}` shows what is inside."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's protocol

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if mark_generation:
                body = [_text_node(ASSISTANT_START), *body, _text_node(ASSISTANT_END)]
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = BoundedEnvironment([GenerationMarks])
    environment.filters["tojson"] = environment.bounded(_to_json)
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except Exception as error:  # noqa: BLE001 - jinja2 lets Python's own errors through, too
        reason = str(error) or type(error).__name__
        raise ConfigError(f"chat_template.jinja is not a template: {reason:.300}") from None


def _text_node(text: str) -> jinja2.nodes.Output:
    from jinja2 import nodes

    return nodes.Output([nodes.TemplateData(text)])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML characters, which models have not seen
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
