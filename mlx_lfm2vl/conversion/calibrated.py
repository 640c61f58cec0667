"""Quantization that looks at answers: bits where they matter, and values that fit together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..checkpoints.hub import resolve_model
from ..checkpoints.loading import load
from ..checkpoints.weights import open_checkpoint, weight_files
from ..checkpoints.writing import free_target, spare, write_json
from ..errors import ConfigError, ConvertError
from ..files import read_json
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from .budget import Choice, assign, group_of
from .calibrate import (
    Measure,
    Tell,
    input_sums,
    log_softmax,
    module_at,
    moments_of,
    read_samples,
    sensitivities,
    squares_of,
)
from .distill import RoundedMatrix, distill, put_rounded
from .plan import Plan, make_plan, write_plan
from .recipes import Quantization, decide, matrices
from .rounding import CLIPS, gptq
from .samples import calibration_samples
from .scaling import scale_channels

METHODS = ("awq", "gptq", "clip", "distill")
DEFAULT_METHODS = ("gptq", "distill")
TARGET_BITS = 4.5
BITS = (2, 3, 4, 5, 6, 8)  # besides floating point
LAST = 1_000_000  # a layer behind all others
MOMENTS = 400_000_000  # bytes of inputs' moments that are held at once, for GPTQ
LARGE = 100_000_000  # parameters; activations of such a model are computed again, not kept


@dataclass(frozen=True)
class Calibration:
    """What a conversion is calibrated on, and what for.

    Attributes:
        samples: a folder or a `.jsonl` file of the user, see `samples.user_samples`; None for
            pictures and texts made in code.
        target_bits: bits per weight over the whole model; each module then gets the bits that
            lose least. None keeps the bits that a `Quantization` asks for.
        methods: "awq" moves scales of channels into the weights before them, "gptq" rounds with a
            look at the inputs, "clip" narrows ranges where that errs less, "distill" trains ranges
            and all that stays in floating point against the source.
        epochs, learning_rate: of the distillation.
        folder: keeps answers, sensitivities and the state of the training, so that a run can be
            continued, and the next one is quick.
    """

    samples: str | Path | None = None
    target_bits: float | None = None
    methods: Sequence[str] = DEFAULT_METHODS
    epochs: int = 4
    learning_rate: float = 1.5e-4
    folder: Path = Path("mlx_model.calibration")

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ConfigError(f"{unknown[0]} is no method; it must be in {', '.join(METHODS)}")
        if self.target_bits is not None and not 1 < self.target_bits <= 32:
            raise ConfigError(f"target-bits is {self.target_bits}; it must be above 1, at most 32")
        if self.epochs < 1:
            raise ConfigError(f"epochs is {self.epochs}; it must be 1 or more")


class Calibrator:
    """The source model and what it says to the calibration set.

    Args:
        source: folder of the source, in floating point.
        tell: is told what is being done, how much of it is done, and all.

    Raises:
        ConvertError: the source is quantized.
    """

    def __init__(self, source: Path, calibration: Calibration, tell: Tell) -> None:
        model, _ = open_checkpoint(source)
        if any("scales" in module for module in model.modules()):
            raise ConvertError(f"{source} is quantized; calibration starts from the original")
        self.source, self.calibration, self.tell = source, calibration, tell
        self.model, processor = load(source, dtype="float32")
        samples = calibration_samples(calibration.samples)
        calibration.folder.mkdir(parents=True, exist_ok=True)
        kept = calibration.folder / "answers.json"
        self.batches = read_samples(
            self.model, processor, samples, kept, source_identity(source), tell
        )
        head = self.model.language_model
        if sum(array.size for _, array in tree_flatten(self.model.parameters())) > LARGE:
            self.model.gradient_checkpointing_enable()
        self.table = head.lm_head.weight if "lm_head" in head else head.model.embed_tokens.weight
        self.hidden: list[mx.array] = []
        self.digest = ""

    def read(self) -> None:
        """Reads the calibration set once; what the source says is kept before its head."""
        digest = hashlib.sha256()
        for batch in self.batches:
            self.hidden.append(batch.hidden(self.model))
            digest.update(np.array(self.hidden[-1]).tobytes())
            self.tell("reading", len(self.hidden), len(self.batches))
        self.digest = digest.hexdigest()

    def head(self, hidden: mx.array) -> mx.array:
        """The source's logits (targets, vocab), whatever became of the model."""
        return hidden @ self.table.T

    def choose(self, plan: Plan, quantization: Quantization) -> dict[str, dict[str, Any]]:
        """Settings by path: the bits that lose least within the target."""
        target = self.calibration.target_bits
        assert target is not None
        ways = possible_ways(self.model, quantization)
        losses = self._sensitivities(ways)
        budget = int(target * plan.parameters / 8)
        sizes = dict(plan.tensors())
        fixed = sum(t.nbytes for n, t in sizes.items() if n.removesuffix(".weight") not in ways)
        groups: dict[str, list[str]] = {}
        for path in ways:
            groups.setdefault(group_of(path), []).append(path)
        options = []
        for group, paths in groups.items():
            weights = [(sizes[f"{path}.weight"], ways[path]) for path in paths]
            known = [
                Choice(bits, sum(_nbytes(w, way[bits]) for w, way in weights), losses[group][bits])
                for bits in BITS
            ]
            options.append([*known, Choice(None, sum(w.nbytes for w, _ in weights), 0.0)])
        least = fixed + sum(min(choice.nbytes for choice in known) for known in options)
        if least > budget:
            raise ConvertError(
                f"target-bits is {target}; the least possible is {8 * least / plan.parameters:.2f}"
            )
        chosen = dict(zip(groups, assign(options, budget - fixed), strict=True))
        return {
            path: ways[path][bits]
            for path in ways
            if (bits := chosen[group_of(path)].bits) is not None
        }

    def _sensitivities(
        self, ways: Mapping[str, Mapping[int, Mapping[str, Any]]]
    ) -> dict[str, dict[int, float]]:
        """Kept in a file, for the same answers of the same model."""
        kept = self.calibration.folder / "sensitivities.json"
        key = _key(self.digest, ways)
        known = read_json(kept) if kept.exists() else {}
        if known.get("key") != key:
            self.model.train()  # or activations are kept, not computed again
            known = {"key": key, "nats": sensitivities(self.model, self.batches, ways, self.tell)}
            self.model.eval()
            write_json(kept, known)
        return {g: {int(b): v for b, v in row.items()} for g, row in known["nats"].items()}

    def refine(self, plan: Plan) -> Plan:
        """The plan with the values that the methods find; the model is used up by it."""
        settings, model = self.calibration, self.model
        types = {name: plan.dtype or array.dtype for name, array in plan.read().items()}
        self._round(plan, types)
        if "distill" in settings.methods:
            model.train()
            distill(
                model, self.batches, lambda n: log_softmax(self.head(self.hidden[n])), types,
                epochs=settings.epochs, rate=settings.learning_rate,
                kept=settings.folder / "distillation.safetensors",
                key=_key(self.digest, plan.after, settings.epochs, settings.learning_rate,
                         settings.methods),
                tell=self.tell,
            )  # fmt: skip
        return replace(plan, before=plan.after, weights=_weights(model, plan, types))

    def _round(self, plan: Plan, types: Mapping[str, mx.Dtype]) -> None:
        """Puts integers in the place of all matrices of the plan."""
        model, methods = self.model, self.calibration.methods
        if "awq" in methods:
            [squares] = self._inputs([list(plan.after)], squares_of)
            scale_channels(model, plan.after, squares)
        portions = in_portions(model, plan.after)
        nothing: Iterator[dict[str, mx.array]] = ({} for _ in portions)
        sums = self._inputs(portions, moments_of) if "gptq" in methods else nothing
        clips, steps = CLIPS if "clip" in methods else CLIPS[:1], count(1)
        for paths, moments in zip(portions, sums, strict=True):
            for path in paths:
                way = plan.after[path]
                weight = module_at(model, path).weight.astype(types[f"{path}.weight"])
                moment = moments.get(group_of(path), mx.eye(weight.shape[1]))
                found = gptq(weight, moment, way["bits"], way["group_size"], clips)
                put_rounded(model, path, found)
                self.tell("rounding", next(steps), len(plan.after))

    def _inputs(
        self, portions: Sequence[Sequence[str]], measure: Measure
    ) -> Iterator[dict[str, mx.array]]:
        """See `input_sums`: of one portion of the modules after the other."""
        steps, total = count(1), len(portions) * len(self.batches)
        for paths in portions:
            yield input_sums(
                self.model, self.batches, paths, measure,
                lambda: self.tell("inputs", next(steps), total),
            )  # fmt: skip


