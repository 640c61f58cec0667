"""The server, asked by the real openai client; each body is checked by the client's own types."""

import asyncio
import json
import re
import threading
from dataclasses import asdict, fields
from typing import Annotated, ClassVar, Literal

import numpy as np
import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from PIL import Image
from pydantic import BaseModel, Field

from mlx_lfm2vl import Sampling, generate, load
from mlx_lfm2vl.serving.http.page import read_page

from .helpers import FIXTURES
from .serving import PICTURE, WAIT, data_url, see, serving, until
from .test_entrances import CASES, DEFAULTS

QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def served():
    with serving(max_batch=4) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return served.client()


@pytest.fixture(scope="module")
def parts():
    return load("demo")


@pytest.fixture(scope="module")
def expected(parts):
    return generate(*parts, QUESTION, PICTURE, temperature=0)


def ask(client, messages=None, **settings):
    messages = see() if messages is None else messages
    return client.chat.completions.create(
        model="demo", messages=messages, **{"temperature": 0, **settings}
    )


def strict(kind, value):
    """The value, checked strictly by a type of the client's."""
    data = value if isinstance(value, str) else value.model_dump_json()
    return kind.model_validate_json(data, strict=True)


class TestChat:
    def test_whole(self, client, expected):
        answer = strict(ChatCompletion, ask(client))
        [choice] = answer.choices
        assert choice.message.content == expected
        assert choice.finish_reason == "stop"
        usage = answer.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert usage.prompt_tokens_details.image_tokens == 76
        assert answer.timings["predicted_n"] == usage.completion_tokens

    def test_streamed(self, client, expected):
        chunks = [
            strict(ChatCompletionChunk, chunk)
            for chunk in ask(client, stream=True, stream_options={"include_usage": True})
        ]
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == expected
        ends = [c.choices[0].finish_reason for c in chunks if c.choices]
        assert ends == [None] * (len(ends) - 1) + ["stop"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage == ask(client).usage.model_copy(
            update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
        )

    def test_asynchronous(self, served, expected):
        async def main():
            async with served.async_client() as client:
                whole = await ask(client)
                parts = [c async for c in await ask(client, stream=True)]
                return whole, "".join(c.choices[0].delta.content or "" for c in parts)

        whole, streamed = asyncio.run(main())
        assert whole.choices[0].message.content == streamed == expected

    def test_the_helper_for_streams(self, client, expected):
        with client.chat.completions.stream(model="demo", messages=see(), temperature=0) as stream:
            assert stream.get_final_completion().choices[0].message.content == expected

    def test_several_choices_are_those_of_seeds(self, client, parts, work):
        settings = {"seed": 7, "temperature": 2.5, "max_tokens": 12}
        answer = ask(client, n=4, **settings)
        texts = [choice.message.content for choice in answer.choices]
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        settings.pop("seed")
        alone = [generate(*parts, QUESTION, PICTURE, seed=7 + n, **settings) for n in range(4)]
        assert texts == alone
        assert len(set(texts)) > 1
        streamed = ["", "", "", ""]
        for chunk in ask(client, n=4, seed=7, stream=True, **settings):
            for choice in chunk.choices:
                streamed[choice.index] += choice.delta.content or ""
        assert streamed == alone

    def test_choices_read_their_prompt_once(self, client, work):
        text = "Say it in other words. " * 8
        work.clear()
        usage = ask(client, see(text), n=4, max_tokens=1).usage
        known = usage.prompt_tokens_details.cached_tokens
        # what is new once, but for the last token, which each choice reads
        assert work.positions == usage.prompt_tokens - known - 1 + 4

    def test_stop(self, client, expected):
        word = expected.split()[2]
        answer = ask(client, stop=[word, "never"]).choices[0]
        assert answer.message.content == expected[: expected.index(word)]
        assert answer.finish_reason == "stop"

    def test_max_tokens(self, client):
        for name in ("max_tokens", "max_completion_tokens"):
            answer = ask(client, **{name: 2})
            assert answer.choices[0].finish_reason == "length"
            assert answer.usage.completion_tokens == 2

    def test_logprobs(self, client, expected):
        answer = strict(ChatCompletion, ask(client, logprobs=True, top_logprobs=3))
        tokens = answer.choices[0].logprobs.content
        assert "".join(token.token for token in tokens) == expected
        assert b"".join(bytes(token.bytes) for token in tokens).decode() == expected
        for token in tokens:
            assert len(token.top_logprobs) == 3
            assert token.top_logprobs[0].logprob == token.logprob <= 0
        chunks = [strict(ChatCompletionChunk, c) for c in ask(client, logprobs=True, stream=True)]
        found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]
        streamed = [token for logprobs in found for token in logprobs.content]
        assert [token.token for token in streamed] == [token.token for token in tokens]
        assert all(token.top_logprobs == [] for token in streamed)

    def test_logit_bias(self, client, parts, expected):
        first = parts[1].tokenizer.encode(expected)[0]
        assert ask(client, logit_bias={str(first): -100}).choices[0].message.content != expected

    def test_several_images_in_their_places(self, client, parts):
        other = Image.new("RGB", (120, 100), "white")
        content = [
            {"type": "text", "text": "First"},
            {"type": "image_url", "image_url": {"url": data_url(), "detail": "high"}},
            {"type": "text", "text": "then"},
            {"type": "image_url", "image_url": data_url(other)},
            {"type": "text", "text": "What changed?"},
        ]
        answer = ask(client, [{"role": "user", "content": content}], max_tokens=8)
        images = [{"type": "image", "image": PICTURE}, {"type": "image", "image": other}]
        items = [content[0], images[0], content[2], images[1], content[4]]
        alone = generate(*parts, [{"role": "user", "content": items}], temperature=0, max_tokens=8)
        assert answer.choices[0].message.content == alone

    def test_detail_and_options(self, served):
        def tokens(**parameters):
            body = {"messages": see(), **parameters}
            detail = body.pop("detail", None)
            body["messages"][0]["content"][0]["image_url"]["detail"] = detail
            return served.post("/v1/chat/completions/input_tokens", body).json()["image_tokens"][0]

        full = tokens()
        assert full == tokens(detail="high") == tokens(detail="auto") == 76
        assert tokens(detail="low") == tokens(image_options={"do_image_splitting": False}) < full
        assert tokens(image_options={"max_image_tokens": 4, "do_image_splitting": False}) <= 4

    def test_a_conversation_with_a_system_message(self, client, parts):
        turns = [
            {"role": "developer", "content": "Answer briefly."},
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("Say ", "it")]},
            {"role": "assistant", "content": "It.", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "Again", "name": "somebody"},
        ]  # fmt: skip
        answer = ask(client, turns, max_tokens=5).choices[0].message.content
        plain = [("system", "Answer briefly."), ("user", "Say it"), ("assistant", "It."),
                 ("user", "Again")]  # fmt: skip
        conversation = [{"role": role, "content": text} for role, text in plain]
        assert answer == generate(*parts, conversation, temperature=0, max_tokens=5)

    def test_the_next_turn_reads_only_what_is_new(self, client, work):
        turns = see("What is in this image? Tell me all.")
        first = ask(client, turns)
        turns += [{"role": "assistant", "content": first.choices[0].message.content}]
        turns += [{"role": "user", "content": "What colour is the cross?"}]
        usage = ask(client, turns).usage
        known = first.usage.total_tokens - 1  # its last token has never gone in
        assert usage.prompt_tokens_details.cached_tokens >= known - 1


