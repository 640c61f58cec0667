"""Weights from disk: one set of names out of every layout, and a strict load.

The names of the MLX layout are the names of the modules here. The transformers layout (first files
and transformers 5, with or without a leading `model.`) is translated.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import ModelNotFoundError, WeightsError
from ..files import read_json
from ..models.config import Lfm2VlConfig, load_config
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from ..options import ImageProcessorConfig
from .names import STRAY_PROJECTOR_NORM, is_mlx_layout, mlx_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# of safetensors; MLX cannot read 64-bit floats, and takes 8-bit ones for integers
READABLE = ("BOOL", "U8", "U16", "U32", "U64", "I8", "I16", "I32", "I64", "F16", "BF16", "F32")
# how a quantized map can be stored: mode -> (bits, group sizes), the usual ones first
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
PACKED = ("weight", "scales", "biases")  # the arrays of a quantized map


def open_checkpoint(
    folder: Path,
    config: Lfm2VlConfig | None = None,
    image_config: ImageProcessorConfig | None = None,
) -> tuple[Lfm2VlForConditionalGeneration, dict[str, mx.array]]:
    """The model of a folder, quantized as its weights are, and these weights, lazily.

    Nothing but configuration and headers is read. Names, shapes and kinds agree in both
    directions; `model.load_weights` puts the weights in.

    Raises:
        ConfigError, ModelNotFoundError: configuration or weights are not there or make no sense.
        WeightsError: names a missing, unknown, misshapen or unreadable tensor.
    """
    config = load_config(folder) if config is None else config
    model = Lfm2VlForConditionalGeneration(config, image_config)
    weights = without_copies(read_weights(folder), config)
    quantize_modules(model, config.quantization, weights)
    check_weights(model, weights)
    return model, weights


def read_weights(folder: Path) -> dict[str, mx.array]:
    """All tensors of a model folder under MLX names, lazily.

    Nothing but the headers is read. The arrays may be evaluated in any thread, one at a time.

    Raises:
        ModelNotFoundError: no weights, or a shard of the index is missing.
        WeightsError: a damaged file, or one tensor under two names.
    """
    # an array is bound to the stream that loads it, and streams to threads, except this kind
    with mx.stream(mx.new_thread_unsafe_stream(mx.cpu)):
        found: dict[str, mx.array] = {}
        for path in weight_files(folder):
            for name, tensor in read_arrays(path).items():
                if name in found:
                    raise WeightsError(f"{path}: {name} stands in another file, too")
                found[name] = tensor
        transpose = not is_mlx_layout(found)
        weights: dict[str, mx.array] = {}
        for name, tensor in found.items():
            target = mlx_name(name)
            if target in weights:
                raise WeightsError(f"{folder}: {name} and another tensor both mean {target}")
            if transpose and target.endswith("conv.conv.weight"):
                tensor = tensor.swapaxes(1, 2)  # (hidden, 1, kernel) -> (hidden, kernel, 1)
            weights[target] = tensor
        return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, by its index if it has one."""
    if (folder / INDEX).exists():
        return _indexed_files(folder)
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        found = f"{len(paths)} safetensors files and no {INDEX}" if paths else "no weights"
        raise ModelNotFoundError(f"{folder} has {found}; it needs {SINGLE} or shards with an index")
    return paths