def in_portions(model: Lfm2VlForConditionalGeneration, paths: Iterable[str]) -> list[list[str]]:
    """Modules in the order of computation, so many at once as `MOMENTS` bytes have capacity for.

    Vision tower, projector and language model never at once: what comes later is rounded for the
    inputs that it will have.
    """
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=_place):
        groups.setdefault(group_of(path), []).append(path)
    portions: list[list[str]] = []
    stage, left = -1, 0
    for first, *others in groups.values():
        nbytes = 4 * int(module_at(model, first).weight.shape[1]) ** 2
        if nbytes > left or _place(first)[0] != stage:
            portions.append([])
            stage, left = _place(first)[0], MOMENTS
        portions[-1] += [first, *others]
        left -= nbytes
    return portions


def _place(path: str) -> tuple[int, int]:
    """Component and layer; the table of embeddings comes last, as it is the head."""
    parts = path.split(".")
    stage = ("vision_tower", "multi_modal_projector", "language_model").index(parts[0])
    return stage, next((int(part) for part in parts if part.isdigit()), LAST)


def _weights(
    model: Lfm2VlForConditionalGeneration, plan: Plan, types: Mapping[str, mx.Dtype]
) -> dict[str, mx.array]:
    """Every tensor as it will be stored."""
    weights: dict[str, mx.array] = {}
    for path in plan.after:
        matrix: RoundedMatrix = module_at(model, path)
        weights |= {f"{path}.{kind}": array for kind, array in matrix.rounded().parts().items()}
    for name, array in tree_flatten(model.parameters()):
        if not name.endswith((".low", ".high")):
            weights[name] = array.astype(types[name])
    return weights


