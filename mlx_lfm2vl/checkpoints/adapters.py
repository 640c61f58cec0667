"""Adapters: small trained updates beside the linear maps of a model.

Files are mlx-lm's, `adapters.safetensors` and `adapter_config.json`; see docs/adapters.md for who
reads what. LoRA (Hu et al. 2021) adds
`scale · B · A` to a weight; DoRA (Liu et al. 2024) also learns the length of each output's row.
Training uses mlx-lm's own layers. Those here only apply what was trained, so that asking a
question imports nothing of mlx-lm.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import TrainError
from ..files import read_json
from ..models.lfm2_vl import Lfm2VlForConditionalGeneration
from .hub import DEMO, REPOSITORY_ID
from .weights import dequantized, quantization_of, read_arrays

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapters.safetensors"
FINE_TUNE_TYPES = ("full", "lora", "dora")

CACHED_REPOSITORY = re.compile(r"models--([\w.-]+?)--([\w.-]+)[/\\]snapshots[/\\]")

# parts of a model by the names that users give them
PARTS = {
    "language": "language_model",
    "projector": "multi_modal_projector",
    "vision": "vision_tower",
}


class Update(NamedTuple):
    """What an adapter holds for one linear map.

    Attributes:
        lora_a: (inputs, rank).
        lora_b: (rank, outputs).
        magnitude: (outputs,) lengths of the rows of the updated weight, DoRA's `m`; or None.
    """

    lora_a: mx.array
    lora_b: mx.array
    magnitude: mx.array | None


class Adapters(NamedTuple):
    """A folder of adapters, read: updates by the path of their module, or whole weights."""

    scale: float
    updates: Mapping[str, Update]
    weights: Mapping[str, mx.array]


class AdaptedLinear(nn.Module):
    """A linear map, quantized or not, and its update; only for answering."""

    def __init__(self, linear: nn.Module, update: Update, scale: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = update.lora_a, update.lora_b
        self.scale = scale
        if update.magnitude is not None:
            weight = float_weight(linear) + update_of(update, scale)
            self.stretch = update.magnitude / mx.linalg.norm(weight, axis=1)
            mx.eval(self.stretch)  # what is left to do could only be done by this thread

    def __call__(self, x: mx.array) -> mx.array:
        out = self.linear(x)
        update = ((x @ self.lora_a) @ self.lora_b * self.scale).astype(x.dtype)
        if "stretch" not in self:
            return out + update
        bias = self.linear.bias if "bias" in self.linear else mx.array(0, x.dtype)
        return self.stretch.astype(x.dtype) * (out - bias + update) + bias


def update_of(update: Update, scale: float) -> mx.array:
    """`scale · B · A`, float32 (outputs, inputs)."""
    a, b = update.lora_a.astype(mx.float32), update.lora_b.astype(mx.float32)
    return scale * (a @ b).T


def float_weight(linear: nn.Module) -> mx.array:
    """A linear map's weight in float32, (outputs, inputs)."""
    settings = quantization_of(linear)
    if settings is None:
        return linear.weight.astype(mx.float32)
    return dequantized(linear, settings)


def merged_weight(weight: mx.array, update: Update, scale: float) -> mx.array:
    """A float32 weight with its update worked in."""
    merged = weight + update_of(update, scale)
    if update.magnitude is None:
        return merged
    return merged * (update.magnitude / mx.linalg.norm(merged, axis=1))[:, None]


def read_adapters(folder: str | Path) -> Adapters:
    """Reads a folder of adapters; its tensors may be evaluated in any thread, one at a time.

    Raises:
        TrainError: no such folder, a file is missing, or the files contradict each other.
        WeightsError: the weights are damaged.
    """
    path, config = _adapter_config(folder)
    kind = config.get("fine_tune_type", "lora")
    if kind not in FINE_TUNE_TYPES:
        raise TrainError(f"{path / ADAPTER_CONFIG}: fine_tune_type {kind!r} is unknown")
    with mx.stream(mx.new_thread_unsafe_stream(mx.cpu)):
        tensors = read_arrays(path / ADAPTER_WEIGHTS)
    if kind == "full":
        return Adapters(1.0, {}, tensors)
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, Mapping) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e308:
        raise TrainError(
            f"{path / ADAPTER_CONFIG} has no lora_parameters with a scale, a number; it is "
            f"{scale!r:.100}"
        )
    return Adapters(float(scale), dict(_updates(tensors, path)), {})


