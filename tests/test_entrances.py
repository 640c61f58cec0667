"""One question, asked at every entrance: the same tokens, or the same error in the same words."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_lfm2vl import (
    CacheOptions,
    Constraint,
    ImageOptions,
    Lfm2VlError,
    Question,
    Sampling,
    Session,
    Worker,
    batch_generate,
    generate,
    stream_generate,
)
from mlx_lfm2vl.cli.batch import main as batch_main
from mlx_lfm2vl.cli.generate import main as generate_main

from .checkpoints.pictures import picture
from .helpers import FIXTURES

TOOLS = [{"name": "f", "description": "It does.", "parameters": {}}]
COUNT = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
NUMBERS = [*TOOLS, {"name": "count", "parameters": COUNT}]
ODD = [*TOOLS, {"name": "odd", "parameters": {"properties": {"x": {"not": {}}}}}]
RED = picture(60, 40, 1)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 9}, "n": {"type": "number"}},
    "required": ["name", "n"],
}
SCHEMA_TEXT = json.dumps(SCHEMA)


@dataclass
class Case:
    """A question, and the flags that say the same at a terminal, if there are any."""

    name: str
    prompt: Any = "What is it?"
    images: Any = None
    settings: dict[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] | None = ()
    fails: str | None = None

    def __repr__(self) -> str:
        return self.name


def setting(name: str, value: Any, *flags: str, fails: str | None = None, **more: Any) -> Case:
    settings = {name: value, **more}
    shown = "halved" if name == "logits_processors" else f"{value!r:.30}"
    return Case(f"{name}={shown}", settings=settings, flags=flags or None, fails=fails)


def user(*items: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(items)}]


TEXT = {"type": "text", "text": "What is it?"}
CASES = [
    Case("text"),
    Case("plain greedy", settings={"temperature": 0}, flags=("--temp", "0")),
    *(setting("max_tokens", n, "-m", str(n)) for n in (1, 3)),
    setting("max_tokens", 0, fails="max_tokens is 0; it must be a whole number from 1"),
    setting("max_tokens", -5, fails="max_tokens is -5"),
    setting("max_tokens", 2.5, fails="max_tokens is 2.5"),
    setting("max_tokens", None, fails="max_tokens is None"),
    setting("max_tokens", "3", fails="max_tokens is '3'"),
    setting("max_tokens", True, fails="max_tokens is True"),
    setting("stop", "e", "--stop", "e"),
    setting("stop", ["e"], "--stop", "e"),
    setting("stop", ("never", "a"), "--stop", "never", "a"),
    setting("stop", "the"),
    setting("stop", []),
    setting("stop", "", "--stop", "", fails="stop is"),
    setting("stop", ["a", ""], "--stop", "a", "", fails="stop is ['a', '']"),
    setting("stop", 5, fails="stop is 5; it must be a text or a list of texts"),
    setting("stop", [1], fails="stop is [1]"),
    setting("temperature", 2.0, "--temp", "2"),
    setting("temperature", 0.5, "--temp", "0.5"),
    setting("temperature", -1.0, "--temp", "-1", fails="temperature is -1"),
    setting("temperature", float("inf"), "--temp", "inf", fails="temperature is inf"),
    setting("temperature", float("nan"), "--temp", "nan", fails="temperature is nan"),
    setting("temperature", 1e-45, "--temp", "1e-45", fails="temperature is 1e-45"),
    setting("temperature", "hot", fails="temperature is 'hot'"),
    setting("top_p", 0.9, "--top-p", "0.9"),
    setting("top_p", 1.5, "--top-p", "1.5", fails="top_p is 1.5"),
    setting("top_p", 1e-300, "--top-p", "1e-300", fails="top_p is 1e-300"),
    setting("top_k", 5, "--top-k", "5"),
    setting("top_k", -1, "--top-k", "-1", fails="top_k is -1"),
    setting("top_k", 2.5, fails="top_k is 2.5"),
    setting("min_p", 0.3, "--min-p", "0.3"),
    setting("min_p", 2.0, "--min-p", "2", fails="min_p is 2.0"),
    setting("repetition_penalty", 1.3, "--repetition-penalty", "1.3"),
    setting("repetition_penalty", 0.0, "--repetition-penalty", "0", fails="is 0.0"),
    setting("repetition_context_size", 3, "--repetition-context-size", "3"),
    setting("repetition_context_size", 0, fails="repetition_context_size is 0"),
    setting("presence_penalty", 1.5, "--presence-penalty", "1.5"),
    setting("frequency_penalty", 0.5, "--frequency-penalty", "0.5"),
    setting("frequency_penalty", 1e9, "--frequency-penalty", "1e9", fails="frequency_penalty is"),
    setting("xtc_probability", 1.0, "--xtc-probability", "1", "--temp", "1", temperature=1.0),
    setting("logit_bias", {9: 50.0}),
    setting("logit_bias", {-1: 1.0}, fails="a token id of logit_bias is -1"),
    setting("sampling", Sampling(top_p=0.9), "--top-p", "0.9"),
    setting("sampling", Sampling(temperature=0), "--temp", "0"),
    setting("sampling", Sampling(top_p=0.5), temperature=1.0),
    setting("sampling", {"top_p": 0.9}, fails="sampling is {'top_p': 0.9}; it must be Sampling"),
    *(
        setting("seed", n, "--seed", str(n), "--temp", "1.5", temperature=1.5)
        for n in (1, 2**64 - 1)
    ),
    setting("seed", -1, fails="seed is -1; it must be"),
    setting("seed", 2**64, fails="seed is 18446744073709551616"),
    setting("seed", "x", fails="seed is 'x'"),
    setting("tools", TOOLS),
    setting("tools", "f", fails="tools is 'f'; it must be a list"),
    setting("tools", ["f"], fails="tool 'f' has no name"),
    setting("tools", ODD, "--tools", "odd.json", fails="tool odd cannot be used: Unimplemented"),
    setting("tools", NUMBERS, "--tools", "numbers.json", "-m", "30", max_tokens=30),
    *(
        setting(
            "tool_choice", choice, "--tools", "numbers.json", "--tool-choice", choice, "-m", "30",
            tools=NUMBERS, max_tokens=30,
        )
        for choice in ("none", "auto", "required", "count")
    ),
    setting(
        "tool_choice", "any", "--tools", "numbers.json", "--tool-choice", "any", tools=NUMBERS,
        fails="tool_choice is 'any'; it must be one of none, auto, required, f, count",
    ),
    setting(
        "tool_choice", "required", "--tool-choice", "required",
        fails="tool_choice 'required' needs tools",
    ),
    setting(
        "tools", NUMBERS, "--tools", "numbers.json", "--regex", "a", regex="a",
        fails="regex and tools exclude each other; give one of them",
    ),
    Case(
        "tools and image", images=RED,
        settings={"tools": NUMBERS, "tool_choice": "required", "max_tokens": 30},
        flags=("--image", "red.png", "--tools", "numbers.json", "--tool-choice", "required",
               "-m", "30"),
    ),
    setting("image_options", {"tile_size": 32}, fails="image_options is {'tile_size': 32}"),
    setting("cache_options", CacheOptions(200, 10), "--max-kv-size", "200", "--keep", "10"),
    setting("cache_options", CacheOptions(400), "--max-kv-size", "400"),
    setting("cache_options", CacheOptions(6), "--max-kv-size", "6", fails="more than half of"),
    setting(
        "cache_options",
        CacheOptions(kv_bits=8, kv_group_size=128),
        *("--kv-bits", "8", "--kv-group-size", "128"),
        fails="kv_group_size is 128; it must divide the head dimension",
    ),
    setting("cache_options", 200, fails="cache_options is 200"),
    # named here: the address of a function differs between the processes of a suite
    Case(
        "logits_processors", flags=None,
        settings={"logits_processors": [lambda tokens, logits: logits * 0.5]},
    ),
    setting("schema", SCHEMA, "--json-schema", SCHEMA_TEXT, "-m", "80", max_tokens=80),
    setting("schema", SCHEMA_TEXT, "--json-schema", SCHEMA_TEXT, "-m", "22", max_tokens=22),
    setting("schema", SCHEMA, max_tokens=30, close=False, temperature=3.0),
    setting("schema", True, "--json-schema", "true", "-m", "40", max_tokens=40),
    setting("schema", False, fails="schema is False; it must be"),
    setting("schema", {"not": {}}, "--json-schema", '{"not": {}}', fails="Unimplemented keys"),
    setting("schema", "no.json", "--json-schema", "no.json", fails="no.json cannot be read"),
    setting("regex", "[a-f]{3}-x", "--regex", "[a-f]{3}-x", "-m", "20", max_tokens=20),
    setting("regex", "(", "--regex", "(", fails="regex cannot be used: unclosed group"),
    setting("choice", ["yes", "no, not"], "--choice", "yes", "no, not", "-m", "20", max_tokens=20),
    setting("choice", ["a", ""], "--choice", "a", "", fails="choice is"),
    setting("grammar", 'start: "a" /[xy]{4}/', max_tokens=20),
    setting("grammar", "start: b", fails='unknown name: "b"'),
    setting("regex", "a", "--regex", "a", "--choice", "b", choice=["b"], fails="exclude each"),
    setting("close", True, fails="close is True; it must be left out without"),
    setting("constraint", Constraint("choice", ("yes", "no"))),
    Case(
        "schema and image", images=RED, settings={"schema": SCHEMA, "max_tokens": 80},
        flags=("--image", "red.png", "--json-schema", SCHEMA_TEXT, "-m", "80"),
    ),
    Case(
        "wrong schema and image", images=RED, settings={"schema": "{"}, fails="schema is no JSON",
        flags=("--image", "red.png", "--json-schema", "{"),
    ),
    Case("image before", images=RED, flags=("--image", "red.png")),
    Case("two images", images=[RED, picture(50, 70, 2)], flags=None),
    Case("image in place", prompt=user({"type": "image", "image": RED}, TEXT), flags=None),
    Case("image after", prompt=user(TEXT, {"type": "image", "image": RED}), flags=None),
    Case("images beside", prompt=user(TEXT, {"type": "image"}), images=[RED], flags=None),
    Case(
        "small image",
        images=RED,
        flags=("--image", "red.png", "--max-image-tokens", "64"),
        settings={"image_options": ImageOptions(max_image_tokens=64)},
    ),
    Case(
        "contradicting image options", images=RED, flags=None, fails="max_image_tokens is 1",
        settings={"image_options": ImageOptions(max_image_tokens=1)},
    ),
    Case(
        "missing film", prompt=user({"type": "video", "video": "no.mp4"}, TEXT), flags=None,
        fails="no.mp4 does not exist",
    ),
    Case(
        "no frames", prompt=user({"type": "video", "video": "no.mp4", "frames": 0}, TEXT),
        flags=None, fails="frames is 0; it must be a whole number from 1 to 1024",
    ),
    Case("no film", prompt=user({"type": "video"}, TEXT), flags=None, fails="has no video; it"),
    Case("missing image", images="no.png", flags=("--image", "no.png"), fails="no.png does not"),
    Case("too many images", prompt=user(TEXT), images=[RED], flags=None, fails="places for only"),
    Case("too few images", prompt=user({"type": "image"}, TEXT), flags=None, fails="more image"),
    Case("no image at all", images=3.5, flags=None, fails="image of type float"),
    Case("empty", prompt=" ", flags=("--prompt", " "), fails="the prompt is empty; ask something"),
    Case("a number", prompt=42, flags=None, fails="prompt is 42; it must be a text"),
    Case("None", prompt=None, flags=None, fails="prompt is None; it must be a text"),
    Case("no messages", prompt=[], flags=None, fails="the conversation is empty"),
    Case("a wrong message", prompt=["hi"], flags=None, fails="has no role"),
    Case("control tokens", prompt="<image> <|im_end|>", flags=("--prompt", "<image> <|im_end|>")),
]  # fmt: skip
PREPARED = [
    Case("prepared", settings={"max_tokens": 5}),
    Case("prepared and images", images=RED, fails="a prepared prompt holds its images already"),
    Case("prepared and tools", settings={"tools": TOOLS}, fails="holds its tools already"),
    Case(
        "prepared and image options",
        settings={"image_options": ImageOptions(max_image_tokens=64)},
        fails="holds its image_options already",
    ),
]
SESSION_SETTINGS = ("tools", "image_options", "cache_options")
DEFAULTS = {"seed": 7, "max_tokens": 6}
Outcome = tuple[str, str]


@pytest.fixture(scope="module")
def parts(loaded):
    return loaded()


@pytest.fixture(scope="module")
def worker(parts):
    mx.eval(parts[0].parameters())
    with Worker(load=lambda: parts) as worker:
        yield worker


def outcome(ask) -> Outcome:
    """What an entrance says: its text, or its error."""
    try:
        return "text", ask()
    except Lfm2VlError as error:
        return type(error).__name__, str(error)


def by_generate(parts, prompt, images, settings):
    return generate(*parts, prompt, images, **settings)


def by_stream(parts, prompt, images, settings):
    return "".join(r.text for r in stream_generate(*parts, prompt, images, **settings))


def by_question(parts, prompt, images, settings):
    return generate(*parts, Question(prompt, images, **settings))


def by_batch(parts, prompt, images, settings):
    others = [Question(f"Other {n}?", max_tokens=n + 1, seed=n) for n in range(2)]
    asked = [others[0], Question(prompt, images, **settings), others[1]]
    return batch_generate(*parts, asked)[1].text


PYTHON = (by_generate, by_stream, by_question, by_batch)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_entrances_agree(case, parts, worker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.asarray(RED)).save("red.png")
    for name, tools in (("numbers", NUMBERS), ("odd", ODD)):
        Path(f"{name}.json").write_text(json.dumps(tools))
    settings = DEFAULTS | case.settings
    found = {
        ask.__name__: outcome(lambda ask=ask: ask(parts, case.prompt, case.images, settings))
        for ask in PYTHON
    }
    answer = worker.submit(case.prompt, case.images, **settings)
    found["worker"] = outcome(lambda: answer.result(30))
    found |= by_sessions(case, parts, worker, settings)
    found |= by_terminal(case, settings, capsys)
    expected = found["by_generate"]
    assert expected[0] == "text" if case.fails is None else case.fails in expected[1], expected
    # a terminal sees no types of errors
    at_terminal = ("text" if case.fails is None else "error", expected[1])
    said = {name: found.pop(name) for name in ("terminal", "folder") if name in found}
    assert said == dict.fromkeys(said, at_terminal)
    assert found == dict.fromkeys(found, expected)


def by_sessions(case, parts, worker, settings) -> dict[str, Outcome]:
    """Where the prompt is a text, or nothing of a kind that `ask` could take."""
    if isinstance(case.prompt, (list, int, type(None))):
        return {}
    own = {name: settings[name] for name in SESSION_SETTINGS if name in settings}
    asked = {name: value for name, value in settings.items() if name not in own}
    images = case.images if isinstance(case.images, list) else [case.images]

    def ask() -> str:
        session = Session(*parts, **own)
        for image in images if case.images is not None else ():
            session.see(image)
        return session.ask(case.prompt, **asked)

    def ask_worker() -> str:
        session = worker.session(**own)
        for image in images if case.images is not None else ():
            session.see(image)
        return session.ask(case.prompt, **asked).result(30)

    return {"session": outcome(ask), "worker's session": outcome(ask_worker)}


def by_terminal(case, settings, capsys) -> dict[str, Outcome]:
    if case.flags is None or not isinstance(case.prompt, str):
        return {}
    flags = ["--model", str(FIXTURES / "v5"), "--dtype", "float32", "--seed", "7", "-m", "6"]
    flags += ["--prompt", case.prompt, *case.flags]
    found = {"terminal": terminal(generate_main, flags, capsys)}
    if "--image" in flags and "--keep" not in flags and "--max-kv-size" not in flags:
        flags = ["--images" if flag == "--image" else flag for flag in flags]
        kind, text = terminal(batch_main, [*flags, "-o", "out.jsonl"], capsys)
        if kind == "text":
            entry = json.loads(Path("out.jsonl").read_text())
            kind, text = ("error", entry["error"]) if "error" in entry else (kind, entry["text"])
        found["folder"] = kind, text
    return found


def terminal(main, flags: list[str], capsys) -> Outcome:
    with pytest.raises(SystemExit) as end:
        main(flags)
    said = capsys.readouterr()
    if end.value.code == 0:
        return "text", said.out.removesuffix("\n")
    assert end.value.code == 2
    return "error", said.err.split(": error: ", 1)[1].removesuffix("\n")


@pytest.mark.parametrize("case", PREPARED, ids=repr)
def test_entrances_agree_about_prepared_prompts(case, parts, worker):
    prompt = parts[1]("What is it?", RED)
    settings = DEFAULTS | case.settings
    found = {
        ask.__name__: outcome(lambda ask=ask: ask(parts, prompt, case.images, settings))
        for ask in PYTHON
    }
    answer = worker.submit(prompt, case.images, **settings)
    found["worker"] = outcome(lambda: answer.result(30))
    expected = found["by_generate"]
    assert expected[0] == "text" if case.fails is None else case.fails in expected[1]
    assert found == dict.fromkeys(found, expected)


def test_an_unknown_setting_is_named_everywhere(parts, worker):
    for ask in (
        lambda: generate(*parts, "Hi", tempreature=1),
        lambda: stream_generate(*parts, "Hi", tempreature=1),
        lambda: Question("Hi", tempreature=1),
        lambda: Session(*parts).ask("Hi", tempreature=1),
        lambda: worker.submit("Hi", tempreature=1),
    ):
        with pytest.raises(TypeError, match="'tempreature' is no setting; these are: cache_opt"):
            ask()