def possible_ways(
    model: Lfm2VlForConditionalGeneration, quantization: Quantization
) -> dict[str, dict[int, dict[str, Any]]]:
    """Settings by bits, for each module that can be integers."""
    everything = replace(quantization, vision_bits=8)
    paths, _ = decide(matrices(model), everything)
    return {path: {bits: quantization.decision(bits) for bits in BITS} for path in paths}


def _nbytes(weight: mx.array, way: Mapping[str, Any]) -> int:
    """Bytes of a matrix in integers."""
    groups = weight.size // int(way["group_size"])
    return weight.size * int(way["bits"]) // 8 + 2 * groups * weight.dtype.size


def source_identity(source: Path) -> str:
    """Tells the weights of a folder from those of others, and from what they were before."""
    found = [(file, file.stat()) for file in weight_files(source)]
    return _key([(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file, stat in found])


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def convert_calibrated(
    hf_path: str | Path,
    mlx_path: str | Path,
    calibration: Calibration,
    quantization: Quantization | None = None,
    *,
    dtype: str | None = None,
    revision: str | None = None,
    force: bool = False,
    tell: Tell = lambda stage, done, total: None,
) -> Path:
    """Converts a checkpoint to integers that were calibrated; as `plan.convert` else.

    Args:
        quantization: see `calibrated_plan`.
        tell: is told what is being done, how much of it is done, and all.
    """
    target = free_target(mlx_path, force)
    source = resolve_model(hf_path, revision)
    spare(target, source)
    plan = calibrated_plan(
        source, quantization, calibration, dtype=dtype, origin=str(hf_path), tell=tell
    )
    write_plan(plan, target)
    return target


def calibrated_plan(
    source: Path,
    quantization: Quantization | None,
    calibration: Calibration,
    *,
    dtype: str | None = None,
    origin: str | None = None,
    tell: Tell = lambda stage, done, total: None,
    refine: bool = True,
) -> Plan:
    """What will be written, calibrated.

    Args:
        quantization: group size, and the bits if the calibration has no target.
        refine: False only decides about the bits.

    Raises:
        ConvertError, ConfigError: the source is quantized, the target cannot be reached, or the
            settings contradict each other.
    """
    quantization = quantization if quantization is not None else Quantization()
    if quantization.mode != "affine":
        raise ConfigError(f"calibration needs q-mode affine, not {quantization.mode}")
    plain = make_plan(source, None, dtype=dtype)
    calibrator = Calibrator(source, calibration, tell)
    calibrator.read()
    decisions = None
    if calibration.target_bits is not None:
        decisions = calibrator.choose(plain, quantization)
    plan = make_plan(source, quantization, dtype=dtype, origin=origin, decisions=decisions)
    return calibrator.refine(plan) if refine else plan
