"""What a conversion lost: a reference and other checkpoints on the same texts and images.

Distributions of the next token are compared position by position, in float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from ..checkpoints.hub import resolve_model
from ..checkpoints.loading import load
from ..checkpoints.weights import weight_files
from ..errors import ConvertError
from ..generation.generate import generate_step
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..prompts.processor import Lfm2VlProcessor, Prompt

if TYPE_CHECKING:
    from PIL import Image


GREEDY_TOKENS = 48
COMPONENTS = {
    "vision tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language model": "language_model.",
}
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TEXTS = (
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote down the "
    "wind, the clouds and the ships that passed.",
    "To make the dough, mix 500 g of flour with 320 ml of water, 10 g of salt and 3 g of yeast; "
    "knead it for ten minutes and let it rest.",
    "def mean(values):\n    total = sum(values)\n    return total / len(values)\n",
    "Q: A train leaves at 9:40 and arrives at 11:05. How long does it travel? A: 85 minutes.",
    "Der Zug nach Zürich fährt heute von Gleis sieben ab, etwa zehn Minuten später als geplant.",
    "La niña abrió la ventana, miró la lluvia y decidió quedarse en casa con un libro.",
    '[{"label": "cup", "bbox": [0.12, 0.40, 0.31, 0.77]}, {"label": "spoon", "bbox": [0.35, 0.5]}]',
)
QUESTION = "Describe this image."


@dataclass(frozen=True)
class Fidelity:
    """One checkpoint against the reference.

    Attributes:
        name: the folder.
        file_bytes: of its safetensors files.
        bits_per_weight: by component, and of all: stored bits for each parameter.
        top1_agreement: share of positions whose most likely token is the same.
        mean_kl, p99_kl: Kullback-Leibler divergence from the reference in nats, mean and 99th
            percentile over positions.
        image_cosine: mean cosine of the image features of one image token.
        first_difference: for each prompt, the first token where greedy answers part; None where
            the first 48 are the same.
    """

    name: str
    file_bytes: int
    bits_per_weight: dict[str, float]
    top1_agreement: float
    mean_kl: float
    p99_kl: float
    image_cosine: float
    first_difference: list[int | None] = field(default_factory=list)


@dataclass
class _Outputs:
    """What one checkpoint says about all samples."""

    logprobs: list[mx.array]  # (positions, vocab) per text
    features: list[mx.array]  # (image tokens, hidden) per image
    answers: list[list[int]]


def report(
    reference: str | Path,
    others: Sequence[str | Path],
    folder: str | Path | None = None,
) -> list[Fidelity]:
    """Compares checkpoints with a reference.

    Args:
        reference: the checkpoint that counts as right.
        others: one or several conversions of it.
        folder: more samples of the user: `.txt` files and images.

    Raises:
        ConvertError: the folder holds no samples, or the vocabularies differ.
    """
    texts, images = samples(folder)
    right = _run(reference, texts, images)
    return [_compare(other, right, _run(other, texts, images)) for other in others]


def samples(folder: str | Path | None) -> tuple[list[str], list[Any]]:
    """The built-in texts and images, and those of a folder."""
    texts: list[str] = list(TEXTS)
    images: list[Any] = list(made_images())
    if folder is not None:
        paths = sorted(Path(folder).expanduser().glob("*"))
        more_texts = [p.read_text(encoding="utf-8") for p in paths if p.suffix == ".txt"]
        more_images = [p for p in paths if p.suffix.lower() in IMAGE_SUFFIXES]
        if not more_texts and not more_images:
            raise ConvertError(f"{folder} holds no .txt file and no image")
        texts, images = texts + more_texts, images + more_images
    return texts, images


def made_images() -> Iterable[Image.Image]:
    """Three pictures made in code: shapes, a printed word, and one large enough to be tiled."""
    from PIL import Image, ImageDraw, ImageFont

    shapes = Image.linear_gradient("L").resize((300, 220)).convert("RGB")
    pen = ImageDraw.Draw(shapes)
    pen.ellipse((30, 40, 130, 140), fill="red")
    pen.rectangle((170, 60, 270, 180), fill="navy", outline="white", width=5)
    yield shapes
    word = Image.new("RGB", (400, 160), "ivory")
    font = ImageFont.load_default(72)
    ImageDraw.Draw(word).text((40, 40), "EXIT 42", fill="darkgreen", font=font)
    yield word
    large = Image.radial_gradient("L").resize((1100, 800)).convert("RGB")
    pen = ImageDraw.Draw(large)
    for n in range(12):
        x, y = 60 + 250 * (n % 4), 60 + 240 * (n // 4)
        pen.polygon((x, y + 120, x + 60, y, x + 120, y + 120), fill=f"hsl({n * 30}, 90%, 50%)")
    yield large


def _run(model_path: str | Path, texts: list[str], images: list[Any]) -> _Outputs:
    model, processor = load(model_path, dtype="float32")
    outputs = _Outputs([], [], [])
    prompts = [processor(QUESTION, image) for image in images]
    for prompt in prompts:
        features: dict[str, mx.array] = {}
        outputs.logprobs.append(_logprobs(model, prompt, features))
        outputs.answers.append(_answer(model, prompt, features))
        outputs.features += features.values()
    for text in texts:
        ids = processor.tokenizer.encode(text, add_special_tokens=True)
        outputs.logprobs.append(_logprobs(model, Prompt(ids), {}))
        outputs.answers.append(_answer(model, _question(processor, text), {}))
    return outputs


def _question(processor: Lfm2VlProcessor, text: str) -> Prompt:
    return processor(f"Continue: {text}")


def _logprobs(
    model: Lfm2VlForConditionalGeneration, prompt: Prompt, features: dict[str, mx.array]
) -> mx.array:
    embeddings = model.embed_prompt(prompt, features=features)
    logits = model(inputs_embeds=embeddings[None]).logits[0]
    # images are seen, not predicted
    image_id = model.config.image_token_id
    text = [i for i, token in enumerate(prompt.token_ids) if token != image_id]
    logits = logits[mx.array(text)].astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    return logprobs


def _answer(
    model: Lfm2VlForConditionalGeneration, prompt: Prompt, features: dict[str, mx.array]
) -> list[int]:
    embeddings = model.embed_prompt(prompt, features=features)
    steps = generate_step(
        prompt.token_ids, model, max_tokens=GREEDY_TOKENS, input_embeddings=embeddings
    )
    return [token for token, _ in steps]


def _compare(name: str | Path, right: _Outputs, other: _Outputs) -> Fidelity:
    if right.logprobs[0].shape != other.logprobs[0].shape:
        raise ConvertError(f"{name} has another vocabulary or tokenizer than the reference")
    divergences = mx.concatenate(
        [kl_divergence(p, q) for p, q in zip(right.logprobs, other.logprobs, strict=True)]
    )
    agree = mx.concatenate(
        [
            mx.argmax(p, axis=-1) == mx.argmax(q, axis=-1)
            for p, q in zip(right.logprobs, other.logprobs, strict=True)
        ]
    )
    cosines = mx.concatenate(
        [cosine(a, b) for a, b in zip(right.features, other.features, strict=True)]
    )
    ordered = cast("list[float]", mx.sort(divergences).tolist())
    path = resolve_model(name)
    return Fidelity(
        str(name),
        sum(file.stat().st_size for file in weight_files(path)),
        bits_per_weight(path),
        _number(agree.astype(mx.float32).mean()),
        _number(divergences.mean()),
        ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))],
        _number(cosines.mean()),
        [first_difference(a, b) for a, b in zip(right.answers, other.answers, strict=True)],
    )


def kl_divergence(p: mx.array, q: mx.array) -> mx.array:
    """Log-probabilities (positions, vocab) of both -> nats (positions,), never below 0."""
    return mx.maximum((mx.exp(p) * (p - q)).sum(axis=-1), 0)


def cosine(a: mx.array, b: mx.array) -> mx.array:
    """(rows, hidden) of both -> (rows,)."""
    lengths = mx.linalg.norm(a, axis=-1) * mx.linalg.norm(b, axis=-1)
    return (a * b).sum(axis=-1) / lengths


def first_difference(a: list[int], b: list[int]) -> int | None:
    """Index of the first token that differs, None where all are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def bits_per_weight(folder: Path) -> dict[str, float]:
    """Stored bits for each parameter, by component and of all."""
    model, _ = load(folder, dtype="float32")
    stored: dict[str, int] = {}
    for file in weight_files(folder):
        tensors = cast("dict[str, mx.array]", mx.load(str(file)))
        for name, tensor in tensors.items():
            stored[_component(name)] = stored.get(_component(name), 0) + tensor.nbytes
    counts: dict[str, int] = {}
    for path, module in model.named_modules():
        for name, array in module.items():
            if isinstance(array, mx.array) and name not in ("scales", "biases"):
                packed = "scales" in module and name == "weight"
                size = array.size * 32 // module.bits if packed else array.size
                part = _component(f"{path}.{name}")
                counts[part] = counts.get(part, 0) + size
    bits = {part: 8 * stored.get(part, 0) / counts[part] for part in COMPONENTS}
    return {**bits, "all": 8 * sum(stored.values()) / sum(counts.values())}


def _component(name: str) -> str:
    for part, prefix in COMPONENTS.items():
        if prefix in name:
            return part
    return "language model"  # lm_head stands alone in the transformers layout


def _number(array: mx.array) -> float:
    return cast(float, array.item())


def as_table(results: list[Fidelity]) -> str:
    """Markdown, one row per checkpoint."""
    lines = [
        "| checkpoint | size | bits/weight (vision, projector, language) | same top token | "
        "mean KL | 99 % KL | image cosine | answers part at |",
        "|---|---|---|---|---|---|---|---|",
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
            f"{result.mean_kl:.5f} | {result.p99_kl:.5f} | {result.image_cosine:.6f} | {apart} |"
        )
    return "\n".join(lines)


def as_json(results: list[Fidelity]) -> str:
    """The same as JSON."""
    return json.dumps([asdict(result) for result in results], indent=2)


def plot(results: list[Fidelity], path: str | Path) -> None:
    """Divergence against size, as a PNG; a ConvertError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConvertError('the plot needs matplotlib: pip install "mlx-lfm2vl[plot]"') from None
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
        ylabel="divergence from the reference (nats): mean, 99 %",
        yscale="log",
        title="What the conversion lost",
    )
    figure.savefig(path, dpi=150)
