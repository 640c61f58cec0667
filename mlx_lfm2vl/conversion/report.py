"""What a conversion lost: a reference and other checkpoints on the same images and texts.

Distributions of the next token are compared position by position, in float32.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count, zip_longest
from pathlib import Path
from time import perf_counter
from typing import cast

import mlx.core as mx

from ..checkpoints.hub import resolve_model
from ..checkpoints.loading import load
from ..checkpoints.weights import weight_files
from ..checkpoints.writing import complete_file
from ..errors import ConvertError
from ..generation.generate import generate_step
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.processor import Prompt
from .plan import Progress, make_plan, parameters_of
from .samples import Samples, samples

GREEDY_TOKENS = 48
TIMED_TOKENS = 32
COMPONENTS = {
    "vision tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language model": "language_model.",
}


@dataclass(frozen=True)
class Fidelity:
    """One checkpoint against the reference.

    Answers are the reference's own, greedy, at most 48 tokens; both are asked for each of their
    tokens. Divergences are Kullback-Leibler, from the reference, in nats.

    Attributes:
        name: the folder.
        file_bytes: of its safetensors files.
        bits_per_weight: by component, and of all: stored bits for each parameter.
        top1_agreement, mean_kl, p99_kl: of answers after images: share of positions whose most
            likely token is the same, mean divergence and 99th percentile.
        text_top1_agreement, text_mean_kl, text_p99_kl: the same of texts without images.
        image_cosine: mean cosine of the image features of one image token.
        first_difference: for each question, images first, the first token where both's own greedy
            answers part; None if they are the same up to their end.
        tokens_per_second: of one answer on this machine, in the type that `load` chooses.
    """

    name: str
    file_bytes: int
    bits_per_weight: dict[str, float]
    top1_agreement: float
    mean_kl: float
    p99_kl: float
    text_top1_agreement: float
    text_mean_kl: float
    text_p99_kl: float
    image_cosine: float
    first_difference: list[int | None] = field(default_factory=list)
    tokens_per_second: float = 0.0


@dataclass
class _Outputs:
    """What one checkpoint says about all samples; conversations with images come first."""

    token_ids: list[list[int]]  # of each question or text
    images: int = 0  # how many of these questions have some
    logprobs: list[mx.array] = field(default_factory=list)  # (positions, vocab)
    features: list[mx.array] = field(default_factory=list)  # (image tokens, hidden)
    answers: list[list[int]] = field(default_factory=list)


def report(
    reference: str | Path,
    others: Sequence[str | Path],
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Fidelity]:
    """Compares checkpoints with a reference.

    Args:
        reference: the checkpoint that counts as right.
        others: one or several conversions of it.
        folder: more samples of the user, see `samples`.
        progress: called with samples answered so far, by all checkpoints, and all.

    Raises:
        ConvertError: the folder holds no samples, or the vocabularies differ.
        DataError: a conversation cannot be read.
    """
    chosen = samples(folder)
    total = (1 + len(others)) * (len(chosen.conversations) + len(chosen.texts))
    numbers = count(1)

    def step() -> None:
        if progress is not None:
            progress(next(numbers), total)

    right = _run(reference, chosen, None, step)
    return [_compare(other, right, _run(other, chosen, right, step)) for other in others]


def _run(
    model_path: str | Path, chosen: Samples, right: _Outputs | None, step: Callable[[], None]
) -> _Outputs:
    """Asks a checkpoint.

    Args:
        right: the reference's outputs, None for the reference itself.
        step: called after each question.
    """
    model, processor = load(model_path, dtype="float32")
    prompts = [processor(talk) for talk in chosen.conversations]
    prompts.sort(key=lambda prompt: prompt.pixel_values is None)
    questions = prompts + [processor(f"Continue: {text}") for text in chosen.texts]
    texts = [processor.tokenizer.encode(text, add_special_tokens=True) for text in chosen.texts]
    ids = [prompt.token_ids for prompt in questions] + texts
    if right is not None and ids != right.token_ids:
        raise ConvertError(
            f"{model_path} makes other tokens of the same samples than the reference: it has "
            "another vocabulary, tokenizer, template or image settings"
        )
    outputs = _Outputs(ids, sum(prompt.pixel_values is not None for prompt in prompts))
    ends = processor.generation_config.eos_token_ids
    for number, prompt in enumerate(questions):
        features: dict[str, mx.array] = {}
        embeddings = model.embed_prompt(prompt, features=features)
        outputs.features += features.values()
        answer = _answer(model, prompt, embeddings, ends)
        outputs.answers.append(answer)
        if number < len(prompts):  # of a text, it is the text itself that is scored
            scored = answer if right is None else right.answers[number]
            outputs.logprobs.append(_logprobs(model, embeddings, scored))
        step()
    for text in texts:
        outputs.logprobs.append(_logprobs(model, model.embed(text[:1])[0], text[1:]))
    return outputs


def _logprobs(
    model: Lfm2VlForConditionalGeneration, before: mx.array, scored: Sequence[int]
) -> mx.array:
    """Log-probabilities (scored tokens, vocab) at each place where one of them comes next."""
    # an answer may name the image token, which stands for no image there
    answer = model.language_model.embed(mx.array([scored], mx.int32))
    embeddings = mx.concatenate([before[None], answer], axis=1)
    start = len(before) - 1
    hidden = model.language_model.model(embeddings).last_hidden_state
    logits = model.language_model.logits(hidden[0, start : start + len(scored)])
    logits = logits.astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    return logprobs


def _answer(
    model: Lfm2VlForConditionalGeneration,
    prompt: Prompt,
    embeddings: mx.array,
    ends: Sequence[int],
) -> list[int]:
    """The greedy answer, its end token included."""
    answer = []
    for token, _ in generate_step(
        prompt.token_ids, model, max_tokens=GREEDY_TOKENS, input_embeddings=embeddings
    ):
        answer.append(token)
        if token in ends:
            break
    return answer


def _compare(name: str | Path, right: _Outputs, other: _Outputs) -> Fidelity:
    if right.logprobs[0].shape != other.logprobs[0].shape:
        raise ConvertError(f"{name} has another vocabulary than the reference")
    cosines = [cosine(a, b) for a, b in zip(right.features, other.features, strict=True)]
    path, images = resolve_model(name), right.images
    return Fidelity(
        str(name),
        sum(file.stat().st_size for file in weight_files(path)),
        bits_per_weight(path),
        *_scores(right.logprobs[:images], other.logprobs[:images]),
        *_scores(right.logprobs[images:], other.logprobs[images:]),
        _number(mx.concatenate(cosines).mean()),
        [first_difference(a, b) for a, b in zip(right.answers, other.answers, strict=True)],
        decode_speed(path),
    )


def decode_speed(folder: Path) -> float:
    """Tokens per second of one answer, after the first ones, in which memory settles."""
    model, _ = load(folder)
    times = [perf_counter() for _ in generate_step([1, 2, 3], model, max_tokens=2 * TIMED_TOKENS)][
        -TIMED_TOKENS:
    ]
    return (len(times) - 1) / (times[-1] - times[0])


def _scores(right: list[mx.array], other: list[mx.array]) -> tuple[float, float, float]:
    """Share of equal most likely tokens; mean and 99th percentile of the divergence."""
    pairs = list(zip(right, other, strict=True))
    divergences = mx.concatenate([kl_divergence(p, q) for p, q in pairs])
    agree = mx.concatenate([mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1) for p, q in pairs])
    ordered = cast("list[float]", mx.sort(divergences).tolist())
    return (
        _number(agree.sum()) / agree.size,
        _number(divergences.mean()),
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
    )


def kl_divergence(p: mx.array, q: mx.array) -> mx.array:
    """Log-probabilities (positions, vocab) of both -> nats (positions,), never below 0."""
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)


def cosine(a: mx.array, b: mx.array) -> mx.array:
    """(rows, hidden) of both -> (rows,)."""
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / lengths


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs or is missing, None if all are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def bits_per_weight(folder: Path) -> dict[str, float]:
    """Stored bits for each parameter, by component and of all."""
    plan = make_plan(folder, None)
    stored: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, tensor in plan.read().items():
        stored[_component(name)] += 8 * tensor.nbytes
        counts[_component(name)] += parameters_of(name, tensor, plan.before)
    bits = {part: stored[part] / counts[part] for part in COMPONENTS}
    return {**bits, "all": stored.total() / counts.total()}


def _component(name: str) -> str:
    return next(part for part, prefix in COMPONENTS.items() if name.startswith(prefix))


def _number(array: mx.array) -> float:
    return cast(float, array.item())


def as_table(results: list[Fidelity]) -> str:
    """Markdown, one row per checkpoint; answers after images first, texts apart."""
    lines = [
        "| checkpoint | size | bits/weight (vision, projector, language) | after images: same top "
        "token | mean KL | 99 % KL | image cosine | answers part at | texts: same top token | "
        "mean KL | 99 % KL | tok/s here |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        bits = result.bits_per_weight
        parts = ", ".join(f"{bits[part]:.2f}" for part in COMPONENTS)
        places = [n for n in result.first_difference if n is not None]
        equal = len(result.first_difference) - len(places)
        apart = f"{sorted(places)[len(places) // 2]} (median); {equal} equal" if places else "never"
        lines.append(
            f"| {Path(result.name).name} | {result.file_bytes / 1e6:.1f} MB | "
            f"{bits['all']:.2f} ({parts}) | {100 * result.top1_agreement:.2f} % | "
            f"{result.mean_kl:.5f} | {result.p99_kl:.5f} | {result.image_cosine:.6f} | {apart} | "
            f"{100 * result.text_top1_agreement:.2f} % | {result.text_mean_kl:.5f} | "
            f"{result.text_p99_kl:.5f} | {result.tokens_per_second:.0f} |"
        )
    return "\n".join(lines)


def as_json(results: list[Fidelity]) -> str:
    """The same as JSON."""
    return json.dumps([asdict(result) for result in results], indent=2)


def check_plot(path: str | Path) -> None:
    """Raises a ConvertError if a plot cannot be drawn there."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise ConvertError('the plot needs matplotlib: pip install "mlx-lfm2vl[plot]"') from None
    if not os.access(Path(path).expanduser().parent, os.W_OK) or Path(path).is_dir():
        raise ConvertError(f"the plot cannot be written to {path}; give a file in a folder")


def plot(results: list[Fidelity], path: str | Path) -> None:
    """Divergence after images against size, as a PNG; a ConvertError without matplotlib."""
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for result in results:
        x = result.bits_per_weight["all"]
        low, high = (max(value, 1e-9) for value in (result.mean_kl, result.p99_kl))
        axes.plot([x, x], [low, high], color="lightgrey", zorder=1)
        axes.scatter([x], [low], color="tab:blue", zorder=2)
        axes.scatter([x], [high], color="tab:orange", zorder=2, marker="_", s=120)
        axes.annotate(Path(result.name).name, (x, low), (5, 5), textcoords="offset points")
    axes.set(
        xlabel="bits per weight",
        ylabel="divergence after images (nats): mean, 99 %",
        yscale="log",
        title="What the conversion lost",
    )
    with complete_file(Path(path).expanduser(), ConvertError) as new:
        figure.savefig(new, dpi=150, format="png")
