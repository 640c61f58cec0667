"""Checkpoints to MLX folders, quantized or not, and back to the transformers layout.

`python -m mlx_lfm2vl.convert`, the top-level `convert.py`, and `convert(...)` in Python. Weights
are read, changed and written one after the other; a folder appears only when it is complete.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..checkpoints.adapters import Adapters, merged_weight
from ..checkpoints.hub import resolve_model
from ..checkpoints.loading import DTYPES
from ..checkpoints.names import hf_name
from ..checkpoints.weights import (
    PACKED,
    dequantized,
    hf_vision_prefix,
    open_checkpoint,
    quantization_of,
    read_weights,
    without_copies,
)
from ..checkpoints.writing import (
    COPIED_FILES,
    MAX_SHARD_BYTES,
    NOT_COPIED,
    complete_folder,
    free_target,
    name_shards,
    save_arrays,
    spare,
    write_json,
)
from ..errors import ConfigError, ConvertError
from ..files import read_json
from ..models.config import Lfm2VlConfig
from .card import model_card
from .layouts import generation_config, hf_config, hf_files, mlx_config
from .recipes import Quantization, decide, grouped, matrices, quantization_entry

Progress = Callable[[int, int], None]
NO_ADAPTERS = Adapters(1.0, {}, {})


def convert(
    hf_path: str | Path,
    mlx_path: str | Path = "mlx_model",
    quantization: Quantization | None = None,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    to_hf: bool = False,
    revision: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Converts a checkpoint.

    Args:
        hf_path: a folder, or a repository of the Hugging Face Hub; any layout.
        mlx_path: the folder to write.
        quantization: what becomes integers; None for nothing.
        dtype: type of what stays floating point; by default what the checkpoint has.
        dequantize: integers become floating point again, before anything else.
        to_hf: write the layout of transformers instead of MLX's.
        revision: branch, tag or commit of a repository.
        force: replace a model folder that is there.
        progress: called with tensors written so far, and all.

    Returns:
        the folder.

    Raises:
        ConvertError: the output is there, is too large for the disk, or the source cannot be
            converted like this.
    """
    target = free_target(mlx_path, force)
    source = resolve_model(hf_path, revision)
    spare(target, source)
    plan = make_plan(
        source,
        quantization,
        dtype=dtype,
        dequantize=dequantize,
        to_hf=to_hf,
        origin=str(hf_path),
    )
    write_plan(plan, target, progress)
    return target


