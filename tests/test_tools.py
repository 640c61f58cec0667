"""Tool calls: read, refused, written into every template, streamed, and constrained."""

import dataclasses
import json
import math
import random
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import mlx.core as mx
import pytest
from jsonschema import Draft202012Validator
from PIL import Image

from mlx_lfm2vl import AnswerError, PromptError, Question, batch_generate, load, stream_generate
from mlx_lfm2vl.cli.batch import main as batch_main
from mlx_lfm2vl.generation.answer import Answer
from mlx_lfm2vl.generation.tools import ToolCallStream
from mlx_lfm2vl.prompts.constraint import compiled
from mlx_lfm2vl.prompts.processor import Lfm2VlProcessor
from mlx_lfm2vl.prompts.tokenizer import Lfm2Tokenizer
from mlx_lfm2vl.prompts.tool_calls import (
    CALL_END,
    CALL_START,
    ToolCall,
    parse_calls,
    render_calls,
)
from mlx_lfm2vl.prompts.tool_grammar import function_schema, read_tools, tool_grammar

from .checkpoints.pictures import picture
from .helpers import FIXTURES, PUBLISHED


def marked(text: str) -> str:
    return f"{CALL_START}{text}{CALL_END}"


# what models have written, and the arguments of the one call f in it
READ = {
    "text": ('[f(a="v", n=1)]', {"a": "v", "n": 1}),
    "single quotes": ("[f(a='it\\'s')]", {"a": "it's"}),
    "nothing": ("[f()]", {}),
    "brackets in a string": ('[f(a="x]y)z, b=1")]', {"a": "x]y)z, b=1"}),
    "line breaks in a string": ('[f(a="one\ntwo\r\tthree")]', {"a": "one\ntwo\r\tthree"}),
    "null in a string": ('[f(a="a\0b")]', {"a": "a\0b"}),
    "escapes": (r'[f(a="\u00e9\n\x41\\")]', {"a": "é\nA\\"}),
    "unknown escapes": (r'[f(a="\d+ C:\Users\x")]', {"a": r"\d+ C:\Users\x"}),
    "raw string": (r'[f(a=r"\n")]', {"a": r"\n"}),
    "halves of a character": (r'[f(a="\ud83d\ude00")]', {"a": "😀"}),
    "three quotes": ('[f(a="""a"b""")]', {"a": 'a"b'}),
    "joined strings": ("[f(a='x' \"y\")]", {"a": "xy"}),
    "signs": ("[f(a=-1, b=+7, c=-0.5)]", {"a": -1, "b": 7, "c": -0.5}),
    "leading zeros": ("[f(a=007, b=00.5, c=1.007)]", {"a": 7, "b": 0.5, "c": 1.007}),
    "exponents": ("[f(a=1e-07, b=1E3)]", {"a": 1e-7, "b": 1000.0}),
    "large number": ("[f(a=12345678901234567890)]", {"a": 12345678901234567890}),
    "tuple": ("[f(a=(1, 2), b=())]", {"a": [1, 2], "b": []}),
    "set": ("[f(a={1, 2})]", {"a": [1, 2]}),
    "words": ("[f(a=True, b=None, c=true, d=false, e=null)]",
              {"a": True, "b": None, "c": True, "d": False, "e": None}),
    "nested": ('[f(a={"k": [1, {"x": null}]})]', {"a": {"k": [1, {"x": None}]}}),
    "keywords as names": ('[f(from="a", class=1, None=2)]', {"from": "a", "class": 1, "None": 2}),
    "dashes in names": ("[f(max-results=5)]", {"max-results": 5}),
    "letters of any language": ('[f(größe="ü")]', {"größe": "ü"}),
    "spaces": ("[ f ( a = 1 , ) , ]", {"a": 1}),
    "over lines": ("[\n  f(\n    a=1,\n  )\n]", {"a": 1}),
    "no list": ("f(a=1)", {"a": 1}),
    "JSON": ('[{"name": "f", "arguments": {"a": [1]}}]', {"a": [1]}),
    "JSON, one": ('{"name": "f", "arguments": {}}', {}),
    "JSON, wrapped": ('[{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]',
                      {"a": 1}),
    "JSON, line break": ('[{"name": "f", "arguments": {"a": "x\ny"}}]', {"a": "x\ny"}),
}  # fmt: skip
REFUSED = {
    "code": '[f(a=__import__("os").system("ls"))]',
    "call in a call": "[f(a=g(b=1))]",
    "method": '[f(a="x".upper())]',
    "arithmetic": "[f(a=10**9)]",
    "lambda": "[f(a=lambda: 1)]",
    "comprehension": "[f(a=[x for x in (1,)])]",
    "f-string": "[f(a=f'{1}')]",
    "bytes": "[f(a=b'x')]",
    "name": "[f(a=b)]",
    "ellipsis": "[f(a=...)]",
    "complex": "[f(a=1j)]",
    "positional": "[f(1)]",
    "dictionary of arguments": '[f(**{"a": 1})]',
    "list of arguments": "[f(*[1])]",
    "spread": "[f(a=[*[1]])]",
    "spread dictionary": "[f(a={**{}})]",
    "twice": "[f(a=1, a=2)]",
    "key twice": '[f(a={"k": 1, "k": 2})]',
    "key that is no text": "[f(a={1: 2})]",
    "endless": "[f(a=1e999)]",
    "endless in JSON": '[{"name": "f", "arguments": {"a": 1e999}}]',
    "NaN in JSON": '[{"name": "f", "arguments": {"a": NaN}}]',
    "twice in JSON": '[{"name": "f", "arguments": {"a": 1, "a": 2}}]',
    "arguments as text in JSON": '[{"name": "f", "arguments": "{}"}]',
    "no name in JSON": '[{"arguments": {}}]',
    "a word": '"f"',
    "half a character": r'[f(a="\ud83d")]',
    "trailing backslash": r'[f(a="C:\")]',
    "cut": '[f(a="x',
    "comment": "[f(a=1) # and]",
    "called twice": "[f(a=1)(b=2)]",
    "statement": "import os",
    "print": "[f(a=1), print(1)]",
    "500 brackets": "[f(a=" + "[" * 500 + "]" * 500 + ")]",
    "500 brackets of JSON": "[" * 500 + "]" * 500,
    "many signs": "[f(a=" + "-" * 100_000 + "1)]",
    "many digits": "[f(a=" + "9" * 5000 + ")]",
    "prose": "I shall look [1].",
    "empty": "",
}