class TestForms:
    class Animal(BaseModel):
        name: Annotated[str, Field(max_length=8)]
        legs: Literal[2, 4]

    def test_parse(self, client):
        answer = client.chat.completions.parse(
            model="demo", messages=see(), response_format=self.Animal, max_tokens=200, temperature=0
        )
        assert isinstance(answer.choices[0].message.parsed, self.Animal)

    def test_any_object(self, client):
        for seed in range(3):
            answer = ask(
                client, response_format={"type": "json_object"}, seed=seed, temperature=2,
                max_tokens=60,
            )  # fmt: skip
            assert isinstance(json.loads(answer.choices[0].message.content), dict)

    def test_others(self, client):
        for form, right in (
            ({"choice": ["green", "blue"]}, ("green", "blue")),
            ({"regex": "[0-4]{3}x"}, None),
            ({"grammar": 'start: "yes" | "no"'}, ("yes", "no")),
        ):
            text = ask(client, extra_body=form).choices[0].message.content
            assert text in right if right else len(text) == 4 and text[-1] == "x"

    @pytest.mark.parametrize(
        "form",
        [
            {"response_format": {"type": "xml"}},
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "/etc/passwd"}}},
            {"response_format": {"type": "json_object", "more": 1}},
            {"regex": "("},
            {"choice": []},
            {"grammar": "start: nothing"},
            {"regex": "a", "choice": ["b"]},
        ],
    )
    def test_what_cannot_be_kept_is_refused(self, served, form):
        answer = served.post("/v1/chat/completions", {"messages": see(), **form})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"]


