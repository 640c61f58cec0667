"""`Ask`: what a request asks for, whichever of the protocols it came by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from ...errors import ConfigError
from ...options import IMAGE_BOUNDS, ImageOptions
from ...prompts.video import DEFAULT_FRAMES, MOST_FRAMES
from .errors import HttpError, refused
from .fields import Fields
from .images import DETAILS, ImagePart

MAX_TOP_LOGPROBS = 20
MAX_STOPS = 4
MAX_CHOICES = 128
SAMPLING: Mapping[str, tuple[type, ...]] = {
    "temperature": (float,), "top_p": (float,), "top_k": (int,), "min_p": (float,),
    "repetition_penalty": (float,), "repetition_context_size": (int,),
    "presence_penalty": (float,), "frequency_penalty": (float,),
    "xtc_probability": (float,), "xtc_threshold": (float,),
}  # fmt: skip
# the kinds of items in both protocols
TEXTS = ("text", "input_text", "output_text", "refusal")
IMAGES = ("image_url", "input_image")
VIDEOS = ("video_url", "input_video")  # as vLLM and mlx-vlm have them
SEEING = ("user", "tool")  # roles
# what changes nothing of an answer, and what there is only one way to do here
HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key")
FIXED: Mapping[str, tuple[Any, ...]] = {
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "in-memory"),
    "moderation": (),
    "prompt_cache_options": (),
}


@dataclass
class Ask:
    """A request, read.

    Attributes:
        model: the name that it asks for.
        messages: in the `transformers` form, images and films as `ImagePart`s.
        settings: of `Question`, as far as it says.
        max_tokens: of an answer; None for the server's own.
        n: how many answers.
        stream, include_usage: as they come, and a last chunk that tells what they cost.
        top_logprobs: how many alternatives of each token to tell; None for no log-probabilities.
        echo: what the response repeats of the request.
    """

    model: str | None
    messages: list[dict[str, Any]]
    settings: dict[str, Any]
    max_tokens: int | None = None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    top_logprobs: int | None = None
    echo: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> list[ImagePart]:
        """All images and films, in order."""
        items = [i for m in self.messages if isinstance(m["content"], list) for i in m["content"]]
        return [item["image"] for item in items if item["type"] == "image"]


def read_sampling(given: Fields) -> dict[str, Any]:
    """The settings of sampling that a request may have."""
    found = {name: given.get(name, *kinds) for name, kinds in SAMPLING.items()}
    return {name: value for name, value in found.items() if value is not None}


def read_common(given: Fields) -> None:
    """Reads what changes nothing, and refuses what cannot be changed."""
    for name in HARMLESS:
        given.get(name, dict if name == "metadata" else str)
    given.only(**FIXED)


def read_bias(given: Fields) -> dict[int, float] | None:
    """logit_bias, whose keys are texts in JSON."""
    bias = given.get("logit_bias", dict)
    try:
        return None if bias is None else {int(token): value for token, value in bias.items()}
    except ValueError:
        raise refused("logit_bias", "must have token ids as its keys", bias) from None


def read_stop(given: Fields) -> tuple[str, ...]:
    """Up to four texts that end an answer."""
    stop = given.get("stop", str, list, default=[])
    texts = [stop] if isinstance(stop, str) else stop
    if len(texts) > MAX_STOPS or not all(isinstance(text, str) and text for text in texts):
        raise refused("stop", f"must be a text or up to {MAX_STOPS}, none empty", stop)
    return tuple(texts)


def read_count(given: Fields, name: str, least: int, most: int, default: Any = None) -> Any:
    """A whole number between two others."""
    value = given.get(name, int, default=default)
    if value is not None and not least <= value <= most:
        raise refused(given.name(name), f"must be from {least} to {most}", value)
    return value


def read_image_options(given: Fields) -> ImageOptions:
    """`image_options`: how all images of a request are to be seen."""
    inner = Fields(given.get("image_options", dict, default={}), given.name("image_options"))
    found = {f.name: inner.get(f.name, IMAGE_BOUNDS[f.name].kind) for f in fields(ImageOptions)}
    inner.end()
    try:
        return ImageOptions(**found)
    except ConfigError as error:
        raise HttpError(400, f"image_options.{error}", "image_options", "invalid_value") from None


def read_image(
    url: Any, detail: Any, options: ImageOptions, param: str, frames: int = 0
) -> dict[str, Any]:
    """A content item with an image, or with so many frames of a film."""
    if not isinstance(url, str) or not url:
        raise refused(param, "must be a data: or http(s) URL", url)
    if detail is not None and detail not in DETAILS:
        raise refused(f"{param}.detail", f"must be one of {', '.join(DETAILS)}", detail)
    part = ImagePart(url, options, detail or "auto", param, frames)
    return {"type": "image", "image": part}


def read_content(
    given: Fields, name: str, content: Any, role: str, options: ImageOptions
) -> str | list[dict[str, Any]]:
    """What a message says: a text, or items of which one or more are images."""
    if isinstance(content, str):
        return content
    items = [
        _item(Fields(item, f"{given.name(name)}[{place}]"), role, options)
        for place, item in enumerate(content)
    ]
    if any(item["type"] == "image" for item in items):
        return items
    return "".join(item["text"] for item in items)


def _item(given: Fields, role: str, options: ImageOptions) -> dict[str, Any]:
    kind = given.need("type", str)
    if kind in TEXTS:
        item = {"type": "text", "text": given.need("refusal" if kind == "refusal" else "text", str)}
        given.only(annotations=([],), logprobs=([],))
    elif kind in (*IMAGES, *VIDEOS) and role in SEEING:
        given.only(file_id=())
        name, frames = ("video_url" if kind in VIDEOS else "image_url"), 0
        if kind in VIDEOS:
            frames = read_count(given, "frames", 1, MOST_FRAMES, DEFAULT_FRAMES)
        url, detail = given.need(name, str, dict), given.get("detail", str)
        if isinstance(url, dict):
            inner = Fields(url, given.name(name))
            url, detail = inner.need("url", str), inner.get("detail", str)
            inner.end()
        item = read_image(url, detail, options, given.name(name), frames)
    else:
        raise HttpError(
            400, f"{given.name('type')} {kind!r:.50} is not supported in a message of the {role}",
            given.name("type"), "unsupported_parameter",
        )  # fmt: skip
    given.end()
    return item


def read_stream(given: Fields) -> tuple[bool, bool]:
    """Whether an answer is streamed, and whether usage comes at its end."""
    stream = given.get("stream", bool, default=False)
    options = given.get("stream_options", dict)
    if options is None:
        return stream, False
    if not stream:
        raise HttpError(400, "stream_options needs stream", "stream_options", "invalid_value")
    inner = Fields(options, "stream_options")
    inner.only(include_obfuscation=(False,))
    usage = inner.get("include_usage", bool, default=False)
    inner.end()
    return stream, usage


def read_form(given: Fields, form: Any, param: str) -> dict[str, Any]:
    """The form of the answer: OpenAI's object, or `regex`, `choice` or `grammar` beside it."""
    others = {
        "regex": given.get("regex", str),
        "choice": given.get("choice", list),
        "grammar": given.get("grammar", str),
    }
    found = {name: value for name, value in others.items() if value is not None}
    if form is None:
        return found
    inner = Fields(form, param)
    kind = inner.need("type", str)
    if kind == "json_schema":
        # chat completions have it one level deeper than responses
        outer, inner = inner, Fields(inner.get("json_schema", dict, default=form), param)
        outer.left -= inner.left
        inner.left.discard("type")
        for name, what in (("name", str), ("description", str), ("strict", bool)):
            inner.get(name, what)
        found["schema"] = inner.need("schema", dict)
        outer.end()
    elif kind == "json_object":
        found["schema"] = {"type": "object"}
    elif kind != "text":
        right = "must be text, json_object or json_schema"
        raise refused(inner.name("type"), right, kind)
    inner.end()
    return found


