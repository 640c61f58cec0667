"""Text to token ids and back, chat templates, and decoding as tokens arrive.

`tokenizers` does the encoding and a sandboxed jinja2 the templates, set up as `transformers` does
it (`chat_template_utils.py`). Special tokens are known by name, never by number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelNotFoundError, PromptError, one_line
from ..files import read_json, read_text, regular_file

if TYPE_CHECKING:
    from datetime import datetime

    import jinja2
    from tokenizers import Encoding, Tokenizer
from .messages import Message
from .template import (
    ASSISTANT_END,
    ASSISTANT_START,
    TextGuard,
    _cut_at_tag,
    _has_generation_marks,
    _strings,
    _tag_final_message,
    _with_reasoning,
    compile_template,
    render_template,
)

# Names of the special tokens if tokenizer_config.json does not give them
TOKEN_NAMES = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|pad|>",
    "image_token": "<image>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "image_thumbnail": "<|img_thumbnail|>",
}


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
        try:
            tokenizer = Tokenizer.from_file(str(regular_file(path)))
        except (ConfigError, ModelNotFoundError):
            raise
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing narrower
            raise ConfigError(f"{path} is not a tokenizer: {error}") from None
        settings: dict[str, Any] = {}
        if (folder / "tokenizer_config.json").exists():
            settings = read_json(folder / "tokenizer_config.json")
        template_path = folder / "chat_template.jinja"
        template = _template_of(settings.get("chat_template"), folder)
        if template_path.exists():
            template = read_text(template_path)
        tokenizer.no_truncation()  # what training has left in the file
        tokenizer.no_padding()
        names = _token_names(settings)
        there = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        for key in ("image_token", "eos_token", "bos_token"):
            if names[key] not in there:
                source = "tokenizer_config.json" if key in settings else "the family"
                raise ConfigError(
                    f"{path} has no special token {one_line(names[key])}, the {key} of {source}"
                )
        return cls(tokenizer, names, template)

    def token_id(self, token: str) -> int:
        """The id of a special token; a ConfigError if the tokenizer has none."""
        if token not in self.special_tokens:
            raise ConfigError(f"tokenizer.json has no special token {one_line(token)}")
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
        rendered = render_template(self._template, context)
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
        from datetime import datetime  # a needless import if nobody is asked anything

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
        guard = TextGuard(self.image_token, self.special_tokens, messages, tools)
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
        guard = TextGuard(self.image_token, self.special_tokens, messages, tools)
        context = self._context(guard.messages, guard.tools, False, False, variables, now)
        rendered = render_template(self._marked_template, context)
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


def _template_of(value: Any, folder: Path) -> str | None:
    """The chat template in tokenizer_config.json: a text, or one of several by name."""
    if isinstance(value, list):  # as transformers before 4.43 wrote them
        named = {
            entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)
        }
        value = named.get("default")
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{folder / 'tokenizer_config.json'}: chat_template is no text")
    return value


def _token_names(settings: Mapping[str, Any]) -> dict[str, str]:
    names = {}
    for name, default in TOKEN_NAMES.items():
        token = settings.get(name)
        if isinstance(token, Mapping):  # an AddedToken written out
            token = token.get("content")
        if token is not None and not isinstance(token, str):
            raise ConfigError(f"tokenizer_config.json: {name} is {token!r:.100}; it must be a text")
        names[name] = token if token is not None else default
    return names


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