class TestResponses:
    def test_whole(self, client, expected):
        items = [{"type": "input_image", "image_url": data_url(), "detail": "auto"}]
        items += [{"type": "input_text", "text": QUESTION}]
        answer = client.responses.create(
            model="demo", input=[{"role": "user", "content": items}], temperature=0, store=False
        )
        strict(Response, answer)
        assert answer.output_text == expected
        assert (answer.status, answer.store) == ("completed", False)
        assert answer.usage.input_tokens_details.image_tokens == 76

    def test_streamed(self, client, parts):
        with client.responses.stream(
            model="demo", input="Hello there", instructions="Be kind.", temperature=0,
            max_output_tokens=1,
        ) as stream:  # fmt: skip
            events = list(stream)
        kinds = [event.type for event in events]
        assert kinds[:4] == [
            "response.created", "response.in_progress", "response.output_item.added",
            "response.content_part.added",
        ]  # fmt: skip
        assert kinds[-4:] == [
            "response.output_text.done", "response.content_part.done", "response.output_item.done",
            "response.incomplete",
        ]  # fmt: skip
        assert [event.sequence_number for event in events] == list(range(len(events)))
        conversation = [{"role": "system", "content": "Be kind."}]
        conversation += [{"role": "user", "content": "Hello there"}]
        alone = generate(*parts, conversation, temperature=0, max_tokens=1)
        assert events[-1].response.output_text == alone
        assert events[-1].response.incomplete_details.reason == "max_output_tokens"
        strict(Response, events[-1].response)

    def test_history_and_logprobs(self, client):
        turns = [
            {"role": "user", "content": "Say it"},
            {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant",
             "content": [{"type": "output_text", "text": "It.", "annotations": []}]},
            {"role": "user", "content": "Again"},
        ]  # fmt: skip
        answer = client.responses.create(
            model="demo", input=turns, max_output_tokens=3, top_logprobs=2,
            include=["message.output_text.logprobs"],
        )  # fmt: skip
        [part] = answer.output[0].content
        assert "".join(token.token for token in part.logprobs) == part.text
        strict(Response, answer)

    def test_parse(self, client):
        answer = client.responses.parse(
            model="demo", input="A cow", text_format=TestForms.Animal, max_output_tokens=200
        )
        assert isinstance(answer.output_parsed, TestForms.Animal)

    @pytest.mark.parametrize(
        "parameter",
        [
            {"previous_response_id": "resp_1"}, {"conversation": "c"}, {"background": True},
            {"store": True}, {"truncation": "auto"}, {"max_tool_calls": 3}, {"prompt": {"id": "p"}},
            {"reasoning": {"effort": "high"}}, {"include": ["web_search_call.results"]},
            {"service_tier": "priority"}, {"n": 2}, {"context_management": []},
        ],
    )  # fmt: skip
    def test_what_is_not_supported_is_named(self, served, parameter):
        answer = served.post("/v1/responses", {"input": "Hello", **parameter})
        assert answer.status_code == 400
        [name] = parameter
        assert answer.json()["error"]["param"].startswith(name)


NAMES = {*(f.name for f in fields(Sampling)), "max_tokens", "seed", "stop", "regex", "choice"}
NAMES |= {"grammar", "schema", "image_options"}


def can_be_said(case):
    """Whether a case of the other entrances can be said in JSON."""
    is_schema = isinstance(case.settings.get("schema", {}), dict)
    return isinstance(case.prompt, str) and case.settings.keys() <= NAMES and is_schema


