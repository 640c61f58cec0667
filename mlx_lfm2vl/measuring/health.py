"""Whether this machine computes what it should: `python -m mlx_lfm2vl.doctor`.

The demo model is compared with stored answers of the official implementation, with the same on the
CPU, and with itself in a batch and quantized.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoints.hub import DEMO_FOLDER
from ..checkpoints.loading import load
from ..checkpoints.weights import dequantized, quantization_of
from ..errors import Lfm2VlError
from ..generation.batch import batch_generate
from ..generation.generate import stream_generate
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import Sampling
from ..prompts.processor import Lfm2VlProcessor
from ..prompts.question import Question
from .machine import Chip
from .reference import CASES, Case, draw, sampled, stored

OK, NOTE, WRONG = "ok", "note", "WRONG"
GREEDY = Sampling(temperature=0)
LONGEST = 40  # tokens of an answer

# Largest difference allowed, relative to the largest value: ten times and more what was seen.
# float32 differs by the order of sums; the other GELU would already be 9e-5. Of each result float16
# keeps 11 bits and bfloat16 8; what they drop adds up over the layers.
TOLERANCES = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 5e-2}

UPDATE = "pip install -U mlx; if that does not help, open an issue with this output"
REINSTALL = "pip install --force-reinstall mlx-lfm2vl"


@dataclass(frozen=True)
class Finding:
    """One line of a diagnosis.

    Attributes:
        state: `OK`, `NOTE` or `WRONG`.
        name: what was looked at.
        text: what was found.
        cure: what to do, if anything.
    """

    state: str
    name: str
    text: str
    cure: str = ""


class Outputs(NamedTuple):
    """What a model makes of one case."""

    token_ids: list[int]
    features: np.ndarray[Any, Any]
    logits: np.ndarray[Any, Any]
    answer: list[int]


def examine(chip: Chip, progress: Callable[[str], None]) -> list[Finding]:
    """All comparisons on the default device.

    Args:
        chip: says how exactly float32 is computed.
        progress: called with the name of what is compared next.
    """
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("demo weights", check_weights),
        *((f"{dtype}", partial(check_stored, dtype, chip)) for dtype in TOLERANCES),
        ("CPU stream", partial(check_cpu, chip)),
        ("batch", check_batch),
        *((f"{bits} bits", partial(check_quantized, bits, chip)) for bits in (8, 4)),
    ]
    found = []
    for name, check in checks:
        progress(name)
        try:
            found += check()
        except (Lfm2VlError, RuntimeError, ValueError, OSError, MemoryError) as error:
            found.append(Finding(WRONG, name, f"{type(error).__name__}: {error}", UPDATE))
    return found


def check_weights() -> list[Finding]:
    """The demo model's file against its stored digest."""
    digest = hashlib.sha256((DEMO_FOLDER / "model.safetensors").read_bytes()).hexdigest()
    if digest == stored()["weights"]:
        return [Finding(OK, "demo weights", "the file is whole")]
    return [Finding(WRONG, "demo weights", "the file is damaged", REINSTALL)]


def check_stored(dtype: str, chip: Chip) -> list[Finding]:
    """All stages in one type against the official implementation in float32."""
    parts, allowed = load(DEMO_FOLDER, dtype), tolerance(dtype, chip)
    # a CPU is slow in the small types; tiles are the same in all of them
    cases = CASES if dtype == "float32" else CASES[:1]
    pairs = [
        (compute(*parts, case), right)
        for case, right in zip(cases, stored()["cases"], strict=False)
    ]
    found = []
    if dtype == "float32":
        same = all(out.token_ids == case["token_ids"] for out, case in pairs)
        found.append(_equal("prompt ids", same, "official ids", REINSTALL))
    for name in ("features", "logits"):
        errors = [relative(sampled(getattr(out, name)), case[name]) for out, case in pairs]
        title = "image features" if name == "features" else name
        found.append(_close(f"{title}, {dtype}", max(errors), allowed))
    same = all(out.answer == case["answer"] for out, case in pairs)
    return [*found, _equal(f"greedy tokens, {dtype}", same, "official answers", UPDATE)]


