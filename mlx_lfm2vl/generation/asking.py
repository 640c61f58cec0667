"""Answers that a program can use: `ask_json` gives a value, `choose` probabilities."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Unpack, cast

import mlx.core as mx

from ..errors import PromptError
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.image_processor import ImageInput
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import Question, QuestionSettings
from .answer import GenerationResponse, eos_token_ids
from .engine import Engine
from .generate import as_question, run, stream_generate
from .memory import memory_limits


def ask_json(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt,
    images: ImageInput | Sequence[ImageInput] | None = None,
    **settings: Unpack[QuestionSettings],
) -> Any:
    """The answer as the value that its JSON stands for, as `json.loads` gives it.

    If `max_tokens` was too few, the document was closed early: it is valid, but its last values
    may be made up. Pass `close=False` to have an error instead.

    Args:
        prompt, images, settings: as for `stream_generate`; `schema` is True, any JSON, by default.

    Raises:
        PromptError: the answer is no whole document; and as `stream_generate`.
    """
    settings.setdefault("schema", True)
    return value_of(stream_generate(model, processor, prompt, images, **settings))


def value_of(responses: Iterable[GenerationResponse]) -> Any:
    """The value of a JSON answer; a PromptError if it is no whole document."""
    text = ""
    for response in responses:
        text += response.text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise PromptError(
            f"the answer is no whole JSON document; it ended by {response.finish_reason} after "
            f"{response.generation_tokens} tokens with {text[-40:]!r}"
        ) from None


def choose(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt | Question,
    options: Sequence[str],
    images: ImageInput | Sequence[ImageInput] | None = None,
    **settings: Unpack[QuestionSettings],
) -> dict[str, float]:
    """How probable each of some answers is, in the order of the options; together they have 1.

    An option's score is the sum of the log-probabilities of its tokens, as the tokenizer cuts its
    text alone, and of the token that ends the answer. The probabilities are the softmax of these
    scores: those that the model gives to the whole answers, if it must give one of them. The prompt
    is read once, all options in one pass after it; settings of sampling make no difference.

    Args:
        prompt, images, settings: as for `stream_generate`.
        options: texts, all different.

    Raises:
        PromptError, ImageError, ConfigError: as `stream_generate`.
    """
    question = as_question(prompt, images, **settings)
    return scores(Engine(model, processor), question, options)


def scores(engine: Engine, question: Question, options: Sequence[str]) -> dict[str, float]:
    """`choose` by an engine that may know a beginning of the prompt."""
    if (
        not isinstance(options, (list, tuple))
        or not options
        or not all(isinstance(option, str) and option for option in options)
        or len(set(options)) < len(options)
    ):
        raise PromptError(
            f"options is {options!r:.200}; it must be a list of texts, none empty, all different"
        )
    with memory_limits(cast(Lfm2VlForConditionalGeneration, engine.model)):
        totals = _totals(engine, question, options)
        return dict(zip(options, cast("list[float]", mx.softmax(totals).tolist()), strict=True))


def _totals(engine: Engine, question: Question, options: Sequence[str]) -> mx.array:
    """The score of each option, (options,)."""
    processor = cast(Lfm2VlProcessor, engine.processor)
    question = question.prepared(processor)
    token_ids = cast(Prompt, question.prompt).token_ids
    # the last token is read together with the options, so that all scores come of one pass
    row, last = engine.add(question, read_only=len(token_ids) - 1), token_ids[-1]
    list(run(engine, row))
    end = eos_token_ids(processor)[0]
    targets = [[*processor.tokenizer.encode_plain(option), end] for option in options]
    width = max(map(len, targets))
    inputs = mx.array([[last, *ids[:-1], *[end] * (width - len(ids))] for ids in targets])
    cache = [
        entry.restore(entry.meta, [mx.repeat(array, len(options), axis=0) for array in entry.state])
        for entry in row.cache
    ]
    model = engine.language_model
    hidden = model.model(model.embed(inputs), cache).last_hidden_state
    places = [n * width + i for n, ids in enumerate(targets) for i in range(len(ids))]
    logits = model.logits(hidden.reshape(-1, hidden.shape[-1])[mx.array(places)])
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = mx.array([token for part in targets for token in part])
    found = mx.take_along_axis(logprobs, ids[:, None], axis=-1)[:, 0]
    rows = mx.array([n for n, part in enumerate(targets) for _ in part])
    return mx.zeros(len(options)).at[rows].add(found)
