"""Answers that keep to a form: schemas, patterns, choices, grammars; and what is probable."""

import gc
import json
import math
import sys
import weakref
from dataclasses import dataclass, field
from decimal import Decimal
from enum import Enum
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from tokenizers import Tokenizer

from mlx_lfm2vl import (
    CacheOptions,
    Constraint,
    PromptError,
    Question,
    Session,
    ask_json,
    batch_generate,
    choose,
    generate,
    load,
    stream_generate,
)
from mlx_lfm2vl.cli.batch import main as batch_main
from mlx_lfm2vl.cli.generate import main as generate_main
from mlx_lfm2vl.generation.guide import Vocabulary, vocabulary
from mlx_lfm2vl.prompts.constraint import compiled
from mlx_lfm2vl.prompts.json_schema import read_schema
from mlx_lfm2vl.prompts.tokenizer import Lfm2Tokenizer

from .checkpoints.pictures import picture
from .helpers import FIXTURES

SCHEMAS = json.loads((FIXTURES / "schemas.json").read_text(encoding="utf-8"))
WILD = {"temperature": 3.0, "top_p": 1.0}
INVOICE = SCHEMAS["invoice"]


@pytest.fixture(scope="module")
def demo():
    return load("demo", dtype="float32")


def judge(schema, text: str) -> None:
    """Decimals, because 0.6 is no multiple of 0.1 in binary."""
    schema = json.loads(json.dumps(schema), parse_float=Decimal)
    Draft202012Validator(schema).validate(json.loads(text, parse_float=Decimal))


def answer(parts, prompt="What is it?", **settings):
    responses = list(stream_generate(*parts, prompt, **settings))
    return "".join(response.text for response in responses), responses


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_is_valid(demo, name):
    """`benchmarks/guided.py --valid 25` asks 500 times."""
    questions = [
        Question("What is it?", schema=SCHEMAS[name], seed=seed, max_tokens=120 + 20 * seed, **WILD)
        for seed in range(3)
    ]
    results = batch_generate(*demo, questions[:2], batch_size=2)
    text, responses = answer(demo, questions[2])
    for result in results:
        judge(SCHEMAS[name], result.text)
        assert result.closed == (result.finish_reason == "length")
    judge(SCHEMAS[name], text)
    assert responses[-1].closed == (responses[-1].finish_reason == "length")


def test_forced_tokens_take_no_passes_of_their_own(demo, work):
    texts = {"type": "string", "maxLength": 24}
    schema = json.loads(json.dumps(INVOICE).replace('{"type": "string"}', json.dumps(texts)))
    text, responses = answer(demo, schema=schema, temperature=0, max_tokens=400)
    judge(INVOICE, text)
    assert responses[-1].finish_reason == "stop"
    assert len(work.passes) <= 0.6 * len(responses)
    # all but the last tokens have gone through the model, each once
    positions = responses[-1].prompt_tokens + len(responses)
    assert positions - 8 <= work.positions <= positions - 1
    forced = [r for r in responses if r.logprobs[r.token].item() == 0]
    assert len(forced) >= len(responses) - len(work.passes)
    assert all(math.isinf(r.logprobs[(r.token + 1) % 949].item()) for r in forced)


def test_forced_tokens_are_read_as_if_they_had_been_chosen(demo, monkeypatch):
    """The cache holds the same, whether tokens went in together or one by one."""
    settings = {"schema": INVOICE, "temperature": 0, "max_tokens": 150}
    for options in (CacheOptions(), CacheOptions(100, 10), CacheOptions(kv_bits=8, kv_group_size=64,
                    quantized_kv_start=60)):  # fmt: skip
        text, _ = answer(demo, cache_options=options, **settings)
        with monkeypatch.context() as patch:
            patch.setattr("mlx_lfm2vl.generation.engine.Row.forced", property(_slow))
            slow, _ = answer(demo, cache_options=options, **settings)
        assert slow == text


class _Slow(list):
    """Tokens that are too few for a pass of their own."""

    def __len__(self) -> int:
        return 0


def _slow(row):
    return _Slow(row.tokens[row.offset + 1 - len(row.token_ids) :])