def _indexed_files(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise WeightsError(f"{folder / INDEX} has no weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or "/" in shard or "\0" in shard:
            raise WeightsError(
                f"{folder / INDEX}: the file of {name} is {shard!r}; it must be the name of a file "
                "in this folder"
            )
    paths = [folder / shard for shard in sorted(set(weight_map.values()))]
    present = {path.name for path in folder.iterdir()}
    for path in paths:
        if path.name not in present:
            raise ModelNotFoundError(f"{path} is missing; {INDEX} names it")
    return paths


def read_arrays(path: Path) -> dict[str, mx.array]:
    """The tensors of one safetensors file, lazily; a WeightsError if it cannot be read."""
    check_file(path)
    try:
        arrays = mx.load(str(path))
    except RuntimeError as error:
        raise WeightsError(f"{path} cannot be read: {error}") from None
    assert isinstance(arrays, dict)
    return arrays


def check_file(path: Path) -> None:
    """Raises a WeightsError if a safetensors file cannot be read or is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        kind = "a broken link" if path.is_symlink() and not path.exists() else "no file"
        raise WeightsError(f"{path} is {kind}; it must be a safetensors file")
    try:
        with safe_open(str(path), framework="mlx") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = file.get_slice(name).get_dtype()
                if dtype not in READABLE:
                    raise WeightsError(
                        f"{path}: {name} is of type {dtype}, which MLX cannot read; store it as "
                        "BF16, F16 or F32"
                    )
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} ({size} bytes) is damaged or cut short, fetch it again: {error}"
        ) from None


def without_copies(weights: Mapping[str, mx.array], config: Lfm2VlConfig) -> dict[str, mx.array]:
    """Leaves out the two kinds of tensors that some files carry for nothing."""
    useless = set() if config.projector_use_layernorm else set(STRAY_PROJECTOR_NORM)
    tied = config.text_config.tie_word_embeddings
    return {
        name: tensor
        for name, tensor in weights.items()
        # a tied head is a second copy of the embeddings
        if name not in useless and not (tied and name.startswith("language_model.lm_head."))
    }


def quantize_modules(
    model: nn.Module, settings: Mapping[str, Any] | None, weights: Mapping[str, mx.array]
) -> None:
    """Makes a quantized module wherever the weights hold its `.scales`."""
    quantized = {name.removesuffix(".scales") for name in weights if name.endswith(".scales")}
    if not quantized:
        return
    if settings is None:
        raise WeightsError(
            f"{min(quantized)}.scales is there, but config.json has no quantization entry"
        )

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in quantized or not hasattr(module, "to_quantized"):
            return False
        own = settings.get(path)
        return _quantization_of(path, own if isinstance(own, Mapping) else settings)

    try:
        nn.quantize(model, class_predicate=predicate)
    except ValueError as error:
        if isinstance(error, WeightsError):
            raise
        raise WeightsError(f"config.json: the quantization entry does not fit: {error}") from None


def _quantization_of(path: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    """How one module is stored; a WeightsError if MLX knows no such way."""
    mode = entry.get("mode", "affine")
    known = MODES.get(mode) if isinstance(mode, str) else None
    if known is None:
        raise WeightsError(f"config.json: mode of {path} is {mode!r}; it must be in {list(MODES)}")
    chosen: dict[str, Any] = {"mode": mode}
    for key, allowed in zip(("bits", "group_size"), known, strict=True):
        value = chosen[key] = entry.get(key, allowed[0])
        if type(value) is not int or value not in allowed:
            raise WeightsError(
                f"config.json: {key} of {path} is {value!r}; with {mode} it must be in {allowed}"
            )
    return chosen


def quantization_of(module: nn.Module) -> dict[str, Any] | None:
    """How a module is quantized, as config.json says it; None if it is not."""
    if "scales" not in module:
        return None
    return {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}


def dequantized(
    parts: Mapping[str, mx.array], settings: Mapping[str, Any], dtype: mx.Dtype = mx.float32
) -> mx.array:
    """The weight of a quantized map, computed in a floating-point type.

    Args:
        parts: its `PACKED` arrays.
        settings: as `quantization_of` gives them.
    """
    scales, biases = parts["scales"], parts.get("biases")
    if biases is not None:
        scales, biases = scales.astype(dtype), biases.astype(dtype)
    return mx.dequantize(parts["weight"], scales, biases, **settings, dtype=dtype)


def check_weights(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Compares what a model needs with what is there; nothing is read or allocated."""
    needed = dict(tree_flatten(model.parameters()))
    missing = sorted(needed.keys() - weights.keys())
    unknown = sorted(weights.keys() - needed.keys())
    if missing:
        raise WeightsError(f"weights are missing: {_some(missing)}")
    if unknown:
        raise WeightsError(f"weights that this model has no place for: {_some(unknown)}")
    for name, array in needed.items():
        found = weights[name]
        if found.shape != array.shape:
            raise WeightsError(f"{name} has shape {found.shape}; the config asks for {array.shape}")
        floats = mx.issubdtype(array.dtype, mx.floating)
        if not (mx.issubdtype(found.dtype, mx.floating) if floats else found.dtype == array.dtype):
            kind = "a floating-point type" if floats else array.dtype
            raise WeightsError(f"{name} is of type {found.dtype}; it must be {kind}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def hf_vision_prefix(source: Path) -> str:
    """How the transformers layout of this checkpoint begins the names of the vision tower.

    MLX folders that were written here remember it; the published files have `vision_model.`.
    """
    from safetensors import safe_open

    usual, short = "model.vision_tower.vision_model.", "model.vision_tower."
    for path in weight_files(source):
        with safe_open(str(path), framework="mlx") as file:
            remembered = (file.metadata() or {}).get("hf_vision_prefix")
            if remembered in (usual, short):
                return str(remembered)
            names = [name for name in file.keys() if "vision_tower." in name]  # noqa: SIM118
        if any("vision_tower.vision_model." in name for name in names):
            return usual
        if any(name.startswith(short) for name in names):
            return short
    return usual
