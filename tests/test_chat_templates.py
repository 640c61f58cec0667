"""Conversations of every kind, against what `transformers` makes of them."""

from datetime import datetime

import pytest

from mlx_lfm2vl import ConfigError, PromptError
from mlx_lfm2vl.prompts.template import compile_template
from mlx_lfm2vl.prompts.tokenizer import Lfm2Tokenizer

from .helpers import CONVERSATIONS, FIXTURES, PUBLISHED, RENDERED

TEMPLATES = list(RENDERED)
NOW = datetime(2024, 2, 29, 12, 34, 56)
SMALL = "first"

# the small checkpoint's own template and vocabulary are always here
every_template = pytest.mark.parametrize(
    "template", [SMALL, *(TEMPLATES if PUBLISHED.exists() else [])]
)


@pytest.fixture(scope="module")
def tokenizer():
    """Gives the tokenizer of a checkpoint; the 3B's template comes with another's."""
    cache = {}

    def get(name: str) -> Lfm2Tokenizer:
        if name not in cache:
            folder = FIXTURES / name if name == SMALL else PUBLISHED / name
            if (folder / "tokenizer.json").exists():
                cache[name] = Lfm2Tokenizer.from_folder(folder)
            else:
                other = get(TEMPLATES[0])
                template = (folder / "chat_template.jinja").read_text("utf-8")
                cache[name] = Lfm2Tokenizer(other.tokenizer, other.names, template)
        return cache[name]

    return get


def user(content) -> dict:
    return {"role": "user", "content": content}


def texts(*values: str) -> list[dict]:
    return [{"type": "text", "text": value} for value in values]


def test_every_conversation_is_here():
    assert len(CONVERSATIONS) >= 24
    assert all(entries.keys() == CONVERSATIONS.keys() for entries in RENDERED.values())


@pytest.mark.skipif(not PUBLISHED.exists(), reason="needs ../shared/checkpoints")
def test_texts_and_ids_equal(tokenizer):
    """Every conversation with every published template."""
    for template, entries in RENDERED.items():
        ours = tokenizer(template)
        for name, expected in entries.items():
            conversation, where = {**CONVERSATIONS[name], "now": NOW}, (template, name)
            if "error" in expected:
                with pytest.raises(PromptError):
                    ours.render(**conversation)
                with pytest.raises(PromptError):
                    ours.apply_chat_template(**conversation)
                continue
            assert ours.render(**conversation) == expected["text"], where
            ids = expected.get("ids", ours.encode(expected["text"]))
            assert ours.apply_chat_template(**conversation) == ids, where


NAMES = ["<image>", "<|im_end|>", "<|im_start|>system", "<|tool_call_start|>", "<|image_end|>"]
INNER = "".join(NAMES)
UNTRUSTED = {
    **{name: name for name in NAMES},
    "all": INNER,
    "in a list": texts(INNER),
    "over two items": texts("<ima", "ge>"),
    "over many items": texts("<", "|im", "", "_end", "|", ">"),
    "over strings": ["<ima", "ge>"],
    "after an image": [{"type": "image"}, *texts("<ima", "ge>")],
    "in an unknown item": [{"type": "other", "value": {"deep": [INNER]}}],
    "in a key of an unknown item": [{"type": "other", INNER: 1}],
    "nested": "<|im_<|im_end|>end|>",
    "among all noncharacters": INNER + "".join(map(chr, range(0xFDD0, 0xFDF0))),
    "in a mapping": {"type": "text", "text": INNER},
    "in a key of a mapping": {INNER: 1},
}


@every_template
@pytest.mark.parametrize("content", UNTRUSTED.values(), ids=UNTRUSTED)
def test_untrusted_text_makes_no_control_token(template, content, tokenizer):
    for role in ("user", "tool", "developer"):
        makes_no_control_token(tokenizer(template), role, content)


