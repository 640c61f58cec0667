"""`Question`: what is asked and how it is to be answered, checked once for every entrance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from ..errors import PromptError
from ..options import (
    DEFAULT_MAX_TOKENS,
    MAX_TOKENS,
    SEED,
    CacheOptions,
    ImageOptions,
    Sampling,
)
from .constraint import Constraint
from .image_processor import NO_OPTIONS, ImageInput
from .messages import Conversation
from .processor import Lfm2VlProcessor, Prompt, PromptPlan
from .tool_grammar import ToolChoice

if TYPE_CHECKING:
    import mlx.core as mx

Tools = Sequence[Any]
NO_CACHE_OPTIONS = CacheOptions()


class AnswerSettings(TypedDict, total=False):
    """How an answer is made; every entrance takes these as keywords.

    Attributes:
        max_tokens: how many tokens at most.
        sampling: changes of the checkpoint's recommended sampling.
        temperature, top_p, top_k, min_p, repetition_penalty, repetition_context_size,
            presence_penalty, frequency_penalty, xtc_probability, xtc_threshold, logit_bias: the
            fields of `Sampling`, one by one; they win over `sampling`.
        seed: makes sampling repeatable, whatever else happens.
        stop: a text or several that end the answer; they are not part of it.
        logits_processors: functions of (tokens so far, logits) that return logits, as mlx-lm's.
        schema: the answer is JSON of this schema: a dict, JSON text, the path of a file, a
            dataclass or pydantic class; True for any JSON. Numbers without bounds lie within ±10¹⁵
            and have six digits behind the point; objects that name properties have no others.
        regex: the whole answer matches this regular expression, without look-around.
        choice: the answer is one of these texts.
        grammar: the answer follows this grammar, in llguidance's variant of Lark's notation.
        close: bring the answer to a whole end before `max_tokens` cuts it, as far as possible;
            without the model, so what is still missing is made up, as short as the form allows.
            None does so for JSON.
        constraint: what these become; given instead of them.
        tool_choice: of the question's tools: "auto": text, or calls with or without text around
            them; "required": calls; the name of a tool: calls of it alone; "none": the tools are
            not shown. Calls then keep to the tools' schemas, which takes llguidance. None is
            "auto", without a guarantee if llguidance is not installed.
    """

    max_tokens: int
    sampling: Sampling | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    repetition_penalty: float | None
    repetition_context_size: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    xtc_probability: float | None
    xtc_threshold: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Sequence[str]
    logits_processors: Sequence[Callable[[mx.array, mx.array], mx.array]]
    schema: Any
    regex: str | None
    choice: Sequence[str] | None
    grammar: str | None
    close: bool | None
    constraint: Constraint | None
    tool_choice: ToolChoice | None


class QuestionSettings(AnswerSettings, total=False):
    """The settings of an answer, and of what is read before it.

    Attributes:
        tools: JSON schemas of functions the model may call, or Python functions with types and a
            docstring. They exclude `schema`, `regex`, `choice` and `grammar`.
        image_options: changes of the checkpoint's image settings.
        image_features: what `model.encode_images` gave for these images, (image tokens, hidden), so
            that they are not encoded again.
        cache_options: bounds or quantizes what attention layers remember.
        measure_vision: wait for the vision tower, to tell its time; costs a little speed.
    """

    tools: Tools | None
    image_options: ImageOptions
    image_features: mx.array | None
    cache_options: CacheOptions
    measure_vision: bool


SAMPLING_FIELDS = tuple(f.name for f in fields(Sampling))
CONSTRAINT_FIELDS = ("schema", "regex", "choice", "grammar", "close", "constraint", "tool_choice")


@dataclass(frozen=True, init=False, eq=False)
class Question:
    """One question. Attributes are the settings, checked; see `QuestionSettings`.

    Attributes:
        prompt: a text, a conversation in the `transformers` form, or what the processor made.
        images: one image or several, for a text or for the image places of a conversation.
    """

    prompt: Conversation | Prompt
    images: ImageInput | Sequence[ImageInput] | None
    max_tokens: int
    sampling: Sampling
    seed: int | None
    stop: tuple[str, ...]
    logits_processors: tuple[Callable[[mx.array, mx.array], mx.array], ...]
    constraint: Constraint | None
    tools: Tools | None
    image_options: ImageOptions
    image_features: mx.array | None
    cache_options: CacheOptions
    measure_vision: bool

    def __init__(
        self,
        prompt: Conversation | Prompt,
        images: ImageInput | Sequence[ImageInput] | None = None,
        **settings: Unpack[QuestionSettings],
    ) -> None:
        """Checks everything that can be checked without a model.

        Raises:
            PromptError: a prompt or setting that makes no sense, or settings that contradict each
                other.
            ConfigError: sampling out of its bounds.
        """
        changes = {name: settings.pop(name, None) for name in SAMPLING_FIELDS}  # type: ignore[misc]
        form = {name: settings.pop(name, None) for name in CONSTRAINT_FIELDS}  # type: ignore[misc]
        sampling = settings.pop("sampling", None)
        _check("sampling", sampling, (Sampling, type(None)), "Sampling(…)")
        tools = settings.pop("tools", None)
        _check("tools", tools, (list, tuple, type(None)), "a list of JSON schemas")
        values: dict[str, Any] = {
            "prompt": prompt,
            "images": images,
            "sampling": (sampling or Sampling()).override(Sampling(**changes)),
            "max_tokens": settings.pop("max_tokens", DEFAULT_MAX_TOKENS),
            "seed": settings.pop("seed", None),
            "stop": _texts(settings.pop("stop", ())),
            "logits_processors": tuple(settings.pop("logits_processors", ())),
            "constraint": Constraint.of(**form, tools=tools),
            "tools": None if form["tool_choice"] == "none" else tools,
            "image_options": settings.pop("image_options", NO_OPTIONS),
            "image_features": settings.pop("image_features", None),
            "cache_options": settings.pop("cache_options", NO_CACHE_OPTIONS),
            "measure_vision": settings.pop("measure_vision", False),
        }
        if settings:
            names = {*values, *SAMPLING_FIELDS, *CONSTRAINT_FIELDS} - {"prompt", "images"}
            known = ", ".join(sorted(names))
            raise TypeError(f"{next(iter(settings))!r} is no setting; these are: {known}")
        self.__dict__.update(values)
        self._check()

    def _check(self) -> None:
        if self.max_tokens is None:
            raise PromptError(f"max_tokens is None; it must be {MAX_TOKENS}")
        MAX_TOKENS.check("max_tokens", self.max_tokens, PromptError)
        SEED.check("seed", self.seed, PromptError)
        kinds = (str, list, tuple, Prompt)
        _check("prompt", self.prompt, kinds, "a text, a list of messages or a prepared prompt")
        _check("image_options", self.image_options, ImageOptions, "ImageOptions(…)")
        _check("cache_options", self.cache_options, CacheOptions, "CacheOptions(…)")
        if not isinstance(self.prompt, Prompt):
            return
        given: dict[str, Any] = {"images": self.images, "tools": self.tools}
        if self.image_options != NO_OPTIONS:
            given["image_options"] = self.image_options
        for name, value in given.items():
            if value is not None:
                raise PromptError(f"a prepared prompt holds its {name} already; leave {name} out")

    def prepare(self, processor: Lfm2VlProcessor) -> Prompt:
        """The prompt, its images read.

        Raises:
            PromptError, ImageError, ConfigError: as the processor.
        """
        if isinstance(self.prompt, Prompt):
            return self.prompt
        return processor(
            self.prompt, self.images, tools=self.tools, image_options=self.image_options
        )

    def plan(self, processor: Lfm2VlProcessor) -> PromptPlan:
        """The prompt without pixels; of images that are files only the headers are read."""
        if isinstance(self.prompt, Prompt):
            return self.prompt.plan
        return processor.plan(
            self.prompt, self.images, tools=self.tools, image_options=self.image_options
        )

    def prepared(self, processor: Lfm2VlProcessor) -> Question:
        """The same question, its prompt made."""
        prompt = self.prepare(processor)
        return replace(self, prompt=prompt, images=None, tools=None, image_options=NO_OPTIONS)


def _texts(stop: str | Sequence[str]) -> tuple[str, ...]:
    texts = (stop,) if isinstance(stop, str) else stop
    if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) and t for t in texts):
        given = stop if texts is stop else [stop]
        raise PromptError(f"stop is {given!r}; it must be a text or a list of texts, none empty")
    return tuple(texts)


def _check(name: str, value: Any, kind: Any, right: str) -> None:
    if not isinstance(value, kind):
        raise PromptError(f"{name} is {value!r:.200}; it must be {right}")