def in_json(case):
    """The request that a case is."""
    said = {k: v for k, v in (DEFAULTS | case.settings).items() if v is not None}
    if "schema" in said:
        schema = {"schema": said.pop("schema")}
        said["response_format"] = {"type": "json_schema", "json_schema": schema}
    if "image_options" in said:
        said["image_options"] = asdict(said["image_options"])
    images = case.images if isinstance(case.images, list) else [case.images]
    urls = [data_url(Image.fromarray(np.asarray(i))) for i in images if i is not None]
    text = [{"role": "user", "content": case.prompt}]
    return {"messages": see(case.prompt, *urls) if urls else text, **said}


def test_the_server_is_an_entrance_like_others(loaded):
    """The same question gives the same answer over HTTP."""
    cases = [case for case in CASES if case.fails is None and can_be_said(case)]
    assert len(cases) > 30
    with serving(FIXTURES / "v5") as served:
        for case in cases:
            answer = served.post("/v1/chat/completions", in_json(case))
            assert answer.status_code == 200, (case, answer.text)
            text = answer.json()["choices"][0]["message"]["content"]
            alone = generate(*loaded(), case.prompt, case.images, **DEFAULTS | case.settings)
            assert text == alone, case


def test_the_prompt_is_counted_before_it_is_asked(served, client):
    body = served.post("/v1/chat/completions/input_tokens", {"messages": see()}).json()
    assert body["input_tokens"] == ask(client).usage.prompt_tokens
    assert body["image_tokens"] == [76]
    assert body["estimated_seconds"] > 0
    count = client.responses.input_tokens.count(model="demo", input="Hello there")
    answer = client.responses.create(model="demo", input="Hello there", max_output_tokens=1)
    assert count.input_tokens == answer.usage.input_tokens


PARAMETERS = [
    {"audio": {"voice": "a", "format": "wav"}}, {"modalities": ["text", "audio"]},
    {"prediction": {"type": "content", "content": "a"}}, {"web_search_options": {}},
    {"functions": [{"name": "f"}]}, {"function_call": "auto"}, {"store": True},
    {"service_tier": "flex"}, {"reasoning_effort": "high"}, {"verbosity": "low"},
    {"moderation": {}}, {"prompt_cache_options": {}}, {"prompt_cache_retention": "24h"},
    {"extra": 1}, {"n": 0}, {"n": 5}, {"n": 1.5}, {"top_logprobs": 2},
    {"logprobs": True, "top_logprobs": 21}, {"logprobs": 3}, {"temperature": -1},
    {"temperature": "hot"}, {"top_p": 2}, {"stop": ["a"] * 5}, {"stop": ""}, {"stop": [1]},
    {"seed": "x"}, {"max_tokens": 0}, {"max_tokens": 3, "max_completion_tokens": 4},
    {"logit_bias": {"x": 1}}, {"logit_bias": {"1": "x"}}, {"presence_penalty": 1000},
    {"stream_options": {"include_usage": True}}, {"stream": "yes"}, {"metadata": "x"},
    {"image_options": {"max_image_tokens": -1}}, {"image_options": {"side": 3}}, {"user": 3},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
]  # fmt: skip


@pytest.mark.parametrize("parameters", PARAMETERS, ids=str)
def test_no_parameter_is_ignored(served, parameters):
    answer = served.post("/v1/chat/completions", {"messages": see(), **parameters})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    name = error["param"].partition(".")[0]
    assert name in parameters, error
    assert name in error["message"]


def test_every_parameter_of_the_client_is_known(served):
    """Honoured or refused by name, those that come with a later client included."""
    from openai.types.chat.completion_create_params import CompletionCreateParamsBase
    from openai.types.responses.response_create_params import ResponseCreateParamsBase

    for path, kind, body in (
        ("/v1/chat/completions", CompletionCreateParamsBase, {"messages": []}),
        ("/v1/responses", ResponseCreateParamsBase, {"input": []}),
    ):
        for name in kind.__annotations__.keys() - body.keys():
            # a value that no parameter takes
            answer = served.post(path, {**body, name: [{"\u2603": 1}]})
            assert answer.status_code == 400
            assert answer.json()["error"]["param"].startswith(name), (name, answer.text)


def test_models(served, client):
    [model] = client.models.list().data
    assert model.id == client.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    answer = client.chat.completions.with_raw_response.create(
        model="gpt-5", messages=see("Hello"), max_tokens=1
    )
    assert answer.headers["x-model"] == answer.parse().model == "demo"
    with serving(strict_model=True) as strict_one:
        other = strict_one.client().chat.completions.create
        with pytest.raises(openai.NotFoundError, match="gpt-5"):
            other(model="gpt-5", messages=see())
        assert other(model="demo", messages=see("Hello"), max_tokens=1)