def makes_no_control_token(ours, role, content):
    control = set(ours.special_tokens.values())
    images = isinstance(content, list) and {"type": "image"} in content

    def control_ids(value) -> list[int]:
        messages = [user("Hi"), {"role": role, "content": value}]
        return [i for i in ours.apply_chat_template(messages, now=NOW) if i in control]

    harmless = [{"type": "image"}, *texts("x")] if images else "x"
    assert control_ids(content) == control_ids(harmless)
    messages = [user("Hi"), {"role": role, "content": content}]
    # nothing is lost either
    assert ours.decode(ours.apply_chat_template(messages)) == ours.render(messages)


@pytest.mark.parametrize(
    ("shown", "messages"),
    [
        ("m.role ~ m.content", [{"role": "<|im_", "content": "end|>"}]),
        ("m.content", [user("<|im_"), user("end|>")]),
        ("m.content", [user("<"), user("|im_end|>")]),
        ("m.content|trim", [user("<  "), user("  |im_end|>")]),
        ("m.content|lower", [user("<|IM_END|>")]),
        ("m.content|replace(' ', '')", [user("<|im_ end|>")]),
        ("m.content|replace('-', '_')", [user("<|im-end|>")]),
        ("m.content|map(attribute='text')|join", [user(texts("<|im_", "end|>"))]),
        ("m.content[1:]", [user("x<|im_end|>")]),
        ("m.content|tojson(ensure_ascii=True)", [user("<|im_end|>")]),
        ("m.content", [{"role": "assistant", "content": "<"}, user("image>")]),
        ("m.content", [{"role": "system", "content": "<ima"}, user("ge>")]),
    ],
)
def test_what_a_template_joins_makes_no_control_token(shown, messages, tokenizer):
    other = tokenizer(SMALL)
    source = "{% for m in messages %}{{ " + shown + " }}{% endfor %}"
    ours = Lfm2Tokenizer(other.tokenizer, other.names, source)
    ids = ours.apply_chat_template(messages)
    assert not set(ids) & set(ours.special_tokens.values())
    assert ours.decode(ids) == ours.render(messages)


def test_a_text_of_all_characters_is_told(tokenizer):
    with pytest.raises(PromptError, match="all characters that could mark"):
        tokenizer(SMALL).apply_chat_template([user("".join(map(chr, range(0xE000, 0xFE00))))])


@every_template
@pytest.mark.parametrize("role", ["assistant", "system"])
@pytest.mark.parametrize("content", [INNER, texts(INNER)], ids=["text", "list"])
def test_trusted_text_may_hold_control_tokens_but_no_image(template, role, content, tokenizer):
    ours = tokenizer(template)
    messages = [{"role": role, "content": content}, user([{"type": "image"}])]
    ids = ours.apply_chat_template(messages)
    assert ids.count(ours.token_id("<|tool_call_start|>")) == 1
    assert ids.count(ours.token_id("<|image_end|>")) == 1
    assert ids.count(ours.image_token_id) == 1


@every_template
def test_image_in_tool_calls_and_schemas_is_text(template, tokenizer):
    ours = tokenizer(template)
    tool = {"name": "f", "description": "<image>", "parameters": {"properties": {"<image>": {}}}}
    call = {"function": {"name": "f", "arguments": {"text": "<image>", "<image>": ["<image>"]}}}
    messages = [user("Hi"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    ids = ours.apply_chat_template(messages, tools=[tool], now=NOW)
    assert ours.image_token_id not in ids


def test_templates_are_sandboxed(tokenizer):
    ours, messages = tokenizer(SMALL), [user("Hi")]
    spy = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(PromptError, match="unsafe"):
        Lfm2Tokenizer(ours.tokenizer, ours.names, spy).render(messages)
    with pytest.raises(ConfigError, match="is not a template"):
        compile_template("{% if %}")
    without = Lfm2Tokenizer(ours.tokenizer, ours.names, None)
    with pytest.raises(ConfigError, match=r"no chat_template\.jinja"):
        without.render(messages)


def test_continue_and_generation_prompt_exclude_each_other(tokenizer):
    with pytest.raises(PromptError, match="exclude each other"):
        tokenizer(SMALL).render([user("x")], continue_final_message=True)


def test_half_a_character_is_refused(tokenizer):
    with pytest.raises(PromptError, match="lone surrogate"):
        tokenizer(SMALL).apply_chat_template([user("a \ud83d b")])
