"""Makes what `transformers` writes for the conversations and texts of this folder.

Needs Python with transformers 5.23 and jinja2, and the published templates and tokenizers in
`../shared/checkpoints`, seen from the root of the repository:

    python tests/chat/make_chat_fixtures.py

`rendered.json`: checkpoint → conversation → `text`, its `ids` where the checkpoint's tokenizer is
at hand, and where the template marks generations their `spans` of characters; or `error`, where
`transformers` refuses. `token_ids.json`: for each of `made_strings` its ids, and its ids with names
of special tokens as plain text where they differ.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from strings import made_strings
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parents[2] / "shared" / "checkpoints"
WITH_TOKENIZER = ["LFM2-VL-450M", "LFM2.5-VL-450M", "LFM2.5-VL-1.6B"]
NAMES = [*WITH_TOKENIZER, "LFM2.5-VL-3B"]
NOW = datetime(2024, 2, 29, 12, 34, 56)


class FrozenClock(datetime):
    """Some templates print the date."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return NOW


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    # the 3B's own tokenizer is not at hand; its template only needs the name of BOS
    folder = name if name in WITH_TOKENIZER else WITH_TOKENIZER[0]
    return PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINTS / folder / "tokenizer.json"),
        chat_template=(CHECKPOINTS / name / "chat_template.jinja").read_text(encoding="utf-8"),
        bos_token="<|startoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
    )


def assistant_spans(
    tokenizer: PreTrainedTokenizerFast, text: str, conversation: dict[str, Any]
) -> list[tuple[int, int]]:
    messages = [
        {key: value for key, value in message.items() if value is not None}
        for message in conversation["messages"]
    ]
    [rendered], [spans] = chat_template_utils.render_jinja_template(
        [messages],
        tools=conversation.get("tools"),
        chat_template=tokenizer.chat_template,
        return_assistant_tokens_mask=True,
        add_generation_prompt=conversation.get("add_generation_prompt", True),
        **{**tokenizer.special_tokens_map, **conversation.get("variables", {})},
    )
    assert rendered == text
    return spans


def expected(
    name: str, tokenizer: PreTrainedTokenizerFast, conversation: dict[str, Any]
) -> dict[str, Any]:
    continued = conversation.get("continue_final_message", False)
    try:
        text = tokenizer.apply_chat_template(
            conversation["messages"],
            tools=conversation.get("tools"),
            add_generation_prompt=conversation.get("add_generation_prompt", True),
            continue_final_message=continued,
            tokenize=False,
            **conversation.get("variables", {}),
        )
    except (TemplateError, TypeError, ValueError):
        return {"error": True}
    entry = {"text": text}
    if name in WITH_TOKENIZER:
        entry["ids"] = tokenizer.encode(text, add_special_tokens=False)
    # transformers tells no spans for an open message
    if "generation -%}" in tokenizer.chat_template and not continued:
        entry["spans"] = assistant_spans(tokenizer, text, conversation)
    return entry


def compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    chat_template_utils.datetime = FrozenClock
    conversations = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    blocks = []
    for name in NAMES:
        tokenizer = load_tokenizer(name)
        lines = [
            f"{json.dumps(title)}: {compact(expected(name, tokenizer, conversation))}"
            for title, conversation in conversations.items()
        ]
        blocks.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    (HERE / "rendered.json").write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")

    tokenizer = load_tokenizer(WITH_TOKENIZER[0])
    lines = []
    for text in made_strings():
        entry = {"ids": tokenizer.encode(text, add_special_tokens=False)}
        plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        if plain != entry["ids"]:
            entry["plain"] = plain
        lines.append(compact(entry))
    (HERE / "token_ids.json").write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