@dataclass
class Plan:
    """What will be written, before anything is read; writing it changes nothing in it.

    Attributes:
        source: the folder that is read.
        origin: what the user called it, a repository or a folder.
        config: the source's config.json, as it will be written.
        model_config: the same, read.
        before, after: how each module is quantized in the source, and in what is written.
        dtype: type of the floating-point tensors, None for what each has.
        hf_names: None for MLX's layout, or the prefix of the vision tower in transformers'.
        parameters: how many numbers the model has, whatever they are stored in.
        left: modules that stay in floating point against the wish, and why.
        adapters: what is worked into the weights.
        adapter_path: where they come from.
        weights: tensors to write instead of the source's, by the names of the modules.
    """

    source: Path
    origin: str
    config: dict[str, Any]
    model_config: Lfm2VlConfig
    before: Mapping[str, dict[str, Any]]
    after: Mapping[str, dict[str, Any]]
    dtype: mx.Dtype | None
    hf_names: str | None
    parameters: int
    left: Mapping[str, str] = field(default_factory=dict)
    adapters: Adapters = NO_ADAPTERS
    adapter_path: str | Path | None = None
    weights: Mapping[str, mx.array] | None = None

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Each tensor to be written with its name, lazily, and read anew every time."""
        weights = self.read()
        while weights:
            path, _, kind = next(iter(weights)).rpartition(".")
            kinds = [k for k in PACKED if f"{path}.{k}" in weights] if kind in PACKED else [kind]
            parts = {k: weights.pop(f"{path}.{k}") for k in kinds}
            if "weight" in parts:
                parts = self._weight(path, parts)
            for kind in list(parts):  # nothing else may hold what was read, or memory grows
                yield self._laid_out(f"{path}.{kind}", parts.pop(kind))

    def read(self) -> dict[str, mx.array]:
        """The tensors of the source by the names of its modules, lazily."""
        if self.weights is not None:
            return dict(self.weights)
        weights = without_copies(read_weights(self.source), self.model_config)
        for name, tensor in self.adapters.weights.items():
            weights[name] = tensor.astype(weights[name].dtype)
        return weights

    def merged(self, path: str, parts: Mapping[str, mx.array]) -> mx.array:
        """The weight of a module with its update; in float32 if there is one, or if `dtype` is."""
        before, update = self.before.get(path), self.adapters.updates.get(path)
        weight = parts["weight"]
        if before is not None:
            exact = update is not None or self.dtype is not None
            weight = dequantized(parts, before, mx.float32 if exact else self._stored(path, parts))
        if update is None:
            return weight
        return merged_weight(weight.astype(mx.float32), update, self.adapters.scale)

    def _weight(self, path: str, parts: dict[str, mx.array]) -> dict[str, mx.array]:
        """A weight, packed or not, in the form in which it is written."""
        before, after = self.before.get(path), self.after.get(path)
        if before == after and path not in self.adapters.updates:
            return parts
        weight = self.merged(path, parts).astype(self.dtype or self._stored(path, parts))
        if after is None:
            return {"weight": weight}
        packed = mx.quantize(weight, after["group_size"], after["bits"], mode=after["mode"])
        return dict(zip(PACKED, packed, strict=False))  # those modes have no biases

    def _stored(self, path: str, parts: Mapping[str, mx.array]) -> mx.Dtype:
        """The floating-point type of a module in the source."""
        if path not in self.before:
            return parts["weight"].dtype
        if "biases" in parts:
            return parts["scales"].dtype
        return self._float_type  # the scales of the small floating-point modes are bytes

    @cached_property
    def _float_type(self) -> mx.Dtype:
        """Of what is not quantized, whatever config.json says."""
        return self.read()["language_model.model.embedding_norm.weight"].dtype

    def _laid_out(self, name: str, tensor: mx.array) -> tuple[str, mx.array]:
        """The tensor in its type and layout, with its name there."""
        if self.dtype is not None and mx.issubdtype(tensor.dtype, mx.floating):
            tensor = tensor.astype(self.dtype)
        if self.hf_names is None:
            return name, mx.contiguous(tensor)
        if name.endswith("conv.conv.weight"):
            tensor = tensor.swapaxes(1, 2)  # (hidden, kernel, 1) -> (hidden, 1, kernel)
        return hf_name(name, self.hf_names), mx.contiguous(tensor)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that will be written."""
        return sum(tensor.nbytes for _, tensor in self.tensors())

    def summary(self, every_module: bool = False) -> str:
        """What will be written, in a few lines or module by module."""
        lines = []
        if every_module:
            lines = [f"  {path}: {_form(after)}" for path, after in self.after.items()]
        forms = Counter(_form(after) for after in self.after.values())
        told = [f"{count} modules of {form}" for form, count in sorted(forms.items())]
        undone = len(self.before.keys() - self.after.keys())
        told += [f"{undone} modules dequantized"] if undone else []
        types = Counter[str]()
        nbytes = 0
        for name, tensor in self.tensors():
            nbytes += tensor.nbytes
            if mx.issubdtype(tensor.dtype, mx.floating) and name.endswith("weight"):
                types[str(tensor.dtype).removeprefix("mlx.core.")] += 1
        told += [f"{count} weights of {name}" for name, count in sorted(types.items())]
        size = f"{nbytes / 1e6:.1f} MB, {8 * nbytes / self.parameters:.2f} bits per weight"
        left = [f"left in floating point: {line}" for line in grouped(self.left)]
        return "\n".join([*lines, *left, "; ".join([*told, size])])


def _form(settings: Mapping[str, Any]) -> str:
    return f"{settings['bits']} bits, groups of {settings['group_size']}, {settings['mode']}"


def make_plan(
    source: Path,
    quantization: Quantization | None,
    *,
    dtype: str | None = None,
    dequantize: bool = False,
    to_hf: bool = False,
    origin: str | None = None,
    decisions: Mapping[str, dict[str, Any]] | None = None,
) -> Plan:
    """Decides about every tensor; reads nothing but headers and configuration.

    Args:
        decisions: how each module is quantized, if that was decided already.

    Raises:
        ConvertError, ConfigError, WeightsError, ModelNotFoundError: before any work is done.
    """
    model, weights = open_checkpoint(source)
    modules = [(path, quantization_of(module)) for path, module in model.named_modules()]
    before = {path: settings for path, settings in modules if settings is not None}
    _check_wishes(source, bool(before), quantization, dtype, dequantize, to_hf)
    after: Mapping[str, dict[str, Any]] = {} if dequantize else before
    left: dict[str, str] = {}
    if decisions is not None:
        after = decisions
    elif quantization is not None:
        after, left = decide(matrices(model), quantization)
    config = read_json(source / "config.json")
    if dequantize or quantization is not None:
        config.pop("quantization", None)
        config.pop("quantization_config", None)
    if quantization is not None:
        config["quantization"] = quantization_entry(quantization, after)
        config["quantization_config"] = config["quantization"]
    if dtype is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return Plan(
        source,
        origin if origin is not None else source.name,
        (hf_config if to_hf else mlx_config)(config, model.config),
        model.config,
        before,
        after,
        DTYPES[dtype] if dtype is not None else None,
        hf_vision_prefix(source) if to_hf else None,
        sum(parameters_of(name, tensor, before) for name, tensor in weights.items()),
        left,
    )