def read_tools(given: Fields, wrapped: bool) -> dict[str, Any]:
    """Settings of `Question` for tools: those that may be called, and whether one must.

    Args:
        wrapped: chat completions have a function's members one level deeper than responses.
    """
    tools = [
        _tool(Fields(tool, given.name(f"tools[{place}]")), wrapped)
        for place, tool in enumerate(given.get("tools", list, default=[]))
    ]
    choice = given.get("tool_choice", str, dict)
    if isinstance(choice, dict):
        inner = Fields(choice, "tool_choice")
        inner.only(type=("function",))
        named = Fields(inner.need("function", dict), "tool_choice.function") if wrapped else inner
        choice = named.need("name", str)
        named.end()
        inner.end()
        if choice not in [tool["function"]["name"] for tool in tools]:
            raise refused("tool_choice", "names none of the tools", choice)
    elif choice not in (None, "none", "auto", "required"):
        raise refused("tool_choice", "must be none, auto, required or a function", choice)
    parallel = given.get("parallel_tool_calls", bool, default=True)
    if not tools and choice != "required":
        return {}
    settings: dict[str, Any] = {"tools": tools, "tool_choice": choice}
    if tools and not parallel and choice != "none":
        settings["parallel"] = False
    return settings


def _tool(given: Fields, wrapped: bool) -> dict[str, Any]:
    kind = given.need("type", str)
    if kind != "function":
        raise HttpError(
            400, f"{given.name('type')} {kind!r:.50} is not supported; function is",
            given.name("type"), "unsupported_parameter",
        )  # fmt: skip
    inner = Fields(given.need("function", dict), given.name("function")) if wrapped else given
    function = {"name": inner.need("name", str)}
    for name, what in (("description", str), ("parameters", dict)):
        if (value := inner.get(name, what)) is not None:
            function[name] = value
    inner.get("strict", bool)  # calls keep to their schemas in any case
    inner.end()
    given.end()
    return {"type": "function", "function": function}