def test_metrics(served, client):
    def value(name):
        lines = served.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[-1])

    before = value("lfm2vl_generated_tokens_total")
    ask(client, max_tokens=3)
    assert value("lfm2vl_generated_tokens_total") == before + 3
    assert value("lfm2vl_answers ") == 0
    served.get("/nowhere?x=1")
    text = served.get("/metrics").text
    assert 'path="other",status="404"' in text
    assert text.endswith("\n")
    for line in text.splitlines():
        assert line.startswith(("# HELP lfm2vl_", "# TYPE lfm2vl_", "lfm2vl_")), line


def test_64_clients_get_what_they_would_get_alone(served, client, parts):
    colours = ("red", "green", "blue", "yellow")
    asked = [
        (f"Is there a {colours[n % 4]} square? {n // 8}", {"seed": n, "temperature": (n % 2) * 1.5})
        for n in range(64)
    ]

    async def main():
        async with served.async_client(timeout=WAIT) as client:
            return await asyncio.gather(
                *(ask(client, see(text), max_tokens=4, **rest) for text, rest in asked)
            )

    answers = [answer.choices[0].message.content for answer in asyncio.run(main())]
    for (text, rest), answer in zip(asked, answers, strict=True):
        assert ask(client, see(text), max_tokens=4, **rest).choices[0].message.content == answer
    for n in range(0, 64, 21):
        text, rest = asked[n]
        assert answers[n] == generate(*parts, text, PICTURE, max_tokens=4, **rest)


def test_eight_clients_share_a_picture(parts, work):
    """The tower sees it once; what stands before the questions is read once."""
    with serving() as served:
        work.clear()

        async def main():
            async with served.async_client(timeout=WAIT) as client:
                questions = [f"Question {n}: what is it?" for n in range(8)]
                return await asyncio.gather(
                    *(ask(client, see(text), max_tokens=1) for text in questions)
                )

        answers = asyncio.run(main())
    assert len(work.views) == 2, "the tiles, which are of one shape, and the thumbnail"
    shared = 87
    lengths = [answer.usage.prompt_tokens for answer in answers]
    assert work.positions == shared + sum(length - shared for length in lengths)


def test_a_key_where_one_is_given():
    with serving(api_key="secret") as served:
        assert served.get("/health").status_code == 200
        for path in ("/v1/models", "/metrics"):
            answer = served.get(path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        with pytest.raises(openai.AuthenticationError):
            served.client().models.list()
        assert served.client(api_key="secret").models.list().data


def test_503_while_the_model_is_loaded(monkeypatch):
    import mlx_lfm2vl.serving.http.service as module

    opened, load = threading.Event(), module.load

    def slow(*arguments, **options):
        assert opened.wait(WAIT)
        return load(*arguments, **options)

    monkeypatch.setattr(module, "load", slow)
    with serving(wait=False) as served:
        for answer in (served.get("/health"), served.post("/v1/chat/completions", {})):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
        opened.set()
        patient = served.client(max_retries=5)
        assert ask(patient, max_tokens=1).usage.completion_tokens == 1
        assert served.get("/health").json() == {"status": "ok", "model": "demo"}
        until(lambda: not served.service.runs)


WEATHER = {
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
        },
        "required": ["city", "days"],
    },
}
TOOLS = [{"type": "function", "function": WEATHER}]