def parameters_of(name: str, tensor: mx.array, before: Mapping[str, Mapping[str, Any]]) -> int:
    """How many numbers of the model a tensor holds; scales and biases of integers hold none."""
    path, _, kind = name.rpartition(".")
    if path not in before or kind not in PACKED:
        return tensor.size
    return tensor.size * 32 // int(before[path]["bits"]) if kind == "weight" else 0


def _check_wishes(
    source: Path,
    quantized: bool,
    quantization: Quantization | None,
    dtype: str | None,
    dequantize: bool,
    to_hf: bool,
) -> None:
    if quantized and quantization is not None and not dequantize:
        raise ConvertError(
            f"{source} is quantized already; start from the original, or add -d, which rounds the "
            "rounded weights once more"
        )
    if quantized and to_hf and not dequantize:
        raise ConvertError(f"{source} is quantized, which transformers cannot read; add -d")
    if dequantize and not quantized:
        raise ConvertError(f"{source} is not quantized; there is nothing to dequantize")
    if to_hf and quantization is not None:
        raise ConvertError("--to-hf and --quantize exclude each other")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")


def write_plan(plan: Plan, target: Path, progress: Progress | None = None, told: str = "") -> None:
    """Does what was planned; the target is there afterwards, complete, or not at all.

    Args:
        told: what the model card says besides the plan's summary.
    """
    done = f"Converted from `{plan.origin}` by mlx_lfm2vl"
    if plan.adapter_path is not None:
        done += f", with the adapters `{plan.adapter_path}` worked in"
    lines = [*plan.summary().splitlines(), *([told] if told else [])]
    card = model_card(
        plan.source, plan.origin, target.name, f"{done}: {'; '.join(lines)}.",
        to_hf=plan.hf_names is not None,
    )  # fmt: skip
    with complete_folder(target, plan.nbytes) as folder:
        write_weights(folder, plan, progress)
        write_files(folder, plan)
        (folder / "README.md").write_text(card, encoding="utf-8")
        open_checkpoint(folder)  # headers say whether it can be loaded


def write_weights(folder: Path, plan: Plan, progress: Progress | None = None) -> None:
    """Writes shards of at most 5 GB, with an index if there is more than one."""
    count = sum(1 for _ in plan.tensors())
    metadata = {"format": "pt"}
    if plan.hf_names is None:
        metadata = {"format": "mlx", "hf_vision_prefix": hf_vision_prefix(plan.source)}
    shards: list[list[str]] = []
    held: dict[str, mx.array] = {}

    def flush() -> None:
        save_arrays(folder / f"shard-{len(shards)}.safetensors", held, metadata)
        shards.append(list(held))
        held.clear()

    total = 0
    for done, (name, tensor) in enumerate(plan.tensors(), 1):
        mx.eval(tensor)
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > MAX_SHARD_BYTES:
            flush()
        held[name] = tensor
        total += tensor.nbytes
        if progress is not None:
            progress(done, count)
    flush()
    name_shards(folder, shards, total)


def write_files(folder: Path, plan: Plan) -> None:
    """Configuration, tokenizer, processor, template and licence."""
    made = {
        "config.json": plan.config,
        "generation_config.json": generation_config(plan.source, plan.model_config),
    }
    leave = {*NOT_COPIED, *made}
    if plan.hf_names is not None:
        made |= hf_files(plan.source, plan.model_config)
        leave |= {*made, "preprocessor_config.json"}
    for pattern in COPIED_FILES:
        for path in plan.source.glob(pattern):
            if path.name not in leave and path.is_file():
                _check_inside(path)
                shutil.copyfile(path, folder / path.name)
    for name, data in made.items():
        write_json(folder / name, data)


def _check_inside(path: Path) -> None:
    """Raises a ConvertError for a link out of its folder, or out of the Hub's download cache."""
    place = path.parent.resolve()
    inside = [place]
    if place.parent.name == "snapshots":
        inside.append(place.parents[1] / "blobs")
    if not any(path.resolve().is_relative_to(folder) for folder in inside):
        raise ConvertError(f"{path} is a link to {path.resolve()}, outside; put the file itself")