def test_neighbours_of_a_guided_row_answer_as_alone(demo):
    plain = [
        Question("What is it?", temperature=0, max_tokens=40),
        Question("How many?", seed=3, max_tokens=60, **WILD),
    ]
    guided = [
        Question("What is it?", schema=INVOICE, seed=1, max_tokens=200, **WILD),
        Question("Is it?", choice=["yes", "no, never"], seed=1, **WILD),
    ]
    results = batch_generate(*demo, [plain[0], guided[0], plain[1], guided[1]], batch_size=4)
    for result, question in ((results[0], plain[0]), (results[2], plain[1])):
        assert result.text == generate(*demo, question)
    judge(INVOICE, results[1].text)
    assert results[3].text in ("yes", "no, never")


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"regex": r"[a-z]{2}-\d{3}"}, r"[a-z]{2}-\d{3}"),
        ({"choice": ["yes", 'no "quotes"', "naïve\ncafé", "yes and no"]}, None),
        ({"grammar": 'start: "a" b+ "."\nb: /[xy]/'}, r"a[xy]+\."),
        ({"constraint": Constraint("regex", "(ab){3}")}, "(ab){3}"),
    ],
)
def test_other_forms(demo, settings, pattern):
    import re

    for seed in range(5):
        text, responses = answer(demo, seed=seed, max_tokens=150, **settings, **WILD)
        assert responses[-1].finish_reason == "stop"
        assert text in settings["choice"] if pattern is None else re.fullmatch(pattern, text)


@pytest.mark.parametrize("max_tokens", range(60, 120, 10))
def test_documents_are_closed_at_the_limit(demo, max_tokens):
    schema = SCHEMAS["nested"]
    text, responses = answer(demo, schema=schema, seed=max_tokens, max_tokens=max_tokens, **WILD)
    judge(schema, text)
    assert len(responses) <= max_tokens
    last = responses[-1]
    assert (last.finish_reason, last.closed) in (("stop", False), ("length", True))
    cut, responses = answer(
        demo, schema=schema, seed=max_tokens, max_tokens=12, close=False, **WILD
    )
    assert (len(responses), responses[-1].finish_reason) == (12, "length")
    assert not responses[-1].closed
    with pytest.raises(ValueError):  # noqa: PT011 - json's own error
        json.loads(cut)


@pytest.mark.parametrize(
    "settings",
    [
        {"schema": {"type": "string", "pattern": "^[a-z]+x$"}},
        {"schema": {"type": "string", "minLength": 60}},
        {"schema": {"type": "array", "items": {"enum": ["naïve café", "日本語"]}, "minItems": 2}},
        {"schema": {"type": "string", "format": "email"}},
        {"regex": r"(\d{3}-)+[a-z]+x", "close": True},
        {"choice": ["a long choice, rather", "日本語の選択"], "close": True},
    ],
)
def test_what_is_hard_to_close_is_closed(demo, settings):
    closed = 0
    for seed in range(2):
        text, responses = answer(demo, seed=seed, max_tokens=80, **settings, **WILD)
        assert responses[-1].finish_reason == "stop" or responses[-1].closed
        closed += responses[-1].closed
        if "schema" in settings:
            judge(settings["schema"], text)


def test_what_is_cut_is_never_told_as_whole(demo):
    for settings in ({"choice": ["aaaaaaaaaaaaaaaaaaaaaaaaaaa", "b" * 30]}, {"schema": INVOICE}):
        _, responses = answer(demo, max_tokens=3, **settings, **WILD)
        assert responses[-1].finish_reason == "length"
        assert not responses[-1].closed


def test_masks_come_before_what_samples(demo):
    seen = []

    def spy(tokens, logits):
        seen.append(logits)
        return logits

    settings = {"choice": ["yes", "no"], "logits_processors": [spy], "repetition_penalty": 1.5}
    text, _ = answer(demo, seed=1, temperature=2.0, **settings)
    assert text in ("yes", "no")
    allowed = demo[1].tokenizer.encode_plain("yn")
    finite = np.flatnonzero(np.isfinite(np.asarray(seen[0][0])))
    assert set(allowed) <= set(finite.tolist())
    assert len(finite) <= 8