@pytest.mark.parametrize(("text", "arguments"), READ.values(), ids=READ)
def test_calls_are_read(text, arguments):
    assert len(READ) + len(REFUSED) >= 40
    for written in (text, marked(text), f"Let me see. {marked(text)} Wait."):
        [call] = parse_calls(written)
        assert call == ToolCall("f", arguments)
        assert [type(value) for value in call.arguments.values()] == [
            type(value) for value in arguments.values()
        ]
        assert call.id == "call_0"


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_all_else_is_refused(text):
    for written in (text, marked(text)):
        with pytest.raises(AnswerError) as caught:
            parse_calls(written)
        assert "\n" not in str(caught.value)
        assert "_0" not in str(caught.value), "names of our own"


def test_several_calls_and_text_around_them():
    two = '[a.b(x=1), get-weather(y="z")]'
    assert [c.name for c in parse_calls(marked(two))] == ["a.b", "get-weather"]
    parts = parse_calls(f"Hm {marked('[f(a=1)]')} [f(a=2)] and {marked('[f(a=3)]')}")
    assert [(c.arguments["a"], c.id) for c in parts] == [(1, "call_0"), (3, "call_1")]
    # the echo of a call after its end is text
    assert len(parse_calls(marked("[f(a=1)]") + "[f(a=1)]")) == 1


def test_text_without_marks_is_a_call_only_of_a_known_tool():
    assert parse_calls("[f(a=1)]", known=["f"]) == [ToolCall("f", {"a": 1})]
    for text in ("[g(a=1)]", "see [1]", "The list [f(a=1)] means …", "[1, 2]"):
        assert parse_calls(text, known=["f"]) == []
    with pytest.raises(AnswerError, match="g is no tool; there are: f"):
        parse_calls(marked("[g(a=1)]"), known=["f"])