class TestTools:
    ASK: ClassVar = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False}

    def test_a_call_and_its_stream(self, client):
        whole = strict(ChatCompletion, ask(client, see("Weather?"), max_tokens=60, **self.ASK))
        [choice] = whole.choices
        [call] = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls"
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather"
        assert arguments.keys() == {"city", "days"}
        chunks = ask(client, see("Weather?"), max_tokens=60, stream=True, **self.ASK)
        deltas = [c.choices[0].delta.tool_calls for c in map(self.checked, chunks)]
        calls = [call for some in deltas if some is not None for call in some]
        assert calls[0].function.name == "weather"
        assert calls[0].id.startswith("call_")
        assert [call.function.name for call in calls[1:]] == [None] * (len(calls) - 1)
        assert json.loads("".join(call.function.arguments for call in calls)) == arguments

    def checked(self, chunk):
        return strict(ChatCompletionChunk, chunk)

    def test_a_named_function_and_none(self, client):
        choice = {"type": "function", "function": {"name": "weather"}}
        answer = ask(client, see(), max_tokens=60, **{**self.ASK, "tool_choice": choice})
        assert answer.choices[0].message.tool_calls[0].function.name == "weather"
        none = ask(client, see(), tools=TOOLS, tool_choice="none")
        assert none.choices[0].message.content == ask(client).choices[0].message.content

    def test_calls_of_the_history(self, client, parts):
        call = {"id": "call_1", "type": "function"}
        call["function"] = {"name": "weather", "arguments": '{"city": "Rome", "days": 2}'}
        turns = [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "Rain"},
        ]
        answer = ask(client, turns, tools=TOOLS, max_tokens=6)
        plain = [{**turn, "content": turn["content"] or ""} for turn in turns]
        alone = generate(*parts, plain, tools=TOOLS, temperature=0, max_tokens=6)
        assert answer.choices[0].message.content == alone

    def test_in_responses(self, client):
        tool = {"type": "function", "strict": True, **WEATHER}
        settings = {"model": "demo", "tools": [tool], "tool_choice": "required", "temperature": 0}
        settings |= {"max_output_tokens": 60, "parallel_tool_calls": False}
        whole = client.responses.create(input="Weather?", **settings)
        strict(Response, whole)
        call = next(item for item in whole.output if item.type == "function_call")
        assert json.loads(call.arguments).keys() == {"city", "days"}
        with client.responses.stream(input="Weather?", **settings) as stream:
            events = list(stream)
        streamed = next(i for i in events[-1].response.output if i.type == "function_call")
        assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
        kinds = [event.type for event in events]
        assert "response.function_call_arguments.done" in kinds
        turns = [{"role": "user", "content": "Weather?"}]
        turns += [item.model_dump(exclude_none=True) for item in whole.output]
        turns += [{"type": "function_call_output", "call_id": call.call_id, "output": "Rain"}]
        again = client.responses.create(input=turns, **{**settings, "tool_choice": "auto"})
        assert again.usage.input_tokens > whole.usage.input_tokens

    @pytest.mark.parametrize(
        "settings",
        [
            {"tools": [{"type": "web_search"}]},
            {"tools": [{"type": "function", "function": {"name": ""}}]},
            {"tools": TOOLS, "tool_choice": "always"},
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}},
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            {"tools": [{**TOOLS[0], "function": {**WEATHER, "parameters": {"not": {}}}}]},
            {"tool_choice": "required"},
        ],
        ids=str,
    )
    def test_what_makes_no_sense(self, served, settings):
        answer = served.post("/v1/chat/completions", {"messages": see(), **settings})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["param"].startswith(("tool", "response_format"))


def test_boxes(served, parts):
    from mlx_lfm2vl.generation.grounding import detect

    labels = ["yellow square", "green cross"]
    for query in (labels, "green cross"):
        answer = served.post("/v1/detect", {"image": data_url(), "query": query})
        assert answer.status_code == 200, answer.text
        body = answer.json()
        assert body["boxes"] == [box.to_dict() for box in detect(*parts, PICTURE, query)]
        assert body["boxes"]
        assert body["image"] == {"width": 345, "height": 236}
    for wrong in ({"query": "a"}, {"image": data_url()}, {"image": data_url(), "query": []},
                  {"image": "data:,x", "query": "a"}, {"image": data_url(), "query": [" "]},
                  {"image": data_url(), "query": "a", "temperature": 1}):  # fmt: skip
        assert served.post("/v1/detect", wrong).status_code == 400


def test_the_page_needs_nothing_else():
    html, headers = read_page()
    assert len(html.splitlines()) <= 600
    assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", html)
    assert not re.search(r"\sstyle=|\son\w+=[\"']|innerHTML|eval\(", html)
    policy = headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")


def test_where_the_page_is():
    with serving() as served:
        answer = served.get("/")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        again = served.get("/", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.text) == (304, "")
    with serving(page=False) as served:
        assert served.get("/").status_code == 404