def test_a_processor_that_brings_back_what_is_forbidden_is_told(demo):
    def wrong(tokens, logits):
        return mx.where(mx.arange(logits.shape[-1]) == 130, 100.0, -100.0)

    with pytest.raises(PromptError, match="a logits processor has chosen token 130"):
        answer(demo, choice=["yes", "no"], logits_processors=[wrong])


def bits(matcher) -> set[int]:
    mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return set(np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist())


def test_control_and_padding_tokens_are_never_part_of_an_answer(demo):
    own = demo[1].tokenizer
    copy = Tokenizer.from_str(own.tokenizer.to_str())
    copy.add_tokens(["<|reserved_9|>"])
    reserved, size = copy.token_to_id("<|reserved_9|>"), copy.get_vocab_size()
    tokenizer = Lfm2Tokenizer(copy, own.names, own.chat_template)
    made = Vocabulary(tokenizer, size + 40, (4, 2))
    matcher = made.matcher(Constraint("json", '{"type": "string"}'))
    matcher.consume_tokens(tokenizer.encode_plain('"a'))
    allowed = bits(matcher)
    assert len(allowed) > 400
    assert allowed.isdisjoint({reserved, *own.special_tokens.values(), *range(size, size + 64)})
    matcher.consume_tokens(tokenizer.encode_plain('"'))
    assert bits(matcher) == {4, 2}


def test_a_vocabulary_is_made_once_and_goes_with_its_tokenizer(demo):
    own = demo[1].tokenizer
    tokenizer = Lfm2Tokenizer(own.tokenizer, own.names, own.chat_template)
    first = vocabulary(tokenizer, 949, (4,))
    assert vocabulary(tokenizer, 949, (4,)) is first
    made = weakref.ref(first.result())
    del first, tokenizer
    gc.collect()
    assert made() is None


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Part:
    name: str
    size: float | None
    parts: list["Part"] = field(default_factory=list)


@dataclass
class Thing:
    title: str
    colour: Colour
    kind: Literal["a", "b"]
    pair: tuple[int, bool]
    prices: dict[str, float]
    main: Part
    anything: Any = None


def test_dataclasses_are_schemas(demo):
    schema = read_schema(Thing)
    Draft202012Validator.check_schema(schema)
    good = {"title": "t", "colour": "red", "kind": "b", "pair": [1, True], "prices": {"x": 1.5},
            "main": {"name": "n", "size": None, "parts": [{"name": "m", "size": 2}]}}  # fmt: skip
    judge(schema, json.dumps(good))
    for name, bad in (("colour", "green"), ("pair", [1]), ("main", {"name": "n"}), ("title", None)):
        assert not Draft202012Validator(schema).is_valid({**good, name: bad})
    judge(schema, answer(demo, schema=Thing, seed=1, **WILD)[0])


def test_pydantic_classes_are_schemas(demo):
    pydantic = pytest.importorskip("pydantic")

    class Line(pydantic.BaseModel):
        text: str
        price: float = pydantic.Field(ge=0)

    class Bill(pydantic.BaseModel):
        lines: list[Line]
        note: str | None = None

    Bill.model_validate_json(answer(demo, schema=Bill, seed=1, max_tokens=80, **WILD)[0])


def test_numbers_end_and_objects_keep_to_their_properties(demo):
    schema = {"type": "object", "properties": {"n": {"type": "number"}}, "required": ["n"]}
    for seed in range(4):
        value = ask_json(*demo, "What is it?", schema=schema, seed=seed, **WILD)
        assert set(value) == {"n"}
        assert abs(value["n"]) <= 10**15
        assert round(value["n"], 6) == value["n"]
    open_schema = {**schema, "additionalProperties": {"type": "integer"}}
    names = [
        set(ask_json(*demo, "?", schema=open_schema, seed=s, max_tokens=80, **WILD))
        for s in range(3)
    ]
    assert any(len(found) > 1 for found in names)
    joined = {"allOf": [schema, {"properties": {"m": {"type": "null"}}, "required": ["m"]}]}
    assert set(ask_json(*demo, "?", schema=joined, max_tokens=60, **WILD)) >= {"n", "m"}
    tight = {"type": "number", "minimum": 1e-8, "maximum": 2e-8}
    assert 1e-8 <= ask_json(*demo, "?", schema=tight, max_tokens=40, **WILD) <= 2e-8