HARD = [
    ToolCall("f", {}),
    ToolCall("f", {"a": 'Pa"ris', "b": "it's", "c": "a\nb\r\tc\0\x7f", "d": "C:\\n\\", "e": ""}),
    ToolCall("g.h-i", {"a": [1, 'it\'s "so"', [True, None]], "b": {"k": "<&'\"", "é": []}}),
    ToolCall("f", {"a": None, "b": True, "c": -0.5, "d": 1e-07, "e": 10**20, "日本": "🎉"}),
    ToolCall("f", {"not a name": 1, "x": {"y": None}}),
    ToolCall("two words", {"a": "b"}),
    ToolCall("f", {"a": f"{CALL_END}<|im_end|>{CALL_START}<image>", "b": ["\\<|im_end|>"]}),
    ToolCall("f", {"a": "]) [f(b=1)]", "b": "{'x': 1}", "c": "</think>x"}),
]
OPENAI = [call.to_dict() for call in HARD]


@pytest.mark.parametrize("call", HARD)
def test_written_calls_are_read_again(call):
    assert parse_calls(render_calls([call])) == [call]
    assert parse_calls(render_calls([call, call])) == [call, call]


OWN = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{{ m.content | map(attribute="text") | join }}
{%- endif %}<|im_end|>
{% endfor %}"""
REPR = OWN.replace(
    "{% if m.content is string %}",
    "{% if m.tool_calls is defined %}"
    + CALL_START
    + "{{ m.tool_calls }}"
    + CALL_END
    + "{% endif %}"
    "{% if m.content is string %}",
)
TEMPLATES = ["LFM2-VL-450M", "LFM2.5-VL-450M", "LFM2.5-VL-1.6B", "LFM2.5-VL-3B"]
WRITTEN = ["drops calls", "spoils calls", "small"]  # these are always here


@pytest.fixture(params=[*(TEMPLATES if PUBLISHED.exists() else []), *WRITTEN])
def processor(request, loaded) -> Lfm2VlProcessor:
    """A processor with each template, and a small tokenizer with all marks."""
    ours = loaded("v5")[1]
    own = {"drops calls": OWN, "spoils calls": REPR, "small": ours.tokenizer.chat_template}
    template = own.get(request.param)
    if template is None:
        template = (PUBLISHED / request.param / "chat_template.jinja").read_text("utf-8")
    names = ours.tokenizer.names
    tokenizer = Lfm2Tokenizer(ours.tokenizer.tokenizer, names, template)
    return Lfm2VlProcessor(ours.image_processor, tokenizer, ours.generation_config)


def turns(*assistant):
    tool = {"role": "tool", "tool_call_id": "call_0", "content": {"sky": "clear", "n": [1, None]}}
    return [
        {"role": "user", "content": "Weather?"},
        *({"role": "assistant", **turn} for turn in assistant),
        tool,
    ]


NOW = datetime(2024, 2, 29)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": "Let me see."},
                                     {"content": [{"type": "text", "text": "Let me see."}]}],
                         ids=["absent", "null", "text", "list"])  # fmt: skip
@pytest.mark.parametrize("call", HARD)
def test_calls_survive_every_template(processor, call, content):
    tokenizer = processor.tokenizer
    messages = turns({**content, "tool_calls": [call.to_dict()]})
    ids = processor(messages, now=NOW).token_ids
    text = tokenizer.decode(ids)
    assert parse_calls(text) == [call]
    # one call, whole turns, and no control token out of an argument
    for name, count in ((CALL_START, 1), (CALL_END, 1), ("<|im_end|>", 3), ("<image>", 0)):
        assert ids.count(tokenizer.token_id(name)) == count, name
    assert text.count("Let me see.") == bool(content.get("content"))
    assert '{"sky": "clear", "n": [1, null]}' in text


def test_several_calls_survive_every_template(processor):
    simple = [call for call in HARD if call.name == "f"][:2]
    ids = processor(turns({"tool_calls": [call.to_dict() for call in simple]}), now=NOW).token_ids
    assert parse_calls(processor.tokenizer.decode(ids)) == simple


def test_simple_calls_look_as_the_template_writes_them():
    path = PUBLISHED / "LFM2.5-VL-3B" / "chat_template.jinja"
    if not path.exists():
        pytest.skip("needs ../shared/checkpoints")
    from mlx_lfm2vl.prompts.template import compile_template
    from mlx_lfm2vl.prompts.tool_calls import call_style, carry_calls

    for name in ("LFM2.5-VL-450M", "LFM2.5-VL-3B"):
        path = PUBLISHED / name / "chat_template.jinja"
        template = compile_template(path.read_text("utf-8"))

        def render(messages, add_generation_prompt=True, template=template):
            return template.render(messages=messages, bos_token="<s>")

        arguments = {"city": "Orléans", "n": 3, "x": -0.5, "yes": True, "l": [1, "a", [None]]}
        function = {"name": "get_weather", "arguments": arguments | {"d": {"k": "v"}}}
        message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        messages = [{"role": "user", "content": "?"}, message]
        carried = carry_calls(messages, lambda render=render: call_style(render))
        assert render(carried) == render(messages)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"function": {"name": "f", "arguments": "{"}}, "f has arguments '{'; give a JSON object"),
        ({"function": {"name": "f", "arguments": "[1]"}}, "give a JSON object"),
        ({"function": {"name": "f", "arguments": {"a": float("nan")}}}, "give a JSON object"),
        ({"function": {"arguments": {}}}, "has no name"),
        ("f()", "has no name"),
    ],
)
def test_wrong_calls_in_a_conversation_are_told(loaded, call, message):
    with pytest.raises(PromptError, match=message.replace("{", r"\{").replace("[", r"\[")):
        loaded("v5")[1](turns({"tool_calls": [call]}))


def test_messages_without_calls_stay_as_they_are(loaded):
    processor = loaded("v5")[1]
    plain = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    with_none = [plain[0], {**plain[1], "tool_calls": None}]
    with_empty = [plain[0], {**plain[1], "tool_calls": []}]
    assert (
        processor(plain).token_ids
        == processor(with_none).token_ids
        == processor(with_empty).token_ids
    )


# ---- streaming


def pieces_of(text, rng):
    while text:
        cut = rng.randint(1, 5)
        yield text[:cut]
        text = text[cut:]


@pytest.mark.parametrize(
    "text", [*(t for t, _ in READ.values()), *(render_calls([c, c])[len(CALL_START):-len(CALL_END)]
                                              for c in HARD)]
)  # fmt: skip
def test_streamed_deltas_make_the_calls(text):
    rng = random.Random(text)
    for _ in range(5):
        stream = ToolCallStream()
        deltas = [delta for piece in pieces_of(text, rng) for delta in stream.add(piece)]
        calls = parse_calls(text)
        assert sorted({delta.index for delta in deltas}) == list(range(len(calls)))
        for index, call in enumerate(calls):
            own = [delta for delta in deltas if delta.index == index]
            assert [own[0].name, *{delta.name for delta in own[1:]}] in (
                [call.name, None], [call.name]
            )  # fmt: skip
            assert json.loads("".join(delta.arguments for delta in own)) == call.arguments


def test_deltas_come_as_early_as_they_are_certain():
    stream = ToolCallStream()
    names = [(d.name, d.arguments) for d in stream.add("[get_weather(")]
    assert names == [("get_weather", "")]
    assert stream.add('city="Pa') == []
    assert [d.arguments for d in stream.add('ris", ')] == ['{"city": "Paris"']
    assert [d.arguments for d in stream.add("n=007)")] == [', "n": 7', "}"]


@pytest.mark.parametrize("text", REFUSED.values(), ids=REFUSED)
def test_a_stream_of_no_calls_ends_quietly(text):
    ToolCallStream().add(text)


class Tokens:
    """Feeds an answer text and marks, as a model would."""

    def __init__(self, processor, **settings):
        self.tokenizer = processor.tokenizer
        self.answer = Answer(processor, Question("?", **settings))

    def run(self, *parts):
        ids = []
        for part in parts:
            special = self.tokenizer.special_tokens.get(part)
            ids += self.tokenizer.encode_plain(part) if special is None else [special]
        pieces = []
        for token in ids:
            pieces.append(self.answer.add(token))
            if pieces[-1].finish_reason is not None:
                break
        self.text = "".join(piece.text for piece in pieces)
        self.content = "".join(piece.content for piece in pieces)
        self.calls = [call for piece in pieces for call in piece.tool_calls]
        deltas = [delta for piece in pieces for delta in piece.tool_call_deltas]
        self.arguments = "".join(delta.arguments for delta in deltas)
        self.indices = {delta.index for delta in deltas}
        self.reason = pieces[-1].finish_reason
        return self


@pytest.fixture
def small(loaded):
    return loaded("v5")[1]


CALL = '[f(a="é ü", n=1)]'


def test_an_answer_knows_its_calls(small):
    told = Tokens(small).run("Wait. ", CALL_START, CALL, CALL_END, " So.", "<|im_end|>")
    assert told.text == f"Wait. {CALL_START}{CALL}{CALL_END} So."
    assert (told.content, told.reason) == ("Wait.  So.", "stop")
    assert told.calls == [ToolCall("f", {"a": "é ü", "n": 1})]
    assert json.loads(told.arguments) == told.calls[0].arguments
    twice = Tokens(small).run(*[CALL_START, CALL, CALL_END] * 2, "<|im_end|>")
    assert [call.id for call in twice.calls] == ["call_0", "call_1"]
    assert twice.indices == {0, 1}
    # its text is a turn of the conversation, with the same tokens
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": told.text}]
    assert small(history).token_ids.count(small.tokenizer.token_id(CALL_START)) == 1


def test_a_text_that_spells_the_marks_is_no_call(small):
    told = Tokens(small).run(f"{CALL_START}{CALL}{CALL_END}", "<|im_end|>")
    assert (told.calls, told.content) == ([], marked(CALL))


@pytest.mark.parametrize("text", ["[f(a=g())]", "[f(a=1", "", "[f(**{})]"])
def test_what_is_no_call_stays_text(small, text):
    told = Tokens(small).run("Hm ", CALL_START, text, CALL_END, "!", "<|im_end|>")
    assert (told.calls, told.content) == ([], f"Hm {marked(text)}!")
    assert told.text == told.content


def test_an_answer_that_ends_in_a_call(small):
    told = Tokens(small).run("Hm ", CALL_START, CALL, "<|im_end|>")
    assert (told.content, told.reason, len(told.calls)) == ("Hm ", "stop", 1)
    cut = Tokens(small).run("Hm ", CALL_START, CALL[:9], "<|im_end|>")
    assert (cut.content, cut.calls) == (f"Hm {CALL_START}{CALL[:9]}", [])
    whole = ["Hm ", CALL_START, CALL, CALL_END, " So."]
    for limit in range(1, 60):
        told = Tokens(small, max_tokens=limit).run(*whole, "<|im_end|>")
        assert told.reason in ("length", "stop")
        assert marked(CALL).join(["Hm ", " So."]).startswith(told.text.rstrip("\ufffd"))
        assert told.content.startswith("Hm "[: len(told.text)])
        if CALL not in told.text:
            assert (told.content, told.calls) == (told.text, [])
        else:
            assert CALL not in told.content
            assert len(told.calls) == 1


def test_stop_texts_do_not_cut_calls(small):
    told = Tokens(small, stop=["a=", "So"]).run("Hm ", CALL_START, CALL, CALL_END, " So.")
    assert (told.content, told.reason, len(told.calls)) == ("Hm  ", "stop", 1)
    before = Tokens(small, stop="Hm").run("Hm ", CALL_START, CALL, CALL_END)
    assert (before.text, before.reason) == ("", "stop")


class Writer:
    """A logits processor that makes a model write certain tokens."""

    def __init__(self, ids):
        self.ids = list(ids)

    def __call__(self, history, logits):
        return mx.where(mx.arange(logits.shape[-1])[None] == self.ids.pop(0), 1.0, -1e9)


def test_calls_come_out_of_every_entrance(loaded):
    model, processor = loaded("v5")
    ids = processor.tokenizer.encode(f"So {marked(CALL)}<|im_end|>")
    want = [ToolCall("f", {"a": "é ü", "n": 1})]
    responses = list(
        stream_generate(model, processor, "?", logits_processors=[Writer([*ids, 0, 0])])
    )
    assert [call for response in responses for call in response.tool_calls] == want
    assert "".join(response.content for response in responses) == "So "
    question = Question("?", logits_processors=[Writer([*ids, 0, 0])])
    [result] = batch_generate(model, processor, [question])
    assert list(result.tool_calls) == want
    assert parse_calls(result.text) == want


# ---- grammars

TREE = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#/$defs/t"}}},
        "additionalProperties": False}  # fmt: skip
WEATHER = {
    "name": "get.weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 5},
            "unit": {"enum": ["c", "f", None]},
            "now": {"type": "boolean"},
            "x": {"type": ["number", "null"]},
            "tree": {"$ref": "#/$defs/t"},
            "y": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "number"}}]},
        },
        "required": ["city", "now"],
        "$defs": {"t": TREE},
    },
}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "stop"}}]
ACCEPTED = (
    '[get.weather(city="Pa\\"ris", now=True)]',
    '[get.weather(city="é\\n", days=3, unit="c", now=False, x=None)]',
    '[get.weather(city="", unit=None, now=False, x=-0.25, tree={"kids": [{"kids": []}]}, y=True)]',
    '[get.weather(city="", now=False, y=[1, 2.5])]',
    "[stop()]",
    "[stop(), stop()]",
)
DENIED = (
    "[get.weather(now=True)]",
    '[get.weather(city="P")]',
    '[get.weather(city="P", days=9, now=True)]',
    '[get.weather(city="P", now=true)]',
    '[get.weather(city="P", now=True, z=1)]',
    '[get.weather(city="P",  now=True)]',
    '[get.weather("P", now=True)]',
    '[get.weather(city="P", now=True, x=' + "1" * 40 + ")]",
    "[other()]",
    "[stop()",
    "[]",
)


@pytest.fixture(scope="module")
def accepts():
    """Says whether a grammar lets an answer through to its end."""
    llguidance = pytest.importorskip("llguidance")
    file = FIXTURES / "v5" / "tokenizer.json"
    guide = llguidance.LLTokenizer(file.read_text("utf-8"))
    tokenizer = Lfm2Tokenizer.from_folder(FIXTURES / "v5")

    def check(grammar, text):
        matcher = llguidance.LLMatcher(guide, grammar)
        assert not matcher.get_error()
        ids = tokenizer.encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    return check


def test_the_grammar_lets_right_calls_through(accepts):
    grammar = tool_grammar(TOOLS)
    assert grammar == tool_grammar(json.loads(json.dumps(TOOLS)))
    for text in ACCEPTED:
        assert accepts(grammar, marked(text)), text
        assert len(parse_calls(marked(text), known=["get.weather", "stop"])) >= 1
        assert accepts(grammar, f"Let me [see].\n{marked(text)} Wait.")
    for text in DENIED:
        assert not accepts(grammar, marked(text)), text
    for text in ("", "It is 21 °C [1].\n\nf(x=1)"):
        assert accepts(grammar, text)


def test_choices(accepts):
    call, other = marked("[stop()]"), marked(ACCEPTED[0])
    openai = {"type": "function", "function": {"name": "stop"}}
    for choice, right in {
        "none": (True, False, False),
        "auto": (True, True, True),
        "required": (False, True, True),
        "stop": (False, True, False),
    }.items():
        grammar = tool_grammar(TOOLS, choice)
        assert tuple(accepts(grammar, text) for text in ("Hi", call, other)) == right, choice
    assert tool_grammar(TOOLS, openai) == tool_grammar(TOOLS, "stop")
    assert not accepts(tool_grammar(TOOLS, parallel=False), marked("[stop(), stop()]"))
    assert accepts(tool_grammar([]), "Hi")
    assert Question("?", tools=TOOLS, tool_choice="none").tools is None
    for choice in ("any", 5):
        with pytest.raises(PromptError, match="must be one of none, auto, required, get"):
            tool_grammar(TOOLS, choice)


def test_calls_as_json(accepts):
    tools = [*TOOLS, {"name": 'a "b"'}]
    grammar = tool_grammar(tools)  # a name is not possible in Python
    assert grammar == tool_grammar(tools, as_json=True)
    both = tool_grammar(TOOLS)
    assert accepts(
        both, marked('[{"name": "stop", "arguments": {}}, {"name": "stop", "arguments": {}}]')
    )
    assert not accepts(both, marked('[stop(), {"name": "stop", "arguments": {}}]'))
    right = {"city": "P", "now": True, "tree": {"kids": []}}
    for call in (
        ToolCall("get.weather", right), ToolCall("stop", {}), ToolCall('a "b"', {}),
    ):  # fmt: skip
        text = marked(json.dumps([{"name": call.name, "arguments": call.arguments}]))
        assert accepts(grammar, text)
        assert parse_calls(text) == [call]
    for name, arguments in (("stop", {"a": 1}), ("get.weather", {"city": "P"}), ("other", {})):
        text = marked(json.dumps([{"name": name, "arguments": arguments}]))
        assert not accepts(grammar, text)


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({}, "has no name"),
        ("f", "has no name"),
        ({"name": "f", "parameters": "x"}, "f has parameters 'x'"),
        ({"name": "f", "parameters": {"properties": {"a b": {}}}}, "'a b' is no name"),
    ],
)
def test_wrong_tools_are_told(tool, message):
    with pytest.raises(PromptError, match=message):
        tool_grammar([tool], as_json=False)


def test_tools_of_a_file(tmp_path):
    file = tmp_path / "t.json"
    for text in ('[{"name": "f"}]', '{"name": "f"}'):
        file.write_text(text)
        assert read_tools(str(file)) == [{"name": "f"}]
    for text in ("[", "[1]", '["f"]'):
        file.write_text(text)
        with pytest.raises(PromptError, match=f"^{file}"):
            read_tools(str(file))


WILD = {"temperature": 3.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}


@pytest.fixture(scope="module")
def demo():
    return load("demo", dtype="float32")


def judge(call: ToolCall) -> None:
    """A call's arguments against its tool's schema."""
    tool = {**TOOLS[0], "parameters": {**WEATHER["parameters"], "additionalProperties": False}}
    schema = tool["parameters"] if call.name == tool["name"] else {"maxProperties": 0}
    assert call.name in ("get.weather", "stop")
    Draft202012Validator(schema).validate(call.arguments)


@pytest.mark.parametrize("choice", ["required", "get.weather", "auto"])
def test_calls_keep_to_their_schemas(demo, choice):
    """At a temperature at which a model does not know what it says, and in a batch."""
    start = demo[1].tokenizer.token_id(CALL_START)
    questions = [
        Question("Weather?", tools=TOOLS, tool_choice=choice, seed=seed, max_tokens=250, close=True,
                 logits_processors=[Wish(start)] if choice == "auto" else [], **WILD)
        for seed in range(4)
    ]  # fmt: skip
    for result in batch_generate(*demo, questions, batch_size=4):
        assert result.tool_calls, result.text
        assert parse_calls(result.text) == list(result.tool_calls)
        for call in result.tool_calls:
            judge(call)
            assert choice != "get.weather" or call.name == choice


class Wish:
    """A logits processor that makes one token certain, the first time that it is allowed."""

    def __init__(self, token):
        self.token, self.granted = token, False

    def __call__(self, history, logits):
        if self.granted or not math.isfinite(logits[0, self.token].item()):
            return logits
        self.granted = True
        return mx.where(mx.arange(logits.shape[-1]) == self.token, 1e4, logits)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": {"x": {"type": "object", "required": 5}}},
        {"properties": {"x": {"enum": 5}}},
        {"properties": {"x": {"anyOf": {}}}},
        {"properties": {"x": {}}, "required": 5},
        {"properties": {"x": {"$ref": "#/$defs/none"}}},
        {"properties": {"x": {"type": "string", "pattern": "("}}},
        {"properties": {"x": {"type": "integer", "minimum": 2, "maximum": 1}}, "required": ["x"]},
    ],
)
def test_schemas_that_make_no_sense_are_told(parameters):
    with pytest.raises(PromptError, match=r"^tool f cannot be used: .") as told:
        Question("?", tools=[{"name": "f", "parameters": parameters}])
    assert "\n" not in str(told.value)


def test_arguments_that_no_name_tells_come_as_json(accepts):
    shared = {"$defs": {"a": {"type": "object", "properties": {"x": {"type": "integer"}}}}}
    for parameters in (
        {"$ref": "#/$defs/a", **shared},
        {"type": "object", "additionalProperties": {"type": "integer"}},
        {"anyOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}], **shared},
    ):
        grammar = Question("?", tools=[{"name": "f", "parameters": parameters}]).constraint.value
        assert accepts(grammar, marked('[{"name": "f", "arguments": {"x": 1}}]')), parameters
        assert not accepts(grammar, marked('[{"name": "f", "arguments": {"x": "a"}}]')), parameters
    none = tool_grammar([{"name": "f", "parameters": {"type": "object"}}])
    assert accepts(none, marked("[f()]"))
    assert not accepts(none, marked('[{"name": "f", "arguments": {"x": 1}}]'))


def test_without_llguidance_calls_are_free_but_read(demo, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    compiled.cache_clear()
    assert Question("?", tools=TOOLS).constraint is None
    assert Question("?", tools=TOOLS, tool_choice="auto").constraint is None
    for choice in ("required", "stop"):
        with pytest.raises(PromptError, match=f"tool_choice '{choice}' cannot be used without"):
            Question("?", tools=TOOLS, tool_choice=choice)


def test_python_functions_are_tools(demo):
    def add(a: int, b: float = 0.5):
        """The sum."""

    questions = [
        Question("?", tools=[tool], tool_choice="required", max_tokens=60, close=True, seed=1)
        for tool in (add, function_schema(add))
    ]
    one, other = batch_generate(*demo, questions)
    assert one == dataclasses.replace(other, index=0)
    assert [call.name for call in one.tool_calls][:1] == ["add"]


# ---- schemas of functions


def test_schema_of_a_function_equals_that_of_transformers():
    utils = pytest.importorskip("transformers.utils")

    def plain(city: str, days: int = 1, parts: list[str] = (), ratio: float = 0.5):
        """The weather
        of a city.

        Args:
            city: its name: as
                it is written
            days: how many
            parts: of a day
            ratio: a share

        Returns:
            a text
        """

    assert function_schema(plain)["function"] == {
        key: value for key, value in utils.get_json_schema(plain)["function"].items()
        if key != "return"
    }  # fmt: skip


def test_schema_of_a_function():
    def many(
        a: Literal["x", 1],
        b: str | None,
        c: dict[str, list[int]],
        d: Any,
        e: Mapping[str, Any],
        *,
        f: list = (),
    ):
        """Does.

        :param a: the first
        :param b: the
            second
        :returns: nothing
        """

    schema = function_schema(many)["function"]
    assert schema["description"] == "Does."
    assert schema["parameters"] == {
        "type": "object",
        "properties": {
            "a": {"enum": ["x", 1], "description": "the first"},
            "b": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "the second"},
            "c": {
                "type": "object",
                "additionalProperties": {"type": "array", "items": {"type": "integer"}},
            },
            "d": {},
            "e": {"type": "object", "additionalProperties": {}},
            "f": {"type": "array"},
        },
        "required": ["a", "b", "c", "d", "e"],
    }

    def positional(a, /):
        """No."""

    def star(*a):
        """No."""

    def odd(a: bytes):
        """No."""

    for function, message in ((positional, "need names"), (star, "need names"), (odd, "bytes")):
        with pytest.raises(PromptError, match=message):
            function_schema(function)


# ---- the command line


def test_tools_at_the_command_line(tmp_path, capsys):
    from mlx_lfm2vl.cli.generate import main

    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    command = ["--model", "demo", "--prompt", "Hi", "--max-tokens", "2", "--json"]
    lengths = {}
    for choice in ("auto", "none"):
        with pytest.raises(SystemExit) as ended:
            main([*command, "--tools", str(file), "--tool-choice", choice])
        assert ended.value.code == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["tool_calls"] == []
        lengths[choice] = answer["prompt_tokens"]
    assert lengths["auto"] > lengths["none"], "none shows no tools"
    with pytest.raises(SystemExit):
        main([*command, "--tools", str(file), "--tool-choice", "stop", "--max-tokens", "600"])
    [call, *_] = json.loads(capsys.readouterr().out)["tool_calls"]
    assert call["function"] == {"name": "stop", "arguments": "{}"}
    for wrong in (
        ["--tools", str(tmp_path / "none.json")],
        ["--tools", str(file), "--tool-choice", "any"],
        ["--tool-choice", "required"],
    ):
        with pytest.raises(SystemExit) as ended:
            main([*command, *wrong])
        assert ended.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_folder_mode_writes_calls(tmp_path, capsys):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    Image.fromarray(picture(60, 40, 1)).save(tmp_path / "a.png")
    with pytest.raises(SystemExit):
        batch_main(["--model", "demo", "--images", str(tmp_path / "a.png"), "--prompt", "Hi",
                    "--output", str(tmp_path / "o.jsonl"), "--tools", str(tmp_path / "tools.json"),
                    "--tool-choice", "stop", "--max-tokens", "600"])  # fmt: skip
    entry = json.loads((tmp_path / "o.jsonl").read_text())
    assert [call["function"]["name"] for call in entry["tool_calls"]][:1] == ["stop"]
    assert parse_calls(entry["text"])[0] == ToolCall("stop", {})
