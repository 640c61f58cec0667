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
from ..models.config import Lfm2VlConfig
from .names import STRAY_PROJECTOR_NORM, is_mlx_layout, mlx_name

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


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
            check_file(path)
            tensors = mx.load(str(path))
            assert isinstance(tensors, dict)
            for name, tensor in tensors.items():
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
    """The safetensors files of a model, by its index where it has one."""
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, Mapping) or not weight_map:
            raise WeightsError(f"{folder / INDEX} has no weight_map")
        paths = [folder / shard for shard in sorted(set(weight_map.values()))]
        for path in paths:
            if not path.exists():
                raise ModelNotFoundError(f"{path} is missing; {INDEX} names it")
        return paths
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        found = f"{len(paths)} safetensors files and no {INDEX}" if paths else "no weights"
        raise ModelNotFoundError(f"{folder} has {found}; it needs {SINGLE} or shards with an index")
    return paths


def check_file(path: Path) -> None:
    """Raises a WeightsError where a safetensors file is damaged or cut short."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="mlx"):
            pass
    except SafetensorError as error:
        size = path.stat().st_size
        raise WeightsError(
            f"{path} ({size} bytes) is damaged or cut short, fetch it again: {error}"
        ) from None


def load_weights(model: nn.Module, config: Lfm2VlConfig, weights: dict[str, mx.array]) -> None:
    """Puts weights into a model, strictly in both directions.

    Modules whose `.scales` are present become quantized modules first.

    Raises:
        WeightsError: names a missing, unknown or misshapen tensor.
    """
    weights = without_copies(weights, config)
    quantize_modules(model, config.quantization, weights)
    check_names_and_shapes(model, weights)
    model.load_weights(list(weights.items()), strict=True)


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
        if path not in quantized:
            return False
        own = settings.get(path)
        chosen = own if isinstance(own, Mapping) else settings
        return {key: chosen[key] for key in ("group_size", "bits", "mode") if key in chosen}

    nn.quantize(model, class_predicate=predicate)


def check_names_and_shapes(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    """Compares what a model needs with what is there; nothing is read or allocated."""
    needed = {name: array.shape for name, array in tree_flatten(model.parameters())}
    missing = sorted(needed.keys() - weights.keys())
    unknown = sorted(weights.keys() - needed.keys())
    if missing:
        raise WeightsError(f"weights are missing: {_some(missing)}")
    if unknown:
        raise WeightsError(f"weights that this model has no place for: {_some(unknown)}")
    for name, shape in needed.items():
        if weights[name].shape != shape:
            raise WeightsError(
                f"{name} has shape {weights[name].shape}; the config asks for {shape}"
            )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def hf_vision_prefix(source: Path) -> str:
    """How the transformers layout of this checkpoint begins the names of the vision tower.

    MLX folders that were written here remember it; the published files have `vision_model.`.
    """
    from safetensors import safe_open

    for path in weight_files(source):
        with safe_open(str(path), framework="mlx") as file:
            remembered = (file.metadata() or {}).get("hf_vision_prefix")
            if remembered is not None:
                return str(remembered)
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if "vision_tower.vision_model." in name:
                    return "model.vision_tower.vision_model."
                if name.startswith("model.vision_tower."):
                    return "model.vision_tower."
    return "model.vision_tower.vision_model."
