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
    """Keeps untrusted text from becoming control tokens, whatever a template joins it with.

    A mark goes behind each character with which the name of a special token begins, so that no
    name can come together. It is a character that occurs nowhere in the conversation, survives the
    template, and is taken out again before encoding. In trusted text only `<image>` is broken.
    """

    def __init__(
        self,
        image_token: str,
        special_tokens: Iterable[str],
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        try:
            everything = "".join(chain(_strings(messages), _strings(tools)))
        except RecursionError:
            raise PromptError("messages or tools are nested too deeply") from None
        candidates = chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900))
        unused = (c for c in candidates if chr(c) not in everything and _json(c) not in everything)
        mark = next(unused, None)
        if mark is None:
            raise PromptError("the conversation holds all characters that could mark its text")
        self._mark, self._escaped = chr(mark), _json(mark)
        starts = "".join(sorted({re.escape(name[0]) for name in special_tokens}))
        self._any = re.compile(f"[{starts}]")
        # a name may be spread over several texts: one then ends with its first character
        first, second = re.escape(image_token[0]), re.escape(image_token[1:2])
        self._image = re.compile(rf"{first}(?={second}|\s*\Z)")
        self.tools = None if tools is None else [self._break(tool, self._any) for tool in tools]
        self.messages = [
            self._break(m, self._image if m.get("role") in TRUSTED_ROLES else self._any)
            for m in messages
        ]

    def restore(self, text: str) -> str:
        """Takes the marks out again, also as JSON in ASCII shows them."""
        return text.replace(self._mark, "").replace(self._escaped, "")

    def _break(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: match[0] + self._mark, value)
        if isinstance(value, Mapping):
            return {
                self._break(key, pattern): self._break(item, pattern) for key, item in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self._break(item, pattern) for item in value]
        return value


def _json(code: int) -> str:
    return f"\\u{code:04x}"


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