BAD = [
    ({"schema": {"not": {}}}, 'schema cannot be used: Unimplemented keys: ["not"]'),
    ({"schema": {"type": "array", "uniqueItems": True}}, 'Unimplemented keys: ["uniqueItems"]'),
    ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "schema cannot be used: look-around"),
    ({"schema": {"type": "string", "format": "nix"}}, "Unknown format: nix"),
    ({"schema": {"$ref": "#/$defs/nix"}}, "'/$defs/nix' does not exist"),
    ({"schema": {"type": "wrong"}}, "Invalid type: wrong"),
    ({"schema": {"properties": 5}}, "properties must be an object"),
    ({"schema": {"type": "object", "required": 5}}, "Expected array for 'required'"),
    ({"schema": False}, "schema is False; it must be a dict, JSON text, the path"),
    ({"schema": int}, "schema is <class 'int'>; it must be"),
    ({"schema": ""}, "schema is ''; it must be"),
    ({"schema": "{"}, "schema is no JSON schema: Expecting property name"),
    ({"schema": "[1]"}, "schema is [1]; it must be a JSON object"),
    ({"schema": "no.json"}, "schema no.json cannot be read: No such file"),
    ({"schema": {"a": {1}}}, "schema is no JSON: Object of type set"),
    ({"regex": "a(b"}, "regex cannot be used: unclosed group"),
    ({"regex": ""}, "regex is ''; it must be a text"),
    ({"choice": "yes"}, "choice is 'yes'; it must be a list of texts"),
    ({"choice": ["a", ""]}, "choice is ['a', '']"),
    ({"grammar": "start: nix"}, 'grammar cannot be used: at 1(8): unknown name: "nix"'),
    ({"schema": True, "regex": "a"}, "schema and regex exclude each other; give one of them"),
    ({"close": True}, "close is True; it must be left out without schema"),
    ({"schema": True, "close": 3}, "close is 3; it must be True, False or None"),
    ({"constraint": "json"}, "constraint is 'json'; it must be Constraint"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=lambda value: str(value)[:40])
def test_bad_forms_are_told_in_one_line(settings, message):
    with pytest.raises(PromptError) as error:
        Question("What is it?", **settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_nested_too_deeply_is_told_in_one_line():
    schema: dict[str, Any] = {}
    for _ in range(900):
        schema = {"items": schema}
    with pytest.raises(PromptError) as error:
        Question("What is it?", schema=schema)
    assert "\n" not in str(error.value)


def test_fields_without_a_schema_are_named():
    @dataclass
    class Odd:
        x: complex

    with pytest.raises(PromptError, match=r"Odd\.x has the type <class 'complex'>"):
        Question("What is it?", schema=Odd)


def test_missing_llguidance_is_told(monkeypatch):
    compiled.cache_clear()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        PromptError, match=r"cannot be used without llguidance: pip install 'mlx-lfm2vl\[json\]'"
    ):
        Question("What is it?", schema=True)
    assert Question("What is it?").constraint is None


