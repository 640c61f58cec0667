"""A calibration set as the source model reads it, and how much each module matters for it."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoints.weights import dequantized
from ..checkpoints.writing import write_json
from ..errors import ConvertError
from ..files import read_json
from ..generation.batch import batch_generate
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration, Lfm2VlModel
from ..options import Sampling
from ..prompts.processor import Lfm2VlProcessor, Prompt
from ..prompts.question import Question
from .budget import group_of
from .rounding import ROWS_AT_ONCE
from .samples import Samples

Tell = Callable[[str, int, int], None]  # what is being done, how much of it is, and all
ANSWER_TOKENS = 48
TEXT_SHARE = 0.1  # of all that counts; answers are the rest
ROWS = 4  # of a batch, at most
TOKENS = 1024  # of a batch with several rows, at most: gradients need memory for each of them


@dataclass(frozen=True)
class Batch:
    """Samples side by side, padded at the end, where a causal model cannot see it.

    Attributes:
        token_ids: (rows, length) int32.
        positions: (targets,) int32, places in rows·length whose next token is part of an answer.
        weight: what each of them counts; over all batches they sum to 1.
        pixel_values: (patches of all views, 3·16²) uint8, or None.
        spatial_shapes: (rows, columns) in patches, one per view.
    """

    token_ids: np.ndarray[Any, Any]
    positions: mx.array
    weight: float
    pixel_values: np.ndarray[Any, Any] | None
    spatial_shapes: tuple[tuple[int, int], ...]

    def hidden(self, model: Lfm2VlForConditionalGeneration) -> mx.array:
        """(targets, hidden) after the final norm."""
        out = Lfm2VlModel.__call__(model, self.token_ids, self.pixel_values, self.spatial_shapes)
        hidden = out.last_hidden_state
        return hidden.reshape(-1, hidden.shape[-1])[self.positions]

    def logprobs(self, model: Lfm2VlForConditionalGeneration) -> mx.array:
        """(targets, vocab) in float32."""
        return log_softmax(model.language_model.logits(self.hidden(model)))


def log_softmax(logits: mx.array) -> mx.array:
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def read_samples(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    samples: Samples,
    kept: Path,
    source: str,
    tell: Tell,
) -> list[Batch]:
    """Batches of questions with their answers, and of texts.

    Args:
        kept: a file for the model's own answers, so that the next run need not make them.
        source: tells models apart that answer into one file.

    Raises:
        ConvertError: there is nothing to learn from.
    """
    prompts = [processor(talk) for talk in samples.conversations]
    end = processor.generation_config.eos_token_ids[0]
    rows = []
    answers = _answers(model, processor, prompts, samples.answers, kept, source, tell)
    for prompt, answer in zip(prompts, answers, strict=True):
        # it may name the image token, which stands for no image there
        ids = [token for token in answer if token != model.config.image_token_id][:ANSWER_TOKENS]
        if ids:
            rows.append((prompt, [*ids, *([end] if len(ids) < ANSWER_TOKENS else [])]))
    texts = []
    for text in samples.texts:
        ids = processor.tokenizer.encode(text, add_special_tokens=True)[: 2 * ANSWER_TOKENS]
        if len(ids) > 1:
            texts.append((Prompt(ids[:1]), ids[1:]))
    if not rows and not texts:
        raise ConvertError("the source answers none of the samples, and no text has two tokens")
    shares = (1 - TEXT_SHARE, TEXT_SHARE) if rows and texts else (1.0, 1.0)
    return [*_batches(rows, shares[0]), *_batches(texts, shares[1])]


def _answers(
    model: Lfm2VlForConditionalGeneration,
    processor: Lfm2VlProcessor,
    prompts: Sequence[Prompt],
    given: Sequence[str | None],
    kept: Path,
    source: str,
    tell: Tell,
) -> list[list[int]]:
    """Token ids of each answer: the user's, what is kept, or the model's own."""
    encode = processor.tokenizer.encode
    found = [None if text is None else encode(text, add_special_tokens=False) for text in given]
    keys = [_key(source, prompt) for prompt in prompts]
    known = read_json(kept) if kept.exists() else {}
    missing = [i for i, ids in enumerate(found) if ids is None and keys[i] not in known]
    questions = [
        Question(prompts[i], max_tokens=ANSWER_TOKENS, sampling=Sampling(temperature=0.0))
        for i in missing
    ]
    count = len(missing)
    results = batch_generate(
        model, processor, questions, progress=lambda done: tell("answers", done, count)
    )
    ends = processor.generation_config.eos_token_ids
    for result in results:
        ids = [token for token in result.tokens if token not in ends]
        known = {**known, keys[missing[result.index]]: ids}
    if missing:
        write_json(kept, known)
    return [ids if ids is not None else known[key] for ids, key in zip(found, keys, strict=True)]


def _key(source: str, prompt: Prompt) -> str:
    """A digest of what a model is asked."""
    told = json.dumps([source, prompt.token_ids, [placed.digest for placed in prompt.images]])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _batches(rows: Sequence[tuple[Prompt, list[int]]], share: float) -> list[Batch]:
    """Rows of about one length in each batch."""
    weight = share / max(sum(len(answer) for _, answer in rows), 1)
    ordered = sorted(rows, key=lambda row: len(row[0].token_ids) + len(row[1]))
    groups: list[list[tuple[Prompt, list[int]]]] = []
    for row in ordered:
        length = len(row[0].token_ids) + len(row[1])
        if not groups or len(groups[-1]) == min(ROWS, max(TOKENS // length, 1)):
            groups.append([])
        groups[-1].append(row)
    return [_batch(group, weight) for group in groups]


def _batch(rows: Sequence[tuple[Prompt, list[int]]], weight: float) -> Batch:
    ids = [[*prompt.token_ids, *answer[:-1]] for prompt, answer in rows]
    length = max(map(len, ids))
    positions = [
        i * length + len(prompt.token_ids) - 1 + place
        for i, (prompt, answer) in enumerate(rows)
        for place in range(len(answer))
    ]
    pixels = [prompt.pixel_values for prompt, _ in rows if prompt.pixel_values is not None]
    return Batch(
        np.array([row + [0] * (length - len(row)) for row in ids], np.int32),
        mx.array(positions),
        weight,
        np.concatenate(pixels) if pixels else None,
        tuple(shape for prompt, _ in rows for shape in prompt.spatial_shapes),
    )


def sensitivities(
    model: Lfm2VlForConditionalGeneration,
    batches: Sequence[Batch],
    ways: Mapping[str, Mapping[int, Mapping[str, Any]]],
    tell: Tell,
) -> dict[str, dict[int, float]]:
    """What is lost if one group of modules is rounded: an estimate of the mean divergence.

    To second order, the divergence is half of the rounding error squared in the metric of the
    Fisher information. Errors of rounding hardly depend on each other, so its diagonal is enough.

    Args:
        ways: bits -> settings of `mx.quantize`, for each module by path.

    Returns:
        nats by group and bits.
    """
    sizes = {path: next(iter(way.values()))["group_size"] for path, way in ways.items()}
    information = _fisher_information(model, batches, sizes, tell)
    losses: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for path, settings in ways.items():
        for bits, way in settings.items():
            weight, found = module_at(model, path).weight, information[path]
            losses[group_of(path)][bits] += _loss(weight, found, way)
    return {group: dict(by_bits) for group, by_bits in losses.items()}


def _loss(weight: mx.array, information: mx.array, way: Mapping[str, Any]) -> float:
    """Of a rounded matrix; some rows at once, since a table of embeddings is large."""
    loss = 0.0
    for start in range(0, len(weight), ROWS_AT_ONCE):
        part = weight[start : start + ROWS_AT_ONCE]
        errors = _squares(rounded(part, way) - part, way["group_size"]).mean(axis=-1)
        counted = information[start : start + ROWS_AT_ONCE] * errors
        loss += cast(float, counted.sum().item()) / 2
    return loss


def _fisher_information(
    model: Lfm2VlForConditionalGeneration,
    batches: Sequence[Batch],
    sizes: Mapping[str, int],
    tell: Tell,
) -> dict[str, mx.array]:
    """The diagonal for each matrix, (rows, groups), summed over the weights of a group.

    The square of a gradient, if what it is taken of is random with the right covariance.
    """
    model.freeze()
    for path in sizes:
        module_at(model, path).unfreeze(keys=["weight"], recurse=False)

    def probed(batch: Batch, key: mx.array) -> mx.array:
        logits = model.language_model.logits(batch.hidden(model)).astype(mx.float32)
        p = mx.stop_gradient(mx.softmax(logits, axis=-1))
        noise = mx.sqrt(p) * mx.where(mx.random.bernoulli(shape=p.shape, key=key), 1.0, -1.0)
        # its covariance is diag(p) - p·pᵀ, the curvature of the divergence by the logits
        return (logits * (noise - p * noise.sum(axis=-1, keepdims=True))).sum()

    gradient = nn.value_and_grad(model, probed)
    information: dict[str, mx.array] = {}
    for number, batch in enumerate(batches):
        slopes = dict(tree_flatten(gradient(batch, mx.random.key(number))[1]))
        # one after the other: what is not kept is let go as soon as its squares are added
        for path in sizes:
            squares = _squares(slopes.pop(f"{path}.weight"), sizes[path]).sum(axis=-1)
            information[path] = information.get(path, 0) + batch.weight * squares
            mx.eval(information[path])
        tell("sensitivity", number + 1, len(batches))
    model.unfreeze()
    return information


def _squares(values: mx.array, size: int) -> mx.array:
    """Squares (rows, groups, size) of (rows, columns)."""
    return mx.square(values.astype(mx.float32)).reshape(len(values), -1, size)


def rounded(weight: mx.array, settings: Mapping[str, Any]) -> mx.array:
    """The values that plain rounding leaves."""
    packed = mx.quantize(weight, **settings)
    parts = dict(zip(("weight", "scales", "biases"), packed, strict=False))
    return dequantized(parts, settings, weight.dtype)


def module_at(tree: Any, path: str) -> Any:
    """A module, or the gradients of one, by path."""
    for name in path.split("."):
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree


def divergence(model: Lfm2VlForConditionalGeneration, batch: Batch, right: mx.array) -> mx.array:
    """What a batch adds to the mean divergence from the right log-probabilities."""
    own = batch.logprobs(model)
    return batch.weight * (mx.exp(right) * (right - own)).sum()


Measure = Callable[[mx.array], mx.array]  # (rows, inputs) float32 -> what is added up over rows


def squares_of(rows: mx.array) -> mx.array:
    """(inputs,)"""
    return mx.square(rows).sum(axis=0)


def moments_of(rows: mx.array) -> mx.array:
    """x·xᵀ, (inputs, inputs)"""
    return rows.T @ rows


class _Watched(nn.Module):
    """A linear map that adds up a measure of its inputs."""

    def __init__(self, inner: nn.Module, add: Callable[[mx.array], None]) -> None:
        super().__init__()
        self.inner = inner
        self._add = add

    def __call__(self, x: mx.array) -> mx.array:
        self._add(x)
        return self.inner(x)


def input_sums(
    model: Lfm2VlForConditionalGeneration,
    batches: Sequence[Batch],
    paths: Sequence[str],
    measure: Measure,
    tell: Callable[[], None],
) -> dict[str, mx.array]:
    """What the inputs of each linear map measure, added up over the calibration set, by group.

    A table of embeddings is a linear map if it is the head, too.

    Args:
        tell: called after each batch.
    """
    head = head_of(model)
    before = {group_of(p): (p, module_at(model, p)) for p in paths if not _is_table(p)}
    before.pop(head, None)
    sums: dict[str, mx.array] = {}

    def add(group: str, x: mx.array) -> None:
        rows = x.reshape(-1, x.shape[-1]).astype(mx.float32)
        sums[group] = sums.get(group, 0) + measure(rows)

    watched = [(p, _Watched(module, partial(add, group))) for group, (p, module) in before.items()]
    model.update_modules(tree_unflatten(watched))
    for batch in batches:
        hidden = batch.hidden(model)
        if head in paths:
            add(head, hidden)
        mx.eval(sums)
        tell()
    model.update_modules(tree_unflatten(list(before.values())))
    return sums


def head_of(model: Lfm2VlForConditionalGeneration) -> str:
    """Where the map to the vocabulary stands, which may be the table of embeddings."""
    tied = "lm_head" not in model.language_model
    return "language_model.model.embed_tokens" if tied else "language_model.lm_head"


def _is_table(path: str) -> bool:
    return path.endswith("embed_tokens")