def _adapter_config(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder and its configuration; a TrainError if a file is missing."""
    path = Path(folder).expanduser()
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if not (path / name).exists():
            raise TrainError(
                f"{path} has no {name}; adapters are folders with {ADAPTER_CONFIG} and "
                f"{ADAPTER_WEIGHTS}"
            )
    return path, read_json(path / ADAPTER_CONFIG)


def adapter_base_model(folder: str | Path) -> str | None:
    """The model that adapters were trained on, as their configuration names it.

    Returns:
        a folder that is there, or a repository; None if none is named.

    Raises:
        TrainError: these are no adapters, or the folder of their model is gone.
    """
    path, config = _adapter_config(folder)
    model = config.get("model")
    if model is None:
        return None
    if not isinstance(model, str):
        raise TrainError(f"{path / ADAPTER_CONFIG}: model is {model!r}; it must be a text")
    if model == DEMO or os.path.isdir(os.path.expanduser(model)) or REPOSITORY_ID.fullmatch(model):
        return model
    cached = CACHED_REPOSITORY.search(model)  # in the download cache of another machine
    if cached is not None:
        return f"{cached[1]}/{cached[2]}"
    raise TrainError(
        f"{path / ADAPTER_CONFIG} names the model {model}, which is not there; give the model"
    )


def base_model(adapter_path: str | Path | None) -> str:
    """The model that adapters name; a TrainError if there is none to be found."""
    named = adapter_base_model(adapter_path) if adapter_path is not None else None
    if named is None:
        file = "adapters" if adapter_path is None else Path(adapter_path) / ADAPTER_CONFIG
        raise TrainError(f"{file} names no model; give the model that the adapters belong to")
    return named


def _updates(tensors: Mapping[str, mx.array], path: Path) -> Iterator[tuple[str, Update]]:
    modules = sorted({name.rpartition(".")[0] for name in tensors})
    for module in modules:
        a, b = tensors.get(f"{module}.lora_a"), tensors.get(f"{module}.lora_b")
        if a is None or b is None:
            raise TrainError(f"{path / ADAPTER_WEIGHTS}: {module} lacks lora_a or lora_b")
        yield module, Update(a, b, tensors.get(f"{module}.m"))


def apply_adapters(model: nn.Module, folder: str | Path) -> None:
    """Puts adapters beside the linear maps of a model, for answering.

    Raises:
        TrainError: an update for a module that the model lacks, or of another shape.
    """
    adapters = read_adapters(folder)
    check_adapters(adapters, model, folder)
    model.load_weights(list(adapters.weights.items()), strict=False)
    modules = dict(model.named_modules())
    adapted = [
        (name, AdaptedLinear(modules[name], update, adapters.scale))
        for name, update in adapters.updates.items()
    ]
    model.update_modules(tree_unflatten(adapted))
    model.eval()


def check_adapters(adapters: Adapters, model: nn.Module, folder: str | Path) -> None:
    """Raises a TrainError if an update or a whole weight does not belong to a model."""
    known = {name: array.shape for name, array in tree_flatten(model.parameters())}
    for name, tensor in adapters.weights.items():
        if known.get(name) != tensor.shape:
            raise TrainError(f"{folder}: {name} of shape {tensor.shape} fits no weight")
    modules = dict(model.named_modules())
    for name, update in adapters.updates.items():
        check_fit(modules.get(name), name, update, folder)


def check_fit(linear: nn.Module | None, name: str, update: Update, folder: str | Path) -> None:
    """Raises a TrainError if an update does not belong to a linear map."""
    if not isinstance(linear, (nn.Linear, nn.QuantizedLinear)):
        raise TrainError(f"{folder}: {name} is no linear map of this model")
    inputs, outputs = linear_inputs(linear), linear.weight.shape[0]
    rank = update.lora_a.shape[-1]
    fitting = {"lora_a": (inputs, rank), "lora_b": (rank, outputs), "m": (outputs,)}
    for kind, tensor in zip(fitting, update, strict=True):
        if tensor is not None and tensor.shape != fitting[kind]:
            raise TrainError(
                f"{folder}: {name}.{kind} has shape {tensor.shape}; a map of {inputs} inputs and "
                f"{outputs} outputs needs {fitting[kind]}"
            )


def linear_inputs(linear: nn.Module) -> int:
    """How many inputs a linear map or a table of embeddings has, packed or not."""
    width = int(linear.weight.shape[1])
    return width * 32 // linear.bits if "scales" in linear else width


def add_adapters(
    model: Lfm2VlForConditionalGeneration,
    train: Sequence[str],
    *,
    use_dora: bool,
    num_layers: int,
    rank: int,
    scale: float,
    dropout: float,
) -> dict[str, Any]:
    """Makes mlx-lm's trainable layers of the linear maps of some parts; freezes the rest.

    Args:
        train: parts, of `language`, `projector` and `vision`.
        num_layers: how many last layers of language model and vision tower; -1 for all.

    Returns:
        what `adapter_config.json` says about them.
    """
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear

    kind = DoRALinear if use_dora else LoRALinear
    model.freeze()
    adapted = []
    for name, linear in trainable_linears(model, train, num_layers):
        if use_dora and not _dora_can(linear):
            raise TrainError(f"DoRA needs a base of 4 or 8 affine bits; {name} has others")
        adapted.append((name, kind.from_base(linear, r=rank, dropout=dropout, scale=scale)))
    model.update_modules(tree_unflatten(adapted))
    # whole paths: mlx-lm finds them in its model, mlx-vlm knows nothing else
    keys = sorted(name for name, _ in adapted)
    return {
        "fine_tune_type": "dora" if use_dora else "lora",
        "num_layers": num_layers if num_layers > 0 else len(model.layers),
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": dropout, "keys": keys},
        "train": list(train),
    }


def _dora_can(linear: nn.Module) -> bool:
    # mlx-lm's layer unpacks whole numbers per word, with scales and biases
    if not isinstance(linear, nn.QuantizedLinear):
        return True
    return linear.mode == "affine" and linear.bits in (4, 8)


def trainable_linears(
    model: Lfm2VlForConditionalGeneration, train: Sequence[str], num_layers: int
) -> list[tuple[str, nn.Module]]:
    """Linear maps inside the layers of some parts, and those of the projector."""
    found = []
    for part in train:
        prefix = PARTS[part]
        modules = [
            (f"{prefix}.{name}", module)
            for name, module in getattr(model, prefix).named_modules()
            if isinstance(module, (nn.Linear, nn.QuantizedLinear))
        ]
        numbers = {_layer(name) for name, _ in modules} - {None}
        first = 0 if num_layers < 0 else len(numbers) - num_layers
        for name, module in modules:
            layer = _layer(name)
            if part == "projector" or (layer is not None and layer >= first):
                found.append((name, module))
    return found


def _layer(name: str) -> int | None:
    _, _, rest = name.partition(".layers.")
    return int(rest.split(".")[0]) if rest else None
