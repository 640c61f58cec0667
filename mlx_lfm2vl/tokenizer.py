"""Text to token ids and back, chat templates, and decoding as tokens arrive.

`tokenizers` does the encoding and a sandboxed jinja2 the templates, set up as `transformers` does
it (`chat_template_utils.py`). Special tokens are known by name, never by number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import read_json
from .errors import ConfigError, ModelNotFoundError, PromptError

if TYPE_CHECKING:
    from datetime import datetime

    import jinja2
    from tokenizers import Encoding, Tokenizer

Message = Mapping[str, Any]

# Names of the special tokens where tokenizer_config.json does not state them
TOKEN_NAMES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}

# The model's own words and the developer's; whatever else comes in is plain text
TRUSTED_ROLES = ("assistant", "system")

# Names under which a message's reasoning is passed
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "

# Noncharacters that stand around what the assistant wrote, while masks are made
ASSISTANT_START, ASSISTANT_END = "\U0001fffe", "\U0001ffff"


class Lfm2Tokenizer:
    """A tokenizer with its chat template.

    Attributes:
        bos_token, eos_token, pad_token, image_token, …: names, as in `transformers`.
        image_token_id: id of the `<image>` token.
    """

    def __init__(
        self, tokenizer: Tokenizer, names: Mapping[str, str], chat_template: str | None
    ) -> None:
        self.tokenizer = tokenizer
        # only ever used for text between special tokens, which are found before
        self.tokenizer.encode_special_tokens = True
        self.chat_template = chat_template
        self.names = dict(names)
        self.bos_token = names["bos_token"]
        self.eos_token = names["eos_token"]
        self.image_token = names["image_token"]
        self.image_start_token = names["image_start_token"]
        self.image_end_token = names["image_end_token"]
        self.image_thumbnail_token = names["image_thumbnail"]
        self.special_tokens = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self.image_token_id = self.token_id(self.image_token)
        self.eos_token_id = self.token_id(self.eos_token)
        self.bos_token_id = self.token_id(self.bos_token)

    @classmethod
    def from_folder(cls, folder: Path) -> Lfm2Tokenizer:
        """Reads `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja`.

        Raises:
            ModelNotFoundError: no `tokenizer.json`.
            ConfigError: the tokenizer cannot be read or lacks a special token.
        """
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.exists():
            raise ModelNotFoundError(f"{path} does not exist; a model folder needs tokenizer.json")
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None
        settings: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").exists():
            settings = read_json(folder / "tokenizer_config.json")
        template_path = folder / "chat_template.jinja"
        template = settings.get("chat_template")
        if template_path.exists():
            template = template_path.read_text(encoding="utf-8")
        return cls(tokenizer, _token_names(settings), template)

    def token_id(self, token: str) -> int:
        """The id of a special token; a ConfigError where the tokenizer has none."""
        if token not in self.special_tokens:
            raise ConfigError(f"tokenizer.json has no special token {token}")
        return self.special_tokens[token]

    def tile_token_id(self, row: int, col: int) -> int:
        """The id of the mark before a tile; rows and columns count from 1."""
        return self.token_id(f"<|img_row_{row}_col_{col}|>")

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Text to ids; the names of special tokens in it become control tokens.

        Args:
            add_special_tokens: begin with BOS, which chat templates do themselves.
        """
        ids = [self.bos_token_id] if add_special_tokens else []
        for part in self._special_pattern.split(text):
            special = self.special_tokens.get(part)
            ids += self.encode_plain(part) if special is None else [special]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Text to ids; nothing in it becomes a control token."""
        return self._encode(text).ids if text else []

    def _encode(self, text: str) -> Encoding:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except TypeError:
            raise PromptError(f"{text!r} has a lone surrogate, half a character") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Ids to text."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, sequences: Iterable[Sequence[int]], skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` for each sequence."""
        return [self.decode(ids, skip_special_tokens) for ids in sequences]

    def detokenizer(self, skip_special_tokens: bool = True) -> StreamingDetokenizer:
        """A decoder for tokens that arrive one by one."""
        return StreamingDetokenizer(self, skip_special_tokens)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The conversation as the template writes it, user text as it is.

        Args:
            messages: the `transformers` form.
            tools: JSON schemas of functions.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: leave the last message open, to be continued.
            variables: more names for the template, such as `keep_past_thinking`.
            now: the time for templates that print the date; by default this moment.

        Raises:
            PromptError: the template refuses the conversation.
        """
        context = self._context(
            messages, tools, add_generation_prompt, continue_final_message, variables, now
        )
        rendered = _render(self._template, context)
        return _cut_at_tag(rendered) if continue_final_message else rendered

    def _context(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: Mapping[str, Any] | None,
        now: datetime | None,
    ) -> dict[str, Any]:
        """The names that a template sees."""
        if not messages:
            raise PromptError("the conversation is empty; it needs one message or more")
        # absent and None are the same to callers, but not to templates
        messages = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        if continue_final_message:
            if add_generation_prompt:
                raise PromptError(
                    "continue_final_message and add_generation_prompt exclude each other"
                )
            messages = _tag_final_message(messages)
        from datetime import datetime  # where nobody is asked anything, a needless import

        names = {name: token for name, token in self.names.items() if name.endswith("_token")}
        return {
            **names,
            **(variables or {}),
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            "strftime_now": (now if now is not None else datetime.now()).strftime,
        }

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> list[int]:
        """The conversation as ids, one `image_token_id` per image.

        As encoding `render`'s string, but names of special tokens inside the text of users and
        tools are plain characters, and so is `<image>` inside any text.
        """
        guard = TextGuard(self, messages, tools)
        rendered = self.render(
            guard.messages,
            guard.tools,
            add_generation_prompt,
            continue_final_message,
            variables,
            now,
        )
        ids = []
        for part in self._special_pattern.split(rendered):
            special = self.special_tokens.get(part)
            ids += self.encode_plain(guard.restore(part)) if special is None else [special]
        return ids

    def apply_chat_template_with_mask(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        now: datetime | None = None,
    ) -> tuple[list[int], list[bool]]:
        """The conversation as ids, and for each whether the assistant wrote it.

        The template's `{% generation %}` blocks decide, as `return_assistant_tokens_mask` of
        transformers; without them, all between `<|im_start|>assistant` and `<|im_end|>`, the end
        mark included.
        """
        marks = (ASSISTANT_START, ASSISTANT_END)
        if any(mark in text for text in (*_strings(messages), *_strings(tools)) for mark in marks):
            raise PromptError("a text holds U+1FFFE or U+1FFFF, which are no characters")
        guard = TextGuard(self, messages, tools)
        context = self._context(guard.messages, guard.tools, False, False, variables, now)
        rendered = _render(self._marked_template, context)
        if not _has_generation_marks(self.chat_template):
            turn = rf"(<\|im_start\|>assistant\n)(.*?{re.escape(self.eos_token)})"
            marked = rf"\1{ASSISTANT_START}\2{ASSISTANT_END}"
            rendered = re.sub(turn, marked, rendered, flags=re.DOTALL)
        ids: list[int] = []
        mask: list[bool] = []
        inside = False
        for part in self._special_pattern.split(rendered):
            special = self.special_tokens.get(part)
            if special is not None:
                ids.append(special)
                mask.append(inside)
                continue
            text, written = "", list[bool]()
            for piece in re.split(f"([{ASSISTANT_START}{ASSISTANT_END}])", guard.restore(part)):
                if piece in (ASSISTANT_START, ASSISTANT_END):
                    inside = piece == ASSISTANT_START
                else:
                    text += piece
                    written += [inside] * len(piece)
            encoding = self._encode(text)
            ids += encoding.ids
            mask += [any(written[start:stop]) for start, stop in encoding.offsets]
        return ids, mask

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @cached_property
    def _template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ConfigError("the model folder has no chat_template.jinja")
        return compile_template(self.chat_template)

    @cached_property
    def _marked_template(self) -> jinja2.Template:
        if self.chat_template is None:
            raise ConfigError("the model folder has no chat_template.jinja")
        return compile_template(self.chat_template, mark_generation=True)


def _render(template: jinja2.Template, context: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    try:
        return template.render(**context)
    except (TemplateError, TypeError) as error:
        raise PromptError(f"the chat template refuses this conversation: {error}") from None


def _has_generation_marks(template: str | None) -> bool:
    return template is not None and re.search(r"{%-?\s*generation\b", template) is not None


def _token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for name, default in TOKEN_NAMES.items():
        token = settings.get(name)
        if isinstance(token, Mapping):  # an AddedToken written out
            token = token.get("content")
        names[name] = token if token is not None else default
    return names


class TextGuard:
    """Breaks the names of special tokens inside untrusted text, so that they stay text.

    A noncharacter that occurs nowhere in the conversation goes inside each name, survives the
    template, and is taken out again before encoding.
    """

    def __init__(
        self,
        tokenizer: Lfm2Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        everything = "".join(_strings(messages)) + "".join(_strings(tools))
        candidates = chain(range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
        self.mark = next(chr(c) for c in candidates if chr(c) not in everything)
        self._image = re.compile(re.escape(tokenizer.image_token))
        self._special = tokenizer._special_pattern
        self.tools = None if tools is None else [self._break(tool, self._image) for tool in tools]
        self.messages = [self._guard_message(message) for message in messages]

    def restore(self, text: str) -> str:
        """Takes the marks out again."""
        return text.replace(self.mark, "")

    def _guard_message(self, message: Message) -> dict[str, Any]:
        trusted = message.get("role") in TRUSTED_ROLES
        pattern = self._image if trusted else self._special
        guarded = {key: self._break(value, pattern) for key, value in message.items()}
        guarded["role"] = message.get("role")
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
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationMarks(Extension):
        """`{% generation %}` … `{% endgeneration %}` shows what is inside."""

        tags = {"generation"}  # noqa: RUF012 - jinja2's protocol

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            if mark_generation:
                body = [_text_node(ASSISTANT_START), *body, _text_node(ASSISTANT_END)]
            return jinja2.nodes.Scope(body).set_lineno(line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationMarks, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ConfigError(f"chat_template.jinja is not a template: {error}") from None


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


@dataclass
class StreamingDetokenizer:
    """Text of tokens that arrive one by one; never half a character.

    Only the tokens since the last safe cut are decoded again, so that the cost per token does not
    grow with the answer.
    """

    tokenizer: Lfm2Tokenizer
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self.last_segment = ""
        self._ids: list[int] = []
        self._shown = ""

    def add_token(self, token_id: int) -> None:
        """Takes a token; `last_segment` is the text that became certain."""
        self._ids.append(token_id)
        text = self.tokenizer.decode(self._ids, self.skip_special_tokens)
        if text.endswith("\ufffd"):  # a character whose last bytes are still to come
            self.last_segment = ""
            return
        self._emit(text)
        if text.endswith("\n") or len(self._ids) > 64:
            self._ids, self._shown = [], ""

    def finalize(self) -> None:
        """Ends the stream; `last_segment` is what was held back."""
        self._emit(self.tokenizer.decode(self._ids, self.skip_special_tokens))

    def _emit(self, text: str) -> None:
        self.last_segment = text[len(self._shown) :]
        self._shown = text