def check_cpu(chip: Chip) -> list[Finding]:
    """The default device against the CPU, in float32."""
    here = compute(*load(DEMO_FOLDER, "float32"), CASES[0])
    with on_cpu():
        there = compute(*load(DEMO_FOLDER, "float32"), CASES[0])
    return [_alike("default device against CPU", here, there, tolerance("float32", chip))]


def check_batch() -> list[Finding]:
    """Answers that decode together against the same ones alone."""
    model, processor = load(DEMO_FOLDER, "float32")
    short, long = CASES
    asked = [
        Question(question, draw(side), max_tokens=LONGEST, sampling=GREEDY)
        for side, question in (short, long, (short.side, long.question))
    ]
    alone = [[r.token for r in stream_generate(model, processor, each)] for each in asked]
    together = [result.tokens for result in batch_generate(model, processor, asked)]
    return [_equal("batch against single", together == alone, "the same answers", UPDATE)]


def check_quantized(bits: int, chip: Chip) -> list[Finding]:
    """Products with integers against those with the numbers that these integers mean."""
    quantized, floats = load(DEMO_FOLDER, "float32"), load(DEMO_FOLDER, "float32")
    nn.quantize(quantized[0].language_model, 64, bits)
    plain = dict(floats[0].named_modules())
    for path, module in quantized[0].named_modules():
        settings = quantization_of(module)
        if settings is not None:
            plain[path].weight = dequantized(module, settings)
    one, other = (compute(*parts, CASES[0]) for parts in (quantized, floats))
    return [_alike(f"{bits} bits against float", one, other, tolerance("float32", chip))]


def compute(
    model: Lfm2VlForConditionalGeneration, processor: Lfm2VlProcessor, case: Case
) -> Outputs:
    """All stages of one case: prompt, picture, prompt read, answer."""
    prompt = processor(case.question, draw(case.side))
    by_image: dict[str, mx.array] = {}
    model.embed_prompt(prompt, features=by_image)
    [features] = by_image.values()
    logits = model(mx.array([prompt.token_ids]), image_features=features).logits[0, -1]
    responses = stream_generate(
        model,
        processor,
        prompt,
        image_features=features,
        max_tokens=LONGEST,
        sampling=GREEDY,
    )
    arrays = [np.array(array.astype(mx.float32)) for array in (features, logits)]
    return Outputs(prompt.token_ids, arrays[0], arrays[1], [r.token for r in responses])


def tolerance(dtype: str, chip: Chip) -> float:
    """See `TOLERANCES`; a chip with TF32 keeps 11 bits of a float32 in products."""
    return TOLERANCES["float16" if dtype == "float32" and chip.uses_tf32 else dtype]


def relative(found: Any, expected: Any) -> float:
    """Largest difference, relative to the largest expected value; infinite if none is finite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape or not np.isfinite(found).all():
        return float("inf")
    return float(abs(found - expected).max() / abs(expected).max())


@contextmanager
def on_cpu() -> Iterator[None]:
    """Computes on the CPU, whatever the default device is."""
    before = mx.default_device()
    mx.set_default_device(mx.Device(mx.cpu))
    try:
        yield
    finally:
        mx.set_default_device(before)


def _alike(name: str, one: Outputs, other: Outputs, allowed: float) -> Finding:
    """Outputs that may differ by a rounding, but not in their answers."""
    if one.answer != other.answer:
        return Finding(WRONG, name, "the answers differ", UPDATE)
    errors = [relative(getattr(one, n), getattr(other, n)) for n in ("features", "logits")]
    return _close(name, max(errors), allowed)


def _close(name: str, error: float, allowed: float) -> Finding:
    good = error <= allowed
    return Finding(
        OK if good else WRONG,
        name,
        f"off by {error:.1e}; {allowed:.0e} is allowed",
        "" if good else UPDATE,
    )


def _equal(name: str, same: bool, what: str, cure: str) -> Finding:
    if same:
        return Finding(OK, name, what)
    return Finding(WRONG, name, f"not the {what.removeprefix('the ')}", cure)
