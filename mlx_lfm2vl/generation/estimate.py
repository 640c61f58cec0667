"""What a question will cost, before it is asked: tokens exactly, seconds as runs have shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Unpack

from mlx.utils import tree_flatten

from ..models.config import Lfm2Config
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import CacheOptions
from ..prompts.image_processor import ImageInput
from ..prompts.messages import Conversation
from ..prompts.processor import Lfm2VlProcessor, Prompt, PromptPlan
from ..prompts.question import Question, QuestionSettings
from .engine import Prefixes
from .generate import as_question
from .speeds import Speeds, decode_work, prefill_work, read_speeds, vision_work


@dataclass(frozen=True)
class Estimate:
    """What a question will cost.

    Attributes:
        prompt_tokens: positions of the prompt, images included.
        image_tokens: image tokens of each image.
        cached_tokens: how many positions are known already.
        views, patches: what the vision tower will see.
        max_tokens: of the answer; it may end before.
        memory: bytes of the weights and of what attention layers remember at the end; what a pass
            through the model needs in between comes on top.
        seconds_vision, seconds_prefill: until the first token.
        seconds_decode: of an answer of `max_tokens`. Seconds are None if no run has shown them.
    """

    prompt_tokens: int
    image_tokens: tuple[int, ...]
    cached_tokens: int
    views: int
    patches: int
    max_tokens: int
    memory: int
    seconds_vision: float | None
    seconds_prefill: float | None
    seconds_decode: float | None

    @property
    def seconds(self) -> float | None:
        """Of all stages, None if one of them is unknown."""
        return _total((self.seconds_vision, self.seconds_prefill, self.seconds_decode))


def estimate(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompt: Conversation | Prompt | Question,
    images: ImageInput | Sequence[ImageInput] | None = None,
    *,
    speeds: Speeds | None = None,
    prefixes: Prefixes | None = None,
    first: bool = False,
    together: bool = False,
    **settings: Unpack[QuestionSettings],
) -> Estimate:
    """What a question will cost. Nothing goes through the model, and no weight is read.

    Of image files only the headers are read; films are decoded.

    Args:
        prompt, images, settings: as for `stream_generate`.
        speeds: of this model, by default those remembered on this machine, see `read_speeds`.
        prefixes: what may be known already of the prompt; its images are then read.
        first: whether the process has not answered anything before.
        together: whether several answers grow together.

    Raises:
        PromptError, ImageError, ConfigError: as `stream_generate`, as far as headers show it.
    """
    question = as_question(prompt, images, **settings)
    speeds = speeds if speeds is not None else read_speeds(model)
    cached = 0
    if prefixes is not None:
        question = question.prepared(processor)
        assert isinstance(question.prompt, Prompt)
        cached = prefixes.known(question.prompt, question.cache_options)
    plan = question.plan(processor)
    shapes = _shapes(plan, question, prefixes, cached)
    return _estimate(model, question, plan, shapes, cached, speeds, first, together)


def estimate_all(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    questions: Sequence[Question],
    *,
    speeds: Speeds | None = None,
) -> Estimate:
    """What questions about the same images cost together.

    The images are encoded and read once, so `prompt_tokens` of later questions are those behind
    them. Arguments and errors are those of `estimate`.
    """
    speeds = speeds if speeds is not None else read_speeds(model)
    found: list[Estimate] = []
    for question in questions:
        plan, shapes, known = question.plan(processor), list[tuple[int, int]](), 0
        if len(found) == 0:
            shapes = _shapes(plan, question, None, 0)
        elif isinstance(question.prompt, Prompt) and question.prompt.images:
            known = question.prompt.images[-1].stop
        together = len(questions) > 1
        found.append(_estimate(model, question, plan, shapes, known, speeds, False, together))
    weights = _weight_bytes(model)
    return replace(
        found[0],
        prompt_tokens=sum(each.prompt_tokens - each.cached_tokens for each in found),
        max_tokens=sum(each.max_tokens for each in found),
        memory=weights + sum(each.memory - weights for each in found),
        seconds_prefill=_total([each.seconds_prefill for each in found]),
        seconds_decode=_total([each.seconds_decode for each in found]),
    )


def _total(seconds: Sequence[float | None]) -> float | None:
    """Their sum, None if one is unknown."""
    return None if None in seconds else sum(s or 0.0 for s in seconds)


def _estimate(
    model: Lfm2VlForConditionalGeneration,
    question: Question,
    plan: PromptPlan,
    shapes: Sequence[tuple[int, int]],
    cached: int,
    speeds: Speeds,
    first: bool,
    together: bool,
) -> Estimate:
    """Of a question whose views to encode and known positions are known; see `estimate`."""
    config, length = model.config.text_config, len(plan.token_ids)
    plan.check_length(config.max_position_embeddings)
    patches = sum(rows * cols for rows, cols in shapes)
    kept = length + question.max_tokens
    if question.cache_options.max_kv_size is not None:
        kept = min(kept, question.cache_options.max_kv_size)
    itemsize = model.language_model.model.embedding_norm.weight.dtype.size
    decode = "decode together" if together else "decode"
    return Estimate(
        prompt_tokens=length,
        image_tokens=plan.image_tokens,
        cached_tokens=cached,
        views=len(shapes),
        patches=patches,
        max_tokens=question.max_tokens,
        memory=_weight_bytes(model)
        + kept * position_bytes(config, itemsize, question.cache_options),
        seconds_vision=speeds.seconds("vision", vision_work(patches), first),
        seconds_prefill=speeds.seconds("prefill", prefill_work(length - cached), first),
        seconds_decode=speeds.seconds(decode, decode_work(question.max_tokens, length), first),
    )


def _shapes(
    plan: PromptPlan, question: Question, prefixes: Prefixes | None, cached: int
) -> list[tuple[int, int]]:
    """The views that will be encoded: all, or those of images of which nothing is known."""
    if question.image_features is not None:
        return []
    if prefixes is None:
        return [shape for image in plan.images for shape in image.spatial_shapes]
    assert isinstance(question.prompt, Prompt)
    new = {
        placed.digest: placed.image
        for placed in question.prompt.images
        if placed.start >= cached and placed.digest not in prefixes.features
    }
    return [shape for image in new.values() for shape in image.spatial_shapes]


def _weight_bytes(model: Lfm2VlForConditionalGeneration) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


def position_bytes(config: Lfm2Config, itemsize: int, options: CacheOptions) -> int:
    """What all attention layers remember of one position.

    Args:
        itemsize: bytes of a value, if it is not stored as an integer.
    """
    attention = config.layer_types.count("full_attention")
    values = 2 * attention * config.num_key_value_heads * config.head_dim
    if options.kv_bits is None:
        return values * itemsize
    # integers, and a scale and a bias for each group
    return values * options.kv_bits // 8 + 2 * itemsize * values // options.kv_group_size