def test_a_grammar_that_becomes_too_large_ends_its_row_alone(demo):
    from llguidance import LLParserLimits

    limits = LLParserLimits(max_grammar_size=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llguidance.LLParserLimits", lambda **_: limits)
        with pytest.raises(PromptError, match=r"schema cannot be used: .*size"):
            answer(demo, schema={"properties": {f"p{n}": {"type": "integer"} for n in range(99)}})


def test_ask_json_gives_values_or_says_why_not(demo):
    value = ask_json(*demo, "What is it?", picture(60, 40, 1), schema=INVOICE, seed=1, **WILD)
    judge(INVOICE, json.dumps(value))
    session = Session(*demo)
    session.see(picture(60, 40, 1))
    assert isinstance(session.ask_json("What is it?", schema={"type": "integer"}), int)
    assert ask_json(*demo, "What is it?", schema={"type": "null"}) is None
    with pytest.raises(PromptError, match="is no whole JSON document; it ended by length after 5"):
        ask_json(*demo, "What is it?", schema=INVOICE, close=False, max_tokens=5)
    with pytest.raises(PromptError, match="is no whole JSON document; it ended by stop"):
        ask_json(*demo, "What is it?", schema=INVOICE, stop="date")


@pytest.mark.parametrize("name", ["text", "image"])
def test_choose_agrees_with_the_official_implementation(loaded, name, work):
    case = json.loads((FIXTURES / "choices.json").read_text(encoding="utf-8"))[name]
    options = list(case["probabilities"])
    images = picture(60, 40, 1) if case["has_image"] else None
    found = choose(*loaded(), case["question"], options, images)
    assert list(found) == options
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)
    total = math.log(sum(map(math.exp, case["scores"])))
    for option, score in zip(options, case["scores"], strict=True):
        # official pictures differ by a grey level here and there
        assert math.log(found[option]) == pytest.approx(
            score - total, abs=5e-3 if images is not None else 1e-4
        )
    assert len(work.passes) == 2
    assert not work.steps
    session = Session(*loaded())
    if images is not None:
        session.see(images)
    assert session.choose(case["question"], options) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("options", ["yes", [], ["a", ""], ["a", "a"], ["a", 3], None])
def test_choose_refuses_what_are_no_options(loaded, options):
    with pytest.raises(PromptError, match="it must be a list of texts, none empty, all different"):
        choose(*loaded(), "Is it red?", options)


def run(main, *arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["--model", "demo", "--dtype", "float32", "--seed", "1", *arguments])
    return end.value.code


def test_the_terminal_takes_schemas_as_file_text_and_from_standard_input(
    tmp_path, monkeypatch, capsys
):
    import io

    monkeypatch.chdir(tmp_path)
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    (tmp_path / "g.lark").write_text('start: "x" /[0-9]/')
    found = []
    for given in ("s.json", json.dumps(schema), "-"):
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(schema)))
        assert run(generate_main, "--prompt", "Hi", "--json-schema", given, "--json") == 0
        entry = json.loads(capsys.readouterr().out)
        assert entry["value"] == json.loads(entry["text"])
        assert entry["closed"] is False
        found.append(entry["value"])
    assert found[0] == found[1] == found[2]
    assert run(generate_main, "--prompt", "Hi", "--grammar", "g.lark") == 0
    assert capsys.readouterr().out[0] == "x"
    for flags, message in (
        (("--prompt", "-", "--json-schema", "-"), "standard input can be the schema, the prompt"),
        (("--prompt", "Hi", "--grammar", "no.lark"), "grammar no.lark cannot be read"),
        (("--prompt", "Hi", "--regex", "a", "--choice", "a"), "regex and choice exclude each"),
        (("--prompt", "Hi", "--json-schema", ""), "schema is ''"),
    ):
        assert run(generate_main, *flags) == 2
        assert message in capsys.readouterr().err


def test_folder_mode_writes_values(tmp_path):
    from PIL import Image

    Image.fromarray(picture(60, 40, 1)).save(tmp_path / "a.png")
    for flags, value in (
        (("--json-schema", '{"enum": [5]}'), {"closed": False, "value": 5}),
        (("--choice", "yes", "no", "-m", "20"), {"closed": False}),
        (("--json-schema", '{"type": "array", "minItems": 90}', "-m", "5"),
         {"closed": False, "value": None}),
    ):  # fmt: skip
        output = tmp_path / "out.jsonl"
        output.unlink(missing_ok=True)
        arguments = ("--images", str(tmp_path / "a.png"), "--prompt", "Hi", "-o", str(output))
        assert run(batch_main, *arguments, *flags) == 0
        entry = json.loads(output.read_text())
        assert {key: entry[key] for key in ("closed", "value") if key in entry} == value
