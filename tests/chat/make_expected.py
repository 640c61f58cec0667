"""Renders the conversations with transformers and encodes them, as the tests expect them.

Needs Python with transformers 5.23, and the published templates and tokenizers in
../shared/checkpoints beside the repository:

    python tests/chat/make_expected.py
"""

from __future__ import annotations

import copy
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import transformers.utils.chat_template_utils as official
from conversations import CONVERSATIONS, digest, made_texts
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).parent
CHECKPOINTS = HERE.parents[2] / "shared" / "checkpoints"
NAMES = ("LFM2-VL-450M", "LFM2.5-VL-450M", "LFM2.5-VL-1.6B", "LFM2.5-VL-3B")
TOKENS = {"bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<|pad|>"}


class FrozenClock(datetime):
    """Templates that print the date print this one."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return datetime(2026, 3, 4, 5, 6, 7)


def render(template: str, name: str) -> str | None:
    """The rendered conversation; None where the template refuses it."""
    messages, options = copy.deepcopy(CONVERSATIONS[name])
    options = {"add_generation_prompt": True, **options}
    variables = options.pop("variables", {})
    try:
        rendered, _ = official.render_jinja_template(
            [messages], chat_template=template, **options, **variables, **TOKENS
        )
    except (TemplateError, TypeError) as error:
        print(f"refused: {name}: {type(error).__name__}: {error}")
        return None
    return rendered[0]


def main() -> None:
    official.datetime = FrozenClock
    expected: dict[str, dict[str, Any]] = {}
    for name in NAMES:
        template = (CHECKPOINTS / name / "chat_template.jinja").read_text(encoding="utf-8")
        expected[name] = {}
        path = CHECKPOINTS / name / "tokenizer.json"
        fast = PreTrainedTokenizerFast(tokenizer_file=str(path)) if path.exists() else None
        for conversation in CONVERSATIONS:
            rendered = render(template, conversation)
            entry: dict[str, Any] = {"rendered": rendered}
            if fast is not None and rendered is not None:
                entry["ids"] = digest(fast(rendered, add_special_tokens=False)["input_ids"])
            expected[name][conversation] = entry
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(CHECKPOINTS / "LFM2.5-VL-450M" / "tokenizer.json")
    )
    ids = [fast(text, add_special_tokens=False)["input_ids"] for text in made_texts()]
    expected["made texts"] = {"ids": [digest(sequence) for sequence in ids]}
    (HERE / "expected.json").write_text(
        json.dumps(expected, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
