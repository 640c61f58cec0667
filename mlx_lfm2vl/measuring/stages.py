"""How fast a model is on this machine, stage by stage: `python -m mlx_lfm2vl.benchmark`.

Every stage runs once unmeasured and then several times; medians count. Work is waited for at the
end of each stage, and all weights are in memory before anything but loading is measured.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..checkpoints.hub import resolve_model
from ..checkpoints.loading import load
from ..errors import ImageError, PromptError
from ..generation.batch import stream_batch
from ..generation.engine import PREFILL_STEP_SIZE
from ..generation.generate import generate_step
from ..generation.memory import memory_limits
from ..generation.usage import Usage
from ..models.cache import Cache, cache_nbytes, copy_cache
from ..models.lfm2 import Lfm2ForCausalLM
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import ImageOptions, Sampling
from ..prompts.image_processor import NO_OPTIONS
from ..prompts.image_source import RawImage, load_image
from ..prompts.processor import Lfm2VlProcessor
from ..prompts.question import Question
from ..serving.session import Session
from . import DEFAULT_ROUNDS, DEFAULT_ROWS, DEFAULT_TOKENS
from .machine import Machine, measure_bandwidth, repeat, seconds, this_machine

Size = tuple[int, int]  # width and height in pixels
QUESTIONS = ("What is in this image?", "What colours do you see?")
GREEDY = Sampling(temperature=0)
DEFAULT_SIZE: Size = (640, 480)
# of a made picture: above so many pixels Pillow warns of files that only claim them
MAX_SIDE, MAX_RATIO, MAX_PIXELS = 16384, 256, 89_000_000
NO_TOKEN = -1  # as the only end of an answer: it never ends early


@dataclass(frozen=True)
class ImageCosts:
    """What questions about one image cost; seconds are medians.

    Attributes:
        name: path, or size of a picture that was made for this.
        views, image_tokens, prompt_tokens: how the model sees it.
        preprocess_s: reading, decoding, resizing and cutting the image, and the prompt's tokens.
        vision_s: vision tower and projector.
        prefill_s: reading the prompt, image features given, until the first token is known.
        first_question_s: image and question to first token, all stages.
        second_question_s: another question about the same image to its first token.
        decode_tps: tokens per second of an answer, after its first token.
        bytes_per_token: weights and cache that each of these tokens reads.
        bandwidth_share: part of the machine's measured bandwidth that this reaches.
        peak_memory_bytes: most that MLX held at once, weights included.
        rounds: each measured round of each of these times, in seconds; of decoding per token.
    """

    name: str
    views: int
    image_tokens: int
    prompt_tokens: int
    preprocess_s: float
    vision_s: float
    prefill_s: float
    first_question_s: float
    second_question_s: float
    decode_tps: float
    bytes_per_token: int
    bandwidth_share: float
    peak_memory_bytes: int
    rounds: dict[str, list[float]]


@dataclass(frozen=True)
class KnobCosts:
    """A stage with several values of a setting; the image with the most patches was taken.

    Attributes:
        name: "patches per group" or "prefill step".
        image: its name.
        seconds: median by value.
    """

    name: str
    image: str
    seconds: dict[int, float]

    @property
    def best(self) -> int:
        """The value that took the least time."""
        return min(self.seconds, key=lambda value: self.seconds[value])


@dataclass(frozen=True)
class BenchmarkResult:
    """One model on one machine.

    Attributes:
        model: as it was named.
        dtype: what it computes in.
        weight_bytes: all weights in memory.
        rounds: how many counted, after one that did not.
        max_tokens: length of the answers.
        load_s: from folder to all weights in memory, files already read once.
        bandwidth: bytes per second of a matrix-vector product in `dtype`.
        batch_rows: answers that decoded together.
        batch_tps: tokens per second of all of them, prompts not counted.
        images: one entry per image.
        knobs: one entry per setting of which several values were tried.
    """

    model: str
    machine: Machine
    dtype: str
    weight_bytes: int
    rounds: int
    max_tokens: int
    load_s: float
    bandwidth: float
    batch_rows: int
    batch_tps: float
    images: list[ImageCosts]
    knobs: list[KnobCosts]


def benchmark(
    model: str | Path,
    images: Sequence[RawImage] = (),
    sizes: Sequence[Size] = (),
    *,
    dtype: str | None = None,
    revision: str | None = None,
    adapter_path: str | Path | None = None,
    image_options: ImageOptions = NO_OPTIONS,
    rounds: int = DEFAULT_ROUNDS,
    max_tokens: int = DEFAULT_TOKENS,
    rows: int = DEFAULT_ROWS,
    patches_per_group: Sequence[int] = (),
    prefill_steps: Sequence[int] = (),
    progress: Callable[[str], None] | None = None,
    learn: Callable[[Any, list[Usage]], None] | None = None,
) -> BenchmarkResult:
    """Measures a model on this machine.

    Args:
        model, dtype, revision, adapter_path: as `load` takes them.
        images: what the questions are about; files and bytes are decoded anew in each round.
        sizes: (width, height) of pictures to make for this; 640x480 without images and sizes.
        image_options: changes of the checkpoint's image settings.
        rounds: how many count, after one that does not.
        max_tokens: length of each answer, 2 or more.
        rows: answers that decode together in the measurement of batches.
        patches_per_group: values of the vision tower's setting of this name to try.
        prefill_steps: how many positions of a prompt at once to try.
        progress: called with the name of what is measured next.
        learn: called with the model, what a question about each image costs, and what one of
            those that grew together.

    Raises:
        PromptError, ImageError: a number makes no sense, or an image cannot be read.
        ModelNotFoundError, ConfigError, WeightsError, TrainError: as `load`.
    """
    _check(rounds=(rounds, 1), max_tokens=(max_tokens, 2), rows=(rows, 1))
    for group, step in zip_longest(patches_per_group, prefill_steps, fillvalue=1):
        _check(patches_per_group=(group, 1), prefill_steps=(step, 1))
    sources = _sources(images, sizes)
    tell = progress if progress is not None else _silence
    tell("load")
    folder = resolve_model(model, revision)
    network, processor, load_s = _load(folder, dtype, adapter_path, rounds)
    benches = [
        _ImageBench(network, processor, *source, image_options, max_tokens) for source in sources
    ]
    with memory_limits(network):
        result = _measure(str(model), load_s, benches, rounds, rows, tell)
        largest = max(benches, key=lambda bench: bench.patches)
        knobs = largest.turn_knobs(rounds, patches_per_group, prefill_steps, tell)
        if learn is not None:
            usages = [bench.usage(c) for bench, c in zip(benches, result.images, strict=True)]
            together = (max_tokens - 1) / result.batch_tps  # an answer's share
            length = len(processor(QUESTIONS[0]).token_ids)
            batch = Usage(length, 0, 0, 0, max_tokens, answer_time=together, rows=rows)
            learn(network, [*usages, batch])
        return replace(result, knobs=knobs)


def _measure(
    name: str,
    load_s: float,
    benches: Sequence[_ImageBench],
    rounds: int,
    rows: int,
    tell: Callable[[str], None],
) -> BenchmarkResult:
    """All stages but loading, of at least one image."""
    network, processor, max_tokens = benches[0].model, benches[0].processor, benches[0].tokens
    compute_type = network.language_model.model.embedding_norm.weight.dtype
    tell("memory bandwidth")
    bandwidth = measure_bandwidth(compute_type, rounds)
    costs = [bench.run(rounds, bandwidth, tell) for bench in benches]
    tell(f"batch of {rows}")
    batch_s = median(repeat(rounds, lambda: _batch_seconds(network, processor, rows, max_tokens)))
    return BenchmarkResult(
        model=name,
        machine=this_machine(),
        dtype=str(compute_type).removeprefix("mlx.core."),
        weight_bytes=_nbytes(network.parameters()),
        rounds=rounds,
        max_tokens=max_tokens,
        load_s=load_s,
        bandwidth=bandwidth,
        batch_rows=rows,
        batch_tps=rows * (max_tokens - 1) / batch_s,
        images=costs,
        knobs=[],
    )


def decode_weight_bytes(model: Lfm2ForCausalLM) -> int:
    """Weights that one decoded token reads: all but embeddings that are no vocabulary head."""
    total = _nbytes(model.parameters())
    if "lm_head" in model:
        # of these a token reads a single row
        total -= _nbytes(model.model.embed_tokens.parameters())
    return total


def made_picture(width: int, height: int) -> bytes:
    """A JPEG with as much detail as a photo, always the same for a size.

    Raises:
        ImageError: too small, too large or too thin.
    """
    short, long = sorted((width, height))
    if short < 1 or long > min(MAX_SIDE, MAX_RATIO * short) or short * long > MAX_PIXELS:
        raise ImageError(
            f"a picture of {width}x{height} pixels is not made; sides must be 1 to {MAX_SIDE}, "
            f"one at most {MAX_RATIO} times the other, and {MAX_PIXELS} pixels in all"
        )
    import numpy as np
    from PIL import Image

    grid = (-(-height // 8), -(-width // 8), 3)
    spots = np.random.default_rng(0).integers(0, 256, grid, dtype=np.uint8)
    picture = Image.fromarray(spots).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


class _ImageBench:
    """The stages of one image, each as a function that returns its seconds."""

    def __init__(
        self,
        model: Lfm2VlForConditionalGeneration,
        processor: Lfm2VlProcessor,
        name: str,
        source: RawImage,
        image_options: ImageOptions,
        tokens: int,
    ) -> None:
        self.model = model
        self.processor = processor
        self.name = name
        self.source = source
        self.image_options = image_options
        self.tokens = tokens
        self.prompt = processor(QUESTIONS[0], source, image_options=image_options)
        self.cache: list[Cache] = []

    def run(self, rounds: int, bandwidth: float, tell: Callable[[str], None]) -> ImageCosts:
        """All stages in their order; `bandwidth` in bytes per second."""
        mx.clear_cache()
        mx.reset_peak_memory()
        times: dict[str, list[float]] = {}
        for stage, measure in (
            ("preprocess", self._preprocess),
            ("vision", self._vision),
            ("prefill", self._prefill()),
            ("first_question", self._first_question),
            ("second_question", self._second_question()),
            ("decode", self._decode()),
        ):
            tell(f"{self.name}: {stage.replace('_', ' ')}")
            times[stage] = repeat(rounds, measure)
        medians = {f"{stage}_s": median(found) for stage, found in times.items()}
        decode_tps = 1 / medians.pop("decode_s")
        weights = decode_weight_bytes(self.model.language_model)
        # without the capacity that a cache holds for later positions
        bytes_per_token = weights + cache_nbytes(copy_cache(self.cache))
        return ImageCosts(
            name=self.name,
            views=len(self.prompt.spatial_shapes),
            image_tokens=sum(image.image_tokens for image in self.prompt.images),
            prompt_tokens=len(self.prompt.token_ids),
            decode_tps=decode_tps,
            bytes_per_token=bytes_per_token,
            bandwidth_share=bytes_per_token * decode_tps / bandwidth,
            peak_memory_bytes=mx.get_peak_memory(),
            rounds=times,
            **medians,
        )

    @property
    def patches(self) -> int:
        """Of all views."""
        return sum(rows * cols for rows, cols in self.prompt.spatial_shapes)

    def usage(self, costs: ImageCosts) -> Usage:
        """What a question about the image costs, all stages by their medians."""
        return Usage(
            prompt_tokens=costs.prompt_tokens,
            processed_tokens=costs.prompt_tokens,
            encoded_images=1,
            generation_tokens=self.tokens,
            encoded_patches=self.patches,
            vision_time=costs.vision_s,
            prompt_time=costs.vision_s + costs.prefill_s,
            answer_time=(self.tokens - 1) / costs.decode_tps,
        )

    def turn_knobs(
        self,
        rounds: int,
        patches_per_group: Sequence[int],
        prefill_steps: Sequence[int],
        tell: Callable[[str], None],
    ) -> list[KnobCosts]:
        """Two stages with several values of what bounds their pieces."""
        found = []
        for name, values, make in (
            ("patches per group", patches_per_group, self._vision_in_groups),
            ("prefill step", prefill_steps, self._prefill),
        ):
            times: dict[int, float] = {}
            for value in values:
                tell(f"{self.name}: {name} {value}")
                times[value] = median(repeat(rounds, make(value)))
            if times:
                found.append(KnobCosts(name, self.name, times))
        return found

    def _vision_in_groups(self, patches: int) -> Callable[[], float]:
        tower = self.model.vision_tower

        def measure() -> float:
            before, tower.patches_per_group = tower.patches_per_group, patches
            try:
                return self._vision()
            finally:
                tower.patches_per_group = before

        return measure

    def _preprocess(self) -> float:
        start = time.perf_counter()
        self.processor(QUESTIONS[0], self.source, image_options=self.image_options)
        return time.perf_counter() - start

    def _features(self) -> dict[str, mx.array]:
        features: dict[str, mx.array] = {}
        self.model.embed_prompt(self.prompt, features=features)
        return features

    def _vision(self) -> float:
        return seconds(self._features)

    def _prefill(self, step_size: int = PREFILL_STEP_SIZE) -> Callable[[], float]:
        features = self._features()
        mx.eval(features)

        def read() -> list[mx.array]:
            cache = self.model.make_cache()
            embeddings = self.model.embed_prompt(self.prompt, features=features)
            steps = generate_step(
                self.prompt.token_ids,
                self.model,
                max_tokens=1,
                prompt_cache=cache,
                prefill_step_size=step_size,
                input_embeddings=embeddings,
            )
            list(steps)
            return [array for entry in cache for array in entry.arrays]

        return lambda: seconds(read)

    def _first_question(self) -> float:
        start = time.perf_counter()
        session = Session(self.model, self.processor, image_options=self.image_options)
        session.see(self.source)
        session.ask(QUESTIONS[0], max_tokens=1, sampling=GREEDY)
        return time.perf_counter() - start

    def _second_question(self) -> Callable[[], float]:
        session = Session(self.model, self.processor, image_options=self.image_options)
        session.see(self.source)
        session.ask(QUESTIONS[0], max_tokens=1, sampling=GREEDY)

        def ask() -> float:
            start = time.perf_counter()
            session.ask(QUESTIONS[1], max_tokens=1, sampling=GREEDY)
            return time.perf_counter() - start

        return ask

    def _decode(self) -> Callable[[], float]:
        embeddings = self.model.embed_prompt(self.prompt)
        mx.eval(embeddings)

        def decode() -> float:
            """Seconds per token after the first one."""
            self.cache = self.model.make_cache()
            steps = generate_step(
                self.prompt.token_ids,
                self.model,
                max_tokens=self.tokens,
                prompt_cache=self.cache,
                input_embeddings=embeddings,
            )
            next(steps)
            start = time.perf_counter()
            count = sum(1 for _ in steps)
            return (time.perf_counter() - start) / count

        return decode


def _load(
    folder: Path, dtype: str | None, adapter_path: str | Path | None, rounds: int
) -> tuple[Lfm2VlForConditionalGeneration, Lfm2VlProcessor, float]:
    """Model and processor, and the median of the seconds that loading took."""
    loaded = None

    def measure() -> float:
        nonlocal loaded
        loaded = None  # there is never more than one in memory
        mx.clear_cache()
        start = time.perf_counter()
        loaded = load(folder, dtype, lazy=False, adapter_path=adapter_path)
        return time.perf_counter() - start

    load_s = median(repeat(rounds, measure))
    assert loaded is not None
    return *loaded, load_s


def _batch_seconds(
    model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor, rows: int, tokens: int
) -> float:
    """Seconds in which so many answers decode together, after the first token of each."""
    endless = Lfm2VlProcessor(
        processor.image_processor,
        processor.tokenizer,
        replace(processor.generation_config, eos_token_ids=(NO_TOKEN,)),
    )
    start = 0.0

    def requests() -> Iterator[Question]:
        nonlocal start
        for n in range(rows):
            yield Question(QUESTIONS[n % 2], max_tokens=tokens, sampling=GREEDY)
        # more is asked for when all prompts are on their way
        mx.synchronize()
        start = time.perf_counter()

    # one more row has a place, or the batch would not ask for it
    for _ in stream_batch(model, endless, requests(), batch_size=rows + 1):
        pass
    return time.perf_counter() - start


def _sources(images: Sequence[RawImage], sizes: Sequence[Size]) -> list[tuple[str, RawImage]]:
    """Names and images; an ImageError before anything slow if one cannot be read."""
    found: list[tuple[str, RawImage]] = []
    for number, image in enumerate(images, 1):
        picture = load_image(image)
        if isinstance(image, (str, Path)) and os.path.isfile(os.path.expanduser(image)):
            found.append((Path(image).name, image))
        else:
            # neither a network nor an array takes part in what is measured
            found.append((f"image {number}", image if isinstance(image, bytes) else picture))
    if not found and not sizes:
        sizes = [DEFAULT_SIZE]
    return found + [(f"{width}x{height}", made_picture(width, height)) for width, height in sizes]


def _check(**values: tuple[int, int]) -> None:
    for name, (value, least) in values.items():
        if value < least:
            raise PromptError(f"{name} is {value}; it must be {least} or more")


def _nbytes(parameters: Any) -> int:
    return sum(array.nbytes for _, array in tree_flatten(parameters))


def _silence(_: str) -> None:
    pass
